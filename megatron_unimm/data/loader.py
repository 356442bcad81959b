"""Prepares optimizer steps: draws samples, packs them, decodes the images that this rank needs, ahead of time.

Every rank plans the whole global batch from texts and image headers, so that all agree on the rows without talking to
each other; pixels are decoded only for a rank's own rows. Nothing depends on the number of ranks but who reads which
row.

    planned one after another      step 0 | step 1 | step 2
    decoded, two at a time                | step 0 …… | step 1 …… |
    handed out                                        | step 0 | step 1
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from megatron_unimm.data.mix import Mix
from megatron_unimm.data.packing import deal_rows
from megatron_unimm.data.plan import BadSample, BatchSize, Layout, Planner, PlanState, RowRule, StepPlan
from megatron_unimm.data.workers import SampleWork, Workers
from megatron_unimm.errors import ConfigError

logger = logging.getLogger(__name__)

STEPS_AHEAD = 2
"""Steps that are prepared while another is computed; bounds the memory of decoded images."""


@dataclass(frozen=True)
class DataShard:
    """Which part of the data a rank reads."""

    dp_rank: int = 0
    dp_size: int = 1
    rows_multiple: int = 1
    """Rows of each data-parallel rank are a multiple of this (the interleaved pipeline schedule asks for it)."""
    alignment: int = 1
    """Each sample takes up a multiple of this many tokens: 2 x context parallel size, 1 without."""
    need_pixels: bool = True
    """False leaves ``patches`` of the rows empty, [0, patch_dim]. Only for ranks that use neither pixels nor labels nor
    targets: whether an image is broken shows when it is decoded, and a rank that does not decode keeps the labels of
    its sample."""
    device: int | None = None
    """Number of the GPU that may decode images."""


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step of one data-parallel rank."""

    step: int
    rows: Sequence[Any]
    """Packed rows (:class:`~megatron_unimm.data.workers.Row`), as many on every data-parallel rank."""
    counts: dict[str, int]
    """Draws per source in the global batch, bad samples included."""
    bad: list[BadSample]
    """Samples of the global batch that were left out; the same on every rank."""
    voided: list[BadSample]
    """Samples of this rank's rows with an image that turned out broken when decoded. It is grey, and the sample has
    neither labels nor targets."""


@dataclass(frozen=True)
class _Prepared:
    batch: StepBatch
    after: PlanState


def pairs_of_tokens(sample: Layout) -> float:
    """Work of a sample beyond what its tokens cost in any row: the pairs that attend to each other."""
    return float(len(sample)) ** 2


class StepLoader:
    """Iterates over optimizer steps without end (or up to ``num_steps``), preparing at most two ahead.

    A sample that cannot be used is left out of its step and reported; whether it can is decided from its text and image
    headers, on all ranks alike. An error while preparing a step is raised when that step is asked for.

    Args:
        work: what is done to samples.
        mix: the order of draws from them.
        size: what a step holds over all ranks.
        shard: what this rank reads.
        cost: work of a sample beyond what its tokens cost in any row; evens out the work of rows and ranks.
        num_steps: the step to stop before.

    Raises:
        DataError: too many of a step's samples are bad, or a worker process died.
    """

    def __init__(
        self,
        *,
        work: SampleWork,
        mix: Mix,
        size: BatchSize,
        shard: DataShard,
        cost: Callable[[Any], float] = pairs_of_tokens,
        num_steps: int | None = None,
    ) -> None:
        data = work.data
        if data.sequence_length % shard.alignment:
            what = f"{data.sequence_length} is not a multiple of {shard.alignment} (2 x context parallel size)"
            raise ConfigError("data.sequence_length", what)
        self._work = work
        self._mix = mix
        self._shard = shard
        self._num_steps = num_steps
        self._workers = Workers(work, data.workers, data.prefetch_workers, shard.device)
        rule = RowRule(work.room, shard.alignment, shard.dp_size * shard.rows_multiple, data.packing)
        self._planner = Planner(mix, size, rule, self._workers.lay_out, cost, data.max_bad_share)
        self._state = PlanState()
        self._faults_seen: set[str] = set()
        self._plans: deque[Future[StepPlan]] = deque()
        self._pending: deque[Future[_Prepared]] = deque()
        # Plans wait for their predecessors and rows for their plans, so each kind has a pool of its own: in one, those
        # that wait could hold all threads.
        ahead = data.prefetch_workers > 0
        self._plan_pool = ThreadPoolExecutor(1, "data-plan") if ahead else None
        self._row_pool = ThreadPoolExecutor(STEPS_AHEAD, "data-rows") if ahead else None

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._num_steps is not None and self._state.step >= self._num_steps:
            raise StopIteration
        try:
            prepared = self._next()
        except BaseException:
            self._drop_pending()
            raise
        self._state = prepared.after
        self._report(prepared.batch)
        return prepared.batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def work(self) -> SampleWork:
        """What is done to samples."""
        return self._work

    def close(self) -> None:
        """Ends threads and worker processes, once what they are doing is done."""
        self._drop_pending()
        for pool in (self._plan_pool, self._row_pool):
            if pool:
                pool.shutdown(cancel_futures=True)
        self._workers.close()

    def waiting_for(self) -> str:
        """What the next step waits for, as a watchdog names it."""
        return self._workers.waiting_for() or "no file; its samples are read"

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: the same on every rank, and independent of their number."""
        state = self._state
        return {
            "step": state.step,
            "next_draw": state.next_draw,
            "carried": list(state.carried),
            "mix": self._mix.fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with exactly the draws that were left, at any number of ranks and at any batch size."""
        if state["mix"] != self._mix.fingerprint():
            logger.warning(
                "data: sources, weights or seed differ from the checkpoint's; the order changes from here on"
            )
        self._drop_pending()
        self._state = PlanState(int(state["step"]), int(state["next_draw"]), tuple(state["carried"]))

    def _next(self) -> _Prepared:
        if self._plan_pool is None or self._row_pool is None:
            return self._decode(self._state.step, self._planner.plan(self._state))
        end = self._state.step + 1 + STEPS_AHEAD
        end = end if self._num_steps is None else min(end, self._num_steps)
        for step in range(self._state.step + len(self._pending), end):
            self._start(step)
        self._plans.popleft()
        return self._pending.popleft().result()

    def _start(self, step: int) -> None:
        assert self._plan_pool is not None
        assert self._row_pool is not None
        before = self._plans[-1] if self._plans else None
        state = self._state
        plan = self._plan_pool.submit(lambda: self._planner.plan(before.result().after if before else state))
        self._plans.append(plan)
        self._pending.append(self._row_pool.submit(lambda: self._decode(step, plan.result())))

    def _drop_pending(self) -> None:
        for future in [*self._pending, *self._plans]:
            future.cancel()
        self._pending.clear()
        self._plans.clear()

    def _decode(self, step: int, plan: StepPlan) -> _Prepared:
        """This rank's rows of a plan."""
        shard = self._shard
        own = [plan.rows[row] for row in deal_rows(plan.costs, shard.dp_size)[shard.dp_rank]]
        items = [laid for row in own for laid in row]
        done = self._workers.load(items) if shard.need_pixels else [(laid.layout, []) for laid in items]
        loaded = iter(done)
        rows, voided = [], []
        for row in own:
            pairs = [next(loaded) for _ in row]
            voided += [bad for _, broken in pairs for bad in broken]
            rows.append(self._work.row([sample for sample, _ in pairs], step))
        counts = {name: plan.drawn[name] for name in self._mix.names}
        return _Prepared(StepBatch(step, rows, counts, plan.bad, voided), plan.after)

    def _report(self, batch: StepBatch) -> None:
        """Logs the first sample of each kind of fault; the counts of all go with the batch."""
        for bad in [*batch.bad, *batch.voided]:
            fault = bad.error.fault
            if fault not in self._faults_seen:
                self._faults_seen.add(fault)
                logger.warning(
                    "data: passed over %s (from here on, samples with this fault are only counted: %s)",
                    bad.error,
                    fault,
                )
