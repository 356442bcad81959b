"""``unimm status``, on runs whose files are written by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_unimm.checkpoint.manifest import commit, step_directory, temporary_name, write_bytes
from megatron_unimm.cli import main
from megatron_unimm.errors import UserError
from megatron_unimm.train.events import FILE
from megatron_unimm.train.goodput import METRICS, Heartbeat, Ledger
from megatron_unimm.train.json_lines import append_line
from megatron_unimm.train.status import StageStatus, read_status

NOW = 1_800_000_000.0
"""Unix seconds of the reader."""


class Stage:
    """Writes what a stage's rank 0 writes; times are seconds before NOW."""

    def __init__(self, run: Path, name: str) -> None:
        self.folder = run / name
        self.folder.mkdir(parents=True)
        self.name = name
        self.launched = 0.0

    def event(self, kind: str, ago: float, rank: int = 0, **fields: Any) -> None:
        head = {"kind": kind, "time": NOW - ago, "rank": rank, "attempt": "slurm-7.0.0", "host": f"n{rank}"}
        self._write(FILE if rank == 0 else f"events_rank{rank:05d}.jsonl", head | fields, ago)

    def launch(self, ago: float, restarts: int = 0, wall: float = 0.0) -> None:
        self.launched = ago
        self.event("launch", ago, wall_seconds=wall, restarts=restarts, world_size=16, stages=["warm_up", "sft"])

    def start(self, ago: float, step: int = 0, good: float = 0.0, lost: int = 0) -> None:
        fields = {"step": step, "total_steps": 1000, "world_size": 16, "origin": "x"}
        elapsed = self.launched - ago
        self.event("start", ago, **fields, elapsed_seconds=elapsed, good_seconds=good, lost_steps=lost)

    def end(self, ago: float, code: int, step: int, reason: str = "", rank: int = 0) -> None:
        fields = {"code": code, "step": step, "total_steps": 1000, "reason": reason}
        self.event("end", ago, rank, **fields, elapsed_seconds=self.launched - ago)

    def record(self, ago: float, step: int, ledger: Ledger | None, **fields: Any) -> None:
        line = {"step": step, "total_steps": 1000, "total_loss": 0.5, "skipped_steps": 0, "skipped_now": 0, "extra": {}}
        line |= {"step_seconds": 2.0, "tokens_per_second": 8000.0, "faults": {}, "straggler": None}
        line |= {"ledger": vars(ledger)} if ledger is not None else {}
        self._write(METRICS, line | fields, ago)

    def beat(self, ago: float, step: int, ledger: Ledger) -> None:
        Heartbeat(NOW - ago, step, ledger).write(self.folder)
        os.utime(self.folder / "heartbeat.json", (NOW - ago, NOW - ago))

    def checkpoint(self, ago: float, step: int) -> Path:
        directory = step_directory(self.folder / "checkpoints", step)
        temporary_name(directory).mkdir(parents=True)
        commit(directory, {"weights": write_bytes(temporary_name(directory) / "weights", b"12345")}, {})
        os.utime(directory / "COMMITTED", (NOW - ago, NOW - ago))
        return directory

    def status(self) -> StageStatus:
        return read_status(self.folder, now=NOW).stages[0]

    def _write(self, name: str, line: dict, ago: float) -> None:
        append_line(self.folder / name, line)
        os.utime(self.folder / name, (NOW - ago, NOW - ago))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "run", "warm_up")


def make_running(stage: Stage) -> None:
    """Killed once, 4 steps after a record; then three records of ten steps: one after 20 s, and one after 40 s, with an
    evaluation in them."""
    stage.launch(500)
    stage.start(490)
    stage.launch(300, restarts=1, wall=200)
    stage.start(290, step=500, good=150, lost=4)
    for ago, step, good in ((260, 510, 170), (240, 520, 190), (200, 530, 210)):
        ledger = Ledger(300 - ago, 500 - ago, good, 4, 1)
        stage.record(ago, step, ledger, straggler={"rank": 3, "host": "n1", "ratio": 1.25})
    stage.beat(3, 534, Ledger(297, 497, 210, 4, 1))
    stage.checkpoint(250, 510)


def test_a_stage_that_runs(stage: Stage) -> None:
    make_running(stage)
    found = stage.status()
    assert (found.state, found.step, found.total_steps) == ("running", 534, 1000)
    assert found.steps_per_second == 20 / 60
    assert found.tokens_per_second == 20 * 2 * 8000 / 60
    assert found.eta_seconds == pytest.approx(466 * 3)
    assert (found.goodput, found.wall_seconds) == (210 / 497, 497)
    assert (found.restarts, found.lost_steps, found.world_size, found.loss) == (1, 4, 16, 0.5)
    assert found.slowest == "rank 3 on n1, 1.25x"
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.checkpoint.age_seconds, found.checkpoint.newer_unusable) == (510, 250, None)


def test_a_checkpoint_counts_when_it_is_whole(stage: Stage) -> None:
    make_running(stage)
    (stage.checkpoint(100, 520) / "weights").write_bytes(b"123")
    (stage.checkpoint(50, 530) / "COMMITTED").unlink()
    found = stage.status().checkpoint
    assert found is not None
    assert (found.step, found.newer_unusable) == (510, 530)


@pytest.mark.parametrize(
    ("silent", "step_seconds", "evaluation", "state"),
    [
        (119, 2, 0, "running"),
        (121, 2, 0, "crashed"),
        (299, 30, 0, "running"),
        (301, 30, 0, "crashed"),
        (599, 2, 300, "running"),
        (601, 2, 300, "crashed"),
    ],
)
def test_how_long_it_may_be_silent(
    stage: Stage, silent: float, step_seconds: float, evaluation: float, state: str
) -> None:
    """Two minutes, ten steps, or twice the longest evaluation."""
    stage.launch(5000)
    stage.start(4990)
    ledger = Ledger(5000 - silent, 5000 - silent, 1, 0, 0)
    stage.record(silent, 10, ledger, step_seconds=step_seconds)
    stage.beat(silent, 10, ledger)
    for suite in ("a", "b"):
        append_line(stage.folder / "evaluation.jsonl", {"step": 5, "suite": suite, "seconds": evaluation / 2})
    assert stage.status().state == state


def test_clocks_that_differ(stage: Stage) -> None:
    """The run's host is an hour behind, but the file system noted its heartbeat just now; and an hour ahead."""
    make_running(stage)
    ledger = Ledger(297, 497, 210, 4, 1)
    Heartbeat(NOW - 3600, 534, ledger).write(stage.folder)
    os.utime(stage.folder / "heartbeat.json", (NOW, NOW))
    assert stage.status().state == "running"
    stage.beat(-3600, 534, ledger)
    assert stage.status().state == "running"


def test_states_by_the_last_end(stage: Stage) -> None:
    assert read_status_of_nothing(stage) == "not begun"
    stage.launch(5000)
    assert stage.status().state == "crashed", "no start in more than half an hour"
    stage.launch(1000, restarts=1)
    assert stage.status().state == "starting"
    ends = (
        (75, "stopped", "run it again"),
        (2, "failed", "is missing"),
        (1, "crashed", "code 1: data: is missing"),
        (70, "crashed", "code 70"),
        (0, "done", ""),
    )
    for number, (code, state, word) in enumerate(ends, 2):
        stage.launch(900 - 20 * number, restarts=number)
        stage.end(890 - 20 * number, code, 400, "data: is missing")
        found = stage.status()
        assert (found.state, found.step) == (state, 400)
        assert word in found.reason
        assert found.eta_seconds is None


def read_status_of_nothing(stage: Stage) -> str:
    other = Stage(stage.folder.parent, "other")
    other.launch(10)
    return read_status(stage.folder.parent, "warm_up", now=NOW).stages[0].state


def test_the_first_rank_that_fails_says_why(stage: Stage) -> None:
    """Rank 5 dies of its own; the others of the network, and rank 0 waits until it is killed."""
    stage.launch(1000)
    stage.start(990)
    stage.end(500, 1, 20, "RuntimeError: out of memory", rank=5)
    stage.end(499, 1, 20, "RuntimeError: connection closed by peer", rank=2)
    found = stage.status()
    assert (found.state, found.reason) == ("crashed", "code 1: RuntimeError: out of memory")
    stage.launch(100, restarts=1, wall=900)
    stage.start(95)
    stage.beat(1, 21, Ledger(99, 999, 0, 0, 1))
    assert stage.status().state == "running", "an end of an attempt before it does not count"
    (trouble,) = read_status(stage.folder, now=NOW).troubles
    assert trouble.what == "ended with code 1: rank 5: RuntimeError: out of memory"


def test_last_troubles(stage: Stage) -> None:
    """Of all kinds and stages, newest first."""
    make_running(stage)
    stage.event("save_failed", 280, step=505, what="checkpoint 505 could not be written: no space left on device")
    stage.event("trouble", 270, rank=9, step=508, what="rank 9 came no further for 480 s")
    extra = {"skipped_tensor/backbone.a": 2.5, "skipped_tensor/head.b": float("inf"), "moe/x": 9.0}
    ledger = Ledger(150, 350, 210, 4, 1)
    stage.record(150, 540, ledger, skipped_now=2, skipped_steps=2, extra=extra, faults={"s/unreadable": 3, "s/x": 1})
    append_line(stage.folder / "quarantine.jsonl", {"source": "s", "fault": "x", "what": "s.jsonl:7: is no JSON"})
    os.utime(stage.folder / "quarantine.jsonl", (NOW - 120, NOW - 120))
    other = Stage(stage.folder.parent, "sft")
    other.launch(200)
    other.event("trouble", 190, step=1, what="slowest rank 3 on n1: 1.42x the median, for 5 records in a row")
    troubles = read_status(stage.folder.parent, now=NOW).troubles
    assert [(NOW - (t.time or 0), t.stage, t.step, t.what) for t in troubles] == [
        (120, "warm_up", None, "4 samples passed over, the last: s.jsonl:7: is no JSON"),
        (150, "warm_up", 540, "2 skipped for their gradients, largest head.b inf"),
        (190, "sft", 1, "slowest rank 3 on n1: 1.42x the median, for 5 records in a row"),
        (270, "warm_up", 508, "rank 9 on n9: rank 9 came no further for 480 s"),
        (280, "warm_up", 505, "checkpoint 505 could not be written: no space left on device"),
        (300, "warm_up", None, "killed without a word (slurm-7.0.0 on n0), launched again"),
    ]
    assert len(read_status(stage.folder.parent, num_troubles=2, now=NOW).troubles) == 2


def test_a_run_of_an_older_version(stage: Stage) -> None:
    """Records alone, without ledger and events."""
    stage.record(500, 10, None)
    found = stage.status()
    assert (found.state, found.step, found.goodput, found.steps_per_second) == ("stopped", 10, None, 0.5)
    stage.record(400, 1000, None)
    assert stage.status().state == "done"


# --- the command


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main.run(["status", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_page_in_a_log(stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line per stage of the recipe in its order, begun or not, and one per trouble, which is cut."""
    monkeypatch.setattr("megatron_unimm.train.status.time.time", lambda: NOW)
    make_running(stage)
    stage.event("trouble", 100, step=531, what="x" * 500)
    code, out, err = run([str(stage.folder.parent)], capsys)
    assert (code, err) == (0, "")
    _, first, second, heading, trouble, _ = out.splitlines()
    for word in ("warm_up  running", "534/1000 steps", "eta 23:18", "loss 0.5", "0.333 steps/s", "5.3k tok/s"):
        assert word in first
    assert "slowest rank 3 on n1, 1.25x" in first
    for word in ("goodput 42.3% of 08:17", "1 restart ", "4 lost steps", "checkpoint 510 committed 04:10 ago"):
        assert word in first
    assert second == "sft      not begun"
    assert heading.startswith("last troubles")
    assert "warm_up step 531  xxx" in trouble
    assert len(trouble) < 250


def test_table_on_a_terminal(stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    make_running(stage)
    stage.end(2, 2, 534, "[data] is missing")
    _, out, _ = run([str(stage.folder.parent)], capsys)
    for word in ("534/1000 steps", "goodput", "not begun", "warm_up failed: [data] is missing", "last troubles"):
        assert word in out


def test_json_for_programs(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    make_running(stage)
    stage.record(190, 540, Ledger(310, 510, 210, 4, 1), total_loss=float("nan"))
    code, out, _ = run([str(stage.folder.parent), "--stage", "warm_up", "--json"], capsys)
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 0
    assert [each["name"] for each in found["stages"]] == ["warm_up"]
    assert (found["stages"][0]["step"], found["stages"][0]["checkpoint"]["step"]) == (540, 510)
    assert found["stages"][0]["loss"] is None
    assert found["troubles"][0]["stage"] == "warm_up"


def test_no_run(tmp_path: Path, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    make_running(stage)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "there is no such folder; give the --run-dir of unimm train"),
        ([str(nothing)], "is no run: none of its folders has events.jsonl or metrics.jsonl"),
        ([str(stage.folder.parent), "--stage", "x"], "x is no stage of"),
    ):
        code, out, err = run(arguments, capsys)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    with pytest.raises(UserError, match="it has warm_up, sft"):
        read_status(stage.folder.parent, "x")


def test_it_needs_no_torch(stage: Stage) -> None:
    """So that it answers at once on a login node: 0.2 s were measured, where importing torch takes 2 s."""
    make_running(stage)
    script = "import sys; from megatron_unimm.cli.main import run; run(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", script, "status", str(stage.folder.parent)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "534/1000" in out
    assert not {"torch", "megatron", "pydantic", "numpy", "rich"} & set(out.splitlines()[-1].split())
