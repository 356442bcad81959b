"""What methods that draw have in common for the shared loop: timesteps, counts, and rows on the device.

Legend  n frames of a row, U image tokens, F values of a patch of latents.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.flow import FlowConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.flow.timesteps import timesteps_of
from megatron_unimm.flow.weighting import weights_of
from megatron_unimm.methods.drawing.losses import NUM_BINS, bin_of
from megatron_unimm.methods.drawing.model import LossInput
from megatron_unimm.models.mmdit.canvas import Canvas, Frames, Place


class FlowRow(Protocol):
    """A row of frames, as far as flow matching goes."""

    @property
    def num_text(self) -> int:
        """Tokens of the text stream, padding included."""
        ...

    @property
    def num_tokens(self) -> int:
        """Of both streams."""
        ...

    @property
    def frames(self) -> Frames: ...

    @property
    def uniform(self) -> np.ndarray:
        """float64 ``[n]`` in (0, 1): become timesteps by the stage's distribution."""
        ...

    @property
    def learned(self) -> np.ndarray:
        """bool ``[n]``: frames that something is learned of."""
        ...


def frame_timesteps(row: FlowRow, flow: FlowConfig) -> np.ndarray:
    """float64 ``[n]``: of each frame, by the stage's distribution; a shift may go by the frame's size. Clean frames are
    at 0."""
    frames, found = row.frames, np.zeros(len(row.frames))
    for size in np.unique(frames.counts):
        same = frames.counts == size
        found[same] = timesteps_of(row.uniform[same], flow.timesteps, int(size))
    return np.where(frames.is_clean, 0.0, found)


def learned_counts(rows: Sequence[FlowRow], flow: FlowConfig) -> list[int]:
    """Image tokens that are learned: of all frames, then by timestep."""
    bins = np.zeros(NUM_BINS, dtype=np.int64)
    for row in rows:
        np.add.at(bins, bin_of(frame_timesteps(row, flow)), row.frames.counts * row.learned)
    return [int(bins.sum()), *bins.tolist()]


def rows_between_stages(stage: StageConfig, num_vectors: int | None) -> int:
    """Hidden states, and a copy of the vectors for each context rank."""
    assert stage.generator is not None
    vectors = (num_vectors or 0) * stage.generator.mmdit.rows_per_vector
    return stage.data.sequence_length + stage.system.parallel.context * vectors


def timestep_vectors(timesteps: np.ndarray, canvas: Canvas, place: Place) -> Tensor:
    """float32, one per conditioning vector; zeros behind."""
    padded = np.zeros(canvas.row.num_vectors, dtype=np.float32)
    padded[: len(timesteps)] = timesteps
    return torch.from_numpy(padded).to(place.device)


def loss_input(row: FlowRow, timesteps: np.ndarray, flow: FlowConfig, canvas: Canvas, place: Place) -> LossInput:
    """What the last stage weighs its tokens by."""
    sizes = row.frames.counts
    weight = np.zeros(len(sizes))
    for size in np.unique(sizes):
        same = (sizes == size) & row.learned
        weight[same] = weights_of(torch.from_numpy(timesteps[same]), flow, int(size)).numpy()
    values = np.zeros((row.num_tokens - row.num_text, 3))  # weight, counted, bin
    per_frame = np.stack([weight, row.learned, bin_of(timesteps)], axis=1)
    values[: sizes.sum()] = np.repeat(per_frame, sizes, axis=0)
    weight_t, counted_t, bin_t = torch.from_numpy(values).to(place.device).index_select(0, canvas.image_index).T
    return LossInput(weight_t.float(), counted_t.float(), bin_t.long())


def stored(values: np.ndarray, place: Place) -> Tensor:
    """What was computed beforehand, on the device; bfloat16 comes as its bits."""
    tensor = torch.from_numpy(values)
    return (tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor).to(place.device, place.dtype)


def floats(values: np.ndarray, place: Place) -> Tensor:
    """Numbers in the computing dtype."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(place.device, place.dtype, non_blocking=True)
