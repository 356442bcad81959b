"""SigLIP's vision tower as Megatron-Core layers: images in, features of their patches out.

Layout: P patches of N images one after another, row by row, ``[P, 1, H]`` between the layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_unimm.config.model import SiglipConfig
from megatron_unimm.models.attention import PackedContext, Segments
from megatron_unimm.models.specs import block_spec, layer_spec


@dataclass(frozen=True)
class SiglipInput:
    """Images on the device."""

    patches: Tensor
    """``[P, patch_dim]`` in the computing dtype; a patch is (channel, row, column)."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of patches of each image."""
    context: PackedContext

    @classmethod
    def from_pixels(cls, images: list[Tensor], patch_size: int) -> "SiglipInput":
        """Cut normalised images ``(C, H, W)``, their sides multiples of ``patch_size``, to patches."""
        parts, grids = [], []
        for image in images:
            channels, height, width = image.shape
            rows, columns = height // patch_size, width // patch_size
            cut = image.reshape(channels, rows, patch_size, columns, patch_size).permute(1, 3, 0, 2, 4)
            parts.append(cut.reshape(rows * columns, -1))
            grids.append((rows, columns))
        bounds = np.cumsum([0, *(rows * columns for rows, columns in grids)])
        segments = {"full": Segments.build(bounds, causal=False, device=parts[0].device)}
        return cls(torch.cat(parts), tuple(grids), PackedContext(segments=segments))

    @classmethod
    def from_patches(
        cls, patches: np.ndarray, sizes: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype
    ) -> "SiglipInput":
        """From the loader's arrays: float32 ``[P, patch_dim]`` of images with ``sizes`` rows and columns of patches."""
        bounds = np.cumsum([0, *(rows * columns for rows, columns in sizes)])
        segments = {"full": Segments.build(bounds, causal=False, device=device)}
        on_device = torch.from_numpy(patches).to(device, dtype, non_blocking=True)
        return cls(on_device, tuple(sizes), PackedContext(segments=segments))


class SiglipVisionEncoder(MegatronModule):
    """Patch embedding with learned positions, full attention blocks, a norm (arXiv 2303.15343; a ViT of arXiv
    2010.11929), and a pooling head."""

    def __init__(
        self, model: SiglipConfig, config: TransformerConfig, backend: str, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.model = model
        self.patch_embed = torch.nn.Linear(model.patch_dim, model.hidden_size)
        self.position_embed = torch.nn.Embedding(model.num_position_embeddings, model.hidden_size)
        layers = [layer_spec(backend, causal=False) for _ in range(model.num_layers)]
        self.blocks = TransformerBlock(config, block_spec(backend, layers), pg_collection=groups)
        if model.pooling_head:
            self.pooling_head = AttentionPooling(model)

    def forward(self, images: SiglipInput) -> Tensor:
        """Features ``[P, H]`` of all patches: transformers' ``last_hidden_state``."""
        hidden = self.patch_embed(images.patches) + self._positions(images.grids)  # [P, H]
        return self.blocks(hidden[:, None], attention_mask=None, packed_seq_params=images.context)[:, 0]  # [P, H]

    def pool(self, features_PH: Tensor, images: SiglipInput) -> Tensor:
        """One vector per image, ``[N, H]``: transformers' ``pooler_output``."""
        return self.pooling_head(features_PH, [rows * columns for rows, columns in images.grids])

    def _positions(self, grids: tuple[tuple[int, int], ...]) -> Tensor:
        """Learned positions ``[P, H]``, resampled where an image's grid is not the table's."""
        side = math.isqrt(self.model.num_position_embeddings)
        table = self.position_embed.weight
        square = table.T.reshape(1, -1, side, side).float()  # antialiasing has no bf16 kernel on CPU
        resampled = {grid: table if grid == (side, side) else self._resample(square, grid) for grid in set(grids)}
        return torch.cat([resampled[grid].to(table.dtype) for grid in grids])

    def _resample(self, table_1Hss: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.model.family == "siglip":
            resized = F.interpolate(table_1Hss, grid, mode="bicubic", align_corners=False)
        else:
            resized = F.interpolate(table_1Hss, grid, mode="bilinear", align_corners=False, antialias=True)
        return resized[0].flatten(1).T  # [rows columns, H]


class AttentionPooling(torch.nn.Module):
    """A learned query attends to an image's patches (arXiv 2303.15343, MAP head). Whole on every tensor-parallel
    rank."""

    def __init__(self, model: SiglipConfig) -> None:
        super().__init__()
        size = model.hidden_size
        self.probe = torch.nn.Parameter(torch.zeros(1, 1, size))
        self.attention = torch.nn.MultiheadAttention(size, model.num_heads, batch_first=True)
        self.norm = torch.nn.LayerNorm(size, eps=model.norm_epsilon)
        self.linear_fc1 = torch.nn.Linear(size, model.mlp_size)
        self.linear_fc2 = torch.nn.Linear(model.mlp_size, size)

    def forward(self, features_PH: Tensor, lengths: list[int]) -> Tensor:
        """Images of ``lengths`` patches each to ``[N, H]``."""
        pooled = [self.attention(self.probe, part[None], part[None])[0] for part in features_PH.split(lengths)]
        hidden = torch.cat(pooled)[:, 0]  # [N, H]
        return hidden + self.linear_fc2(F.gelu(self.linear_fc1(self.norm(hidden)), approximate="tanh"))
