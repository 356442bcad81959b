"""Where a run is, read from its files alone: while it goes on, from another machine, without torch.

    RUN_DIR/STAGE/   events.jsonl  heartbeat.json  metrics.jsonl  quarantine.jsonl  checkpoints/step_…

What state a stage is in follows from its last attempt (``train/attempt.py``): the code that it ended with; or, where no
end was written, whether it has been heard of lately. A stage gives a sign of life every ten seconds or every step,
whichever is longer, but not while it evaluates or starts; so it counts as running for two minutes, ten of its steps, or
twice its longest evaluation after the last sign, and as starting for half an hour after its launch.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

from megatron_unimm.checkpoint.manifest import MARKER, STEP_NAME, latest
from megatron_unimm.errors import UserError
from megatron_unimm.train.events import FILE, Event, read_events, read_file
from megatron_unimm.train.goodput import HEARTBEAT, METRICS, Attempt, Heartbeat, attempts_of, ledger_of
from megatron_unimm.train.json_lines import last_lines
from megatron_unimm.train.wording import clock

State = Literal["done", "running", "starting", "stopped", "failed", "crashed", "not begun"]
DONE, FAILED, STOPPED = 0, 2, 75
"""Exit codes of ``unimm train``."""
QUIET_SECONDS, QUIET_STEPS, STARTING_SECONDS = 120.0, 10, 1800.0
SKIPPED_TENSOR = "skipped_tensor/"
PACE_RECORDS = 20
"""Records that the rate is taken from, at most."""


@dataclass(frozen=True)
class Checkpoint:
    """The newest checkpoint whose marker, manifest and sizes of files are right."""

    step: int
    age_seconds: float
    newer_unusable: int | None
    """Step of a newer folder that is unfinished or damaged."""


@dataclass(frozen=True)
class Trouble:
    """One thing that went wrong."""

    time: float | None
    """Unix seconds; None where its file does not tell."""
    stage: str
    step: int | None
    what: str


@dataclass(frozen=True)
class StageStatus:
    """One stage."""

    name: str
    state: State
    reason: str = ""
    """Why it is not running, or how long it has been silent."""
    step: int | None = None
    total_steps: int | None = None
    steps_per_second: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    """Only while it runs."""
    loss: float | None = None
    skipped_steps: int = 0
    restarts: int = 0
    lost_steps: int = 0
    goodput: float | None = None
    """Share of the time since the first launch that made steps which count."""
    wall_seconds: float | None = None
    world_size: int | None = None
    slowest: str = ""
    """The slowest rank of the last record."""
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class RunStatus:
    """A run's stages in their order, and what went wrong last, newest first."""

    run: str
    stages: list[StageStatus]
    troubles: list[Trouble] = field(default_factory=list)


def read_status(path: Path, stage: str | None = None, num_troubles: int = 8, now: float | None = None) -> RunStatus:
    """Where a run is.

    Args:
        path: the run's folder, or that of one stage.
        stage: only this one.
        now: Unix seconds; None asks the clock.

    Raises:
        UserError: the folder is no run's, or has no such stage.
    """
    run, names = _find_stages(path, stage)
    now = time.time() if now is None else now
    readers = [_StageFiles(run / name, now) for name in names]
    troubles = [trouble for reader in readers for trouble in reader.troubles()]
    newest = sorted(troubles, key=lambda trouble: trouble.time or 0.0, reverse=True)[:num_troubles]
    return RunStatus(str(run), [reader.status() for reader in readers], newest)


def _find_stages(path: Path, stage: str | None) -> tuple[Path, list[str]]:
    if not path.is_dir():
        raise UserError(str(path), "there is no such folder; give the --run-dir of unimm train")
    if _is_stage(path):
        path, stage = path.parent, stage or path.resolve().name
    begun = {child.name: child for child in sorted(path.iterdir()) if child.is_dir() and _is_stage(child)}
    if not begun:
        what = f"is no run: none of its folders has {FILE} or {METRICS}; give the --run-dir of unimm train"
        raise UserError(str(path), what)
    # The newest launch knows the recipe's stages and their order; runs of older versions are taken by name.
    launches = [event for folder in begun.values() for event in read_file(folder / FILE) if event.kind == "launch"]
    known = max(launches, key=lambda event: event.time).fields["stages"] if launches else []
    names = [*known, *(name for name in begun if name not in known)]
    if stage is not None and stage not in names:
        raise UserError("--stage", f"{stage} is no stage of {path}; it has {', '.join(names)}")
    return path, names if stage is None else [stage]


def _is_stage(folder: Path) -> bool:
    return (folder / FILE).is_file() or (folder / METRICS).is_file()


class _StageFiles:
    """What the files of a stage say."""

    def __init__(self, folder: Path, now: float) -> None:
        self.folder = folder
        self.name = folder.name
        self.now = now
        self.events = read_events(folder)
        self.attempts = attempts_of(read_file(folder / FILE))
        self.lines = last_lines(folder / METRICS)
        self.heartbeat = Heartbeat.read(folder)

    def status(self) -> StageStatus:
        if not self.attempts and not self.lines:
            return StageStatus(self.name, "not begun")
        state, reason = self._state()
        step, total = self._place()
        last = self.lines[-1] if self.lines else {}
        steps_per_second, tokens_per_second = pace(self.lines)
        left = total - step if total is not None and step is not None else None
        eta = left / steps_per_second if state == "running" and left is not None and steps_per_second else None
        ledger = ledger_of(self.attempts, self.lines, self.heartbeat) if self.attempts else None
        slowest = last.get("straggler")
        return StageStatus(
            name=self.name,
            state=state,
            reason=reason,
            step=step,
            total_steps=total,
            steps_per_second=steps_per_second,
            tokens_per_second=tokens_per_second,
            eta_seconds=eta,
            loss=last.get("total_loss"),
            skipped_steps=last.get("skipped_steps", 0),
            restarts=ledger.restarts if ledger else 0,
            lost_steps=ledger.lost_steps if ledger else 0,
            goodput=ledger.share if ledger else None,
            wall_seconds=ledger.wall_seconds if ledger else None,
            world_size=self.attempts[-1].launch.fields["world_size"] if self.attempts else None,
            slowest="rank {rank} on {host}, {ratio:.2f}x".format(**slowest) if slowest else "",
            checkpoint=self._checkpoint(),
        )

    def _place(self) -> tuple[int | None, int | None]:
        """Steps done, and steps in all."""
        last = self.lines[-1] if self.lines else {}
        step, total = last.get("step"), last.get("total_steps")
        if not self.attempts:
            return step, total
        attempt = self.attempts[-1]
        for event in (attempt.start, attempt.end):
            if event is not None and event.fields["total_steps"]:
                total = event.fields["total_steps"]
                step = event.fields["step"] if event is attempt.end else max(step or 0, event.fields["step"])
        if self.heartbeat is not None and attempt.end is None:
            step = max(step or 0, self.heartbeat.step)
        return step, total

    # ------------------------------------------------------------------------------------------ state

    def _state(self) -> tuple[State, str]:
        silent = self.silent_seconds()
        if not self.attempts:
            last = self.lines[-1]
            if last["step"] >= last["total_steps"]:
                return "done", ""
            return ("running", "") if silent < self.quiet_seconds() else ("stopped", f"{clock(silent)} ago")
        attempt = self.attempts[-1]
        end = self._end_of(attempt)
        if end is not None:
            return _ended(end)
        if attempt.start is None:
            alive: State = "starting"
            is_alive = silent < STARTING_SECONDS
        else:
            alive = "running"
            is_alive = silent < self.quiet_seconds()
        if is_alive:
            return alive, ""
        return "crashed", f"no sign of life for {clock(silent)}: killed, or its node is gone"

    def _end_of(self, attempt: Attempt) -> Event | None:
        """How an attempt ended, by rank 0 or by the first rank that told of an error; what the user can mend first."""
        launch = attempt.launch
        ends = [
            event
            for event in self.events
            if event.kind == "end" and event.attempt == launch.attempt and event.time >= launch.time
        ]
        if attempt.end is not None:
            ends.append(attempt.end)
        later = [other.launch.time for other in self.attempts if other.restarts > attempt.restarts]
        ends = [event for event in ends if event is attempt.end or event.time < min(later, default=math.inf)]
        return min(ends, key=lambda event: (event.fields["code"] != FAILED, event.time), default=None)

    def silent_seconds(self) -> float:
        """Since the last sign of life. Hosts' clocks differ: the time that was written down and the time that the file
        system noted are both asked, and the later is believed."""
        signs = [event.time for event in self.events[-1:]]
        signs += [self.heartbeat.time] if self.heartbeat is not None else []
        files = (self.folder / name for name in (FILE, HEARTBEAT, METRICS))
        signs += [path.stat().st_mtime for path in files if path.exists()]
        return max(0.0, self.now - max(signs))

    def quiet_seconds(self) -> float:
        """How long a stage that runs may be silent."""
        steps = [line["step_seconds"] for line in self.lines[-PACE_RECORDS:]]
        usual = QUIET_STEPS * median(steps) if steps else QUIET_SECONDS
        by_step: dict[int, float] = {}
        for line in last_lines(self.folder / "evaluation.jsonl"):
            by_step[line["step"]] = by_step.get(line["step"], 0.0) + line["seconds"]
        return max(QUIET_SECONDS, usual, 2 * max(by_step.values(), default=0.0))

    def _checkpoint(self) -> Checkpoint | None:
        folder = self.folder / "checkpoints"
        newest = latest(folder)
        if newest is None:
            return None
        step = _step_of(newest)
        newer = [_step_of(path) for path in folder.iterdir() if STEP_NAME.fullmatch(path.name)]
        age = max(0.0, self.now - (newest / MARKER).stat().st_mtime)
        return Checkpoint(step, age, max((other for other in newer if other > step), default=None))

    # ------------------------------------------------------------------------------------------ troubles

    def troubles(self) -> list[Trouble]:
        return [*self._told(), *self._ends(), *self._skipped(), *self._bad_data()]

    def _told(self) -> list[Trouble]:
        """What was written down as such."""
        found = []
        for event in self.events:
            if event.kind in ("trouble", "save_failed"):
                what = str(event.fields.get("what", ""))
                if event.rank:
                    what = f"rank {event.rank} on {event.fields['host']}: {what}"
                found.append(Trouble(event.time, self.name, event.fields.get("step"), what))
        return found

    def _ends(self) -> list[Trouble]:
        """Attempts but the last, which the stage's state tells of, that ended without being done or told to stop."""
        found, told = [], {event.fields.get("what") for event in self.events if event.kind == "trouble"}
        for attempt, following in pairwise(self.attempts):
            end = self._end_of(attempt)
            if end is not None and (end.fields["code"] in (DONE, STOPPED) or end.fields["reason"] in told):
                continue
            if end is not None:
                who = f"rank {end.rank}: " if end.rank else ""
                what = f"ended with code {end.fields['code']}: {who}{end.fields['reason']}"
                found.append(Trouble(end.time, self.name, end.fields["step"], what))
            else:
                what = f"killed without a word ({attempt_of(attempt)}), launched again"
                found.append(Trouble(following.launch.time, self.name, None, what))
        return found

    def _skipped(self) -> list[Trouble]:
        """Records with skipped steps, and the tensors with the largest gradients."""
        found = []
        launched = {attempt.restarts: attempt.launch.time for attempt in self.attempts}
        for line in self.lines:
            if line["skipped_now"]:
                norms = [(norm, key) for key, norm in line["extra"].items() if key.startswith(SKIPPED_TENSOR)]
                worst = f", largest {max(norms)[1].removeprefix(SKIPPED_TENSOR)} {max(norms)[0]:.3g}" if norms else ""
                ledger = line.get("ledger")
                at = launched[ledger["restarts"]] + ledger["elapsed_seconds"] if ledger else None
                what = f"{line['skipped_now']} skipped for their gradients{worst}"
                found.append(Trouble(at, self.name, line["step"], what))
        return found

    def _bad_data(self) -> list[Trouble]:
        """How many samples were passed over, and the last of them."""
        path = self.folder / "quarantine.jsonl"
        lines = last_lines(path)
        if not lines:
            return []
        count = sum(self.lines[-1]["faults"].values()) if self.lines else 0
        what = f"{count or len(lines)} samples passed over, the last: {lines[-1]['what']}"
        return [Trouble(path.stat().st_mtime, self.name, None, what)]


def _ended(end: Event) -> tuple[State, str]:
    code, reason = end.fields["code"], end.fields["reason"]
    if code == DONE:
        return "done", ""
    if code == STOPPED:
        return "stopped", "by a signal, after saving; run it again"
    if code == FAILED:
        return "failed", reason
    return "crashed", f"code {code}: {reason}"


def attempt_of(attempt: Attempt) -> str:
    """An attempt's name and host."""
    return f"{attempt.launch.attempt} on {attempt.launch.fields['host']}"


def pace(lines: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Steps and tokens per second over the last records of an attempt, with all that came between them (evaluations,
    saves); of a single record, while it trained."""
    if not lines:
        return None, None
    last = lines[-1]
    alone = 1 / last["step_seconds"], last["tokens_per_second"]
    if not last.get("ledger"):
        return alone
    restarts = last["ledger"]["restarts"]
    same = [line for line in lines[-PACE_RECORDS:] if line.get("ledger", {}).get("restarts") == restarts]
    seconds = last["ledger"]["elapsed_seconds"] - same[0]["ledger"]["elapsed_seconds"]
    if len(same) < 2 or seconds <= 0:
        return alone
    tokens = sum(
        line["tokens_per_second"] * line["step_seconds"] * (line["step"] - before["step"])
        for before, line in pairwise(same)
    )
    return (last["step"] - same[0]["step"]) / seconds, tokens / seconds


def _step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step_"))
