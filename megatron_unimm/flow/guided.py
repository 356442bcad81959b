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
    """Latents of a row's frames, of which those that are drawn change from step to step."""

    base: Tensor
    """float32 ``[U, F]``: of the pictures before; zeros where there is noise."""
    noisy: Tensor
    """int64 ``[k n u]``: where that is."""
    is_noisy: Tensor
    """bool, of each frame."""

    @classmethod
    def build(cls, frames: Frames, clean: Tensor | None, width: int, device: torch.device) -> "FrameState":
        """From frames on the host.

        Args:
            clean: ``[U', F]`` of the clean frames, one behind the other; None puts zeros in their place.
            width: F.
        """
        is_clean = torch.from_numpy(np.repeat(frames.is_clean, frames.counts)).to(device)
        base = torch.zeros(len(is_clean), width, device=device)
        if clean is not None:
            base[is_clean] = clean.float()
        return cls(base, (~is_clean).nonzero()[:, 0], torch.from_numpy(~frames.is_clean).to(device))

    def at(self, noisy: Tensor) -> Tensor:
        """``[U, F]`` with the state ``[k n u, F]`` of what is drawn."""
        return self.base.index_copy(0, self.noisy, noisy)


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
        velocity = row.run(state, row.state.is_noisy.float() * t)
        parts = velocity.index_select(0, row.state.noisy).float().reshape(times, *state_nuF.shape)
        return combined(list(parts), self.sampler)
