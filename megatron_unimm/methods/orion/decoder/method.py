"""The image decoder as the shared loop sees it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_unimm.config.layout import stream_multiple
from megatron_unimm.config.methods import OrionDecoderConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.drawing import DrawingRow, DrawingSample, DrawingWork
from megatron_unimm.data.packing import round_up
from megatron_unimm.data.sizes import check_size, smallest_area
from megatron_unimm.methods.drawing.losses import TERMS, WEIGHTS
from megatron_unimm.methods.drawing.method import (
    floats,
    frame_timesteps,
    learned_counts,
    loss_input,
    rows_between_stages,
    stored,
    timestep_vectors,
)
from megatron_unimm.methods.drawing.model import PictureInput
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.orion.decoder.flops import row_flops, sample_flops
from megatron_unimm.methods.orion.decoder.model import ConditionInput, DecoderBatch, OrionDecoderModel
from megatron_unimm.models.mmdit.canvas import Canvas, Place, grids_of
from megatron_unimm.models.vision import VisionInput
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


class OrionDecoder:
    """The image decoder for one stage: see ``methods/interface.py`` for the contract."""

    terms: tuple[str, ...] = TERMS
    weights: tuple[float, ...] = WEIGHTS

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> None:
        assert isinstance(stage.method, OrionDecoderConfig)
        assert stage.generator is not None
        self.stage = stage
        self.config = stage.method
        self.generator = stage.generator
        self.platform = platform
        self.groups = groups

    def build(self, virtual_stage: int, with_base: bool = True) -> OrionDecoderModel:
        return OrionDecoderModel(self.stage, self.platform, self.groups, virtual_stage)

    def model_parts(self) -> dict[str, Path]:
        return {}

    def work(self, data: DataSetup) -> DrawingWork:
        """Pictures with conditions.

        Raises:
            ConfigError: a size that is no whole number of tokens.
        """
        return drawing_work(self.stage, data)

    def num_vectors(self) -> int | None:
        """See :func:`num_vectors`."""
        return num_vectors(self.stage)

    def travelling_rows(self) -> int:
        return travelling_rows(self.stage)

    def base_parts(self) -> dict[str, Path]:
        """The vision encoder is the base model's, the last stage's VAE the image generator's."""
        return {"vision_encoder": Path(self.stage.base_checkpoint), "vae": Path(self.stage.generator_checkpoint)}

    def counts(self, rows: Sequence[DrawingRow]) -> list[int]:
        return learned_counts(rows, self.config.flow)

    def batch(self, row: DrawingRow, model: OrionDecoderModel, device: torch.device) -> DecoderBatch:
        place = model.place(self.num_vectors())
        canvas = Canvas.build(row.frames, row.num_text, row.num_tokens, self.generator, place)
        timesteps = frame_timesteps(row, self.config.flow)
        at_an_end = model.pre_process or model.post_process
        return DecoderBatch(
            canvas=canvas,
            timestep=timestep_vectors(timesteps, canvas, place),
            pictures=self._pictures(row, place) if at_an_end else None,
            loss=loss_input(row, timesteps, self.config.flow, canvas, place) if model.post_process else None,
            condition=self._condition(row, place) if model.pre_process else None,
        )

    def row_flops(self, row: DrawingRow) -> float:
        return row_flops(row, self.stage)

    def sample_flops(self, sample: DrawingSample) -> float:
        return sample_flops(sample, self.stage)

    def part_configs(self) -> dict[str, Any]:
        """How the connector is built, for exports."""
        return {"connector": self.config.connector.model_dump(mode="json")}

    def _condition(self, row: DrawingRow, place: Place) -> ConditionInput:
        encoder = self.stage.model.vision_encoder
        tokens = row.grids.prod(axis=1) // encoder.spatial_merge_size**2  # of each condition image
        is_source = np.repeat(row.is_source, tokens)
        kept = np.repeat(~row.unconditional, row.num_condition)
        kept |= is_source & np.repeat(row.sources_kept, row.num_condition)
        images = features = None
        if row.features is not None:
            features = stored(row.features, place)
        elif len(row.grids):
            images = VisionInput.build(row.patches, row.grids, encoder, place.device, place.dtype)
        noise = None if row.condition_noise is None else floats(row.condition_noise, place)
        return ConditionInput(images, features, floats(kept, place), floats(is_source, place), noise)

    def _pictures(self, row: DrawingRow, place: Place) -> PictureInput:
        latents = None if row.latents is None else stored(row.latents, place)
        pixels = None if latents is not None else floats(row.pixels, place)
        return PictureInput(pixels, latents, list(grids_of(row.pictures)), floats(row.noise, place))


def drawing_work(stage: StageConfig, data: DataSetup) -> DrawingWork:
    """What is done to samples; see :meth:`OrionDecoder.work`."""
    assert isinstance(stage.method, OrionDecoderConfig)
    assert stage.generator is not None
    sizes, encoder = stage.data, stage.model.vision_encoder
    assert sizes.drawing_size is not None
    check_size(sizes.drawing_size, stage.generator.token_pixels, "data.drawing_size")
    check_size(sizes.generation_size, encoder.token_pixels, "data.generation_size")
    check_size(sizes.understanding_size, encoder.token_pixels, "data.understanding_size")
    return DrawingWork(
        generator=stage.generator,
        encoder=encoder,
        data=sizes,
        sources=data.sources,
        seed=stage.train.seed,
        condition_dropout=stage.method.condition_dropout,
        with_sources=stage.method.connector.sources,
        condition_noise=stage.method.condition_noise,
        stream_multiple=stream_multiple(stage),
        features=data.features,
        latents=data.latents,
    )


def num_vectors(stage: StageConfig) -> int | None:
    """Conditioning vectors of a row that travels through a pipeline: as many as the smallest pictures would need, with
    the smallest conditions. None without a pipeline: as many as pictures."""
    parallel, data = stage.system.parallel, stage.data
    if parallel.pipeline == 1:
        return None
    assert data.drawing_size is not None
    assert stage.generator is not None
    smallest = smallest_area(data.drawing_size, stage.generator.token_pixels)
    smallest += smallest_area(data.generation_size, stage.model.vision_encoder.token_pixels)
    return round_up(data.sequence_length // smallest + 1, parallel.tensor if parallel.sequence else 1)


def travelling_rows(stage: StageConfig) -> int:
    """As of all methods that draw."""
    return rows_between_stages(stage, num_vectors(stage))
