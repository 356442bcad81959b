"""What chunks of MMCORE's VLM ask of a rank; see ``methods/footprint.py``."""

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.model import SiglipConfig, VisionEncoder
from megatron_unimm.config.queries import QueryVlmConfig, SiglipTeacher
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.queries import QueryRow
from megatron_unimm.data.sample import PackedRow
from megatron_unimm.data.typical import LARGE_PHOTO, PHOTO, query_conversation_row, shares
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace
from megatron_unimm.methods.mmcore.flops import (
    adapters_train,
    adapters_work,
    backbone_trains,
    connector_works,
    row_flops,
    teacher_work,
)
from megatron_unimm.methods.mmcore.model import keeps_vision_encoder
from megatron_unimm.methods.vlm.footprint import Trained, VlmChunk, VlmLoad, layer_kinds
from megatron_unimm.methods.vlm.layout import alignment, travelling_rows
from megatron_unimm.methods.vlm.queries import frozen_parts
from megatron_unimm.models.flops import Work
from megatron_unimm.models.memory import (
    Kept,
    Spread,
    Weights,
    query_connector_kept,
    query_connector_weights,
    siglip_weights,
    tower_pass,
)
from megatron_unimm.models.trainable import is_frozen


@dataclass(frozen=True)
class QueryLoad(VlmLoad):
    """With what the teacher looks at."""

    target_grids: np.ndarray
    """int64 ``[F, 3]``; none where there is no teacher."""
    pictures: int
    """To be drawn, F."""

    @property
    def target_patches(self) -> int:
        return int(self.target_grids.prod(axis=1).sum())

    @classmethod
    def of_row(cls, row: QueryRow, stage: StageConfig) -> "QueryLoad":
        load = vars(VlmLoad.of(row.tokens, stage))
        return cls(**load, target_grids=row.target_grids, pictures=len(row.target_grids))

    @classmethod
    def without_teacher(cls, row: PackedRow, pictures: int, stage: StageConfig) -> "QueryLoad":
        load = vars(VlmLoad.of(row, stage))
        return cls(**load, target_grids=np.zeros((0, 3), dtype=np.int64), pictures=pictures)


class MMCoreFootprints:
    """See :class:`~megatron_unimm.methods.footprint.Footprints`."""

    def typical_row(
        self,
        stage: StageConfig,
        kinds: tuple[SampleKind, ...] | None = None,
        large: bool = False,
        pixels: bool = True,
    ) -> QueryRow:
        mix, photo = shares(stage.data, kinds), LARGE_PHOTO if large else PHOTO
        return query_conversation_row(mix, stage.model, vlm_of(stage), stage.data, alignment(stage), photo, pixels)

    def row_flops(self, stage: StageConfig, row: QueryRow) -> float:
        return row_flops(row, stage)

    def travelling_rows(self, stage: StageConfig) -> int:
        return travelling_rows(stage)

    def alike(self, stage: StageConfig, place: ChunkPlace) -> Hashable:
        return place.first, place.last, tuple(layer_kinds(stage, place.layers, vlm_of(stage).lora).items())

    def chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: QueryRow) -> ChunkFootprint:
        teacher = teacher_of(stage, place)
        return QueryChunk(stage, spread, place, QueryLoad.of_row(row, stage), teacher).footprint()


def teacher_of(stage: StageConfig, place: ChunkPlace) -> SiglipConfig | VisionEncoder | None:
    """Where it is not the student's own vision encoder."""
    teacher = vlm_of(stage).teacher
    if isinstance(teacher, SiglipTeacher):
        return teacher.encoder
    own = place.first and keeps_vision_encoder(stage, frozen_parts(stage))
    return None if stage.data.feature_cache or own else stage.model.vision_encoder


def vlm_of(stage: StageConfig) -> QueryVlmConfig:
    assert stage.queries is not None
    return stage.queries


class QueryChunk(VlmChunk):
    """One chunk of one stage, and one row.

    Args:
        teacher: where there is one that is not the student's own vision encoder.
    """

    load: QueryLoad

    def __init__(
        self,
        stage: StageConfig,
        spread: Spread,
        place: ChunkPlace,
        load: QueryLoad,
        teacher: SiglipConfig | VisionEncoder | None,
        prefix: str = "",
    ) -> None:
        self.vlm, self.teacher, self.prefix = vlm_of(stage), teacher, prefix
        self.connector_trains = not is_frozen(f"{prefix}query_connector", stage.train.trainable)
        frozen = frozen_parts(stage, prefix)
        trained = Trained(
            tower=not frozen.vision_encoder,
            backbone=backbone_trains(stage, prefix),
            inputs=not frozen.inputs,
            adapters=adapters_train(stage, prefix),
        )
        super().__init__(stage, spread, place, load, trained, self.vlm.lora)
        self.latent = self.vlm.latent_size(stage.model)

    # -- weights

    def parts(self) -> list[tuple[Weights, bool]]:
        queries = Weights(self.vlm.num_queries * self.backbone.hidden_size * self.place.first)
        connector = self._connector_weights() if self.place.last else Weights()
        return [*super().parts(), (queries, self.trained.inputs), (connector, self.connector_trains)]

    def companions(self) -> Weights:
        if not self.place.last or self.teacher is None:
            return Weights()
        if isinstance(self.teacher, SiglipConfig):
            return siglip_weights(self.teacher, self.spread.parallel.tensor)
        return self.tower_weights()

    def large_weights(self) -> list[int]:
        hidden = self.backbone.hidden_size
        has_connector = self.place.last and self.connector_trains
        return [*super().large_weights(), *([hidden * max(hidden, self.latent)] if has_connector else [])]

    def _connector_weights(self) -> Weights:
        tensor = self.spread.parallel.tensor
        return query_connector_weights(self.vlm.connector, self.backbone.hidden_size, self.latent, tensor)

    # -- activations

    def encoder_kept(self) -> Kept:
        kept = super().encoder_kept()
        if self.place.last and self._teaches:
            kept += tower_pass(self.teacher or self.encoder, self.spread, self.load.target_patches)
        return kept

    @property
    def _teaches(self) -> bool:
        """A teacher runs: its features do not come from a cache."""
        return isinstance(self.teacher, SiglipConfig) or not self.load.from_cache

    def visual_tokens_kept(self) -> Kept:
        """Those that were put among the words, their deepstack levels, and these once more to be laid out over the
        row; queries."""
        if not (self.place.first and self.has_gradient):
            return Kept()
        levels = len(self.encoder.deepstack_layers)
        tokens = (1 + 2 * levels) * self.load.read_patches / self.encoder.spatial_merge_size**2
        return Kept((tokens + self._num_queries) * self.backbone.hidden_size * self.spread.itemsize)

    def loss_kept(self) -> Kept:
        parts, queries = self.text_loss_kept(), self._num_queries
        if self.connector_trains or self.has_gradient:
            parts.append(
                query_connector_kept(
                    self.vlm.connector,
                    self.backbone.hidden_size,
                    self.latent,
                    self.spread,
                    queries,
                    queries * self.most_positions,
                    trains=self.connector_trains,
                )
            )
        return self.sum_of_losses(parts)

    @property
    def _num_queries(self) -> int:
        """Q."""
        return self.load.pictures * self.vlm.num_queries

    def inputs(self) -> float:
        target = self.load.target_patches if self.place.last and self._teaches else 0
        if isinstance(self.teacher, SiglipConfig):
            return super().inputs() + target * (self.teacher.patch_dim * self.spread.itemsize + 24)
        return super().inputs() + self.patch_inputs(target)

    def cached_patches(self) -> int:
        target = self.load.target_patches if self.place.last and not self._teaches else 0
        return super().cached_patches() + target

    # -- FLOPs

    def other_works(self) -> list[tuple[Work, bool, bool]]:
        works, passes, trains = super().other_works(), self.has_gradient, self.trained.adapters
        works.append((adapters_work(self.stage, self.place.layers, self.load.tokens), trains, passes))
        if self.place.last:
            ranks = self.spread.parallel.context
            works.append((teacher_work(self.load.target_grids, self.stage).times(ranks), False, False))
            layers, projection = connector_works(self.vlm, self.stage.model, self.load.pictures)
            for work, inner in ((layers.times(ranks), True), *((work, bool(n)) for n, work in enumerate(projection))):
                behind = inner or bool(self.vlm.connector.num_layers)
                works.append((work, self.connector_trains, passes or (behind and self.connector_trains)))
        return works
