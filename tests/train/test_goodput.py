"""The ledger of a stage over its attempts, on histories whose answers are known, and how attempts end in its events."""

import json
from pathlib import Path

import pytest

from megatron_unimm.errors import ConfigError
from megatron_unimm.train import attempt as attempt_module
from megatron_unimm.train import events as events_module
from megatron_unimm.train.attempt import AttemptLog
from megatron_unimm.train.events import FILE, read_events, read_file
from megatron_unimm.train.goodput import METRICS, Heartbeat, Ledger, attempts_of, ledger_of
from megatron_unimm.train.json_lines import append_line, keep_lines, last_lines, read_lines


class Clock:
    """Stands in for the module ``time``: a host's clock, which may be set, and one that does not jump."""

    def __init__(self) -> None:
        self.wall = 1000.0
        self.ticks = 50.0
        self.slept = 0.0

    def time(self) -> float:
        return self.wall

    def perf_counter(self) -> float:
        return self.ticks

    def sleep(self, seconds: float) -> None:
        self.slept += seconds

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.ticks += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (attempt_module, events_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


class Run:
    """A stage's rank 0 as the loop and its callbacks drive it, without training."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.folder = folder
        self.clock = clock
        self.ledger = Ledger()

    def launch(self, startup_seconds: float, step: int, total: int = 100) -> AttemptLog:
        attempt = AttemptLog(self.folder, ["warm_up", "sft"])
        self.clock.advance(startup_seconds)
        attempt.step, attempt.total_steps = step, total
        self.ledger = attempt.start(step, total, 2)
        keep_lines(self.folder / METRICS, lambda line: line["step"] <= step)
        return attempt

    def record(self, attempt: AttemptLog, seconds: float, step: int, useful: float) -> None:
        self.clock.advance(seconds)
        attempt.step = step
        self.ledger = attempt.at(self.ledger, self.ledger.good_seconds + useful)
        append_line(self.folder / METRICS, {"step": step, "ledger": vars(self.ledger)})
        self.beat(attempt, 0, step)

    def beat(self, attempt: AttemptLog, seconds: float, step: int) -> None:
        self.clock.advance(seconds)
        attempt.step = step
        self.ledger = attempt.at(self.ledger, self.ledger.good_seconds)
        Heartbeat(self.clock.wall, step, self.ledger).write(self.folder)

    def end(self, attempt: AttemptLog, seconds: float, code: int) -> None:
        self.clock.advance(seconds)
        with attempt:
            attempt.finish(code)

    def as_read(self) -> Ledger:
        attempts = attempts_of(read_file(self.folder / FILE))
        return ledger_of(attempts, last_lines(self.folder / METRICS), Heartbeat.read(self.folder))


def test_goodput_over_attempts(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path, clock)

    # 10 s of startup, 20 s with 15 s of steps, 20 s with 18 s of steps; killed 8 s and 4 steps later.
    first = run.launch(10, step=0)
    assert run.as_read() == Ledger(10, 10, 0, 0, 0)
    run.record(first, 20, 10, useful=15)
    run.record(first, 20, 20, useful=18)
    assert run.ledger == Ledger(50, 50, 33, 0, 0)
    assert run.ledger.share == 33 / 50
    run.beat(first, 8, 24)
    assert run.as_read() == Ledger(58, 58, 33, 0, 0)

    # 42 s later, from the checkpoint at 15: 9 steps were for nothing, and half of the second record's work.
    clock.advance(42)
    second = run.launch(5, step=15)
    assert run.ledger == Ledger(5, 105, 15 + 18 / 2, 9, 1)
    run.record(second, 15, 20, useful=8)
    assert run.ledger == run.as_read() == Ledger(20, 120, 32, 9, 1)
    run.end(second, 2, 75)
    assert run.as_read() == Ledger(22, 122, 32, 9, 1)

    # Requeued on a host whose clock is an hour behind: no time may be taken back.
    clock.wall -= 3600
    third = run.launch(3, step=20)
    assert run.ledger == Ledger(3, 125, 32, 9, 2)

    # It fails at once, and so does the next before it has begun; then the disk is mended and the stage gets done.
    clock.advance(7)
    with pytest.raises(OSError, match="full"), third:
        raise OSError(28, "disk full")
    clock.advance(100)
    fourth = AttemptLog(tmp_path, ["warm_up", "sft"])
    clock.advance(1)
    with pytest.raises(ConfigError), fourth:
        raise ConfigError("data", "is missing")
    assert run.as_read() == Ledger(1, 122 + 110 + 1, 32, 9, 3)
    clock.advance(9)
    fifth = run.launch(10, step=20)
    assert run.ledger == Ledger(10, 252, 32, 9, 4)
    run.record(fifth, 30, 100, useful=28)
    run.end(fifth, 18, 0)
    assert run.as_read() == Ledger(58, 300, 60, 9, 4)
    assert run.as_read().share == 0.2

    # Started again a week later, for nothing: the time after it was done does not count.
    clock.advance(7 * 86400)
    run.end(run.launch(6, step=100), 0, 0)
    assert run.as_read() == Ledger(6, 306, 60, 9, 5)


def test_resumes_further_back_and_from_the_beginning(tmp_path: Path, clock: Clock) -> None:
    """What is done over again counts once, however often it is done."""
    run = Run(tmp_path, clock)
    first = run.launch(0, step=0)
    for step in (10, 20, 30):
        run.record(first, 10, step, useful=10)
    second = run.launch(0, step=20)
    assert (run.ledger.good_seconds, run.ledger.lost_steps) == (20, 10)
    run.record(second, 10, 30, useful=9)
    third = run.launch(0, step=5)
    assert (run.ledger.good_seconds, run.ledger.lost_steps) == (5, 10 + 25)
    run.launch(0, step=5)
    assert (run.ledger.good_seconds, run.ledger.lost_steps) == (5, 35)
    del third
    run.launch(0, step=0)
    assert (run.ledger.good_seconds, run.ledger.lost_steps, run.ledger.restarts) == (0, 40, 4)
    assert run.ledger.wall_seconds == 40


def test_a_run_of_an_older_version_goes_on(tmp_path: Path, clock: Clock) -> None:
    """Its records have no ledger: goodput counts from now on."""
    append_line(tmp_path / METRICS, {"step": 50})
    run = Run(tmp_path, clock)
    attempt = run.launch(4, step=50)
    run.record(attempt, 6, 60, useful=5)
    assert run.as_read() == Ledger(10, 10, 5, 0, 0)


# --- ends

ENDS = {
    "user": (ConfigError("data.sources", "is\nempty"), 2, "data.sources: is empty"),
    "disk": (OSError(28, "No space left on device"), 2, "OSError: [Errno 28] No space left on device"),
    "crash": (RuntimeError("device-side\n  assert"), 1, "RuntimeError: device-side assert"),
    "interrupt": (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("rank", [0, 3])
def test_an_error_is_told(name: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """With the code that the command exits with, by any rank that meets it."""
    error, code, reason = ENDS[name]
    monkeypatch.setenv("RANK", str(rank))
    attempt = AttemptLog(tmp_path, ["sft"])
    attempt.step, attempt.total_steps = 7, 9
    clock.advance(11)
    with pytest.raises(type(error)), attempt:
        raise error
    end = read_events(tmp_path)[-1]
    assert (end.kind, end.rank) == ("end", rank)
    assert end.fields.pop("host")
    assert end.fields == {"code": code, "step": 7, "total_steps": 9, "reason": reason, "elapsed_seconds": 11}


def test_other_ranks_do_not_repeat_an_error_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    error = ConfigError("data", "is missing")
    with pytest.raises(ConfigError), AttemptLog(tmp_path, ["sft"]):
        raise error
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError), AttemptLog(tmp_path, ["sft"]):
        raise error
    assert clock.slept > 0, "rank 0 had time to say it"
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    with pytest.raises(ConfigError), AttemptLog(tmp_path, ["sft"]):
        raise ConfigError("data", "of this rank alone")
    assert len(list(tmp_path.glob("events_rank00001.jsonl"))) == 1


def test_orderly_ends(tmp_path: Path) -> None:
    """Rank 0 speaks for all."""
    for code in (75, 0):
        with AttemptLog(tmp_path, ["sft"]) as attempt:
            assert attempt.finish(code) == code
    assert [event.fields["code"] for event in read_events(tmp_path) if event.kind == "end"] == [75, 0]


# --- files


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, {"step": 1})
    with path.open("ab") as file:
        file.write('{"step": 2, "name": "é'.encode()[:-1])
    append_line(path, {"step": 3})
    assert read_lines(path) == [{"step": 1}, {"step": 3}]
    keep_lines(path, lambda line: line["step"] > 1)
    assert path.read_text() == '{"step": 3}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["lines.jsonl"]


@pytest.mark.parametrize("max_bytes", [1, 7, 16, 100, 10_000])
def test_last_lines_of_a_long_file(tmp_path: Path, max_bytes: int) -> None:
    """They are whole, they are the last, there is at least one, and no more than fit unless that one does not."""
    path = tmp_path / "lines.jsonl"
    lines = [{"n": n, "x": "y" * (n % 5)} for n in range(100)]
    for line in lines:
        append_line(path, line)
    found = last_lines(path, max_bytes)
    assert found
    assert found == lines[-len(found) :]
    assert len(found) == 1 or sum(len(json.dumps(line)) + 1 for line in found) <= 2 * max_bytes
    assert max_bytes < 10_000 or found == lines
    assert last_lines(tmp_path / "none.jsonl") == read_lines(tmp_path / "none.jsonl") == []
