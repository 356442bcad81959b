"""Rows: what is in them, how full they are, and how even."""

from itertools import pairwise

import numpy as np
import pytest

from megatron_unimm.data.length_mix import length_mix
from megatron_unimm.data.packing import build_row, deal_rows, fill_rows, pack, plan_rows
from megatron_unimm.data.sample import IGNORED_LABEL, TokenizedSample
from megatron_unimm.errors import ConfigError, DataError

PAD = 9
PATCH_DIM = 3


def make_sample(name: str, length: int, image_at: int | None = None, seed: int = 0) -> TokenizedSample:
    """Random tokens; with ``image_at``, a target image of 2 visual tokens (4 patches each) there."""
    rng = np.random.default_rng(seed)
    visual = np.zeros(0, dtype=np.int64) if image_at is None else np.array([image_at, image_at + 1])
    num_images = 0 if image_at is None else 1
    return TokenizedSample(
        id=name,
        kind="understanding",
        input_ids=rng.integers(10, 99, length),
        labels=rng.integers(10, 99, length),
        position_ids=np.sort(rng.integers(0, 50, (3, length))),
        patches=rng.random((8 * num_images, PATCH_DIM), dtype=np.float32),
        grids=np.array([[1, 2, 4]] * num_images, dtype=np.int64).reshape(-1, 3),
        is_target=np.ones(num_images, dtype=bool),
        visual_index=visual,
        predict_index=visual - 1,
        target_index=np.arange(len(visual)),
    )


def test_row_drawn():
    """Two samples with an image each, aligned to 4, in a row of 16."""
    a, b = make_sample("a", 5, image_at=2, seed=1), make_sample("b", 6, image_at=3, seed=2)
    row = build_row([a, b], sequence_length=16, alignment=4, pad_id=PAD, patch_dim=PATCH_DIM)
    assert row.segment_bounds == (0, 8, 16)
    assert row.input_ids.tolist() == [*a.input_ids, PAD, PAD, PAD, *b.input_ids, PAD, PAD]
    assert row.labels.tolist() == [*a.labels, *[IGNORED_LABEL] * 3, *b.labels, *[IGNORED_LABEL] * 2]
    top_a, top_b = a.position_ids.max(), b.position_ids.max()
    for axis in range(3):
        padded_a = [*a.position_ids[axis], top_a + 1, top_a + 2, top_a + 3]
        assert row.position_ids[axis].tolist() == [*padded_a, *b.position_ids[axis], top_b + 1, top_b + 2]
    assert row.visual_index.tolist() == [2, 3, 11, 12]
    assert row.predict_index.tolist() == [1, 2, 10, 11]
    assert row.target_index.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(row.patches, np.concatenate([a.patches, b.patches]))
    assert (row.grids.shape, row.is_target.tolist()) == ((2, 3), [True, True])
    assert (row.sample_ids, row.num_padding) == (("a", "b"), 5)


def test_tail_is_a_segment_of_its_own():
    row = build_row([make_sample("a", 5)], sequence_length=12, alignment=2, pad_id=PAD, patch_dim=PATCH_DIM)
    assert row.segment_bounds == (0, 6, 12)
    assert row.position_ids[:, 6:].tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    empty = build_row([], sequence_length=4, alignment=2, pad_id=PAD, patch_dim=PATCH_DIM)
    assert (empty.segment_bounds, empty.sample_ids, empty.num_padding) == ((0, 4), (), 4)
    assert (empty.patches.shape, empty.grids.shape, empty.position_ids.dtype) == ((0, PATCH_DIM), (0, 3), np.int64)


@pytest.mark.parametrize("alignment", [1, 4, 16])
@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("packing", [True, False])
def test_unpacking_gives_back_every_sample(alignment, multiple, packing):
    """Random samples, cut out of the rows again by their bounds."""
    rng = np.random.default_rng(alignment + multiple)
    samples = [
        make_sample(f"s{i}", int(n), 1 if n > 4 and i % 2 else None, i) for i, n in enumerate(rng.integers(1, 65, 40))
    ]
    rows = pack(
        samples, sequence_length=64, num_rows_multiple=multiple, alignment=alignment, packing=packing, pad_id=PAD
    )
    assert len(rows) % multiple == 0
    assert sorted(name for row in rows for name in row.sample_ids) == sorted(sample.id for sample in samples)
    by_id = {sample.id: sample for sample in samples}
    for row in rows:
        assert row.segment_bounds[0] == 0
        assert row.segment_bounds[-1] == len(row.input_ids) == 64
        assert all(bound % alignment == 0 for bound in row.segment_bounds)
        assert packing or len(row.sample_ids) <= 1
        first_feature = first_patch = 0
        for name, start, end in zip(row.sample_ids, row.segment_bounds, row.segment_bounds[1:], strict=False):
            sample = by_id[name]
            stop = start + len(sample)
            assert end - stop < alignment
            np.testing.assert_array_equal(row.input_ids[start:stop], sample.input_ids)
            np.testing.assert_array_equal(row.labels[start:stop], sample.labels)
            np.testing.assert_array_equal(row.position_ids[:, start:stop], sample.position_ids)
            inside = (row.predict_index >= start) & (row.predict_index < stop)
            np.testing.assert_array_equal(row.predict_index[inside] - start, sample.predict_index)
            np.testing.assert_array_equal(row.target_index[inside] - first_feature, sample.target_index)
            np.testing.assert_array_equal(row.patches[first_patch : first_patch + len(sample.patches)], sample.patches)
            first_feature += len(sample.visual_index)
            first_patch += len(sample.patches)
        assert (row.labels != IGNORED_LABEL).sum() == sum(len(by_id[name]) for name in row.sample_ids)
        assert row.num_padding == (row.input_ids == PAD).sum()


def test_few_rows():
    """At most 11/9 of the least possible plus 1, the bound of first fit decreasing; and full where it can be."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 101, 60).tolist()
        plan = plan_rows(lengths, costs=lengths, sequence_length=100, num_rows_multiple=1, alignment=1, packing=True)
        assert len(plan) <= 11 / 9 * -(-sum(lengths) // 100) + 12  # pieces over 50 cannot be paired freely
        assert all(sum(lengths[i] for i in row) <= 100 for row in plan)
    assert (
        len(
            plan_rows(
                [50, 30, 20, 60, 40], costs=[0] * 5, sequence_length=100, num_rows_multiple=1, alignment=1, packing=True
            )
        )
        == 2
    )


def test_ranks_get_even_work():
    """Pairs of tokens per rank differ by a few percent."""
    lengths = np.random.default_rng(0).lognormal(5, 1, 600).clip(8, 2048).astype(int).tolist()
    pairs = [length**2 for length in lengths]
    plan = plan_rows(lengths, costs=pairs, sequence_length=2048, num_rows_multiple=4, alignment=1, packing=True)
    cost = [sum(pairs[i] for i in row) for row in plan]
    totals = [sum(cost[row] for row in rows) for rows in deal_rows(cost, 4)]
    assert max(totals) / min(totals) < 1.05
    naive = [sum(cost[rank * len(plan) // 4 : (rank + 1) * len(plan) // 4]) for rank in range(4)]
    assert max(naive) / min(naive) > 1.5


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
def test_every_row_has_one_rank(dp_size):
    costs = np.random.default_rng(0).integers(1, 100, 16).tolist()
    shares = deal_rows(costs, dp_size)
    assert sorted(row for share in shares for row in share) == list(range(16))
    assert {len(share) for share in shares} == {16 // dp_size}
    assert all(costs[a] >= costs[b] for share in shares for a, b in pairwise(share))


def test_dealing_by_hand():
    """9 | 7 | 6 + … : the last two go where least is."""
    assert deal_rows([9, 7, 6, 2], 2) == [[0, 3], [1, 2]]


def test_filled_rows_hold_each_sample_once_and_no_more_than_fits():
    rng = np.random.default_rng(0)
    for alignment in (1, 4):
        lengths = rng.integers(1, 60, 100).tolist()
        rows, left = fill_rows(
            lengths, lengths, num_rows=8, sequence_length=256, alignment=alignment, packing=True, first=5
        )
        assert sorted([i for row in rows for i in row] + left) == list(range(100))
        assert all(sum(-(-lengths[i] // alignment) * alignment for i in row) <= 256 for row in rows)
        assert not set(left) & set(range(5)), "what was left over before goes in first"


def test_filled_rows_without_packing():
    rows, left = fill_rows([5, 9, 7], [5, 9, 7], num_rows=2, sequence_length=16, alignment=1, packing=False)
    assert (rows, left) == ([[1], [2]], [0])


def test_filled_rows_at_scale():
    """A length mix like LLaVA-OneVision's, 64 ranks of two rows of 8192 tokens, ten steps with what is left over."""
    draw = length_mix(np.random.default_rng(0))
    carried: list[int] = []
    # In a decoder of 7B's shape, products with weights cost a token what attention costs it to 40,000 others.
    linear = 8192 * 40_000.0
    for _ in range(10):
        lengths = list(carried)
        while sum(lengths) < 1.02 * 128 * 8192:
            lengths.append(next(draw))
        pairs = [length * (length + 1) / 2 for length in lengths]
        rows, left = fill_rows(
            lengths, pairs, num_rows=128, sequence_length=8192, alignment=1, packing=True, first=len(carried)
        )
        padding = 1 - sum(lengths[i] for row in rows for i in row) / (128 * 8192)
        work = [linear + sum(pairs[i] for i in row) for row in rows]
        totals = [sum(work[row] for row in share) for share in deal_rows(work, 64)]
        assert padding < 0.03
        assert max(totals) / np.mean(totals) < 1.05
        assert not set(left) & set(range(len(carried)))
        carried = [lengths[i] for i in left]


def test_plan_does_not_depend_on_the_number_of_rows_asked_for():
    lengths = np.random.default_rng(1).integers(1, 50, 30).tolist()
    plans = [
        [
            row
            for row in plan_rows(
                lengths, costs=lengths, sequence_length=64, num_rows_multiple=m, alignment=1, packing=True
            )
            if row
        ]
        for m in (1, 2, 8)
    ]
    assert plans[0] == plans[1] == plans[2]


def test_errors():
    with pytest.raises(ConfigError, match="100 is not a multiple of 8"):
        plan_rows([5], costs=[0], sequence_length=100, num_rows_multiple=1, alignment=8, packing=True)
    with pytest.raises(DataError, match="is 64, but a sample has 65 tokens"):
        plan_rows([5, 65], costs=[0, 0], sequence_length=64, num_rows_multiple=1, alignment=1, packing=True)
    assert pack([], sequence_length=8, num_rows_multiple=2, alignment=1, packing=True, pad_id=0) == []
