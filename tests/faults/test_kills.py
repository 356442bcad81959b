"""Killed ranks: whatever is cut off, a job that is started again ends where one that ran through does."""

import json
import random
from functools import partial
from pathlib import Path

import pytest
from injected import POINTS, kill_at, record_samples
from job import Job, differences, step_name

from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.checkpoint.store import latest

STEPS = 60
SEED = 20
RANK_0_ONLY = ("writes the index", "commits", "marks", "prunes")
SETTINGS = (
    f"train.steps={STEPS}",
    "train.global_batch_size=null",
    "train.global_batch_rows=2",  # samples that find no room are carried over from step to step
    "train.ema_decay=0.9",
)


def drawn(run_dir: Path, rank: int) -> list[tuple[int, list[str]]]:
    """Step and samples of every step that a rank has done, also of those done again."""
    lines = (json.loads(line) for line in (run_dir / f"drawn_{rank}.jsonl").read_text().splitlines())
    return [(line["step"], line["samples"]) for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_random_kills(job: Job, tmp_path: Path) -> None:
    """One rank or both, at every point of a step and of a save, at random steps: the last checkpoint is that of a run
    that was left alone, bit for bit, and every step had the same samples."""
    whole, killed = (job.of(tmp_path / name, *SETTINGS) for name in ("whole", "killed"))
    whole.finish(2, faults=[record_samples])
    rng = random.Random(SEED)
    plan = [(point, everyone) for point in POINTS for everyone in (False, True)]
    assert len(plan) == 20
    rng.shuffle(plan)
    for number, (point, everyone) in enumerate(plan):
        good = latest(killed.checkpoints)
        step = (0 if good is None else read_meta(good)["step"]) + rng.randint(0, 2)
        by = 0 if point in RANK_0_ONLY else rng.randint(0, 1)
        victims = (0, 1) if everyone else (by,)
        call = rng.randint(1, 5) if point == "writes a tensor" else 1
        fault = partial(kill_at, point=point, step=step, by=by, victims=victims, call=call)
        outcome = killed.run(2, faults=[record_samples, fault])
        for rank, (code, said) in enumerate(zip(outcome.codes, outcome.said, strict=True)):
            where = f"kill {number}: rank {by} {point} in step {step}, victims {victims}; rank {rank}:\n{said[-2000:]}"
            assert code == (-9 if rank in victims else 1), where
            assert rank in victims or "lost the connection to another rank" in said, where
    killed.finish(2, faults=[record_samples])

    directories = [run.checkpoints / step_name(STEPS) for run in (whole, killed)]
    assert not differences(*directories)
    expected, found = (read_meta(directory) for directory in directories)
    assert found["progress"] == expected["progress"]
    assert (found["optimizer_steps"], found["average_steps"]) == (STEPS, STEPS)
    assert sum(found["progress"]["totals"]["draws"].values()) > 2 * STEPS
    kept = ("step", "losses", "gradient_norm", "learning_rates", "draws")
    assert [[line[key] for key in kept] for line in killed.records()] == [
        [line[key] for key in kept] for line in whole.records()
    ]
    for rank in (0, 1):
        once = dict(drawn(tmp_path / "whole", rank))
        again = drawn(tmp_path / "killed", rank)
        assert set(once) == {step for step, _ in again} == set(range(1, STEPS + 1))
        assert len(again) > STEPS, "some steps were done twice"
        assert all(samples == once[step] for step, samples in again)


@pytest.mark.slow
def test_a_kill_between_taking_a_checkpoint_away_and_marking_the_new_one(job: Job) -> None:
    """Where a step is saved again, the old checkpoint is there until the new one is finished."""
    job.finish(1, "train.steps=2", "train.checkpoint.keep_last=1")
    fault = partial(kill_at, point="marks", step=0, by=0, victims=(0,))
    outcome = job.run(1, "train.steps=2", faults=[fault], resume="never")
    assert outcome.codes == [-9]
    assert job.names() == [step_name(2), f"{step_name(2)}.replaced.tmp"]
    assert latest(job.checkpoints) is None
    said = job.finish(1, "train.steps=3").said[0]
    assert "resuming at step 2" in said
    assert job.names() == [step_name(2), step_name(3)]
