"""What enters an MMDiT: patches of latents with their positions, the condition's tokens, and the conditioning vector.

Legend  n conditioning vectors of a row, H hidden size, T tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_unimm.config.mmdit import DiffusionTransformerConfig, MMDiTConfig, Sd3Config

NUM_FREQUENCIES = 128
MAX_PERIOD = 10000.0
TIMESTEP_SCALE = 1000.0
"""Timesteps in [0, 1] are embedded as the numbers of a thousand steps, as the published weights have learned them."""


class VectorEmbedder(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, in_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, values_nF: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(values_nF)))  # [n, H]


class ConditioningVector(nn.Module):
    """The vector that modulates all blocks: of the timestep, the pooled condition, and FLUX's guidance scale."""

    def __init__(self, model: MMDiTConfig, guidance: bool) -> None:
        super().__init__()
        self.timestep_embedder = VectorEmbedder(2 * NUM_FREQUENCIES, model.hidden_size)
        self.pooled_embedder = VectorEmbedder(model.pooled_size, model.hidden_size)
        if guidance:
            self.guidance_embedder = VectorEmbedder(2 * NUM_FREQUENCIES, model.hidden_size)
        self.has_guidance = guidance

    def forward(self, timestep_n: Tensor, pooled_nF: Tensor, guidance_n: Tensor | None) -> Tensor:
        """``[n, H]``.

        Args:
            timestep_n: float32 in [0, 1]. guidance_n: float32, the scale; only where the model has that input.
        """
        dtype = pooled_nF.dtype
        vector = self.timestep_embedder(sinusoid(timestep_n * TIMESTEP_SCALE).to(dtype))  # [n, H]
        if self.has_guidance:
            assert guidance_n is not None, "a guidance-distilled model wants the scale as an input"
            vector = vector + self.guidance_embedder(sinusoid(guidance_n * TIMESTEP_SCALE).to(dtype))
        return vector + self.pooled_embedder(pooled_nF)


class LatentEmbedder(nn.Module):
    """Patches of latents to tokens; SD3 adds a fixed table of positions, FLUX rotates queries and keys instead, and
    SANA's convolutions see what is beside what."""

    position_table: Tensor

    def __init__(self, model: DiffusionTransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(model.patch_dim, model.hidden_size)
        self.has_table = isinstance(model, Sd3Config)
        if isinstance(model, Sd3Config):
            table = sincos_table(model.hidden_size, model.position_grid, model.base_grid)
            self.register_buffer("position_table", table)  # in checkpoints, as in the published ones

    def forward(self, patches_TF: Tensor, position_index: Tensor | None) -> Tensor:
        """``[T, H]``; ``position_index`` int64 ``[T]``: rows of the table."""
        hidden = self.linear(patches_TF)
        if self.has_table:
            assert position_index is not None
            hidden = hidden + self.position_table.index_select(0, position_index).to(hidden.dtype)
        return hidden


def sinusoid(values_n: Tensor) -> Tensor:
    """Cosines, then sines, of falling frequencies: float32 ``[n, 2 · 128]``."""
    exponents = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=values_n.device) / NUM_FREQUENCIES
    angles = values_n.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_table(size: int, grid: int, base_grid: int) -> Tensor:
    """Fixed positions of a square of ``grid`` x ``grid`` patches, row by row: float32 ``[grid², size]``.

    Columns fill the first half, rows the second, each with sines and then cosines (arXiv 2111.06377). Coordinates are
    scaled so that ``base_grid`` patches span what they did when the model first learned (arXiv 2403.03206, section
    5.3.2).
    """
    frequencies = 1.0 / MAX_PERIOD ** (torch.arange(size // 4, dtype=torch.float64) / (size / 4))
    places = torch.arange(grid, dtype=torch.float32) / (grid / base_grid)
    angles = places.double()[:, None] * frequencies  # [grid, size / 4]
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [grid, size / 2]
    columns = line[None].expand(grid, grid, -1)
    rows = line[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(grid * grid, size).float()
