"""Packs tokenised samples into rows of fixed length, each of which is one micro-batch.

Drawn for sequence_length 12, alignment 4, samples A (6 tokens) and B (3 tokens), ``.`` padding::

    tokens          A A A A A A . .  B B B .      segment_bounds (0, 8, 12)
    tokens          C C C C  . . . . . . . .      segment_bounds (0, 4, 12): the tail is a segment of its own

Legend  T tokens of a row, L of a segment, N images, V visual tokens, P patches.
"""

from collections.abc import Callable, Sequence

import numpy as np

from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow, TokenizedSample
from megatron_unimm.errors import ConfigError, DataError


def pack(
    samples: Sequence[TokenizedSample],
    *,
    sequence_length: int,
    num_rows_multiple: int,
    alignment: int,
    packing: bool,
    pad_id: int,
) -> list[PackedRow]:
    """Packs samples into rows: :func:`plan_rows`, then :func:`build_row` on each."""
    plan = plan_rows(
        [len(sample) for sample in samples],
        costs=[0.0] * len(samples),
        sequence_length=sequence_length,
        num_rows_multiple=num_rows_multiple,
        alignment=alignment,
        packing=packing,
    )
    patch_dim = samples[0].patches.shape[1] if samples else 0
    return [
        build_row(
            [samples[i] for i in row],
            sequence_length=sequence_length,
            alignment=alignment,
            pad_id=pad_id,
            patch_dim=patch_dim,
        )
        for row in plan
    ]


def plan_rows(
    lengths: Sequence[int],
    *,
    costs: Sequence[float],
    sequence_length: int,
    num_rows_multiple: int,
    alignment: int,
    packing: bool,
) -> list[list[int]]:
    """Decides which samples share a row: as few rows as first fit, longest first, needs (``packing`` false: one sample
    per row).

    Rows are then sorted by cost, so that neighbours, which go to different ranks at the same micro-batch, cost about
    the same; empty rows at the end fill up to a multiple of ``num_rows_multiple``. A pure function: every rank that
    knows the lengths knows the plan.

    Args:
        lengths: tokens of each sample.
        costs: work of each sample, in any unit.
        sequence_length: tokens of a row.
        num_rows_multiple: the number of rows is rounded up to a multiple of this.
        alignment: each sample takes up a multiple of this many tokens (2 x context parallel size).

    Returns:
        For each row the indices of its samples.

    Raises:
        ConfigError: ``sequence_length`` is not a multiple of ``alignment``.
        DataError: a sample is longer than a row.
    """
    padded = _padded(lengths, sequence_length, alignment)
    rows = _first_fit(padded, sequence_length) if packing else [[i] for i in range(len(padded))]
    rows.sort(key=lambda row: -sum(costs[i] for i in row))
    return rows + [[] for _ in range(-len(rows) % num_rows_multiple)]


def fill_rows(
    lengths: Sequence[int],
    costs: Sequence[float],
    *,
    num_rows: int,
    sequence_length: int,
    alignment: int,
    packing: bool,
    first: int = 0,
) -> tuple[list[list[int]], list[int]]:
    """Fills a given number of rows, each with about the same work, from samples that are more than enough.

    Longest first, each into the row with the least work so far among those with room for it: long samples end up in
    different rows, short ones fill the gaps. The ``first`` samples, which were left over before, go in before all
    others, so that none waits for more than a step.

    Returns:
        For each row the indices of its samples, rows of most work first; and the indices of those left over.

    Raises:
        As :func:`plan_rows`.
    """
    padded = _padded(lengths, sequence_length, alignment)
    room, work = [sequence_length] * num_rows, [0.0] * num_rows
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    left: list[int] = []
    for i in sorted(range(len(padded)), key=lambda i: (i >= first, -padded[i])):
        fitting = [r for r in range(num_rows) if room[r] >= padded[i] and (packing or not rows[r])]
        if not fitting:
            left.append(i)
            continue
        # Rows without any work yet are told apart by their room, or samples of no cost would pile up in the first.
        row = min(fitting, key=lambda r: (work[r], -room[r]))
        rows[row].append(i)
        room[row] -= padded[i]
        work[row] += costs[i]
    order = sorted(range(num_rows), key=lambda r: -work[r])
    return [rows[r] for r in order], sorted(left)


def deal_rows(costs: Sequence[float], dp_size: int) -> list[list[int]]:
    """Which rows each data-parallel rank reads, one per micro-batch: as many on each, of about the same total cost.

    Most costly first, each to the rank with the least so far among those that have not got all of theirs (the longest
    processing time rule), so that micro-batch k costs about the same everywhere too.
    """
    assert len(costs) % dp_size == 0, f"{len(costs)} rows do not divide over {dp_size} ranks"
    dealt: list[list[int]] = [[] for _ in range(dp_size)]
    totals = [0.0] * dp_size
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        open_ranks = [rank for rank in range(dp_size) if len(dealt[rank]) < len(costs) // dp_size]
        rank = min(open_ranks, key=lambda rank: (totals[rank], len(dealt[rank])))
        dealt[rank].append(row)
        totals[rank] += costs[row]
    return dealt


def _padded(lengths: Sequence[int], sequence_length: int, alignment: int) -> list[int]:
    if sequence_length % alignment:
        what = f"{sequence_length} is not a multiple of {alignment} (2 x context parallel size)"
        raise ConfigError("data.sequence_length", what)
    padded = [round_up(length, alignment) for length in lengths]
    if padded and max(padded) > sequence_length:
        raise DataError("data.sequence_length", f"is {sequence_length}, but a sample has {max(lengths)} tokens")
    return padded


def build_row(
    samples: Sequence[TokenizedSample], *, sequence_length: int, alignment: int, pad_id: int, patch_dim: int
) -> PackedRow:
    """Puts samples one after another, each padded to a multiple of ``alignment``, and fills up with a tail of padding.

    Padding has no labels. Inside a segment its positions go on from the sample's; in the tail they start at 0.
    """
    bounds = _bounds([round_up(len(sample), alignment) for sample in samples], sequence_length)
    input_ids = np.full(sequence_length, pad_id, dtype=np.int64)
    labels = np.full(sequence_length, IGNORED_LABEL, dtype=np.int64)
    position_ids = np.empty((3, sequence_length), dtype=np.int64)
    visual_starts = np.cumsum([0, *(len(sample.visual_index) for sample in samples)])
    for sample, start, end in zip(samples, bounds, bounds[1:], strict=False):
        stop = start + len(sample)
        input_ids[start:stop], labels[start:stop], position_ids[:, start:stop] = (
            sample.input_ids,
            sample.labels,
            sample.position_ids,
        )
        position_ids[:, stop:end] = np.arange(end - stop) + sample.position_ids.max() + 1
    filled = bounds[len(samples)]
    position_ids[:, filled:] = np.arange(sequence_length - filled)
    return PackedRow(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        segment_bounds=bounds,
        patches=np.concatenate([np.zeros((0, patch_dim), dtype=np.float32), *(sample.patches for sample in samples)]),
        grids=np.concatenate([np.zeros((0, 3), dtype=np.int64), *(sample.grids for sample in samples)]),
        is_target=np.concatenate([np.zeros(0, dtype=bool), *(sample.is_target for sample in samples)]),
        visual_index=_join(samples, lambda sample: sample.visual_index, bounds),
        predict_index=_join(samples, lambda sample: sample.predict_index, bounds),
        target_index=_join(samples, lambda sample: sample.target_index, visual_starts),
        sample_ids=tuple(sample.id for sample in samples),
        kinds=tuple(sample.kind for sample in samples),
        num_padding=sequence_length - sum(len(sample) for sample in samples),
        noise_seeds=np.array(
            [sample.noise_seed + place for sample in samples for place in range(len(sample.grids))], dtype=np.int64
        ),
        features=_join_features(samples),
    )


def _join_features(samples: Sequence[TokenizedSample]) -> np.ndarray | None:
    """Features of all samples, where they were computed beforehand."""
    found = [sample.features for sample in samples if sample.features is not None]
    assert len(found) in (0, len(samples)), "features of all samples, or of none"
    return np.concatenate(found) if found else None


def _join(
    samples: Sequence[TokenizedSample],
    field: Callable[[TokenizedSample], np.ndarray],
    starts: Sequence[int] | np.ndarray,
) -> np.ndarray:
    """Concatenates an index of each sample, shifted to where the sample starts: int64."""
    shifted = [field(sample) + start for sample, start in zip(samples, starts, strict=False)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *shifted])


def round_up(length: int, multiple: int) -> int:
    """The next multiple."""
    return -(-length // multiple) * multiple


def _bounds(lengths: Sequence[int], sequence_length: int) -> tuple[int, ...]:
    """Starts and ends of segments laid end to end, with the tail as last segment if there is one."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    if bounds[-1] < sequence_length:
        bounds.append(sequence_length)
    return tuple(bounds)


def _first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit decreasing; equal lengths keep their order."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, free in enumerate(room) if free >= lengths[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows
