"""MMCORE's diffusion transformer as the shared loop sees it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_unimm.config.layout import stream_multiple
from megatron_unimm.config.methods import DropoutSchedule, MMCoreDrawing, PathwayDiffusionConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow, FrameSample, FrameWork
from megatron_unimm.data.sizes import check_size
from megatron_unimm.methods.drawing.frames import model_parts, num_vectors, picture_input, travelling_rows
from megatron_unimm.methods.drawing.losses import TERMS, WEIGHTS
from megatron_unimm.methods.drawing.method import (
    floats,
    frame_timesteps,
    learned_counts,
    loss_input,
    stored,
    timestep_vectors,
)
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.diffusion.flops import row_flops, sample_flops
from megatron_unimm.methods.mmcore.diffusion.model import (
    ConditionInput,
    DiffusionBatch,
    MMCoreDiffusionModel,
)
from megatron_unimm.methods.vlm.layout import alignment
from megatron_unimm.methods.vlm.queries import build_condition_batch, frozen_vlm
from megatron_unimm.models.mmdit.canvas import Canvas, Place
from megatron_unimm.models.vit_features import FeaturePlaces
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


class MMCoreDiffusion:
    """The diffusion transformer for one stage: see ``methods/interface.py`` for the contract."""

    terms: tuple[str, ...] = TERMS
    weights: tuple[float, ...] = WEIGHTS

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> None:
        assert isinstance(stage.method, PathwayDiffusionConfig)
        assert stage.generator is not None
        self.stage = stage
        self.config = stage.method
        self.generator = stage.generator
        self.platform = platform
        self.groups = groups
        self.frozen = frozen_vlm(stage)

    def build(self, virtual_stage: int, with_base: bool = True) -> MMCoreDiffusionModel:
        return MMCoreDiffusionModel(self.stage, self.platform, self.groups, self.frozen, virtual_stage)

    def work(self, data: DataSetup) -> FrameWork:
        """Frames with conditions.

        Raises:
            ConfigError: a size that is no whole number of tokens.
        """
        return frame_work(self.stage, data)

    def travelling_rows(self) -> int:
        return travelling_rows(self.stage)

    def base_parts(self) -> dict[str, Path]:
        """The last stage's VAE."""
        return {"vae": Path(self.stage.generator_checkpoint)}

    def model_parts(self) -> dict[str, Path]:
        return model_parts(self.stage)

    def counts(self, rows: Sequence[FrameRow]) -> list[int]:
        return learned_counts(rows, self.config.flow)

    def batch(self, row: FrameRow, model: MMCoreDiffusionModel, device: torch.device) -> DiffusionBatch:
        place = model.place(num_vectors(self.stage))
        canvas = Canvas.build(row.frames, row.num_text, row.num_tokens, self.generator, place)
        timesteps = frame_timesteps(row, self.config.flow)
        at_an_end = model.pre_process or model.post_process
        return DiffusionBatch(
            canvas=canvas,
            timestep=timestep_vectors(timesteps, canvas, place),
            pictures=picture_input(row, place) if at_an_end else None,
            loss=loss_input(row, timesteps, self.config.flow, canvas, place) if model.post_process else None,
            condition=self._condition(row, model, place) if model.pre_process else None,
        )

    def row_flops(self, row: FrameRow) -> float:
        return row_flops(row, self.stage)

    def sample_flops(self, sample: FrameSample) -> float:
        return sample_flops(sample, self.stage)

    def part_configs(self) -> dict[str, Any]:
        """How queries, connector and pathways are built, for exports."""
        assert self.stage.queries is not None
        return {"queries": self.stage.queries.model_dump(mode="json"), "pathways": {}}

    def _condition(self, row: FrameRow, model: MMCoreDiffusionModel, place: Place) -> ConditionInput:
        conversation = word_index = words = latents = None
        if row.words is not None and row.visual is not None:
            words, latents = stored(row.words, place), stored(row.visual, place)
        else:
            role = replace(model.vlm.role(), device=place.device)
            conversation = build_condition_batch(row.conversation, row.query_index, self.stage.model, role)
            word_index = torch.from_numpy(row.word_index).to(place.device, non_blocking=True)
        return ConditionInput(
            conversation=conversation,
            word_index=word_index,
            order=torch.from_numpy(row.condition_order).to(place.device, non_blocking=True),
            text_kept=floats(row.text_kept, place),
            visual_kept=floats(row.visual_kept, place),
            words=words,
            latents=latents,
            features=feature_places(row, self.stage, place.device) if self.config.vit_features else None,
        )


def feature_places(row: FrameRow, stage: StageConfig, device: torch.device) -> FeaturePlaces:
    """Where the VLM's visual tokens go: what a frame looks back at is what the VLM reads, in the same order."""
    grids = row.conversation.grids[:, 1:] // stage.model.vision_encoder.spatial_merge_size
    return FeaturePlaces.build(row.frames, grids, device)


NO_DROPOUT = DropoutSchedule(start=0.0, end=0.0)


def frame_work(stage: StageConfig, data: DataSetup, with_targets: bool = False) -> FrameWork:
    """What is done to samples; see :meth:`MMCoreDiffusion.work`.

    Args:
        with_targets: pictures to be drawn are also looked at by a vision encoder.
    """
    method = stage.method
    assert isinstance(method, MMCoreDrawing)
    assert stage.generator is not None
    assert stage.queries is not None
    assert stage.data.drawing_size is not None
    check_size(stage.data.drawing_size, stage.generator.token_pixels, "data.drawing_size")
    parallel = stage.system.parallel
    aligned = alignment(stage)
    drops = isinstance(method, PathwayDiffusionConfig)
    return FrameWork(
        generator=stage.generator,
        chat=data.chat(),
        scales=stage.queries.scales,
        sources=data.sources,
        seed=stage.train.seed,
        text_dropout=method.text_dropout if drops else NO_DROPOUT,
        visual_dropout=method.visual_dropout if drops else NO_DROPOUT,
        max_frames=method.max_frames,
        pathways=method.pathways,
        earlier_latents=drops and method.earlier_latents,
        stream_multiple=stream_multiple(stage),
        vlm_alignment=aligned,
        vlm_multiple=aligned * (parallel.tensor if parallel.sequence else 1),
        latents=data.latents,
        conditions=data.conditions,
        with_targets=with_targets,
    )
