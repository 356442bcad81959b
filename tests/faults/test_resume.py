"""What a resume rests on: nothing random but by seed, sample and step; learning rates; order by steps, not clocks."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from job import Job, differences, step_name
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from small_decoder import decoder_step, row_of, several, small_decoder
from small_orion import make_row, small_stage

from megatron_unimm.checkpoint.manifest import find_checkpoint
from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.config.train import ScheduleConfig
from megatron_unimm.errors import CheckpointError
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.events import EventLog, read_events
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.schedule import check_resumed_rate, learning_rate
from megatron_unimm.train.step import TrainStep

World = tuple[Platform, ParallelGroups]


@pytest.fixture
def world(repo: Path) -> Iterator[World]:
    yield setup.enter(small_stage(repo))
    destroy_groups()


# ---------------------------------------------------------------------------------------------- random numbers


def states() -> list[bytes]:
    """Of every generator that a step could draw from: torch's, Megatron-Core's by name, numpy's, Python's."""
    trackers = sorted(get_cuda_rng_tracker().get_states().items())
    found = [torch.get_rng_state(), *(state for _, state in trackers)]
    # numpy's global generator is what would be a mistake to draw from.
    others = [repr(np.random.get_state()).encode(), repr(random.getstate()).encode()]
    return [state.numpy().tobytes() for state in found] + others


def orion_step(stage: StageConfig, world: World) -> TrainStep:
    platform, groups = world
    method, chunks = setup.build_model(stage, platform, groups)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    return TrainStep(stage, method, wrapped, build_optimizer(wrapped, stage, groups), platform, groups)


def test_training_draws_from_no_generator(repo: Path, world: World) -> None:
    """So that a checkpoint needs none: templates, dropped conditions and noise come from (seed, sample, step) and there
    is no dropout. With experts and recomputation, too; and the image decoder's noise."""
    moe = "model.backbone.moe={num_experts: 4, top_k: 2, expert_mlp_size: 48}"
    recompute = "system.recompute={granularity: full, num_layers: 1}"
    stage = small_stage(repo, moe, recompute)
    step = orion_step(stage, world)
    before = states()
    assert len(before) >= 5, "Megatron-Core's tracked generators are among them"
    step.run([make_row(stage)], 1e-3)
    assert states() == before
    decoder = small_decoder(repo)
    step = decoder_step(decoder, world)
    row = row_of(decoder, several(decoder), world)
    before = states()
    step.run([row], 1e-3)
    assert states() == before
    torch.rand(1)
    assert states() != before


# ---------------------------------------------------------------------------------------------- learning rates

SCHEDULE = ScheduleConfig(max_learning_rate=1e-3, min_learning_rate=1e-4, warmup_ratio=0.1)


def saved_at(step: int, total_steps: int, schedule: ScheduleConfig) -> dict:
    rate = learning_rate(step - 1, total_steps, schedule)
    return json.loads(json.dumps({"rate": rate, "schedule": {"total_steps": total_steps, **schedule.model_dump()}}))


def test_the_same_schedule_goes_on_in_silence() -> None:
    for step in range(1, 101):
        assert check_resumed_rate(step, 100, SCHEDULE, saved_at(step, 100, SCHEDULE)) == ""


def test_another_schedule_names_both_rates_and_what_changed() -> None:
    """Twice as many steps: after 50 the old schedule was in the middle of its way, the new one is higher up."""
    text = check_resumed_rate(50, 200, SCHEDULE, saved_at(50, 100, SCHEDULE))
    old, new = learning_rate(49, 100, SCHEDULE), learning_rate(49, 200, SCHEDULE)
    assert f"step 50 was {old:g}, and by the recipe's schedule it is {new:g}" in text
    assert "total_steps was 100, is 200" in text
    faster = SCHEDULE.model_copy(update={"max_learning_rate": 2e-3})
    assert "max_learning_rate was 0.001, is 0.002" in check_resumed_rate(50, 100, faster, saved_at(50, 100, SCHEDULE))


def test_a_rate_that_does_not_fit_its_own_schedule_is_refused() -> None:
    wrong = saved_at(50, 100, SCHEDULE) | {"rate": 5e-3}
    with pytest.raises(CheckpointError, match=r"was 0.005, and by the recipe's schedule it is 0.0.*did not change"):
        check_resumed_rate(50, 100, SCHEDULE, wrong)


@pytest.mark.slow
def test_a_run_that_is_prolonged_says_so(job: Job) -> None:
    job.finish(1, "train.steps=2")
    said = job.finish(1, "train.steps=6").said[0]
    assert "the learning rate of step 2 was 1e-05, and by the recipe's schedule it is 9.1" in said
    assert "(total_steps was 2, is 6); training goes on with the recipe's" in said
    # What followed is what the prolonged schedule says.
    schedule = ScheduleConfig(max_learning_rate=1e-4, min_learning_rate=1e-5)
    rates = [record["learning_rates"]["x1"] for record in job.records()]
    assert rates[2:] == pytest.approx([learning_rate(step, 6, schedule) for step in range(2, 6)])
    (resumed,) = job.events("resume")
    assert resumed.fields["step"] == 2
    assert resumed.fields["seconds"] > 0


# ---------------------------------------------------------------------------------------------- clocks


def write_stage(run: Path, name: str, after: str | None, *steps: int) -> None:
    for step in steps:
        meta = {"stage": name, "step": step, "config": f"name: {name}\nafter: {after or 'null'}\n"}
        save({}, run / name / "checkpoints" / f"step_{step:08d}", meta)


def test_the_newest_checkpoint_is_told_by_steps(tmp_path: Path) -> None:
    """Hosts whose clocks are wrong: what was written last looks oldest, in a stage and between stages."""
    write_stage(tmp_path, "b_first", None, 100, 2000)
    write_stage(tmp_path, "c_second", "b_first", 50)
    write_stage(tmp_path, "a_third", "c_second", 10, 9)
    wanted = tmp_path / "a_third/checkpoints/step_00000010"
    for number, path in enumerate(sorted(tmp_path.rglob("*"), key=lambda path: wanted in (path, *path.parents))):
        os.utime(path, (2e9 - number, 2e9 - number))
    assert find_checkpoint(tmp_path) == wanted
    assert find_checkpoint(tmp_path / "b_first").name == "step_00002000"
    assert find_checkpoint(tmp_path, lambda meta: meta["stage"] != "a_third").name == "step_00000050"


def test_events_of_hosts_with_other_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second attempt ran on a host an hour behind: its events are still all there, and rank 0's in their order."""
    for attempt, now in (("one", 10_000.0), ("two", 6_400.0)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", attempt)
        monkeypatch.setattr("time.time", lambda now=now: now)
        log = EventLog(tmp_path, 0)
        log.add("start", step=0)
        log.add("saved", step=2)
        EventLog(tmp_path, 1).add("trouble", what=f"in {attempt}")
        log.add("end", code=1)
    order = [(event.attempt, event.kind) for event in read_events(tmp_path) if event.rank == 0]
    one, two = "local-one.0", "local-two.0"
    kinds = ("start", "saved", "end")
    assert order == [(attempt, kind) for attempt in (one, two) for kind in kinds]
    assert len(read_events(tmp_path)) == 8


# ---------------------------------------------------------------------------------------------- overlap


def test_checkpoints_hold_whole_weights_where_they_arrive_late(job: Job) -> None:
    """With overlapped gathering a rank's weights are its neighbours' old ones until the next forward pass. What is
    saved in between, and a run that resumes from it, are bit for bit as without."""
    steady = "stages.sft.train.schedule={kind: constant, min_learning_rate: 1.0e-4, warmup_ratio: 0}"
    plain, late = job.of(job.run_dir / "plain", steady), job.of(job.run_dir / "late", steady)
    overlap = "system.overlap={grad_reduce: true, param_gather: true}"
    plain.finish(2, "train.checkpoint.keep_last=3")
    late.finish(2, overlap, "train.steps=4")
    for step in (2, 4):
        assert not differences(plain.checkpoints / step_name(step), late.checkpoints / step_name(step))
    late.finish(2, overlap)
    assert not differences(plain.checkpoints / step_name(6), late.checkpoints / step_name(6))
