"""Prepares optimizer steps: draws samples, packs them, decodes the images that this rank needs, ahead of time.

Every rank plans the whole global batch from texts and image headers, so that all agree on the rows without talking to
each other; pixels are decoded only for a rank's own rows. Nothing depends on the number of ranks but who reads which
row.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from megatron_unimm.data.chat import ChatFormat, concat_patches, image_order, layout_sample
from megatron_unimm.data.conversations import ConversationSource
from megatron_unimm.data.faults import Fault, SampleError
from megatron_unimm.data.images import load_patches
from megatron_unimm.data.mix import Draw, Mix
from megatron_unimm.data.packing import build_row, plan_rows, rows_of_rank
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow, Sample, TokenizedSample
from megatron_unimm.errors import ConfigError, DataError

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


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step of one data-parallel rank."""

    step: int
    rows: list[PackedRow]
    """As many on every data-parallel rank."""
    counts: dict[str, int]
    """Draws per source in the global batch, bad samples included."""
    skipped: list[str]
    """``where: what`` of the samples of the global batch that were left out; the same on every rank."""
    faults: list[Fault]
    """The kind of fault of each of them, to count by."""
    voided: list[str]
    """``where: what`` of images of this rank's rows that turned out broken when decoded. They are grey, and their
    sample has neither labels nor targets."""


class StepLoader:
    """Iterates over optimizer steps without end (or up to ``num_steps``), preparing at most two ahead in threads.

    Step s takes the draws [s·G, (s + 1)·G) of the mix, G the global batch size. A sample that cannot be used is left
    out of its step and reported; whether it can is decided from its text and image headers, on all ranks alike. An
    error while preparing a step is raised when that step is asked for.

    Args:
        chat: tokenizer, vision encoder and data settings.
        sources: opened sources by name.
        mix: the order of draws from them.
        global_batch_size: samples per step over all ranks.
        shard: what this rank reads.
        num_steps: the step to stop before.

    Raises:
        DataError: more than half of a step's samples are bad.
    """

    def __init__(
        self,
        *,
        chat: ChatFormat,
        sources: Mapping[str, ConversationSource],
        mix: Mix,
        global_batch_size: int,
        shard: DataShard,
        num_steps: int | None = None,
    ) -> None:
        if chat.data.sequence_length % shard.alignment:
            what = f"{chat.data.sequence_length} is not a multiple of {shard.alignment} (2 x context parallel size)"
            raise ConfigError("data.sequence_length", what)
        self._chat = chat
        self._sources = sources
        self._mix = mix
        self._batch_size = global_batch_size
        self._shard = shard
        self._num_steps = num_steps
        self._step = 0
        self._first_draw = 0  # Draw at which step 0 would start; not 0 after a resume with another batch size.
        self._faults_seen: set[str] = set()
        self._pending: deque[Future[StepBatch]] = deque()
        num_threads = chat.data.prefetch_workers
        # Steps wait for their samples, so each has its own pool: in one, steps could hold all threads and wait.
        self._step_pool = ThreadPoolExecutor(STEPS_AHEAD, "data-step") if num_threads else None
        self._sample_pool = ThreadPoolExecutor(num_threads, "data-sample") if num_threads else None

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._num_steps is not None and self._step >= self._num_steps:
            raise StopIteration
        try:
            batch = self._next_pending(self._step_pool).result() if self._step_pool else self._prepare(self._step)
        except BaseException:
            self._drop_pending()
            raise
        self._step += 1
        self._report(batch)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads, once what they are doing is done."""
        self._drop_pending()
        for pool in (self._step_pool, self._sample_pool):
            if pool:
                pool.shutdown(cancel_futures=True)

    def state_dict(self) -> dict[str, int | str]:
        """Where to go on: the same on every rank, and independent of their number."""
        next_draw = self._first_draw + self._step * self._batch_size
        return {"step": self._step, "next_draw": next_draw, "mix": self._mix.fingerprint()}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Goes on with exactly the draws that were left, at any number of ranks and at any global batch size."""
        if state["mix"] != self._mix.fingerprint():
            logger.warning(
                "data: sources, weights or seed differ from the checkpoint's; the order changes from here on"
            )
        self._drop_pending()
        self._step = int(state["step"])
        self._first_draw = int(state["next_draw"]) - self._step * self._batch_size

    def _next_pending(self, pool: ThreadPoolExecutor) -> Future[StepBatch]:
        """The future of the current step, with those of the next steps started."""
        end = self._step + 1 + STEPS_AHEAD
        end = end if self._num_steps is None else min(end, self._num_steps)
        for step in range(self._step + len(self._pending), end):
            self._pending.append(pool.submit(self._prepare, step))
        return self._pending.popleft()

    def _drop_pending(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()

    def _map(self, function: Callable, items: list) -> list:
        return list(self._sample_pool.map(function, items)) if self._sample_pool else [function(item) for item in items]

    def _prepare(self, step: int) -> StepBatch:
        first = self._first_draw + step * self._batch_size
        draws = [self._mix[g] for g in range(first, first + self._batch_size)]
        planned = self._map(self._plan, draws)
        good = [plan for plan in planned if isinstance(plan, _Plan)]
        bad = [plan for plan in planned if isinstance(plan, SampleError)]
        if 2 * len(bad) > len(draws):
            raise DataError(
                bad[0].where,
                f"{bad[0].what} (and {len(bad)} of the {len(draws)} samples of step {step} cannot be used)",
            )
        rows, voided = self._rows(good)
        counts = Counter(draw.source for draw in draws)
        return StepBatch(
            step=step,
            rows=rows,
            counts={name: counts[name] for name in self._mix.names},
            skipped=[str(fault) for fault in bad],
            faults=[fault.fault for fault in bad],
            voided=voided,
        )

    def _plan(self, draw: Draw) -> "_Plan | SampleError":
        source = self._sources[draw.source]
        where = source.where(draw.index)
        try:
            sample = source[draw.index]
            return _Plan(where, sample, layout_sample(sample, self._chat))
        except SampleError as fault:
            return fault if fault.where == where else SampleError(where, str(fault), fault.fault)

    def _rows(self, plans: list["_Plan"]) -> tuple[list[PackedRow], list[str]]:
        """This rank's rows, and the broken images in them."""
        data, shard = self._chat.data, self._shard
        plan = plan_rows(
            [len(item.layout) for item in plans],
            sequence_length=data.sequence_length,
            num_rows_multiple=shard.dp_size * shard.rows_multiple,
            alignment=shard.alignment,
            packing=data.packing,
        )
        own = [[plans[i] for i in plan[row]] for row in rows_of_rank(len(plan), shard.dp_rank, shard.dp_size)]
        loaded = iter(self._map(self._load, [item for row in own for item in row]))
        rows, voided = [], []
        for row in own:
            pairs = [next(loaded) for _ in row]
            voided += [message for _, broken in pairs for message in broken]
            rows.append(
                build_row(
                    [tokenized for tokenized, _ in pairs],
                    sequence_length=data.sequence_length,
                    alignment=shard.alignment,
                    pad_id=self._chat.tokenizer.token_ids.pad,
                    patch_dim=self._chat.encoder.patch_dim,
                )
            )
        return rows, voided

    def _load(self, plan: "_Plan") -> tuple[TokenizedSample, list[str]]:
        """Decodes the images of a sample; voids it where one is broken."""
        if not self._shard.need_pixels:
            return plan.layout, []
        encoder, patches, broken = self._chat.encoder, [], []
        for index, grid in zip(image_order(plan.sample.turns), plan.layout.grids, strict=True):
            try:
                patches.append(load_patches(plan.sample.images[index], grid, encoder, self._chat.data.max_image_pixels))
            except SampleError as fault:
                broken.append(f"{plan.where}: {fault}")
                patches.append(np.zeros((int(grid.prod()), encoder.patch_dim), dtype=np.float32))
        layout = void(plan.layout) if broken else plan.layout
        return replace(layout, patches=concat_patches(patches, encoder)), broken

    def _report(self, batch: StepBatch) -> None:
        """Logs the first sample of each kind of fault; the counts of all go with the batch."""
        broken = [("broken image", message) for message in batch.voided]
        for fault, message in [*zip(batch.faults, batch.skipped, strict=True), *broken]:
            if fault not in self._faults_seen:
                self._faults_seen.add(fault)
                logger.warning(
                    "data: passed over %s (from here on, samples with this fault are only counted: %s)", message, fault
                )


@dataclass(frozen=True)
class _Plan:
    """A sample that can be used, laid out from its text and image headers."""

    where: str
    sample: Sample
    layout: TokenizedSample


def void(sample: TokenizedSample) -> TokenizedSample:
    """The sample with nothing to learn from: no labels, no targets."""
    return replace(
        sample,
        labels=np.full_like(sample.labels, IGNORED_LABEL),
        is_target=np.zeros_like(sample.is_target),
        predict_index=sample.predict_index[:0],
        target_index=sample.target_index[:0],
    )
