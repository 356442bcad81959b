"""Which samples make a step, and which of its rows: decided from texts and image sizes, alike on every rank.

A step is a fixed number of samples (as papers count their batches) or a fixed number of rows (as hardware likes it).
With rows, samples are drawn until they overfill the rows a little; those that find no room are carried over and come
first in the next step, so that none is lost and none waits long::

    step 0     draws 0 1 2 3 4 5 6 7      rows | 0 3 6 | 1 2 5 7 |     carried over: 4
    step 1     4, draws 8 9 10 …          rows | 4 …

All is a pure function of the state before the step, which is small and says nothing of ranks.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Protocol

from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.mix import Draw, Mix
from megatron_unimm.data.packing import fill_rows, plan_rows, round_up
from megatron_unimm.data.sample import Sample
from megatron_unimm.errors import DataError

OVERFILL = 1.02
"""Tokens drawn over those that the rows hold: so many small samples remain that every row is filled to the brim."""
DRAW_AT_LEAST = 16
"""Samples laid out at a time while rows are being filled."""


@dataclass(frozen=True)
class BatchSize:
    """What a step holds, over all ranks; one of the two."""

    samples: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class RowRule:
    """What rows are like."""

    sequence_length: int
    """Tokens of a row."""
    alignment: int = 1
    """Each sample takes up a multiple of this many tokens."""
    multiple: int = 1
    """The number of rows of a step is a multiple of this."""
    packing: bool = True
    """False puts one sample in a row."""


@dataclass(frozen=True)
class PlanState:
    """Where the order of samples stands before a step."""

    step: int = 0
    next_draw: int = 0
    """First draw of the mix that no step has looked at."""
    carried: tuple[int, ...] = ()
    """Draws before it that have found no room yet."""


class Layout(Protocol):
    """What is known of a sample before its images are decoded, as far as planning needs it."""

    def __len__(self) -> int:
        """Tokens that it takes up."""
        ...


@dataclass(frozen=True)
class Laid:
    """A sample that can be used, laid out from its text and the sizes of its images."""

    draw: Draw
    where: str
    sample: Sample
    layout: Any
    """A :class:`Layout`: of what kind, the work on the sample knows."""


@dataclass(frozen=True)
class BadSample:
    """A sample that was left out."""

    source: str
    error: SampleError


@dataclass(frozen=True)
class StepPlan:
    """The global batch of a step."""

    rows: list[list[Laid]]
    costs: list[float]
    """Of each row, without what all rows have in common."""
    drawn: Counter[str]
    """Draws per source, bad samples included."""
    bad: list[BadSample]
    after: PlanState


class Planner:
    """Plans steps one after another.

    Args:
        mix: the order of draws.
        lay_out: reads the samples of draws, in order; may work on several at a time.
        cost: work of a sample beyond what its share of a row costs anyway, in any unit.
        max_bad_share: of a step's samples.
    """

    def __init__(
        self,
        mix: Mix,
        size: BatchSize,
        rule: RowRule,
        lay_out: Callable[[Sequence[Draw]], Iterable[Laid | BadSample]],
        cost: Callable[[Any], float],
        max_bad_share: float,
    ) -> None:
        assert (size.samples is None) != (size.rows is None), size
        assert size.rows is None or size.rows % rule.multiple == 0, (size, rule)
        self.mix = mix
        self.size = size
        self.rule = rule
        self.lay_out = lay_out
        self.cost = cost
        self.max_bad_share = max_bad_share

    def plan(self, state: PlanState) -> StepPlan:
        """The step that follows ``state``.

        Raises:
            DataError: more than ``max_bad_share`` of its samples are bad; names the first.
        """
        if self.size.rows is None:
            assert self.size.samples is not None
            numbers = range(state.next_draw, state.next_draw + self.size.samples)
            laid = list(self.lay_out([self._draw(number) for number in numbers]))
            return self._of_samples(list(zip(numbers, laid, strict=True)), state)
        return self._of_rows(self._enough(state, self.size.rows), state, self.size.rows)

    def _of_samples(self, laid: list[tuple[int, "Laid | BadSample"]], state: PlanState) -> StepPlan:
        good = [each for _, each in laid if isinstance(each, Laid)]
        rows = plan_rows(
            [len(each.layout) for each in good],
            costs=[self.cost(each.layout) for each in good],
            sequence_length=self.rule.sequence_length,
            num_rows_multiple=self.rule.multiple,
            alignment=self.rule.alignment,
            packing=self.rule.packing,
        )
        return self._finish([[good[i] for i in row] for row in rows], laid, PlanState(state.step + 1, laid[-1][0] + 1))

    def _of_rows(self, laid: list[tuple[int, "Laid | BadSample"]], state: PlanState, num_rows: int) -> StepPlan:
        good = [(number, each) for number, each in laid if isinstance(each, Laid)]
        rows, left = fill_rows(
            [len(each.layout) for _, each in good],
            [self.cost(each.layout) for _, each in good],
            num_rows=num_rows,
            sequence_length=self.rule.sequence_length,
            alignment=self.rule.alignment,
            packing=self.rule.packing,
            first=sum(number < state.next_draw for number, _ in good),
        )
        end = max([state.next_draw, *(number + 1 for number, _ in laid)])
        after = PlanState(state.step + 1, end, tuple(good[i][0] for i in left))
        return self._finish([[good[i][1] for i in row] for row in rows], laid, after)

    def _enough(self, state: PlanState, num_rows: int) -> list[tuple[int, "Laid | BadSample"]]:
        """Carried samples, then new ones until they overfill the rows."""
        wanted = OVERFILL * num_rows * self.rule.sequence_length if self.rule.packing else num_rows
        carried = list(self.lay_out([self._draw(number) for number in state.carried]))
        laid = list(zip(state.carried, carried, strict=True))
        filled = sum(self._size(each) for each in carried)
        numbers = count(state.next_draw)
        while filled < wanted:
            chunk = list(islice(numbers, max(DRAW_AT_LEAST, num_rows // 4)))
            for number, each in zip(chunk, self.lay_out([self._draw(n) for n in chunk]), strict=True):
                laid.append((number, each))
                filled += self._size(each)
                if filled >= wanted:
                    return laid
            self._refuse_bad(laid)
        return laid

    def _draw(self, number: int) -> Draw:
        if self.mix.num_draws is not None and number >= self.mix.num_draws:
            what = f"all have max_epochs and are used up after {self.mix.num_draws} samples; raise max_epochs"
            raise DataError("data.sources", what)
        return self.mix[number]

    def _size(self, each: "Laid | BadSample") -> int:
        """What a sample adds to a step: tokens, or without packing a row."""
        if isinstance(each, BadSample):
            return 0
        return round_up(len(each.layout), self.rule.alignment) if self.rule.packing else 1

    def _finish(self, rows: list[list[Laid]], laid: list[tuple[int, "Laid | BadSample"]], after: PlanState) -> StepPlan:
        self._refuse_bad(laid)
        bad = [each for _, each in laid if isinstance(each, BadSample)]
        used = [each for row in rows for each in row]
        drawn = Counter([each.draw.source for each in used] + [each.source for each in bad])
        costs = [sum(self.cost(each.layout) for each in row) for row in rows]
        return StepPlan(rows, costs, drawn, bad, after)

    def _refuse_bad(self, laid: list[tuple[int, "Laid | BadSample"]]) -> None:
        bad = [each for _, each in laid if isinstance(each, BadSample)]
        if len(bad) > self.max_bad_share * len(laid):
            raise DataError(
                bad[0].error.where,
                f"{bad[0].error.what} (and {len(bad)} of the step's {len(laid)} samples cannot be used, more than "
                f"data.max_bad_share {self.max_bad_share:g})",
            )
