"""What the image decoder's chunks ask of a rank; see ``methods/footprint.py``."""

from collections.abc import Hashable

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.methods import OrionDecoderConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.drawing import DrawingRow
from megatron_unimm.data.typical import LARGE_PHOTO, PHOTO, drawing_row, shares
from megatron_unimm.methods.drawing.footprint import DrawingChunk, DrawingLoad
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.orion.decoder.flops import load_of, row_flops
from megatron_unimm.methods.orion.decoder.method import drawing_work, num_vectors, travelling_rows
from megatron_unimm.models.flops import Work, vision_work
from megatron_unimm.models.memory import (
    Kept,
    Spread,
    Weights,
    block_kinds,
    connector_weights,
    tower_pass,
    vision_weights,
)
from megatron_unimm.models.trainable import is_frozen


class DecoderFootprints:
    """See :class:`~megatron_unimm.methods.footprint.Footprints`."""

    def typical_row(
        self,
        stage: StageConfig,
        kinds: tuple[SampleKind, ...] | None = None,
        large: bool = False,
        pixels: bool = True,
    ) -> DrawingRow:
        work = drawing_work(stage, DataSetup({}, _no_chat))
        return drawing_row(shares(stage.data, kinds), work, LARGE_PHOTO if large else PHOTO, pixels)

    def row_flops(self, stage: StageConfig, row: DrawingRow) -> float:
        return row_flops(row, stage)

    def travelling_rows(self, stage: StageConfig) -> int:
        return travelling_rows(stage)

    def alike(self, stage: StageConfig, place: ChunkPlace) -> Hashable:
        assert stage.generator is not None
        return place.first, place.last, tuple(block_kinds(stage.generator.mmdit, place.layers).items())

    def chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: DrawingRow) -> ChunkFootprint:
        return _Chunk(stage, spread, place, row).footprint()


def _no_chat() -> None:
    raise AssertionError("the decoder reads no text")


class _Chunk(DrawingChunk):
    """One chunk of one stage, and one row."""

    def __init__(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: DrawingRow) -> None:
        assert isinstance(stage.method, OrionDecoderConfig)
        self.method, self.encoder, self.row = stage.method, stage.model.vision_encoder, row
        self.sees = place.first and not stage.data.feature_cache
        picture_tokens = int(row.pictures.prod(axis=1).sum())
        load = DrawingLoad(
            mmdit=load_of(row),
            vectors=num_vectors(stage) or len(row.pictures),
            pictures=picture_tokens,
            drawn=picture_tokens,
            travelling=travelling_rows(stage),
        )
        super().__init__(stage, spread, place, load, not is_frozen("connector", stage.train.trainable))

    @property
    def _patches(self) -> float:
        return float(self.row.grids.prod(axis=1).sum())

    def parts(self) -> list[tuple[Weights, bool]]:
        if not self.place.first:
            return super().parts()
        connector = connector_weights(self.method.connector, self.encoder.out_size, self.mmdit)
        return [*super().parts(), (connector, self.condition_trains)]

    def companions(self) -> Weights:
        tower = vision_weights(self.encoder, self.spread.parallel.tensor) if self.sees else Weights()
        return super().companions() + tower

    def kept(self) -> dict[str, Kept]:
        kept = super().kept()
        if self.place.first and self.has_gradient:
            kept["layers"] += Kept(self._connector_kept())
        if self.sees:
            kept["encoder"] += tower_pass(self.encoder, self.spread, self._patches)
        return kept

    def _connector_kept(self) -> float:
        """Of every condition token: its input, both layers' outputs and normalised outputs, the activation."""
        inner = self.method.connector.hidden_size or self.mmdit.condition_size
        width = self.encoder.out_size + 3 * inner + self.mmdit.condition_size
        return float(self.row.num_condition.sum()) * width * self.spread.itemsize * self.condition_trains

    def inputs(self) -> float:
        """And patches of the condition."""
        if not self.sees:
            return super().inputs()
        angles = self.encoder.hidden_size // self.encoder.num_heads
        return super().inputs() + self._patches * ((self.encoder.patch_dim + angles) * self.spread.itemsize + 24)

    def other_works(self) -> list[tuple[Work, tuple[bool, bool]]]:
        if not self.sees:
            return []
        tower = sum(vision_work(self.encoder, self.row.grids), Work(0.0))
        return [(tower.times(self.spread.parallel.context), (False, False))]  # whole on every context rank
