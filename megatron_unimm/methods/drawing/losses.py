"""What a diffusion transformer learns: flow matching (arXiv 2210.02747, 2209.03003), E ‖v(x_t, t, V) − (ε − x_0)‖²
w(t).

The square is averaged over the values of a patch; the sum over image tokens is divided by their number in the global
batch, once per step. Beside the loss itself stand its parts by timestep, unweighted by w: a model that learns shows
first near noise, and last near data.
"""

import numpy as np
import torch
from torch import Tensor

NUM_BINS = 10
TERMS = ("flow", *(f"flow/t_{number / NUM_BINS:.1f}" for number in range(NUM_BINS)))
"""The loss, and its parts by timestep: ``flow/t_0.3`` is of timesteps in [0.3, 0.4)."""
WEIGHTS = (1.0, *(0.0,) * NUM_BINS)


def bin_of(timesteps: np.ndarray) -> np.ndarray:
    """int64: which part each timestep belongs to."""
    return np.minimum((timesteps * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def flow_matching_loss(
    velocity_tF: Tensor, target_tF: Tensor, weight_t: Tensor, counted_t: Tensor, bin_t: Tensor
) -> Tensor:
    """Sums over tokens, float32 ``[terms]`` in the order of :data:`TERMS`.

    Args:
        weight_t: w(t) of each token's picture, 0 where nothing is learned.
        counted_t: 1, or 0 where nothing is learned. bin_t: int64.
    """
    error = (velocity_tF.float() - target_tF.float()).square().mean(dim=-1)  # [t]
    parts = error.new_zeros(NUM_BINS).index_add(0, bin_t, error.detach() * counted_t)
    return torch.cat([(error * weight_t).sum()[None], parts])
