"""The order of samples: which sample of which source is the g-th of the training run.

Everything is a pure function of the seed and g, found without walking there, so that any rank at any layout, and any
resumed run, agrees on it. Nothing is shuffled in memory: each pass over a source follows a pseudo-random permutation
that is computed one place at a time.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_unimm.errors import ConfigError

MAX_CYCLE = 1 << 16
"""Draws after which the schedule of the sources repeats, at most. Bounds its memory, and the rounding of odd
weights."""

FEISTEL_ROUNDS = 6
MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Draw:
    """One draw of the mix."""

    source: str
    index: int
    """Place in the source."""
    epoch: int
    """Passes over the source that were completed before."""


def draw_key(seed: int, draw: Draw) -> int:
    """128 bits for what is random about one draw, the same on whichever rank reads it."""
    words = repr((seed, draw.source, draw.index, draw.epoch)).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=16).digest(), "little")


@dataclass(frozen=True)
class _Segment:
    """Draws between two sources' last ones: which sources alternate, and how."""

    start: int
    """First draw."""
    sources: list[int]
    quotas: list[int]
    """Draws of each of them in one cycle."""
    schedule: np.ndarray
    """int32 [W]: place in ``sources`` of each draw of a cycle."""
    ranks: np.ndarray
    """int32 [W]: how often its source was drawn before in the cycle."""
    before: list[int]
    """Draws of each of ``sources`` before the segment."""


class Mix:
    """Interleaves sources by weight.

    The sources alternate by a schedule that repeats after one cycle: for integer weights w_i without a common factor, W
    = sum of w_i draws of which source i gets exactly w_i. Inside the cycle, after any n draws each source was drawn
    floor or ceil of n * w_i / W times (the quota method of Balinski and Young). Weights are taken as the decimals that
    they were written as (0.1 is a tenth). Where the cycle would be longer than 65536, shares are rounded to multiples
    of 1/65536, at least one; ``shares`` tells what holds.

    A source with a cap is drawn until it has been passed that often; from then on the others share the draws by their
    weights, in a schedule of their own.

    Args:
        sources: name -> anything with a length.
        weights: name -> weight of each of them, relative to the sum; a source of weight 0 is never drawn.
        seed: seeds the permutations.
        max_epochs: name -> passes after which a source is drawn no more; absent or None for no cap.

    Raises:
        ConfigError: no source has a positive weight, or one that has is empty.
    """

    def __init__(
        self,
        sources: Mapping[str, Sized],
        weights: Mapping[str, float],
        seed: int,
        max_epochs: Mapping[str, float | None] | None = None,
    ) -> None:
        self.seed = seed
        self._names = [name for name in sources if weights[name] > 0]
        if not self._names:
            raise ConfigError(
                "data.sources", f"none of {len(sources)} sources has a weight above 0; name at least one to train on"
            )
        self._sizes = [len(sources[name]) for name in self._names]
        for name, size in zip(self._names, self._sizes, strict=True):
            if not size:
                raise ConfigError(f"data.sources.{name}", "holds no samples but has a weight above 0")
        caps = [(max_epochs or {}).get(name) for name in self._names]
        self._limits = [
            None if cap is None else math.ceil(Fraction(str(cap)) * size)
            for cap, size in zip(caps, self._sizes, strict=True)
        ]
        self._segments, self.num_draws = _segments([weights[name] for name in self._names], self._limits)
        """``num_draws``: how many draws there are, where every source has a cap; else None."""

    def __getitem__(self, g: int) -> Draw:
        """The g-th draw of the run, from 0 on; without end, unless every source has a cap.

        Raises:
            IndexError: there is none.
        """
        if g < 0 or (self.num_draws is not None and g >= self.num_draws):
            raise IndexError(f"draw {g} of {self.num_draws}")
        segment = self._segments[bisect_right(self._segments, g, key=lambda segment: segment.start) - 1]
        cycle, place = divmod(g - segment.start, len(segment.schedule))
        which = int(segment.schedule[place])
        source = segment.sources[which]
        number = segment.before[which] + cycle * segment.quotas[which] + int(segment.ranks[place])
        epoch, place = divmod(number, self._sizes[source])
        name = self._names[source]
        return Draw(source=name, index=permute(place, self._sizes[source], f"{self.seed}/{name}/{epoch}"), epoch=epoch)

    @property
    def names(self) -> tuple[str, ...]:
        """The sources that are drawn from."""
        return tuple(self._names)

    @property
    def shares(self) -> dict[str, Fraction]:
        """The share of each source in the draws, exactly, before any has reached its cap."""
        quotas = self._segments[0].quotas
        return {name: Fraction(quota, sum(quotas)) for name, quota in zip(self._names, quotas, strict=True)}

    @property
    def epoch_size(self) -> int:
        """Draws in one epoch of the mix: as many as there are samples in all sources that are drawn from.

        With weights proportional to the sizes every sample is drawn once; otherwise some sources are repeated and
        others cut short.
        """
        return sum(self._sizes)

    def num_steps(self, epochs: float, global_batch_size: int) -> int:
        """Optimizer steps that draw at least ``epochs`` epochs."""
        return math.ceil(math.ceil(Fraction(str(epochs)) * self.epoch_size) / global_batch_size)

    def fingerprint(self) -> str:
        """Changes whenever the order of draws does: sources, sizes, weights, caps or seed."""
        capped = [limit for limit in self._limits if limit is not None]
        text = repr(
            (self.seed, self._names, self._sizes, self._segments[0].quotas, *([self._limits] if capped else []))
        )
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _segments(weights: list[float], limits: list[int | None]) -> tuple[list[_Segment], int | None]:
    """The run's segments, and where the last one ends if it does."""
    segments: list[_Segment] = []
    start, drawn, active = 0, [0] * len(weights), list(range(len(weights)))
    while active:
        quotas = _integer_weights([weights[source] for source in active])
        schedule, ranks = _schedule(quotas)
        before = [drawn[source] for source in active]
        segments.append(_Segment(start, active, quotas, schedule, ranks, before))
        ends: dict[int, int] = {}
        for which, source in enumerate(active):
            limit = limits[source]
            if limit is not None:
                # The draw of the segment that is the source's last: whole cycles, and a place in the next.
                cycle, rank = divmod(limit - before[which] - 1, quotas[which])
                place = int(np.flatnonzero((schedule == which) & (ranks == rank))[0])
                ends[source] = cycle * len(schedule) + place + 1
        if not ends:
            return segments, None
        length = min(ends.values())
        cycles, rest = divmod(length, len(schedule))
        for which, source in enumerate(active):
            drawn[source] += cycles * quotas[which] + int((schedule[:rest] == which).sum())
        start += length
        active = [source for source in active if ends.get(source) != length]
    return segments, start


def permute(place: int, size: int, key: str) -> int:
    """The image of ``place`` under a pseudo-random permutation of range(size).

    A Feistel network permutes the next power of 4; places that land outside the range are sent through again until they
    land inside (cycle walking, under 4 rounds on average).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(key.encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(FEISTEL_ROUNDS)]
    while True:
        place = _feistel(place, half_bits, keys)
        if place < size:
            return place


def _feistel(value: int, half_bits: int, keys: list[int]) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for key in keys:
        left, right = right, left ^ (_scramble(right ^ key) & mask)
    return left << half_bits | right


def _scramble(value: int) -> int:
    """The output function of SplitMix64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK_64
    return value ^ value >> 31


def _integer_weights(weights: list[float]) -> list[int]:
    """Integers in the ratio of the weights, without a common factor; rounded to a sum of about MAX_CYCLE where it would
    be larger."""
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*integers)
    integers = [integer // divisor for integer in integers]
    total = sum(integers)
    if total <= MAX_CYCLE:
        return integers
    rounded = [max(1, MAX_CYCLE * integer // total) for integer in integers]
    by_remainder = sorted(range(len(integers)), key=lambda i: -(MAX_CYCLE * integers[i] % total))
    for i in by_remainder[: max(0, MAX_CYCLE - sum(rounded))]:
        rounded[i] += 1
    return rounded


def _schedule(quotas: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """One cycle of draws: source [W] and, for each draw, how often its source was drawn before in the cycle [W]; both
    int32."""
    total = sum(quotas)
    counts = [0] * len(quotas)
    schedule, ranks = np.empty(total, dtype=np.int32), np.empty(total, dtype=np.int32)
    for n in range(1, total + 1):
        # Only sources below their quota of n draws may be drawn; the one whose next draw is due first is.
        eligible = (i for i, quota in enumerate(quotas) if counts[i] * total < n * quota)
        source = min(eligible, key=lambda i: (counts[i] + 1) / quotas[i])
        schedule[n - 1], ranks[n - 1] = source, counts[source]
        counts[source] += 1
    return schedule, ranks
