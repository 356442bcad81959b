"""What a diffusion transformer is conditioned on beside pictures: words and visual latents, each by its own way
(MMCORE, arXiv 2604.19902, section 3.1.1, iii).

Legend  V words, Q visual latents; H width of a word's hidden state, D of a visual latent, C of the condition.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_unimm.models.mmdit.embedding import sincos_table


class Pathway(nn.Module):
    """RMSNorm, Linear, GELU, Linear. The norm, because hidden states of a language model have large and uneven
    magnitudes, and eq. 1 leaves the length of a visual latent open; what the paper projects with, it does not say.
    Whole on every rank."""

    def __init__(self, in_size: int, condition_size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(in_size, eps=1e-6)
        self.linear_1 = nn.Linear(in_size, condition_size)
        self.linear_2 = nn.Linear(condition_size, condition_size)

    def forward(self, values_nF: Tensor, kept_n: Tensor) -> Tensor:
        """``[n, C]``; nothing is what zeros in place of the values stand for.

        Args:
            kept_n: 0 where a value is left out.
        """
        kept = self.norm(values_nF) * kept_n[:, None].to(values_nF.dtype)
        return self.linear_2(F.gelu(self.linear_1(kept)))


class DualPathway(nn.Module):
    """The condition of a frame: all its words, and its N visual latents.

    Visual latents are told apart by a vector of their place in the grid, sines and cosines of rows and columns at first
    (as SD3 has for patches) and learned from there: from zeros it took long until a patch found its latent. The pooled
    condition, which text encoders gave the pretrained model, is a weight: one vector for all frames.
    """

    def __init__(
        self, word_size: int, latent_size: int, grid: tuple[int, int], condition_size: int, pooled_size: int
    ) -> None:
        super().__init__()
        self.text = Pathway(word_size, condition_size)
        self.visual = Pathway(latent_size, condition_size)
        side = max(grid)
        places = sincos_table(condition_size, side, side).unflatten(0, (side, side))[: grid[0], : grid[1]]
        self.place = nn.Parameter(places.flatten(0, 1).clone())  # [N, C]
        self.pooled = nn.Parameter(torch.zeros(pooled_size))

    def forward(
        self, words_VH: Tensor, text_kept_V: Tensor, latents_QD: Tensor, visual_kept_Q: Tensor, order: Tensor
    ) -> Tensor:
        """``[V + Q, C]`` in the order of the text stream.

        Args:
            order: int64 ``[V + Q]``: places among the words, then the latents.
        """
        text = self.text(words_VH, text_kept_V)  # [V, C]
        places = self.place.repeat(len(latents_QD) // len(self.place), 1)  # [Q, C]
        visual = self.visual(latents_QD, visual_kept_Q) + places  # [Q, C]
        return torch.cat([text, visual]).index_select(0, order)

    def guided(
        self,
        words_VH: Tensor,
        spoken_V: Tensor,
        latents_QD: Tensor,
        shown_Q: Tensor,
        order: Tensor,
        num_conditions: int,
    ) -> Tensor:
        """The conditions that a guided velocity is made of, one behind the other: words and visual latents, visual
        latents, neither; ``[num_conditions (V + Q), C]``.

        Args:
            spoken_V, shown_Q: bool; other words and visual latents are left out of all.
        """
        parts = [
            self(words_VH, spoken_V & (number == 0), latents_QD, shown_Q & (number < 2), order)
            for number in range(num_conditions)
        ]
        return torch.cat(parts)
