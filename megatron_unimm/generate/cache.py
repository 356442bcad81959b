"""Keys and values of a batch of sequences that grow together, for the layers of one pipeline stage.

Legend  B sequences, t new tokens of all of them, n the most new tokens of one, S the most tokens stored of one,
N heads, G groups of heads that share keys and values, R = N / G, D head size.

Every forward pass brings some new tokens of every sequence, one sequence after another: whole prompts at first, then
one token each. Drawn for stored lengths 2 and 0 and for 1 and 2 new tokens, ``+`` what is appended and q the queries,
padded to n = 2::

    slots   0 1 2    queries      query sees
    seq 0   k k +    q0 .         [1 1 1] [1 1 1]
    seq 1   + +      q0 q1        [1 0 0] [1 1 0]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class _Growth:
    """Where the new tokens of one forward pass go; the same for every layer."""

    sequence: Tensor
    """int64 ``[t]``."""
    slot: Tensor
    """int64 ``[t]``: place in the stored sequence."""
    query: Tensor
    """int64 ``[t]``: place among the sequence's new tokens."""
    num_queries: int
    """n."""
    num_stored: int
    """S, with the new tokens."""
    mask: Tensor
    """bool ``[B, n, S]``, True attends."""


class SequenceCache:
    """A ``KeyValueStore`` (models/attention.py). Call :meth:`grow` before each forward pass.

    Layers are known by their global number and get their storage ``[B, max_length, G, D]`` when they first come by, so
    that a pipeline stage stores its own only.

    Args:
        num_sequences: B.
        max_length: room for tokens of each sequence.
    """

    def __init__(self, num_sequences: int, max_length: int, device: torch.device) -> None:
        self.lengths = np.zeros(num_sequences, dtype=np.int64)
        self.max_length = max_length
        self.device = device
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._growth: _Growth | None = None

    def grow(self, counts: Sequence[int]) -> None:
        """Announce the new tokens of the next forward pass: how many of each sequence, at least one."""
        num_new, starts = np.asarray(counts, dtype=np.int64), self.lengths
        assert len(num_new) == len(starts), f"{counts} new tokens for {len(starts)} sequences"
        assert num_new.min() > 0, f"{counts} new tokens: every sequence that is kept gets some"
        self.lengths = starts + num_new
        assert self.lengths.max() <= self.max_length, f"{self.lengths.max()} tokens, but room for {self.max_length}"
        sequence = np.repeat(np.arange(len(num_new)), num_new)
        query = np.arange(num_new.sum()) - np.repeat(np.cumsum(num_new) - num_new, num_new)
        places = torch.from_numpy(np.stack([sequence, query + starts[sequence], query])).to(self.device)
        num_queries, num_stored = int(num_new.max()), int(self.lengths.max())
        first = torch.from_numpy(starts).to(self.device)
        last_seen = first[:, None] + torch.arange(num_queries, device=self.device)  # [B, n]
        mask = torch.arange(num_stored, device=self.device) <= last_seen[..., None]  # [B, n, S]
        self._growth = _Growth(places[0], places[1], places[2], num_queries, num_stored, mask)

    @property
    def slots(self) -> Tensor:
        """int64 ``[t]``: place of each new token in its sequence."""
        assert self._growth is not None, "grow() comes before the forward pass"
        return self._growth.slot

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all sequences but these, which take the places 0, 1, ... in this order."""
        self.lengths = self.lengths[list(rows)]
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self._layers = {number: (keys[chosen], values[chosen]) for number, (keys, values) in self._layers.items()}

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Store ``[t, G, D]`` keys and values, attend ``[t, N, D]`` queries to what their sequence has up to
        themselves.

        Returns:
            ``[t, N, D]``.
        """
        growth = self._growth
        assert growth is not None, "grow() comes before the forward pass"
        keys, values = self._stored(layer_number, key)
        keys[growth.sequence, growth.slot] = key
        values[growth.sequence, growth.slot] = value
        batch, groups = len(self.lengths), key.shape[1]
        num_heads, size = query.shape[1:]
        repeats = num_heads // groups
        padded = query.new_zeros(batch, growth.num_queries, num_heads, size)
        padded[growth.sequence, growth.query] = query
        # Heads that share keys stand as further queries, so that keys and values are not repeated in memory.
        grouped = padded.unflatten(2, (groups, repeats)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, R n, D]
        mask = growth.mask[:, None, None].expand(-1, -1, repeats, -1, -1).flatten(2, 3)  # [B, 1, R n, S]
        attended = F.scaled_dot_product_attention(
            grouped,
            keys[:, : growth.num_stored].transpose(1, 2),  # [B, G, S, D]
            values[:, : growth.num_stored].transpose(1, 2),
            attn_mask=mask,
            scale=scale,
        )
        by_query = (
            attended.unflatten(2, (repeats, growth.num_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        )  # [B, n, N, D]
        return by_query[growth.sequence, growth.query]

    def _stored(self, layer_number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if layer_number not in self._layers:
            shape = (len(self.lengths), self.max_length, *like.shape[1:])
            # Zeros, not empty: a masked slot still enters the products, and NaN times 0 is NaN.
            self._layers[layer_number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[layer_number]
