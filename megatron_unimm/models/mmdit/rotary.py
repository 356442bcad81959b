"""Rotary positions of FLUX: one block of frequencies per axis, rotating neighbouring pairs.

Shapes: T tokens, N heads, D head size, A axes of position.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def axes_angles(position_ids: Tensor, axes_dims: Sequence[int], theta: float) -> Tensor:
    """Angles of each token: the first ``axes_dims[0] / 2`` are turned by the first axis, and so on.

    Args:
        position_ids: ``[A, T]``; FLUX has an index, row and column (text: zeros).

    Returns:
        float32 ``[T, sum(axes_dims) / 2]``, between 0 and 2 pi.
    """
    assert len(position_ids) == len(axes_dims), f"{len(position_ids)} axes of position for axes_dims {axes_dims}"
    blocks = []
    for positions, size in zip(position_ids, axes_dims, strict=True):
        exponents = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
        blocks.append(positions.double()[:, None] * theta**-exponents)
    # In double, as diffusers does, and to one turn before rounding: a large position keeps its angle's last digits.
    return torch.cat(blocks, dim=-1).remainder(2 * math.pi).float()


def rotate_pairs(heads_TND: Tensor, cos_TD2: Tensor, sin_TD2: Tensor) -> Tensor:
    """Rotate each head: pairs are (2 i, 2 i + 1), as in FLUX.

    Args:
        heads_TND: ``[T, N, D]``.
        cos_TD2: ``[T, D / 2]``; in float32 the products are too, whatever the dtype of the heads.

    Returns:
        ``[T, N, D]`` in the dtype of the heads.
    """
    even, odd = heads_TND.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TD2[:, None, :], sin_TD2[:, None, :]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(heads_TND.dtype)
