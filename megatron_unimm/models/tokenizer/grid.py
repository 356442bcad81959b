"""Cells of the grids of packed pictures, and transformer layers over them.

Layout: V cells of all pictures, one behind the other, row by row; T = V rounded up to what sequence parallelism cuts.
The cells that fill it up are a segment of their own.
"""

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_unimm.models.attention import PackedContext, Segments
from megatron_unimm.models.mmdit.canvas import padded_to
from megatron_unimm.models.rotary import grid_angles
from megatron_unimm.models.specs import block_spec, layer_spec
from megatron_unimm.models.vae import from_patches
from megatron_unimm.models.vision.layout import patch_positions


@dataclass(frozen=True)
class CellGrids:
    """The grids of one row, on the device. Made once per micro-batch."""

    sizes: tuple[tuple[int, int], ...]
    """Rows and columns of cells of each picture."""
    num_padded: int
    """T."""
    positions: Tensor
    """int64 ``[2, T]``: row and column of each cell."""
    segments: Segments

    @classmethod
    def build(cls, sizes: np.ndarray, multiple: int, device: torch.device) -> "CellGrids":
        """Of pictures of ``sizes`` int64 ``[n, 2]``; ``multiple`` of ranks cut T."""
        whole = np.concatenate([np.ones((len(sizes), 1), dtype=np.int64), sizes], axis=1)
        positions = patch_positions(whole, merge=1)  # [2, V]
        bounds = np.concatenate([[0], np.cumsum(sizes.prod(axis=1))])
        padding = -bounds[-1] % multiple
        if padding:
            bounds = np.append(bounds, bounds[-1] + padding)
        padded = np.pad(positions, ((0, 0), (0, padding)))
        return cls(
            tuple((int(rows), int(columns)) for rows, columns in sizes),
            int(bounds[-1]),
            torch.from_numpy(padded).to(device, non_blocking=True),
            Segments.build(bounds, causal=False, device=device),
        )

    def context(self, head_size: int, dtype: torch.dtype) -> PackedContext:
        """What layers with heads of this size share."""
        angles = grid_angles(self.positions, head_size)
        return PackedContext.with_angles(angles, dtype, segments={"full": self.segments})

    def by_size(self) -> dict[tuple[int, int], list[int]]:
        """Numbers of the pictures of each size."""
        return {
            size: [number for number, each in enumerate(self.sizes) if each == size]
            for size in dict.fromkeys(self.sizes)
        }

    def pictures(self, cells_VF: Tensor, side: int) -> dict[tuple[int, int], Tensor]:
        """Pictures of each size ``(B, C, rows side, columns side)``, of cells of ``side`` x ``side`` places, each
        (channel, row, column)."""
        parts = cells_VF.split([rows * columns for rows, columns in self.sizes])
        return {
            size: from_patches(torch.stack([parts[number] for number in numbers]), *size, side)
            for size, numbers in self.by_size().items()
        }

    def cells(self, by_size: dict[tuple[int, int], Tensor]) -> Tensor:
        """``[V, F]``, of each size's ``[B, cells, F]``."""
        parts: dict[int, Tensor] = {}
        for size, numbers in self.by_size().items():
            parts |= dict(zip(numbers, by_size[size], strict=True))
        return torch.cat([parts[number] for number in range(len(self.sizes))])


class GridLayers(MegatronModule):
    """Transformer layers in which a picture's cells see one another, and a norm: ``[V, H]`` to ``[V, H]``, whole on
    every rank before and after; tensor parallel inside, and sequence parallel where the config says so.

    Args:
        config: see ``stream_transformer_config``.
    """

    def __init__(self, config: TransformerConfig, backend: str, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.tensor_group = groups.tp
        layers = [layer_spec(backend, causal=False) for _ in range(config.num_layers)]
        self.block = TransformerBlock(config, block_spec(backend, layers), pg_collection=groups)

    def forward(self, cells_VH: Tensor, grids: CellGrids) -> Tensor:
        config = self.config
        assert config.kv_channels is not None
        hidden = padded_to(cells_VH, grids.num_padded)[:, None]  # [T, 1, H]
        if config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.tensor_group)
        context = grids.context(config.kv_channels, hidden.dtype)
        hidden = self.block(hidden, attention_mask=None, packed_seq_params=context)
        if config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tensor_group
            )
        return hidden[: len(cells_VH), 0]
