"""Skipping steps with anomalous gradients (ORION, section 4.1), decided on the device."""

import torch
from torch import Tensor

from megatron_unimm.config.train import SpikeConfig


class SpikeGuard:
    """Keeps a running mean of the gradient norm and says, as a device tensor, whether this step must be skipped.

    All ranks see the same norm (it is summed over the world), so all decide the same without talking. State is a
    float32 ``[4]`` tensor:
    running mean, good steps seen, skipped steps in all, skipped steps in a row.
    """

    def __init__(self, config: SpikeConfig, device: torch.device) -> None:
        self.config = config
        self.state = torch.zeros(4, device=device)

    @torch.no_grad()
    def judge(self, norm: Tensor) -> Tensor:
        """1.0 to skip, 0.0 to go on; feeds the mean with good steps only. ``norm`` is a float32 scalar."""
        mean, seen, skipped, in_a_row = self.state.unbind()
        spike = (seen >= self.config.warmup_steps) & (norm > self.config.factor * mean)
        skip = (~norm.isfinite() | spike).float()
        good = 1.0 - skip
        first = (seen == 0).float()
        decay = self.config.decay * (1 - first)
        new_mean = torch.where(skip.bool(), mean, decay * mean + (1 - decay) * torch.nan_to_num(norm))
        self.state = torch.stack([new_mean, seen + good, skipped + skip, (in_a_row + skip) * skip])
        return skip

    @property
    def skipped(self) -> Tensor:
        """Skipped steps so far, float32 scalar on the device."""
        return self.state[2]

    @property
    def in_a_row(self) -> Tensor:
        return self.state[3]
