"""Weights of the flow-matching loss by timestep: ``[n]`` in, ``[n]`` out, on the timesteps' device."""

import math

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.flow import FlowConfig
from megatron_unimm.flow.timesteps import timesteps_of


def weights_of(t: Tensor, config: FlowConfig, num_tokens: int) -> Tensor:
    """Weights of timesteps ``t`` that were drawn for images of ``num_tokens`` tokens."""
    match config.weighting:
        case "uniform":
            return torch.ones_like(t)
        case "cosmap":
            return cosmap(t)
        case "sigma_sqrt":
            return sigma_sqrt(t)
        case "gaussian":
            # Midpoints of 1000 strata stand for the distribution that t was drawn from.
            drawn = timesteps_of((np.arange(1000) + 0.5) / 1000, config.timesteps, num_tokens)
            return bump(t) / bump(torch.from_numpy(drawn)).mean().item()


def cosmap(t: Tensor) -> Tensor:
    """2 / (π (1 - 2t + 2t²)), the density called CosMap in arXiv 2403.03206, section 3.1, as a weight: 4/π in the
    middle, half of that at both ends."""
    return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


def sigma_sqrt(t: Tensor) -> Tensor:
    """1/t²: the name and formula are diffusers'. Unbounded near data."""
    return t**-2


def bump(t: Tensor) -> Tensor:
    """exp(-2 (t - 1/2)²) - exp(-1/2): Nexus-Gen's weight before its normalisation, 0 at t = 0 and t = 1.

    DiffSynth, which Nexus-Gen trains with, subtracts the smallest of 1000 shifted timesteps, which is the one at t = 1,
    and then makes the mean over them 1.
    """
    return torch.exp(-2 * (t - 0.5) ** 2) - math.exp(-0.5)
