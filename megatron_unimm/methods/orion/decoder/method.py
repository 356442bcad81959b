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
from megatron_unimm.flow.timesteps import timesteps_of
from megatron_unimm.flow.weighting import weights_of
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.orion.decoder.batch import Canvas, Place, grids_of
from megatron_unimm.methods.orion.decoder.flops import row_flops, sample_flops
from megatron_unimm.methods.orion.decoder.losses import NUM_BINS, TERMS, WEIGHTS, bin_of
from megatron_unimm.methods.orion.decoder.model import (
    ConditionInput,
    DecoderBatch,
    LossInput,
    OrionDecoderModel,
    PictureInput,
)
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

    def timesteps(self, row: DrawingRow) -> np.ndarray:
        """float64 ``[n]``: of each picture, by the stage's distribution; a shift may go by the picture's size."""
        config = self.config.flow.timesteps
        sizes = row.pictures.prod(axis=1)
        found = np.zeros(len(sizes))
        for size in np.unique(sizes):
            found[sizes == size] = timesteps_of(row.uniform[sizes == size], config, int(size))
        return found

    def counts(self, rows: Sequence[DrawingRow]) -> list[int]:
        """Image tokens that are learned: of all pictures, then by timestep."""
        bins = np.zeros(NUM_BINS, dtype=np.int64)
        for row in rows:
            np.add.at(bins, bin_of(self.timesteps(row)), row.pictures.prod(axis=1) * row.learned)
        return [int(bins.sum()), *bins.tolist()]

    def batch(self, row: DrawingRow, model: OrionDecoderModel, device: torch.device) -> DecoderBatch:
        place = model.place(self.num_vectors())
        canvas = Canvas.build(row.num_condition, row.pictures, row.num_text, row.num_tokens, self.generator, place)
        timesteps = self.timesteps(row)
        padded = np.zeros(canvas.row.num_vectors, dtype=np.float32)
        padded[: len(timesteps)] = timesteps
        at_an_end = model.pre_process or model.post_process
        return DecoderBatch(
            canvas=canvas,
            timestep=torch.from_numpy(padded).to(device),
            condition=self._condition(row, place) if model.pre_process else None,
            pictures=self._pictures(row, place) if at_an_end else None,
            loss=self._loss(row, timesteps, canvas, place) if model.post_process else None,
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
            features = _stored(row.features, place)
        elif len(row.grids):
            images = VisionInput.build(row.patches, row.grids, encoder, place.device, place.dtype)
        noise = None if row.condition_noise is None else _floats(row.condition_noise, place)
        return ConditionInput(images, features, _floats(kept, place), _floats(is_source, place), noise)

    def _pictures(self, row: DrawingRow, place: Place) -> PictureInput:
        latents = None if row.latents is None else _stored(row.latents, place)
        pixels = None if latents is not None else _floats(row.pixels, place)
        return PictureInput(pixels, latents, list(grids_of(row.pictures)), _floats(row.noise, place))

    def _loss(self, row: DrawingRow, timesteps: np.ndarray, canvas: Canvas, place: Place) -> LossInput:
        sizes = row.pictures.prod(axis=1)
        weight = np.zeros(len(sizes))
        for size in np.unique(sizes):
            same = torch.from_numpy(timesteps[sizes == size])
            weight[sizes == size] = weights_of(same, self.config.flow, int(size)).numpy()
        values = np.zeros((row.num_tokens - row.num_text, 3))  # weight, counted, bin
        per_picture = np.stack([weight * row.learned, row.learned, bin_of(timesteps)], axis=1)
        values[: sizes.sum()] = np.repeat(per_picture, sizes, axis=0)
        weight_t, counted_t, bin_t = torch.from_numpy(values).to(place.device).index_select(0, canvas.image_index).T
        return LossInput(weight_t.float(), counted_t.float(), bin_t.long())


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
    """Hidden states, and a copy of the vectors for each context rank."""
    return stage.data.sequence_length + stage.system.parallel.context * (num_vectors(stage) or 0)


def _stored(values: np.ndarray, place: Place) -> torch.Tensor:
    """On the device; bfloat16 comes as its bits."""
    tensor = torch.from_numpy(values)
    return (tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor).to(place.device, place.dtype)


def _floats(values: np.ndarray, place: Place) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(place.device, place.dtype, non_blocking=True)
