"""What ORION's chunks ask of a rank; see ``methods/footprint.py``."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.methods import OrionConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.sample import PackedRow
from megatron_unimm.data.typical import LARGE_PHOTO, PHOTO, conversation_row, shares
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace
from megatron_unimm.methods.orion.flops import frozen_parts, row_flops, vision_head_work
from megatron_unimm.methods.orion.method import travelling_rows
from megatron_unimm.methods.vlm.footprint import Trained, VlmChunk, VlmLoad, layer_kinds
from megatron_unimm.methods.vlm.layout import alignment
from megatron_unimm.models.flops import Work, logits_work, vision_work
from megatron_unimm.models.memory import (
    Kept,
    Spread,
    Weights,
    kl_kept,
    tower_pass,
    vision_head_kept,
    vision_head_weights,
    vision_weights,
)


@dataclass(frozen=True)
class OrionLoad(VlmLoad):
    """With what is to be generated."""

    num_vision: int
    drawn_grids: np.ndarray
    """int64 ``[N, 3]``."""

    @classmethod
    def of(cls, row: PackedRow, stage: StageConfig) -> "OrionLoad":
        assert isinstance(stage.method, OrionConfig)
        load = VlmLoad.of(row, stage)
        if not stage.method.loss_weights.cross_entropy:
            load = replace(load, num_text=0)
        return cls(**vars(load), num_vision=len(row.predict_index), drawn_grids=row.grids[row.is_target])


class OrionFootprints:
    """See :class:`~megatron_unimm.methods.footprint.Footprints`."""

    def typical_row(
        self,
        stage: StageConfig,
        kinds: tuple[SampleKind, ...] | None = None,
        large: bool = False,
        pixels: bool = True,
    ) -> PackedRow:
        photo = LARGE_PHOTO if large else PHOTO
        return conversation_row(shares(stage.data, kinds), stage.model, stage.data, alignment(stage), photo, pixels)

    def row_flops(self, stage: StageConfig, row: PackedRow) -> float:
        return row_flops(row, stage, frozen_parts(stage))

    def travelling_rows(self, stage: StageConfig) -> int:
        return travelling_rows(stage)

    def alike(self, stage: StageConfig, place: ChunkPlace) -> Hashable:
        return place.first, place.last, tuple(layer_kinds(stage, place.layers).items())

    def chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: PackedRow) -> ChunkFootprint:
        return _Chunk(stage, spread, place, OrionLoad.of(row, stage)).footprint()


class _Chunk(VlmChunk):
    """One chunk of one stage, and one row."""

    load: OrionLoad

    def __init__(self, stage: StageConfig, spread: Spread, place: ChunkPlace, load: OrionLoad) -> None:
        assert isinstance(stage.method, OrionConfig)
        self.method, frozen = stage.method, frozen_parts(stage)
        self.head_trains = "vision_head" not in frozen
        self.has_teacher = self.method.loss_weights.kl > 0
        # Where the last stage is not the first it makes its targets itself, with a tower of its own.
        self.second_tower = place.last and not place.first and not stage.data.feature_cache
        trained = Trained(tower="vision_encoder" not in frozen, backbone="backbone" not in frozen)
        super().__init__(stage, spread, place, load, trained, forward_passes=1 + self.has_teacher)

    # -- weights

    def parts(self) -> list[tuple[Weights, bool]]:
        head = self._head_weights() if self.place.last else Weights()
        return [*super().parts(), (head, self.head_trains)]

    def companions(self) -> Weights:
        teacher = self.backbone_weights() if self.has_teacher else Weights()
        if self.second_tower or (self.place.first and self.trained.tower):
            teacher = teacher + vision_weights(self.encoder, self.spread.parallel.tensor)
        return teacher

    def large_weights(self) -> list[int]:
        has_head = self.head_trains and self.place.last
        return [*super().large_weights(), *([self._head_weights().dense // 2] if has_head else [])]

    def _head_weights(self) -> Weights:
        return vision_head_weights(self.method.vision_head, self.backbone.hidden_size, self.spread.parallel.tensor)

    # -- activations

    def encoder_kept(self) -> Kept:
        kept = super().encoder_kept()
        if self.place.first and self.trained.tower and not self.load.from_cache:
            kept += tower_pass(self.encoder, self.spread, self.load.patches if self.load.num_vision else 0)
        if self.second_tower:
            kept += tower_pass(self.encoder, self.spread, self.load.patches - self.load.read_patches)
        return kept

    def visual_tokens_kept(self) -> Kept:
        """Those that were put among the words, and those that were read among those that are to be generated."""
        if not (self.place.first and self.has_gradient):
            return Kept()
        units, levels = self.encoder.spatial_merge_size**2, len(self.encoder.deepstack_layers)
        tokens = self.load.patches / units + (1 + levels) * self.trained.tower * self.load.read_patches / units
        return Kept(tokens * self.backbone.hidden_size * self.spread.itemsize)

    def loss_kept(self) -> Kept:
        vision, parts = self.load.num_vision * self.most_positions, []
        if self.head_trains or self.has_gradient:
            head = self.method.vision_head
            parts.append(vision_head_kept(head, self.backbone.hidden_size, self.spread, max(vision, 1)))
        parts += self.text_loss_kept()
        if self.has_gradient and self.has_teacher and vision:
            parts.append(kl_kept(self.backbone, self.spread, vision))
        return self.sum_of_losses(parts)

    def seen_patches(self) -> int:
        load = self.load
        if self.place.first:
            frozen = load.patches if load.num_vision or not self.trained.tower else 0
            return frozen + (load.read_patches if self.trained.tower else 0)
        return load.patches - load.read_patches if self.place.last else 0

    def cached_patches(self) -> int:
        return self.load.patches if self.place.first or self.place.last else 0

    # -- FLOPs

    def copies_run(self) -> int:
        # Under expert parallelism ranks with other rows meet in the experts' exchange.
        teaches = self.load.num_vision or self.spread.parallel.expert > 1
        return 1 + bool(self.has_teacher and teaches)

    def tower_works(self) -> list[tuple[Work, bool, bool]]:
        load, ranks = self.load, self.spread.parallel.context
        works = super().tower_works()
        if not load.num_vision:
            return works
        again = np.concatenate([load.read_grids, load.drawn_grids]) if self.trained.tower else load.drawn_grids
        return [*works, (sum(vision_work(self.encoder, again), Work(0.0)).times(ranks), False, False)]

    def other_works(self) -> list[tuple[Work, bool, bool]]:
        works, load, ranks = super().other_works(), self.load, self.spread.parallel.context
        if self.second_tower and load.num_vision:
            targets = sum(vision_work(self.encoder, load.drawn_grids), Work(0.0))
            works.append((targets.times(ranks), False, False))
        if self.place.last:
            if self.has_teacher and load.num_vision:
                logits = logits_work(self.backbone, load.num_vision)
                works += [(logits, self.trained.backbone, self.has_gradient), (logits, False, False)]
            head = vision_head_work(self.method.vision_head, self.backbone.hidden_size, load.num_vision)
            works += [(work, self.head_trains, self._passes(inner)) for work, inner in head]
        return works

    def _passes(self, inner: bool) -> bool:
        """Whether a product of the head gets a gradient for its input."""
        return self.has_gradient or (inner and self.head_trains)
