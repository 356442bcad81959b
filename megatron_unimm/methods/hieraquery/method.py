"""HieraQuery as the shared loop sees it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_unimm.config.layout import chunk_of_layer, stream_multiple
from megatron_unimm.config.methods import DropoutSchedule, HieraQueryConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow, FrameSample, FrameWork
from megatron_unimm.data.sizes import check_size
from megatron_unimm.methods.drawing.alignment import ALIGNMENT, Targets, aligned_rows
from megatron_unimm.methods.drawing.frames import model_parts, num_vectors, picture_input
from megatron_unimm.methods.drawing.losses import TERMS, WEIGHTS
from megatron_unimm.methods.drawing.method import (
    floats,
    frame_timesteps,
    learned_counts,
    loss_input,
    stored,
    timestep_vectors,
)
from megatron_unimm.methods.hieraquery.flops import row_flops, sample_flops
from megatron_unimm.methods.hieraquery.model import ConditionInput, HieraQueryBatch, HieraQueryModel
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.vlm.layout import alignment
from megatron_unimm.methods.vlm.queries import build_condition_batch, frozen_vlm
from megatron_unimm.models.mmdit.canvas import Canvas, Place
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


class HieraQuery:
    """One stage: see ``methods/interface.py`` for the contract."""

    terms: tuple[str, ...]
    weights: tuple[float, ...]

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> None:
        assert isinstance(stage.method, HieraQueryConfig)
        assert stage.generator is not None
        self.stage = stage
        self.config = stage.method
        self.generator = stage.generator
        self.platform = platform
        self.groups = groups
        self.frozen = frozen_vlm(stage)
        aligned = stage.method.alignment
        self.terms = TERMS if aligned is None else (*TERMS, ALIGNMENT)
        self.weights = WEIGHTS if aligned is None else (*WEIGHTS, aligned.weight)

    def build(self, virtual_stage: int, with_base: bool = True) -> HieraQueryModel:
        return HieraQueryModel(self.stage, self.platform, self.groups, self.frozen, virtual_stage, with_base)

    def work(self, data: DataSetup) -> FrameWork:
        """Frames with conditions.

        Raises:
            ConfigError: a size that is no whole number of tokens.
        """
        return frame_work(self.stage, data)

    def travelling_rows(self) -> int:
        return aligned_rows(self.stage, self.config.alignment)

    def looks_here(self) -> bool:
        """Whether the layer that is aligned is on this rank."""
        if self.config.alignment is None:
            return False
        return chunk_of_layer(self.stage, self.config.alignment.layer)[0] == self.groups.collection.pp.rank()

    def base_parts(self) -> dict[str, Path]:
        """The last stage's VAE, and the vision encoder of the stage that aligns."""
        return {"vae": Path(self.stage.generator_checkpoint), "vision_encoder": Path(self.stage.base_checkpoint)}

    def model_parts(self) -> dict[str, Path]:
        scales = self.stage.hieraquery
        assert scales is not None
        connector = scales.connector_checkpoint
        return model_parts(self.stage) | ({"scale_connector": Path(connector)} if connector else {})

    def counts(self, rows: Sequence[FrameRow]) -> list[int]:
        """Image tokens that are learned: of all frames, by timestep, and aligned ones."""
        flow = learned_counts(rows, self.config.flow)
        return flow if self.config.alignment is None else [*flow, flow[0]]

    def batch(self, row: FrameRow, model: HieraQueryModel, device: torch.device) -> HieraQueryBatch:
        place = model.place(num_vectors(self.stage))
        canvas = Canvas.build(row.frames, row.num_text, row.num_tokens, self.generator, place)
        timesteps = frame_timesteps(row, self.config.flow)
        at_an_end = model.pre_process or model.post_process
        return HieraQueryBatch(
            canvas=canvas,
            timestep=timestep_vectors(timesteps, canvas, place),
            pictures=picture_input(row, place) if at_an_end else None,
            loss=loss_input(row, timesteps, self.config.flow, canvas, place) if model.post_process else None,
            condition=self._condition(row, model, place) if model.pre_process else None,
            targets=Targets.of(row, self.stage.model.vision_encoder, place) if model.mmdit.has_tap else None,
        )

    def row_flops(self, row: FrameRow) -> float:
        return row_flops(row, self.stage)

    def sample_flops(self, sample: FrameSample) -> float:
        return sample_flops(sample, self.stage)

    def part_configs(self) -> dict[str, Any]:
        """How queries, connector and the parts around it are built, for exports."""
        assert self.stage.hieraquery is not None
        return {"hieraquery": self.stage.hieraquery.model_dump(mode="json")}

    def _condition(self, row: FrameRow, model: HieraQueryModel, place: Place) -> ConditionInput:
        conversation = hidden = None
        if row.visual is not None:
            hidden = stored(row.visual, place)
        else:
            role = replace(model.vlm.role(), device=place.device)
            conversation = build_condition_batch(row.conversation, row.query_index, self.stage.model, role)
        frames = np.repeat(np.arange(len(row.frames)), row.frames.num_condition)
        order, frame_of_token = (
            torch.from_numpy(each).to(place.device, non_blocking=True) for each in (row.condition_order, frames)
        )
        return ConditionInput(conversation, hidden, order, floats(row.visual_kept, place), frame_of_token)


NO_WORDS = DropoutSchedule(start=0.0, end=0.0)


def frame_work(stage: StageConfig, data: DataSetup) -> FrameWork:
    """What is done to samples; see :meth:`HieraQuery.work`."""
    method, parallel = stage.method, stage.system.parallel
    assert isinstance(method, HieraQueryConfig)
    assert stage.generator is not None
    assert stage.data.drawing_size is not None
    side = stage.generator.token_pixels * stage.scales.multiple
    check_size(stage.data.drawing_size, side, "data.drawing_size")
    aligned = alignment(stage)
    dropout = method.condition_dropout
    return FrameWork(
        generator=stage.generator,
        chat=data.chat(),
        scales=stage.scales,
        sources=data.sources,
        seed=stage.train.seed,
        text_dropout=NO_WORDS,
        visual_dropout=DropoutSchedule(start=dropout, end=dropout),
        max_frames=method.max_frames,
        pathways="visual",
        shows_sources=method.shows_sources,
        stream_multiple=stream_multiple(stage),
        vlm_alignment=aligned,
        vlm_multiple=aligned * (parallel.tensor if parallel.sequence else 1),
        latents=data.latents,
        conditions=data.conditions,
        with_targets=method.alignment is not None,
        features=data.features,
    )
