"""What a vision encoder sees of earlier pictures, beside their latents (MMCORE, arXiv 2604.19902, section 4.3, "Impact
of Visual Latents on Conditional VAEs": "augmenting the conditional VAE's DiT encoder features").

The paper does not say how. Here each clean token gets the visual token over its centre, through a norm and a linear
layer that is zero at the start, so that the pretrained transformer begins as it is.

Legend  V visual tokens of all pictures that are read, D their width, U image tokens of the row, H hidden size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from megatron_unimm.models.mmdit.frames import Frames


class VitFeatures(nn.Module):
    """RMSNorm, as in pathways, and Linear. Whole on every rank."""

    def __init__(self, feature_size: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(feature_size, eps=1e-6)
        self.linear = nn.Linear(feature_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features_VD: Tensor, places: "FeaturePlaces") -> Tensor:
        """``[U, H]``, to be added to image tokens; zeros where they are noisy."""
        chosen = self.linear(self.norm(features_VD.index_select(0, places.feature)))
        return chosen.new_zeros(places.num_tokens, chosen.shape[1]).index_copy(0, places.token, chosen)


@dataclass(frozen=True)
class FeaturePlaces:
    """Which image tokens get something, and what."""

    token: Tensor
    """int64: clean ones of the U."""
    feature: Tensor
    """int64: of the V, for each of these."""
    num_tokens: int
    """U."""

    @classmethod
    def build(cls, frames: Frames, grids: np.ndarray, device: torch.device) -> "FeaturePlaces":
        """For a row whose clean frames are the pictures that are read, in their order.

        Args:
            grids: int64 ``[clean frames, 2]``: rows and columns of each one's visual tokens.
        """
        assert len(grids) == frames.is_clean.sum(), (len(grids), frames.is_clean)
        starts = np.cumsum([0, *grids.prod(axis=1)])
        found = [
            start + nearest(tuple(size), tuple(grid))
            for start, size, grid in zip(starts, frames.sizes[frames.is_clean], grids, strict=False)
        ]
        feature = np.concatenate([np.zeros(0, dtype=np.int64), *found])
        token = np.flatnonzero(np.repeat(frames.is_clean, frames.counts))
        return cls(
            *(torch.from_numpy(values).to(device, non_blocking=True) for values in (token, feature)),
            num_tokens=int(frames.counts.sum()),
        )


def nearest(size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Of each cell of ``size`` (rows, columns), row by row, the cell of ``grid`` over the same picture that its centre
    lies in: int64."""
    row, column = (
        np.floor((np.arange(cells) + 0.5) * of / cells).astype(np.int64) for cells, of in zip(size, grid, strict=True)
    )
    return (row[:, None] * grid[1] + column[None]).reshape(-1)
