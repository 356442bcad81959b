"""Rotary positions, computed once per micro-batch and carried to every attention layer.

Megatron-Core's own multimodal rotary knows only the chunked layout and is wrong for packed rows under context
parallelism, so the angles are made here.
Shapes: T tokens, D head size, A axes of position.
"""

import torch
from torch import Tensor

from megatron_unimm.config.model import BackboneConfig


def inverse_frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    """``theta^(-2 i / size)`` for i in 0..size/2-1, float32 ``[size / 2]`` (RoFormer, arXiv 2104.09864)."""
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)


def mrope_angles(position_ids: Tensor, head_size: int, theta: float, sections: list[int], interleaved: bool) -> Tensor:
    """Angles of multimodal rotary positions (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Args:
        position_ids: int ``[3, T]``, time, height, width.
        sections: how many of the head_size / 2 frequencies belong to each axis.
        interleaved: False: the first ``sections[0]`` frequencies are time's, and so on (Qwen2.5-VL). True:
            frequencies cycle through time, height, width until height's and width's share is used up; the rest is
            time's (Qwen3-VL).

    Returns:
        float32 ``[T, head_size / 2]``.
    """
    per_axis = position_ids[:, :, None].float() * inverse_frequencies(
        head_size, theta, position_ids.device
    )  # [3, T, D / 2]
    return per_axis.gather(
        0, _axis_of_frequency(sections, interleaved, position_ids.device).expand(1, per_axis.shape[1], -1)
    )[0]


def token_angles(position_ids: Tensor, model: BackboneConfig) -> Tensor:
    """The decoder's angles for positions ``[3, T]``: float32 ``[T, head_size / 2]``."""
    return mrope_angles(position_ids, model.head_size, model.rope_theta, model.mrope_sections, model.mrope_interleaved)


def _axis_of_frequency(sections: list[int], interleaved: bool, device: torch.device) -> Tensor:
    """int64 ``[D / 2]``: which axis drives each frequency."""
    if not interleaved:
        axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
    else:
        axes = [0] * sum(sections)
        for axis in (1, 2):
            axes[axis : 3 * sections[axis] : 3] = [axis] * len(axes[axis : 3 * sections[axis] : 3])
    return torch.tensor(axes, device=device)


def grid_angles(position_ids: Tensor, head_size: int, theta: float = 10000.0) -> Tensor:
    """Angles of 2-D rotary positions in a vision tower: the first half of the frequencies for the row, the second
    for the column.

    Args:
        position_ids: int ``[2, P]``, row and column of each patch.

    Returns:
        float32 ``[P, head_size / 2]``.
    """
    per_axis = position_ids[:, :, None].float() * inverse_frequencies(
        head_size // 2, theta, position_ids.device
    )  # [2, P, D / 4]
    return torch.cat([per_axis[0], per_axis[1]], dim=-1)


def rotate(heads_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate each head: pairs are (i, i + D / 2), as in Hugging Face's Qwen models.

    Args:
        heads_TND: ``[T, heads, D]``.
        cos_TD: ``[T, D / 2]``.
    """
    first, second = heads_TND.chunk(2, dim=-1)
    cos, sin = cos_TD[:, None, :], sin_TD[:, None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
