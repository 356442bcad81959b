"""Where the time of a step goes, and which rank holds up the others."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_orion import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import world_folder  # noqa: F401 - a fixture

from megatron_unimm.config.train import LoggingConfig
from megatron_unimm.train.callbacks.straggler_watch import StragglerWatch
from megatron_unimm.train.events import EventLog, read_events
from megatron_unimm.train.status import read_status
from megatron_unimm.train.stragglers import Peer, Straggler, slowest
from megatron_unimm.train.timers import PHASES, Phase, StepClock, mean_times, useful_seconds


class Device:
    """A device that is busy until ``free_at``, behind a host at ``now``; both in seconds."""

    def __init__(self) -> None:
        self.now = self.free_at = 0.0
        self.marks = 0

    def launch(self, seconds: float) -> None:
        """The host hands over work and goes on."""
        self.free_at = max(self.now, self.free_at) + seconds

    def mark(self) -> "DeviceMark":
        self.marks += 1
        return DeviceMark(self)


class DeviceMark:
    """As torch.Event: takes the time at which the device comes to it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.at = 0.0

    def record(self) -> None:
        self.at = max(self.device.now, self.device.free_at)

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, other: "DeviceMark") -> float:
        return 1e3 * (other.at - self.at)


def test_phases_on_a_device_that_runs_behind_its_host() -> None:
    """Two steps of 5 s of work. For the first the data takes 2 s, in which the device stands still; for the second 4 s,
    which pass while the device still works. The split adds up to the device's time."""
    device = Device()
    clock = StepClock(device.mark)
    for wait in (2.0, 4.0):
        clock.begin("data")
        device.now += wait
        clock.begin("forward_backward")
        device.launch(1.0)
        with clock.within("pipeline"):
            device.launch(0.5)
        device.launch(1.5)
        clock.begin("reduce")
        clock.begin("reduce")
        device.launch(0.25)
        clock.begin("optimizer")
        device.launch(1.75)
        clock.begin("other")
    found = clock.read()
    expected = {"data": 2.0, "forward_backward": 5.0, "pipeline": 1.0, "reduce": 0.5, "optimizer": 3.5}
    assert found == {**dict.fromkeys(PHASES, 0.0), **expected}
    assert sum(found.values()) == device.free_at == device.now == 12.0


def test_reset_forgets_and_marks_are_used_again() -> None:
    device = Device()
    clock = StepClock(device.mark)
    for _ in range(5):
        for phase in PHASES:
            clock.begin(phase)
            device.launch(1.0)
        assert clock.read() == dict.fromkeys(PHASES, 1.0)
        clock.reset()
    assert device.marks == len(PHASES) + 2


def test_a_clock_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.5, 4.0])
    monkeypatch.setattr("megatron_unimm.train.timers.time.perf_counter", lambda: next(ticks))
    clock = StepClock.of(torch.device("cpu"))
    clock.begin("data")
    clock.begin("save")
    found = clock.read()
    assert (found["other"], found["data"], found["save"]) == (1.0, 2.5, 0.5)


def times(**seconds: float) -> dict[Phase, float]:
    return {phase: seconds.get(phase, 0.0) for phase in PHASES}


def test_means_and_useful_time_of_several_ranks() -> None:
    """Ten steps in 20 s on both ranks. The second waits 4 s for data while the first waits for it, and the first spends
    1 s in callbacks: what makes steps are the 16 s that the second did not lose, in four of five steps."""
    ranks = [times(forward_backward=12, reduce=7, other=1), times(data=4, forward_backward=12, reduce=4)]
    assert mean_times(ranks, 10) == {"data": 0.2, "forward_backward": 1.2, "reduce": 0.55, "other": 0.05}
    assert useful_seconds(ranks, 0.8) == pytest.approx(16 * 0.8)


# --- stragglers


def peers(*pipeline_ranks: int) -> list[Peer]:
    return [Peer(f"n{rank // 2}", pipeline_rank) for rank, pipeline_rank in enumerate(pipeline_ranks)]


def test_slowest_rank() -> None:
    found = slowest([1.0, 1.1, 1.0, 0.9, 1.42, 1.0], peers(*[0] * 6))
    assert found == Straggler(4, "n2", pytest.approx(1.42))
    assert str(found) == "slowest rank 4 on n2: 1.42x the median"
    assert slowest([3.0, 1.0], peers(0, 0)) == Straggler(0, "n0", 3.0)


def test_slowest_rank_is_measured_by_its_own_pipeline_stage() -> None:
    """The second stage has twice the work; that is no fault of its ranks. One that has no like is never slow."""
    assert slowest([1.0, 1.0, 1.3, 2.0, 2.0, 2.2], peers(0, 0, 0, 1, 1, 1)) == Straggler(2, "n1", 1.3)
    assert slowest([1.0, 9.0], peers(0, 1)) is None
    assert slowest([0.0, 0.0], peers(0, 0)) == Straggler(0, "n0", 1.0)


@pytest.mark.usefixtures("world")
def test_warning_of_a_straggler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once for each time that a host has been too slow in three records in a row."""
    watch = StragglerWatch(LoggingConfig(straggler_ratio=1.5, straggler_intervals=3), EventLog(tmp_path, 0))
    slow, other, fine = Straggler(5, "n2", 2.0), Straggler(1, "n0", 2.0), Straggler(5, "n2", 1.4)
    sequence = [slow, slow, fine, slow, slow, other, slow, slow, slow, slow, fine, slow, slow, slow]
    for step, straggler in enumerate(sequence, 1):
        watch.on_record(SimpleNamespace(), SimpleNamespace(straggler=straggler, step=step))
    what = "slowest rank 5 on n2: 2.00x the median, for 3 records in a row"
    assert [record.message for record in caplog.records] == [f"step 9: {what}", f"step 14: {what}"]
    events = read_events(tmp_path)
    assert [(event.kind, event.fields["step"], event.fields["what"]) for event in events] == [
        ("trouble", 9, what),
        ("trouble", 14, what),
    ]


# --- two ranks


@pytest.fixture
def overrides(world_folder: Path) -> list[str]:  # noqa: F811
    kinds = ("understanding", "text_to_image", "editing")
    data = [f"data.sources.{kind}.path={world_folder}/data/train/{kind}.jsonl" for kind in kinds]
    settings = [
        "data.sequence_length=512",
        "train.global_batch_size=null",
        "train.global_batch_rows=4",
        "train.steps=6",
        "train.logging.every_steps=2",
    ]
    settings += ["train.logging.straggler_ratio=1.001", "train.logging.straggler_intervals=2"]
    return [*SMALL, *settings, f"base_checkpoint={world_folder}/base", *data]


def train(repo: Path, run_dir: Path, slow_rank: int, seconds: float, *overrides: str) -> list[dict]:
    """Two ranks, of which one sleeps in every forward step; their records but the first, in which all begins."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("slow_rank.py")), str(slow_rank), str(seconds)]
    command += ["train", "configs/orion/shapes.yaml", "--stage", "warm_up", "--run-dir", str(run_dir), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (run_dir / "warm_up" / "metrics.jsonl").read_text().splitlines()][1:]


def test_a_slow_rank_is_named(repo: Path, overrides: list[str], tmp_path: Path) -> None:
    """Two data-parallel ranks: the second sleeps 2 s per step, and the first waits as long for the sum of gradients.

    The wait is not the first one's own time, or neither would be the slower. By how much the second is depends on what
    else the machine does, which draws out the work and not the sleep: ratios are tested on given times above."""
    records = train(repo, tmp_path, 1, 1.0, *overrides)
    for record in records:
        assert record["straggler"]["rank"] == 1
        assert record["straggler"]["ratio"] > 1
        assert sum(record["times"].values()) == pytest.approx(record["step_seconds"], rel=0.05)
        assert record["times"]["forward_backward"] > 1, "the mean of a rank that sleeps 2 s and one that does not"
        assert record["times"]["reduce"] > 0
        assert record["useful_seconds"] < 2 * record["step_seconds"]
    found = read_status(tmp_path, "warm_up")
    assert found.stages[0].slowest.startswith("rank 1 on ")
    assert any(trouble.what.startswith("slowest rank 1 on ") for trouble in found.troubles)
    events = EventAccumulator(str(tmp_path / "warm_up" / "tensorboard")).Reload()
    tags = {f"time/{phase}" for phase in PHASES if phase != "pipeline"}
    tags |= {"straggler/ratio", "straggler/rank", "goodput/share", "goodput/restarts", "goodput/lost_steps"}
    assert tags <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("straggler/rank")][1:] == [1.0] * 2


def test_waiting_for_the_neighbour_in_a_pipeline(repo: Path, overrides: list[str], tmp_path: Path) -> None:
    """Two pipeline stages, the first of which sleeps 0.2 s in each of four micro-batches: the other waits for it. They
    have different work, so neither is called slow."""
    records = train(repo, tmp_path, 0, 0.2, *overrides, "system.parallel.pipeline=2")
    for record in records:
        assert record["times"]["pipeline"] > 0.3, "the mean of a rank that waits 0.8 s and one that hardly does"
        assert record["straggler"] is None
        assert sum(record["times"].values()) == pytest.approx(record["step_seconds"], rel=0.05)
