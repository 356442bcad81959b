"""What HieraQuery's chunks ask of a rank, the VLM and the connector among the first's; see ``methods/footprint.py``."""

from collections.abc import Hashable
from dataclasses import replace

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.hieraquery import MultiScaleConfig
from megatron_unimm.config.methods import HieraQueryConfig, RepresentationAlignmentConfig
from megatron_unimm.config.mmdit import Sd3Config
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow
from megatron_unimm.data.typical import LARGE_PHOTO, PHOTO, frame_row, shares, wordless_chat
from megatron_unimm.methods.drawing.alignment import aligned_rows
from megatron_unimm.methods.drawing.flops import alignment_works, frames_load
from megatron_unimm.methods.drawing.footprint import (
    DrawingChunk,
    DrawingLoad,
    alignment_kept,
    aligns_here,
    projector_weights,
)
from megatron_unimm.methods.drawing.frames import num_vectors
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace, Flops, Traffic
from megatron_unimm.methods.hieraquery.flops import CONDITION, connector_works, row_flops
from megatron_unimm.methods.hieraquery.method import frame_work
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.vlm.footprint import Trained, VlmChunk, VlmLoad
from megatron_unimm.methods.vlm.queries import VLM, frozen_parts, vlm_stage
from megatron_unimm.models.flops import Work
from megatron_unimm.models.memory import (
    Kept,
    LayerShape,
    Spread,
    Weights,
    block_kinds,
    layer_weights,
    rms_norm_kept,
    tower_layer_kept,
    tower_pass,
    vision_weights,
)
from megatron_unimm.models.trainable import is_frozen


def scales_of(stage: StageConfig) -> MultiScaleConfig:
    assert stage.hieraquery is not None
    return stage.hieraquery


class HieraQueryFootprints:
    """See :class:`~megatron_unimm.methods.footprint.Footprints`."""

    def typical_row(
        self,
        stage: StageConfig,
        kinds: tuple[SampleKind, ...] | None = None,
        large: bool = False,
        pixels: bool = True,
    ) -> FrameRow:
        work = frame_work(stage, DataSetup({}, lambda: wordless_chat(stage.model, stage.data)))
        hidden = stage.model.backbone.hidden_size
        row = frame_row(shares(stage.data, kinds), work, (hidden, hidden), LARGE_PHOTO if large else PHOTO, pixels)
        return row if row.words is None else replace(row, words=row.words[:0])

    def row_flops(self, stage: StageConfig, row: FrameRow) -> float:
        return row_flops(row, stage)

    def travelling_rows(self, stage: StageConfig) -> int:
        assert isinstance(stage.method, HieraQueryConfig)
        return aligned_rows(stage, stage.method.alignment)

    def alike(self, stage: StageConfig, place: ChunkPlace) -> Hashable:
        assert stage.generator is not None
        kinds = tuple(block_kinds(stage.generator.mmdit, place.layers).items())
        assert isinstance(stage.method, HieraQueryConfig)
        return place.first, place.last, aligns_here(stage.method.alignment, place), kinds

    def chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: FrameRow) -> ChunkFootprint:
        return _Chunk(stage, spread, place, row).footprint()


class _Vlm(VlmChunk):
    """The whole VLM, whose last hidden states at the queries are read."""

    def __init__(self, stage: StageConfig, spread: Spread, load: VlmLoad, num_queries: int) -> None:
        frozen = frozen_parts(stage, VLM)
        trained = Trained(not frozen.vision_encoder, not frozen.backbone, not frozen.inputs)
        place = ChunkPlace(first=True, last=True, layers=range(stage.model.backbone.num_layers))
        super().__init__(stage, spread, place, load, trained)
        self.scales, self.num_queries = scales_of(stage), num_queries

    def parts(self) -> list[tuple[Weights, bool]]:
        marks = 2 * len(self.scales.scales) * (self.scales.mode == "learned")
        queries = Weights((self.scales.num_queries + marks) * self.backbone.hidden_size)
        return [*super().parts(), (queries, self.trained.inputs)]

    def visual_tokens_kept(self) -> Kept:
        if not self.has_gradient:
            return Kept()
        levels = len(self.encoder.deepstack_layers)
        tokens = (1 + 2 * levels) * self.load.read_patches / self.encoder.spatial_merge_size**2
        return Kept((tokens + self.num_queries) * self.backbone.hidden_size * self.spread.itemsize)

    def loss_kept(self) -> Kept:
        return self.sum_of_losses([])


class _Chunk(DrawingChunk):
    """One chunk of one stage, and one row."""

    def __init__(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: FrameRow) -> None:
        assert isinstance(stage.method, HieraQueryConfig)
        self.method, self.scales, self.row = stage.method, scales_of(stage), row
        frames = row.frames
        load = DrawingLoad(
            mmdit=frames_load(row.num_text, row.num_tokens - row.num_text, frames),
            vectors=num_vectors(stage) or max(1, len(frames)),
            pictures=int(row.pictures.prod(axis=1).sum()),
            drawn=int(frames.counts.sum()),
            travelling=aligned_rows(stage, stage.method.alignment),
        )
        self.rules = stage.train.trainable
        super().__init__(stage, spread, place, load, not all(is_frozen(part, self.rules) for part in CONDITION))
        self.aligns = aligns_here(stage.method.alignment, place)
        self.noisy = int(frames.counts[~frames.is_clean].sum()) if self.aligns else 0
        self.queries = len(row.query_index)
        self.vlm = self._vlm() if place.first else None
        frozen = frozen_parts(stage, VLM).vision_encoder
        self.has_tower = self.aligns and not stage.data.feature_cache
        self.has_own_tower = self.has_tower and not (place.first and frozen)

    def _vlm(self) -> ChunkFootprint:
        stage = vlm_stage(self.stage)
        spread = Spread.of(stage.system, self.spread.fused)
        found = _Vlm(stage, spread, VlmLoad.of(self.row.conversation, stage), self.queries).footprint()
        if not self.stage.data.condition_cache:
            return found
        numbers = self.queries * stage.model.backbone.hidden_size
        return replace(
            found,
            kept={},
            inputs=numbers * spread.itemsize,
            forward=Flops(),
            backward=Flops(),
            forward_traffic=Traffic(),
            backward_traffic=Traffic(),
        )

    # -- weights

    @property
    def connector(self) -> LayerShape:
        """One of its layers."""
        model = self.scales.connector
        return LayerShape(
            hidden=model.hidden_size,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            head_size=model.head_size,
            mlp=model.mlp_size,
            gated=True,
            rms_norm=True,
            qk_norm=False,
            qkv_bias=True,
            bias=False,
        )

    def parts(self) -> list[tuple[Weights, bool]]:
        parts = super().parts()
        if self.vlm is not None:
            layers = layer_weights(self.connector, self.spread.parallel.tensor).times(self.scales.connector.num_layers)
            embedding = self.method.max_frames * self.mmdit.hidden_size * isinstance(self.mmdit, Sd3Config)
            parts += [
                (self.vlm.trained, True),
                (self.vlm.frozen, False),
                (layers + Weights(self.scales.connector.hidden_size), not is_frozen("scale_connector", self.rules)),
                (Weights(self._adapters()), not is_frozen("scale_adapters", self.rules)),
                (Weights(embedding), not is_frozen("frame_embedding", self.rules)),
            ]
        if self.aligns:
            projector = projector_weights(self.mmdit, self.alignment, self.stage.model.vision_encoder.out_size)
            parts.append((projector, not is_frozen("alignment_projector", self.rules)))
        return parts

    def _adapters(self) -> int:
        hidden, inner = self.stage.model.backbone.hidden_size, self.scales.connector.hidden_size
        condition, pooled = self.mmdit.condition_size, self.mmdit.pooled_size
        total = _two_layers(condition, condition, pooled) * (pooled > 0)
        total += _two_layers(hidden, inner, inner) * (hidden != inner)
        total += _two_layers(inner, condition, condition) * (inner != condition)
        return total + self.scales.num_queries * condition * (self.scales.mode == "learned")

    @property
    def alignment(self) -> RepresentationAlignmentConfig:
        """Where there is one."""
        assert self.method.alignment is not None
        return self.method.alignment

    def companions(self) -> Weights:
        tower = vision_weights(self.stage.model.vision_encoder, self.spread.parallel.tensor)
        return super().companions() + (tower if self.has_own_tower else Weights())

    def footprint(self) -> ChunkFootprint:
        found = super().footprint()
        largest = 0 if self.vlm is None else self.vlm.largest_weight
        return replace(found, largest_weight=max(found.largest_weight, largest))

    # -- activations

    def kept(self) -> dict[str, Kept]:
        kept = super().kept()
        if self.vlm is not None:
            kept["encoder"] += self.vlm.all_kept
            kept["layers"] += self._connector_kept() if self.condition_trains else Kept()
        if self.has_tower and self.row.target_grids is not None:
            patches = int(self.row.target_grids.prod(axis=1).sum())
            kept["encoder"] += tower_pass(self.stage.model.vision_encoder, self.spread, patches)
        if self.aligns and self.has_gradient:
            width = self.stage.model.vision_encoder.out_size
            kept["loss"] += alignment_kept(self.mmdit, self.alignment, width, self.spread, self.noisy)
        return kept

    def _connector_kept(self) -> Kept:
        """Two layers keep their input and the hidden layer before and after the activation."""
        hidden, inner = self.stage.model.backbone.hidden_size, self.scales.connector.hidden_size
        condition, item = self.mmdit.condition_size, self.spread.itemsize
        around = (hidden + 2 * inner) * (hidden != inner) + (inner + 2 * condition) * (inner != condition)
        layers = tower_layer_kept(self.connector, self.spread, self.queries).times(self.scales.connector.num_layers)
        norm = rms_norm_kept(inner, self.spread, self.queries)
        # What is kept of the condition, and its tokens as the text stream has them.
        return layers + norm + Kept(self.queries * (around + 2 * condition) * item)

    def inputs(self) -> float:
        """And the conversation, or what was computed of it, and pictures for the vision encoder."""
        total = super().inputs() + (0.0 if self.vlm is None else self.vlm.inputs)
        if self.aligns and self.row.target_grids is not None:
            encoder, item = self.stage.model.vision_encoder, self.spread.itemsize
            patches = float(self.row.target_grids.prod(axis=1).sum())
            seen = patches * (encoder.patch_dim * item + 24)
            cached = patches / encoder.spatial_merge_size**2 * encoder.out_size * item
            total += seen if self.has_tower else cached
        return total

    # -- FLOPs

    def flops(self) -> tuple[Flops, Flops, Flops]:
        forward, backward, again = super().flops()
        if self.vlm is None:
            return forward, backward, again
        return forward + self.vlm.forward, backward + self.vlm.backward, again

    def other_works(self) -> list[tuple[Work, tuple[bool, bool]]]:
        works, ranks = super().other_works(), self.spread.parallel.context
        if self.vlm is not None:
            passes = not is_frozen(VLM.removesuffix("."), self.rules)
            parts = ("scale_adapters", "scale_connector", "scale_adapters")
            for part, work in zip(parts, connector_works(self.queries, self.stage), strict=True):
                trains = not is_frozen(part, self.rules)
                works.append((work.times(ranks), (trains, passes)))  # whole on every context rank
                passes = passes or trains
        if self.aligns and self.row.target_grids is not None:
            projector, tower = alignment_works(self.noisy, self.row.target_grids, self.stage, self.alignment)
            works += [
                (projector, (not is_frozen("alignment_projector", self.rules), self.has_gradient)),
                (tower.times(ranks), (False, False)),
            ]
        return works

    def traffic(self) -> tuple[Traffic, Traffic]:
        forward, backward = super().traffic()
        if self.vlm is None:
            return forward, backward
        return forward + self.vlm.forward_traffic, backward + self.vlm.backward_traffic


def _two_layers(wide: int, inner: int, out: int) -> int:
    """Numbers of two linear layers."""
    return (wide + 1) * inner + (inner + 1) * out
