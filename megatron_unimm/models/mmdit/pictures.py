"""The pictures of a row's image stream as grids, for layers that look at a token's neighbours.

Legend  U image tokens without padding, F values per token.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class GridBatch(NamedTuple):
    """Pictures of one size, computed as a batch."""

    num_pictures: int
    rows: int
    columns: int


@dataclass(frozen=True)
class PictureBatches:
    """A row's pictures by size."""

    index: Tensor
    """int64 ``[U]``: tokens of the image stream, picture by picture in the order of ``batches``; all but padding."""
    batches: tuple[GridBatch, ...]
    """At least one, if it is of no pictures: what is computed on it has gradients (zeros)."""

    @classmethod
    def build(cls, sizes: np.ndarray, device: torch.device) -> "PictureBatches":
        """Of pictures one behind the other.

        Args:
            sizes: int64 ``[n, 2]``: rows and columns of tokens of each.
        """
        starts = np.cumsum([0, *sizes.prod(axis=1)])
        grids = [(int(rows), int(columns)) for rows, columns in sizes]
        order = sorted(range(len(grids)), key=lambda number: grids[number])
        index = [np.arange(starts[number], starts[number + 1]) for number in order]
        same = groupby(grids[number] for number in order)
        return cls(
            torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *index])).to(device, non_blocking=True),
            tuple(GridBatch(len(list(group)), *grid) for grid, group in same) or (GridBatch(0, 1, 1),),
        )

    def grids(self, tokens_UF: Tensor) -> list[Tensor]:
        """``[num_pictures, rows, columns, F]`` of each size, from tokens in the order of ``index``."""
        parts = tokens_UF.split([batch.num_pictures * batch.rows * batch.columns for batch in self.batches])
        width = tokens_UF.shape[1]
        return [part.reshape(*batch, width) for part, batch in zip(parts, self.batches, strict=True)]
