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
    lengths: Sequence[int], *, sequence_length: int, num_rows_multiple: int, alignment: int, packing: bool
) -> list[list[int]]:
    """Decides which samples share a row, from their lengths alone.

    First fit, longest first (``packing`` false: one sample per row). Rows are then sorted by the cost of their
    attention, so that neighbours, which go to different ranks at the same micro-batch, cost about the same; empty rows
    at the end fill up to a multiple of ``num_rows_multiple``. A pure function: every rank that knows the lengths knows
    the plan.

    Args:
        lengths: tokens of each sample.
        sequence_length: tokens of a row.
        num_rows_multiple: the number of rows is rounded up to a multiple of this.
        alignment: each sample takes up a multiple of this many tokens (2 x context parallel size).

    Returns:
        For each row the indices of its samples.

    Raises:
        ConfigError: ``sequence_length`` is not a multiple of ``alignment``.
        DataError: a sample is longer than a row.
    """
    if sequence_length % alignment:
        what = f"{sequence_length} is not a multiple of {alignment} (2 x context parallel size)"
        raise ConfigError("data.sequence_length", what)
    padded = [_round_up(length, alignment) for length in lengths]
    if padded and max(padded) > sequence_length:
        raise DataError("data.sequence_length", f"is {sequence_length}, but a sample has {max(lengths)} tokens")
    rows = _first_fit(padded, sequence_length) if packing else [[i] for i in range(len(padded))]
    rows.sort(key=lambda row: -_cost([padded[i] for i in row], sequence_length))
    return rows + [[] for _ in range(-len(rows) % num_rows_multiple)]


def rows_of_rank(num_rows: int, dp_rank: int, dp_size: int) -> list[int]:
    """The rows that one data-parallel rank reads, one per micro-batch.

    Rows are dealt out one by one, forth and back (0 1 2 3, 3 2 1 0, …), which evens out the totals of sorted rows.
    """
    assert num_rows % dp_size == 0, f"{num_rows} rows do not divide over {dp_size} ranks"
    rounds = range(num_rows // dp_size)
    return [k * dp_size + (dp_rank if k % 2 == 0 else dp_size - 1 - dp_rank) for k in rounds]


def build_row(
    samples: Sequence[TokenizedSample], *, sequence_length: int, alignment: int, pad_id: int, patch_dim: int
) -> PackedRow:
    """Puts samples one after another, each padded to a multiple of ``alignment``, and fills up with a tail of padding.

    Padding has no labels. Inside a segment its positions go on from the sample's; in the tail they start at 0.
    """
    bounds = _bounds([_round_up(len(sample), alignment) for sample in samples], sequence_length)
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
    )


def _join(
    samples: Sequence[TokenizedSample],
    field: Callable[[TokenizedSample], np.ndarray],
    starts: Sequence[int] | np.ndarray,
) -> np.ndarray:
    """Concatenates an index of each sample, shifted to where the sample starts: int64."""
    shifted = [field(sample) + start for sample, start in zip(samples, starts, strict=False)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *shifted])


def _round_up(length: int, multiple: int) -> int:
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


def _cost(lengths: Sequence[int], sequence_length: int) -> int:
    """Work of a row in pairs of tokens. Linear layers cost the same in all rows; the tail attends to itself as samples
    do."""
    tail = sequence_length - sum(lengths)
    return sum(length * length for length in [*lengths, tail])
