"""What SPAR's joint training asks of a rank; see ``methods/footprint.py``: as of MMCORE's diffusion transformer, with
the tokenizer in the VAE's place, routers in the VLM, and the projector and the teacher of self-alignment. Weights are
exact; of what the tokenizer needs for a moment its vision encoder's part is counted. Not measured."""

from collections.abc import Hashable

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.methods import SparConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow
from megatron_unimm.data.typical import LARGE_PHOTO, PHOTO, frame_row, shares, wordless_chat
from megatron_unimm.methods.drawing.alignment import aligned_rows
from megatron_unimm.methods.drawing.flops import alignment_works
from megatron_unimm.methods.drawing.footprint import alignment_kept, aligns_here, projector_weights
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.diffusion.footprint import DiffusionChunk, DiffusionFootprints
from megatron_unimm.methods.mmcore.diffusion.method import frame_work
from megatron_unimm.methods.mmcore.footprint import QueryChunk, QueryLoad, vlm_of
from megatron_unimm.methods.spar.alignment.footprint import RoutedChunk
from megatron_unimm.methods.spar.tokenizer.footprint import tokenizer_weights
from megatron_unimm.methods.vlm.queries import VLM, frozen_vlm
from megatron_unimm.models.flops import Work
from megatron_unimm.models.memory import Kept, Spread, Weights, tower_pass, vision_weights
from megatron_unimm.models.trainable import is_frozen


class SparFootprints(DiffusionFootprints):
    """See :class:`~megatron_unimm.methods.footprint.Footprints`."""

    def typical_row(
        self,
        stage: StageConfig,
        kinds: tuple[SampleKind, ...] | None = None,
        large: bool = False,
        pixels: bool = True,
    ) -> FrameRow:
        chat = wordless_chat(stage.model, stage.data)
        work = frame_work(stage, DataSetup({}, lambda: chat), with_targets=_method(stage).alignment is not None)
        widths = stage.model.backbone.hidden_size, vlm_of(stage).latent_size(stage.model)
        return frame_row(shares(stage.data, kinds), work, widths, LARGE_PHOTO if large else PHOTO, pixels)

    def travelling_rows(self, stage: StageConfig) -> int:
        return aligned_rows(stage, _method(stage).alignment)

    def alike(self, stage: StageConfig, place: ChunkPlace) -> Hashable:
        return super().alike(stage, place), aligns_here(_method(stage).alignment, place)

    def chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: FrameRow) -> ChunkFootprint:
        return _Chunk(stage, spread, place, row).footprint()


def _method(stage: StageConfig) -> SparConfig:
    assert isinstance(stage.method, SparConfig)
    return stage.method


class _Chunk(DiffusionChunk):
    """One chunk of one stage, and one row."""

    def __init__(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: FrameRow) -> None:
        super().__init__(stage, spread, place, row)
        self.encoder, self.alignment = stage.model.vision_encoder, _method(stage).alignment
        self.aligns = aligns_here(self.alignment, place)
        self.noisy = float(row.frames.counts[~row.frames.is_clean].sum())
        self.is_internal = self.alignment is not None and self.alignment.teacher == "internal"

    @staticmethod
    def travelling_rows(stage: StageConfig) -> int:
        return aligned_rows(stage, _method(stage).alignment)

    def vlm_chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, load: QueryLoad) -> QueryChunk:
        return RoutedChunk(stage, spread, place, load, teacher=None, prefix=VLM)

    # -- weights

    def parts(self) -> list[tuple[Weights, bool]]:
        parts = super().parts()
        if self.alignment is not None and self.aligns:
            trains = not is_frozen("alignment_projector", self.stage.train.trainable)
            parts.append((projector_weights(self.mmdit, self.alignment, self.encoder.out_size), trains))
        return parts

    def autoencoder_weights(self) -> Weights:
        assert self.stage.tokenizer is not None
        tensor = self.spread.parallel.tensor
        return vision_weights(self.encoder, tensor) + tokenizer_weights(self.stage.tokenizer, self.encoder, tensor)

    def companions(self) -> Weights:
        """Frozen ones, the teacher among them."""
        found, first = super().companions(), self.place.first
        if self.alignment is None or not self.aligns:
            return found
        if self.is_internal:
            is_there = first or (self.place.last and not self.stage.data.latent_cache)
            return found if is_there else found + self.autoencoder_weights()
        is_there = first and frozen_vlm(self.stage).vision_encoder
        return found if is_there else found + vision_weights(self.encoder, self.spread.parallel.tensor)

    # -- activations

    def autoencoder_pass(self) -> Kept:
        assert self.stage.tokenizer is not None
        patches = self.pixels / self.encoder.patch_size**2
        return tower_pass(self.encoder, self.spread, patches)

    def kept(self) -> dict[str, Kept]:
        kept = super().kept()
        if self.alignment is not None and self.aligns and self.has_gradient:
            width = self.encoder.out_size
            kept["loss"] += alignment_kept(self.mmdit, self.alignment, width, self.spread, self.noisy)
        return kept

    def inputs(self) -> float:
        """And pictures for the teacher."""
        total = super().inputs()
        if self.aligns and self.row.target_grids is not None:
            patches = float(self.row.target_grids.prod(axis=1).sum())
            total += patches * (self.encoder.patch_dim * self.spread.itemsize + 24)
        return total

    # -- FLOPs

    def other_works(self) -> list[tuple[Work, tuple[bool, bool]]]:
        works = super().other_works()
        if self.alignment is not None and self.aligns and self.row.target_grids is not None:
            found = alignment_works(int(self.noisy), self.row.target_grids, self.stage, self.alignment)
            trains = not is_frozen("alignment_projector", self.stage.train.trainable)
            context = self.spread.parallel.context
            works += [(found[0], (trains, self.has_gradient)), (found[1].times(context), (False, False))]
        return works
