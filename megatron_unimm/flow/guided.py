"""The guided velocity of pictures that are drawn together. They stand in a row k times, once per condition, each time
with the pictures before them, which stay as they are.

Legend  n pictures of u image tokens each, U image tokens of a row, F values of a patch of latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.flow.guidance import combined, guided_at
from megatron_unimm.models.mmdit.frames import Frames


@dataclass(frozen=True)
class FrameState:
    """Latents of a row's frames: the last frame of each sample is drawn and changes from step to step, the others look
    as they are, whether they are there clean or at t = 0."""

    base: Tensor
    """float32 ``[U, F]``: of the pictures before; zeros for those that are drawn."""
    drawn: Tensor
    """int64 ``[k n u]``: where these are."""
    is_drawn: Tensor
    """bool, of each frame."""

    @classmethod
    def build(cls, frames: Frames, clean: Tensor | None, width: int, device: torch.device) -> "FrameState":
        """From frames on the host.

        Args:
            clean: ``[U', F]`` of the clean frames, one behind the other; None puts zeros in place of all before.
            width: F.
        """
        is_last = frames.is_last
        is_drawn = torch.from_numpy(np.repeat(is_last, frames.counts)).to(device)
        base = torch.zeros(len(is_drawn), width, device=device)
        if clean is not None:
            places = torch.from_numpy(frames.clean_places(np.flatnonzero(~is_last))).to(device)
            base[~is_drawn] = clean.float().index_select(0, places)
        return cls(base, is_drawn.nonzero()[:, 0], torch.from_numpy(is_last).to(device))

    def at(self, drawn: Tensor) -> Tensor:
        """``[U, F]`` with the state ``[k n u, F]`` of what is drawn."""
        return self.base.index_copy(0, self.drawn, drawn)


@dataclass(frozen=True)
class GuidedRow:
    """A row, and the network on it."""

    state: FrameState
    run: Callable[[Tensor, Tensor], Tensor]
    """The velocity ``[U, F]`` of a state ``[U, F]`` at each frame's timestep, float32."""


class GuidedFrames:
    """The guided velocity of pictures of one size.

    Args:
        build: lays the row of the first so many conditions, the fullest one first.
        num_conditions: k where guidance is on; elsewhere it is 1.
    """

    def __init__(self, build: Callable[[int], GuidedRow], num_conditions: int, sampler: SamplerConfig) -> None:
        self.num_conditions = num_conditions
        self.sampler = sampler
        self.rows = {times: build(times) for times in {1, num_conditions}}

    def velocity(self, state_nuF: Tensor, t: float) -> Tensor:
        """``[n, u, F]`` float32."""
        times = self.num_conditions if guided_at(t, self.sampler.guidance_interval) else 1
        row = self.rows[times]
        state = row.state.at(state_nuF.flatten(0, 1).repeat(times, 1))
        velocity = row.run(state, row.state.is_drawn.float() * t)
        parts = velocity.index_select(0, row.state.drawn).float().reshape(times, *state_nuF.shape)
        return combined(list(parts), self.sampler)
