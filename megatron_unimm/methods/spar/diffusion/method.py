"""SPAR's joint training as the shared loop sees it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_unimm.config.layout import chunk_of_layer
from megatron_unimm.config.methods import SparConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow, FrameWork
from megatron_unimm.methods.drawing.alignment import ALIGNMENT, Targets, aligned_rows
from megatron_unimm.methods.drawing.flops import alignment_flops
from megatron_unimm.methods.drawing.frames import num_vectors
from megatron_unimm.methods.drawing.losses import TERMS, WEIGHTS
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.diffusion.flops import CONDITION, row_flops
from megatron_unimm.methods.mmcore.diffusion.method import MMCoreDiffusion, frame_work
from megatron_unimm.methods.mmcore.diffusion.model import MMCoreDiffusionModel
from megatron_unimm.methods.spar.diffusion.model import SparBatch, SparModel
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


class Spar(MMCoreDiffusion):
    """One stage: see ``methods/interface.py`` for the contract."""

    terms: tuple[str, ...]
    weights: tuple[float, ...]

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> None:
        super().__init__(stage, platform, groups)
        assert isinstance(stage.method, SparConfig)
        self.alignment = stage.method.alignment
        self.terms = TERMS if self.alignment is None else (*TERMS, ALIGNMENT)
        self.weights = WEIGHTS if self.alignment is None else (*WEIGHTS, self.alignment.weight)

    def build(self, virtual_stage: int, with_base: bool = True) -> SparModel:
        return SparModel(self.stage, self.platform, self.groups, self.frozen, virtual_stage, with_base)

    def work(self, data: DataSetup) -> FrameWork:
        return frame_work(self.stage, data, with_targets=self.alignment is not None)

    def travelling_rows(self) -> int:
        return aligned_rows(self.stage, self.alignment)

    def looks_here(self) -> bool:
        """Whether the layer that is aligned is on this rank."""
        if self.alignment is None:
            return False
        return chunk_of_layer(self.stage, self.alignment.layer)[0] == self.groups.collection.pp.rank()

    def base_parts(self) -> dict[str, Path]:
        """The tokenizer of the last stage and of the one that aligns, and the vision encoder of the latter."""
        return {"vae": Path(self.stage.tokenizer_checkpoint), "vision_encoder": Path(self.stage.base_checkpoint)}

    def model_parts(self) -> dict[str, Path]:
        base, generator = Path(self.stage.base_checkpoint), self.stage.generator_checkpoint
        parts = {"vae": Path(self.stage.tokenizer_checkpoint), "vision_encoder": base, "backbone": base}
        return parts | ({"mmdit": Path(generator)} if generator else {})

    def counts(self, rows: Sequence[FrameRow]) -> list[int]:
        """Image tokens that are learned: of all frames, by timestep, and aligned ones."""
        flow = super().counts(rows)
        return flow if self.alignment is None else [*flow, flow[0]]

    def batch(self, row: FrameRow, model: MMCoreDiffusionModel, device: torch.device) -> SparBatch:
        found, place = super().batch(row, model, device), model.place(num_vectors(self.stage))
        has_targets = self.alignment is not None and model.mmdit.has_tap
        encoder = self.stage.model.vision_encoder
        return SparBatch(**vars(found), targets=Targets.of(row, encoder, place) if has_targets else None)

    def row_flops(self, row: FrameRow) -> float:
        total = row_flops(row, self.stage)
        if self.alignment is None or row.target_grids is None:
            return total
        tokens = int((row.frames.counts * row.learned).sum())
        return total + alignment_flops(tokens, row.target_grids, self.stage, self.alignment, CONDITION)

    def part_configs(self) -> dict[str, Any]:
        """And how layers are mixed, and pictures become latents."""
        routing, tokenizer = self.stage.routing, self.stage.tokenizer
        assert tokenizer is not None
        return {
            **super().part_configs(),
            "routing": None if routing is None else routing.model_dump(mode="json"),
            "tokenizer": tokenizer.model_dump(mode="json"),
        }
