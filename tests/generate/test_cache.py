"""The cache against plain causal attention over each sequence alone."""

import pytest
import torch
from torch import Tensor

from megatron_unimm.generate.cache import SequenceCache

N, G, D = 4, 2, 8


def tokens(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values of ``count`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, heads, D, generator=generator) for heads in (N, G, G))  # type: ignore[return-value]


def alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one sequence ``[L, N, D]``, written out."""
    key, value = (t.repeat_interleave(N // G, dim=1) for t in (key, value))
    scores = torch.einsum("qnd,knd->nqk", query, key) / D**0.5
    scores += torch.full(scores.shape[1:], float("-inf")).triu(1)
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1), value)


def test_growing_sequences_attend_as_if_alone() -> None:
    """Unequal prompts, single tokens, several tokens for some, and a sequence that leaves. Measured error 5e-7."""
    lengths = [[3, 1, 1, 4], [5, 1, 1, 1], [1, 1, 1, 2]]
    whole = [tokens(sum(parts), seed) for seed, parts in enumerate(lengths)]
    cache = SequenceCache(3, max_length=10, device=torch.device("cpu"))
    rows, done = [0, 1, 2], [0, 0, 0]
    outputs: list[list[Tensor]] = [[], [], []]
    for number in range(4):
        if number == 2:
            cache.keep([0, 2])
            rows = [0, 2]
        counts = [lengths[row][number] for row in rows]
        cache.grow(counts)
        cuts = [slice(done[row], done[row] + count) for row, count in zip(rows, counts, strict=True)]
        query, key, value = (
            torch.cat([whole[row][kind][cut] for row, cut in zip(rows, cuts, strict=True)]) for kind in range(3)
        )
        attended = cache.attend(7, query, key, value, None)
        for row, part in zip(rows, attended.split(counts), strict=True):
            outputs[row].append(part)
        done = [done[row] + (lengths[row][number] if row in rows else 0) for row in range(3)]
    for row in range(3):
        length = done[row]
        expected = alone(*(part[:length] for part in whole[row]))
        torch.testing.assert_close(torch.cat(outputs[row]), expected, rtol=0, atol=5e-6)


def test_layers_are_apart() -> None:
    cache = SequenceCache(1, max_length=2, device=torch.device("cpu"))
    query, key, value = tokens(1, 0)
    cache.grow([1])
    cache.attend(1, query, key, value, None)
    torch.testing.assert_close(cache.attend(2, query, key, 2 * value, None)[0, 0], 2 * value[0, 0])


def test_refuses_more_than_it_has_room_for() -> None:
    cache = SequenceCache(1, max_length=2, device=torch.device("cpu"))
    with pytest.raises(AssertionError, match="room for 2"):
        cache.grow([3])
