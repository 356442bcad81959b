"""What the chunks of MMCORE's diffusion transformer ask of a rank, the VLM among the first's; see
``methods/footprint.py``."""

from collections.abc import Hashable
from dataclasses import replace

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.methods import MMCoreDrawing, PathwayDiffusionConfig
from megatron_unimm.config.mmdit import Sd3Config
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow
from megatron_unimm.data.typical import LARGE_PHOTO, PHOTO, frame_row, shares, wordless_chat
from megatron_unimm.methods.drawing.footprint import DrawingChunk, DrawingLoad
from megatron_unimm.methods.drawing.frames import num_vectors, travelling_rows
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace, Flops, Traffic
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.diffusion.flops import CONDITION, load_of, row_flops
from megatron_unimm.methods.mmcore.diffusion.method import frame_work
from megatron_unimm.methods.mmcore.footprint import QueryChunk, QueryLoad, vlm_of
from megatron_unimm.methods.vlm.queries import VLM, vlm_stage
from megatron_unimm.models.memory import Kept, Spread, Weights, block_kinds, pathway_kept, pathways_weights
from megatron_unimm.models.trainable import is_frozen


class DiffusionFootprints:
    """See :class:`~megatron_unimm.methods.footprint.Footprints`."""

    def typical_row(
        self,
        stage: StageConfig,
        kinds: tuple[SampleKind, ...] | None = None,
        large: bool = False,
        pixels: bool = True,
    ) -> FrameRow:
        work = frame_work(stage, DataSetup({}, lambda: wordless_chat(stage.model, stage.data)))
        widths = stage.model.backbone.hidden_size, vlm_of(stage).latent_size(stage.model)
        return frame_row(shares(stage.data, kinds), work, widths, LARGE_PHOTO if large else PHOTO, pixels)

    def row_flops(self, stage: StageConfig, row: FrameRow) -> float:
        return row_flops(row, stage)

    def travelling_rows(self, stage: StageConfig) -> int:
        return travelling_rows(stage)

    def alike(self, stage: StageConfig, place: ChunkPlace) -> Hashable:
        assert stage.generator is not None
        return place.first, place.last, tuple(block_kinds(stage.generator.mmdit, place.layers).items())

    def chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: FrameRow) -> ChunkFootprint:
        return DiffusionChunk(stage, spread, place, row).footprint()


class DiffusionChunk(DrawingChunk):
    """One chunk of one stage, and one row."""

    def __init__(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: FrameRow) -> None:
        assert isinstance(stage.method, MMCoreDrawing)
        self.method, self.row = stage.method, row
        load = DrawingLoad(
            mmdit=load_of(row),
            vectors=num_vectors(stage) or max(1, len(row.frames)),
            pictures=int(row.pictures.prod(axis=1).sum()),
            drawn=int(row.frames.counts.sum()),
            travelling=self.travelling_rows(stage),
        )
        rules = stage.train.trainable
        super().__init__(stage, spread, place, load, not all(is_frozen(part, rules) for part in CONDITION))
        self.pathways_train = not is_frozen("pathways", rules)
        self.vlm = self._vlm() if place.first else None

    @staticmethod
    def travelling_rows(stage: StageConfig) -> int:
        """Between pipeline stages."""
        return travelling_rows(stage)

    def _vlm(self) -> ChunkFootprint:
        """All of the VLM, whose last hidden states are what the pathways read; of what was computed beforehand it has
        its weights alone."""
        stage = vlm_stage(self.stage)
        spread = Spread.of(stage.system, self.spread.fused)
        place = ChunkPlace(first=True, last=True, layers=range(stage.model.backbone.num_layers))
        load = QueryLoad.without_teacher(self.row.conversation, self.row.num_images, stage)
        found = self.vlm_chunk(stage, spread, place, load).footprint()
        if not self.stage.data.condition_cache:
            return found
        numbers = len(self.row.word_index) * stage.model.backbone.hidden_size
        numbers += len(self.row.query_index) * vlm_of(stage).latent_size(stage.model)
        return ChunkFootprint(
            trained=found.trained,
            frozen=found.frozen,
            companions=found.companions,
            kept={},
            inputs=numbers * spread.itemsize,
            largest_weight=found.largest_weight,
            forward=Flops(),
            backward=Flops(),
        )

    def vlm_chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, load: QueryLoad) -> QueryChunk:
        """All of the VLM."""
        return QueryChunk(stage, spread, place, load, teacher=None, prefix=VLM)

    def footprint(self) -> ChunkFootprint:
        found = super().footprint()
        largest = 0 if self.vlm is None else self.vlm.largest_weight
        return replace(found, largest_weight=max(found.largest_weight, largest))

    def parts(self) -> list[tuple[Weights, bool]]:
        if self.vlm is None:
            return super().parts()
        queries, words = vlm_of(self.stage), self.stage.model.backbone.hidden_size
        pathways = pathways_weights(self.mmdit, words, queries.latent_size(self.stage.model), queries.num_queries)
        embedding = self.method.max_frames * self.mmdit.hidden_size * isinstance(self.mmdit, Sd3Config)
        features = Weights(0)
        if isinstance(self.method, PathwayDiffusionConfig) and self.method.vit_features:
            width = self.stage.model.vision_encoder.out_size
            features = Weights(width + (width + 1) * self.mmdit.hidden_size)
        return [
            *super().parts(),
            (self.vlm.trained, True),
            (self.vlm.frozen, False),
            (pathways, self.pathways_train),
            (Weights(embedding), not is_frozen("frame_embedding", self.stage.train.trainable)),
            (features, not is_frozen("vit_features", self.stage.train.trainable)),
        ]

    def kept(self) -> dict[str, Kept]:
        kept = super().kept()
        if self.vlm is not None:
            kept["encoder"] += self.vlm.all_kept
            kept["layers"] += self._pathways_kept() if self.condition_trains else Kept()
        return kept

    def _pathways_kept(self) -> Kept:
        queries, backbone, condition = vlm_of(self.stage), self.stage.model.backbone, self.mmdit.condition_size
        words = pathway_kept(backbone.hidden_size, condition, self.spread, len(self.row.word_index))
        latent_size = queries.latent_size(self.stage.model)
        return words + pathway_kept(latent_size, condition, self.spread, len(self.row.query_index))

    def inputs(self) -> float:
        """And the conversation, or what was computed of it."""
        return super().inputs() + (0.0 if self.vlm is None else self.vlm.inputs)

    def flops(self) -> tuple[Flops, Flops, Flops]:
        forward, backward, again = super().flops()
        if self.vlm is None:
            return forward, backward, again
        return forward + self.vlm.forward, backward + self.vlm.backward, again

    def traffic(self) -> tuple[Traffic, Traffic]:
        forward, backward = super().traffic()
        if self.vlm is None:
            return forward, backward
        return forward + self.vlm.forward_traffic, backward + self.vlm.backward_traffic
