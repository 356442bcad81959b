"""Optimizer steps: the same samples at any layout, exact resume, bad samples, threads."""

import json
import logging
import multiprocessing
import os
import random
import signal
import threading
from collections import Counter

import numpy as np
import pytest
from whole_samples import tokenize_sample

from megatron_unimm.config.data import SourceConfig
from megatron_unimm.data.loader import DataShard, StepBatch, StepLoader
from megatron_unimm.data.mix import Mix
from megatron_unimm.data.plan import BatchSize
from megatron_unimm.data.sample import IGNORED_LABEL
from megatron_unimm.data.sources.opening import open_sources
from megatron_unimm.data.workers import ConversationWork
from megatron_unimm.errors import ConfigError, DataError

BATCH = 12


def turns(human: str, gpt: str) -> list[dict]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


@pytest.fixture
def world(tmp_path, write_image, write_jsonl):
    """Three sources, 40 samples: questions with an image, text to image, editing with two images."""
    ask, draw, edit = [], [], []
    for i in range(20):
        write_image(tmp_path / f"ask{i}.png", 28 + 14 * (i % 5), 56, seed=i)
        ask.append({"id": i, "image": f"ask{i}.png", "conversations": turns("<image>\nwhat?", "red " * (i % 7 + 1))})
    for i in range(12):
        write_image(tmp_path / f"draw{i}.jpg", 64, 64, seed=i)
        draw.append({"id": i, "image": f"draw{i}.jpg", "conversations": turns("draw " + "x" * i, "<image>")})
    for i in range(8):
        names = [f"edit{i}a.png", f"edit{i}b.png"]
        for k, name in enumerate(names):
            write_image(tmp_path / name, 64, 48, seed=2 * i + k)
        edit.append({"id": i, "image": names, "conversations": turns("<image> make it blue", "Here: <image>")})
    for name, entries in (("ask", ask), ("draw", draw), ("edit", edit)):
        write_jsonl(tmp_path / f"{name}.jsonl", entries)
    kinds = {"ask": ("understanding", 2.0), "draw": ("text_to_image", 1.0), "edit": ("editing", 1.0)}
    return {
        name: SourceConfig(path=str(tmp_path / f"{name}.jsonl"), kind=kind, weight=weight)
        for name, (kind, weight) in kinds.items()
    }


def messages(batch: StepBatch) -> list[str]:
    return [str(bad.error) for bad in batch.bad]


@pytest.fixture
def make_loader(world, make_chat):
    """Builds loaders over the world, and closes them."""
    loaders = []

    def make(shard=None, batch=BATCH, num_steps=None, **settings) -> StepLoader:
        sources = open_sources(world)
        loaders.append(
            StepLoader(
                work=ConversationWork(make_chat(**settings), sources, alignment=(shard or DataShard()).alignment),
                mix=Mix(sources, {name: world[name].weight for name in sources}, seed=5),
                size=batch if isinstance(batch, BatchSize) else BatchSize(samples=batch),
                shard=shard or DataShard(),
                num_steps=num_steps,
            )
        )
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def take(loader: StepLoader, count: int) -> list:
    return [next(loader) for _ in range(count)]


def ids(batch) -> list[str]:
    return [name for row in batch.rows for name in row.sample_ids]


def assert_same_rows(left, right) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for field, value in vars(a).items():
            np.testing.assert_array_equal(value, getattr(b, field), err_msg=field)


def test_a_step_holds_the_draws_of_the_mix(make_loader, world, make_chat):
    """Every row equals its samples tokenised one by one."""
    loader, sources = make_loader(), open_sources(world)
    mix = Mix(sources, {name: world[name].weight for name in sources}, seed=5)
    chat = make_chat()
    for step, batch in enumerate(take(loader, 5)):
        draws = [mix[g] for g in range(step * BATCH, (step + 1) * BATCH)]
        drawn = [sources[draw.source][draw.index] for draw in draws]
        samples = {sample.id: tokenize_sample(sample, chat) for sample in drawn}
        assert batch.step == step
        assert batch.counts == Counter(draw.source for draw in draws) == {"ask": 6, "draw": 3, "edit": 3}
        assert sorted(ids(batch)) == sorted(sample.id for sample in drawn)
        for row in batch.rows:
            patches = np.concatenate([samples[name].patches for name in row.sample_ids])
            np.testing.assert_array_equal(row.patches, patches)
            labels = np.concatenate([samples[name].labels for name in row.sample_ids])
            np.testing.assert_array_equal(row.labels[: len(labels)], labels)


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("dp_size", [2, 4])
def test_same_global_batch_at_any_dp_size(make_loader, dp_size, alignment):
    """Not only the same samples: the same rows, but for empty ones."""
    whole = take(make_loader(DataShard(alignment=alignment)), 4)
    parts = [take(make_loader(DataShard(rank, dp_size, alignment=alignment)), 4) for rank in range(dp_size)]
    for step in range(4):
        batches = [part[step] for part in parts]
        assert len({len(batch.rows) for batch in batches}) == 1
        assert sorted(name for batch in batches for name in ids(batch)) == sorted(ids(whole[step]))
        assert all(batch.counts == whole[step].counts for batch in batches)
        rows = sorted(
            (row for batch in batches for row in batch.rows if row.sample_ids), key=lambda row: row.sample_ids
        )
        assert_same_rows(rows, sorted(whole[step].rows, key=lambda row: row.sample_ids))


def test_rows_multiple(make_loader):
    for dp_rank in range(2):
        batch = next(make_loader(DataShard(dp_rank, 2, rows_multiple=3)))
        assert len(batch.rows) % 3 == 0


def test_resume_at_another_dp_size_and_batch_size(make_loader):
    """The samples after the stop are exactly those that had not been seen, in the same order."""
    straight = [sorted(ids(batch)) for batch in take(make_loader(), 6)]
    first = make_loader(DataShard(0, 2))
    take(first, 2)
    state = first.state_dict()
    assert (state["step"], state["next_draw"]) == (2, 24)
    resumed = [make_loader(DataShard(rank, 4)) for rank in range(4)]
    for loader in resumed:
        loader.load_state_dict(state)
    for step in range(2, 6):
        batches = [next(loader) for loader in resumed]
        assert {batch.step for batch in batches} == {step}
        assert sorted(name for batch in batches for name in ids(batch)) == straight[step]
    smaller = make_loader(batch=BATCH // 2)
    smaller.load_state_dict(state)
    halves = take(smaller, 4)
    assert [batch.step for batch in halves] == [2, 3, 4, 5]
    assert [sorted(ids(halves[i]) + ids(halves[i + 1])) for i in (0, 2)] == straight[2:4]
    assert smaller.state_dict()["next_draw"] == 48


def test_resume_with_another_mix_warns(make_loader, caplog):
    loader = make_loader()
    with caplog.at_level(logging.WARNING):
        loader.load_state_dict(loader.state_dict())
        assert not caplog.records
        loader.load_state_dict({**loader.state_dict(), "mix": "other"})
    assert "the order changes from here on" in caplog.text


def test_state_counts_what_was_handed_out_not_what_was_prepared(make_loader):
    loader = make_loader(prefetch_workers=2)
    take(loader, 1)
    assert loader.state_dict()["step"] == 1


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_threads_change_nothing(make_loader, workers):
    reference = take(make_loader(prefetch_workers=0), 5)
    for a, b in zip(reference, take(make_loader(prefetch_workers=workers), 5), strict=True):
        assert_same_rows(a.rows, b.rows)


def test_without_packing_each_sample_has_its_row(make_loader):
    batch = next(make_loader(packing=False))
    assert [len(row.sample_ids) for row in batch.rows] == [1] * BATCH


def test_without_pixels(make_loader):
    full, lean = next(make_loader()), next(make_loader(DataShard(need_pixels=False)))
    for a, b in zip(full.rows, lean.rows, strict=True):
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.grids, b.grids)
        assert len(b.patches) == 0 < len(a.patches)


def test_end(make_loader):
    assert [batch.step for batch in make_loader(num_steps=3)] == [0, 1, 2]


def test_bad_samples_are_left_out_alike_on_all_ranks(make_loader, world, tmp_path, caplog):
    """One missing image, one unreadable header, one too long: counted, told once per kind with the place."""
    (tmp_path / "ask3.png").unlink()
    (tmp_path / "ask4.png").unlink()
    (tmp_path / "draw5.jpg").write_text("no image")
    with caplog.at_level(logging.WARNING):
        whole = take(make_loader(), 4)
    bad = [str(each.error) for batch in whole for each in batch.bad]
    assert Counter(each.error.fault for batch in whole for each in batch.bad) == {
        "missing image": 2,
        "unreadable image": 1,
    }
    assert sorted(message.split(":")[1] for message in bad) == ["4", "5", "6"]
    assert all(message.startswith(str(tmp_path)) for message in bad)
    assert [record.getMessage().count("missing image") for record in caplog.records] in ([1, 0], [0, 1])
    for batch in whole:
        assert len(ids(batch)) + len(batch.bad) == sum(batch.counts.values()) == BATCH
    for rank in range(2):
        part = take(make_loader(DataShard(rank, 2)), 4)
        assert [messages(batch) for batch in part] == [messages(batch) for batch in whole]


def test_too_long_samples_are_left_out(make_loader):
    lengths = sorted(256 - row.num_padding for row in next(make_loader(packing=False)).rows)
    batch = next(make_loader(sequence_length=lengths[8]))
    assert len(batch.bad) == sum(length > lengths[8] for length in lengths) > 0
    assert {each.error.fault for each in batch.bad} == {"too long"}
    assert f"tokens, but data.sequence_length is {lengths[8]}" in str(batch.bad[0].error)


def test_mostly_bad_is_an_error(make_loader, tmp_path):
    for path in [*tmp_path.glob("ask*.png"), *tmp_path.glob("draw*.jpg")]:
        path.unlink()
    loader = make_loader()
    for _ in range(2):  # Asked again, it tells again.
        with pytest.raises(DataError, match=r"no image file .* \(and 9 of the step's 12 samples cannot be used"):
            next(loader)
    assert loader.state_dict()["step"] == 0


def test_broken_pixels_void_the_sample(make_loader, tmp_path):
    """Header fine, pixels cut off: the row keeps its shape, the image is grey, nothing is learned from the sample."""
    whole = take(make_loader(), 4)
    for name in ("edit2b.png", "ask7.png"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    broken = take(make_loader(), 4)
    voided = {"edit/2", "ask/7"}
    for before, after in zip(whole, broken, strict=True):
        assert ids(before) == ids(after)
        assert len(after.voided) == len(voided & set(ids(after)))
        for a, b in zip(before.rows, after.rows, strict=True):
            np.testing.assert_array_equal(a.input_ids, b.input_ids)
            np.testing.assert_array_equal(a.visual_index, b.visual_index)
            assert a.patches.shape == b.patches.shape
            kept = np.ones(len(a.labels), dtype=bool)
            for name, start, end in zip(a.sample_ids, a.segment_bounds, a.segment_bounds[1:], strict=False):
                if name in voided:
                    kept[start:end] = False
            np.testing.assert_array_equal(b.labels, np.where(kept, a.labels, IGNORED_LABEL))
            np.testing.assert_array_equal(b.predict_index, a.predict_index[kept[a.predict_index]])
            np.testing.assert_array_equal(b.target_index, a.target_index[kept[a.predict_index]])
            assert b.is_target.sum() == a.is_target.sum() - ("edit/2" in a.sample_ids)
            assert (np.abs(b.patches).sum(axis=1) == 0).any() == bool(voided & set(a.sample_ids))


def test_back_pressure(make_loader, monkeypatch):
    """However long the consumer takes, at most two further steps are prepared."""
    loader = make_loader(prefetch_workers=2)
    prepared, third = [], threading.Event()
    decode = loader._decode

    def counted(step: int, plan):
        prepared.append(step)
        if len(prepared) == 3:
            third.set()
        return decode(step, plan)

    monkeypatch.setattr(loader, "_decode", counted)
    take(loader, 1)
    assert third.wait(60)
    assert not threading.Event().wait(0.2)  # Time in which more could be started.
    assert sorted(prepared) == [0, 1, 2]


def test_errors_of_threads_reach_the_consumer_and_threads_end(make_loader, monkeypatch):
    def fail(draws):
        raise RuntimeError("disk on fire")

    before = threading.active_count()
    with make_loader(prefetch_workers=2) as loader:
        monkeypatch.setattr(loader._planner, "lay_out", fail)
        with pytest.raises(RuntimeError, match="disk on fire"):
            next(loader)
    assert threading.active_count() == before


def test_processes_change_nothing(make_loader):
    reference = take(make_loader(prefetch_workers=0), 3)
    for a, b in zip(reference, take(make_loader(prefetch_workers=2, workers="process"), 3), strict=True):
        assert_same_rows(a.rows, b.rows)


def test_a_dead_worker_is_an_error(make_loader):
    loader = make_loader(prefetch_workers=1, workers="process")
    next(loader)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"data\.workers: a worker process died"):
        take(loader, 5)


# --- a fixed number of rows


ROWS = BatchSize(rows=4)


def test_rows_are_filled(make_loader):
    """As many samples as find room; the share of padding is small though samples are a quarter of a row."""
    batches = take(make_loader(batch=ROWS), 6)
    assert {len(batch.rows) for batch in batches} == {4}
    padding = [row.num_padding for batch in batches for row in batch.rows]
    assert sum(padding) / (256 * len(padding)) < 0.1
    per_sample = [len(row.sample_ids) for batch in take(make_loader(), 6) for row in batch.rows]
    assert np.mean([len(row.sample_ids) for batch in batches for row in batch.rows]) > np.mean(per_sample)


@pytest.mark.parametrize("dp_size", [2, 4])
def test_the_same_rows_at_any_dp_size(make_loader, dp_size):
    whole = take(make_loader(batch=ROWS), 4)
    parts = [take(make_loader(DataShard(rank, dp_size), batch=ROWS), 4) for rank in range(dp_size)]
    for step in range(4):
        rows = [row for part in parts for row in part[step].rows]
        assert_same_rows(
            sorted(rows, key=lambda row: row.sample_ids), sorted(whole[step].rows, key=lambda row: row.sample_ids)
        )


@pytest.mark.parametrize("seed", range(12))
def test_resume_loses_nothing_and_repeats_nothing(make_loader, seed):
    """Stop anywhere, go on at another number of ranks: the same samples, step by step, as without a stop."""
    chance = random.Random(seed)
    size = chance.choice([ROWS, BatchSize(rows=8), BatchSize(samples=12)])
    total, stop = 6, chance.randrange(1, 6)
    before, after = chance.choice([1, 2, 4]), chance.choice([1, 2, 4])
    straight = [sorted(ids(batch)) for batch in take(make_loader(batch=size), total)]
    first = [make_loader(DataShard(rank, before), batch=size) for rank in range(before)]
    seen = [sorted(name for loader in first for name in ids(next(loader))) for _ in range(stop)]
    state = json.loads(json.dumps(first[0].state_dict()))
    assert all(loader.state_dict() == state for loader in first)
    resumed = [make_loader(DataShard(rank, after), batch=size) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(state)
    seen += [sorted(name for loader in resumed for name in ids(next(loader))) for _ in range(total - stop)]
    assert seen == straight


def test_every_draw_is_used_once(make_loader):
    """What finds no room comes later: after many steps only the few that are still carried are missing."""
    loader = make_loader(batch=ROWS)
    used = Counter(name for batch in take(loader, 10) for name in ids(batch))
    state = loader.state_dict()
    mix, sources = loader._mix, loader._workers.work.sources
    drawn = Counter(sources[d.source][d.index].id for d in (mix[g] for g in range(state["next_draw"])))
    carried = Counter(sources[d.source][d.index].id for d in (mix[g] for g in state["carried"]))
    assert used == drawn - carried
    assert 0 < carried.total() < 20


def test_alignment_must_divide_the_row(make_loader):
    with pytest.raises(ConfigError, match=r"data\.sequence_length: 250 is not a multiple of 4"):
        make_loader(DataShard(alignment=4), sequence_length=250)
