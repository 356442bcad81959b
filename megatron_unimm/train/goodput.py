"""How much of a stage's time made optimizer steps that count, over all its attempts; from files, without torch.

    time      launch ──── start ── 10 ── 20 ── 24 ✗        launch ──── start ── 30 …
    steps                 0        10    20    (lost: 4)                20       30

Rank 0 writes down, on the way: at a launch the time since the first launch (``wall_seconds``), at a start and with each
record also the time that made steps which count (``good_seconds``) and the steps that were done in vain
(``lost_steps``). Goodput is good over wall: startup, resumes, saves, waits for data, skipped steps, steps done twice,
evaluations and the time between attempts are what it lacks. The time after a stage was done does not count.

Within an attempt time is that of a clock which does not jump; the hosts' clocks are compared only from one launch to
the next, where a later launch is never earlier than what the attempt before it has lived through.

Legend  attempt: as in ``events.py``;  launch: its begin;  start: when its first step could begin.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_unimm.train.events import Event

METRICS, HEARTBEAT = "metrics.jsonl", "heartbeat.json"
DONE = 0
"""Code of an attempt after which nothing was left to do."""


@dataclass(frozen=True)
class Ledger:
    """What has become of a stage's time up to some moment."""

    elapsed_seconds: float = 0.0
    """Since this attempt's launch."""
    wall_seconds: float = 0.0
    """Since the first attempt's launch."""
    good_seconds: float = 0.0
    """Of these, what made optimizer steps that still count."""
    lost_steps: int = 0
    """Steps that were done, and had to be done again from an earlier checkpoint."""
    restarts: int = 0
    """Launches after the first."""

    @property
    def share(self) -> float:
        """Goodput: 0 to 1."""
        return self.good_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a stage's rank 0."""

    time: float
    """Unix seconds by its host's clock."""
    step: int
    ledger: Ledger

    def write(self, folder: Path) -> None:
        """Replace the one before it; a reader sees one or the other."""
        temporary = folder / f"{HEARTBEAT}.tmp"
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, folder / HEARTBEAT)

    @classmethod
    def read(cls, folder: Path) -> "Heartbeat | None":
        path = folder / HEARTBEAT
        if not path.exists():
            return None
        fields = json.loads(path.read_text())
        return cls(fields["time"], fields["step"], Ledger(**fields["ledger"]))


@dataclass(frozen=True)
class Attempt:
    """One attempt as rank 0's events tell it."""

    launch: Event
    start: Event | None
    """None before its first step."""
    end: Event | None
    """None while it runs, and for ever if it was killed."""

    @property
    def restarts(self) -> int:
        return self.launch.fields["restarts"]


def attempts_of(events: Sequence[Event]) -> list[Attempt]:
    """The attempts in rank 0's events, in the order in which it wrote them."""
    launches = [number for number, event in enumerate(events) if event.kind == "launch"]
    found = []
    for begin, stop in pairwise([*launches, len(events)]):
        last = {event.kind: event for event in events[begin:stop]}
        found.append(Attempt(events[begin], last.get("start"), last.get("end")))
    return found


def ledger_of(attempts: Sequence[Attempt], lines: Sequence[dict[str, Any]], heartbeat: Heartbeat | None) -> Ledger:
    """Where the last attempt stood when it was last heard of.

    Args:
        attempts: all of them, at least one.
        lines: the last of ``metrics.jsonl``, if there is one; earlier ones make no difference.
    """
    attempt = attempts[-1]
    launched = Ledger(0.0, attempt.launch.fields["wall_seconds"], restarts=attempt.restarts)
    known = [ledger for ledger in _written(lines, heartbeat) if ledger.restarts == attempt.restarts]
    starts = [each.start for each in attempts if each.start is not None]
    counted = max(known, key=lambda ledger: ledger.elapsed_seconds, default=None)
    if counted is None:
        fields = starts[-1].fields if starts else {"good_seconds": 0.0, "lost_steps": 0}
        counted = Ledger(0.0, 0.0, fields["good_seconds"], fields["lost_steps"])
    lived = [event.fields["elapsed_seconds"] for event in (attempt.start, attempt.end) if event is not None]
    elapsed = max([counted.elapsed_seconds, *lived])
    return Ledger(elapsed, launched.wall_seconds + elapsed, counted.good_seconds, counted.lost_steps, launched.restarts)


def _written(lines: Sequence[dict[str, Any]], heartbeat: Heartbeat | None) -> list[Ledger]:
    """What the last record and the last heartbeat say."""
    found = [] if heartbeat is None else [heartbeat.ledger]
    return found + [Ledger(**line["ledger"]) for line in lines[-1:] if line.get("ledger")]


def at_launch(
    attempts: Sequence[Attempt], now: float, lines: Sequence[dict[str, Any]], heartbeat: Heartbeat | None
) -> Ledger:
    """The ledger with which an attempt begins.

    Args:
        attempts: those before it.
        now: Unix seconds of the launch.
        lines: the last of ``metrics.jsonl``, as the attempts before left it; as is ``heartbeat``.
    """
    if not attempts:
        return Ledger()
    before, launch, end = ledger_of(attempts, lines, heartbeat), attempts[-1].launch, attempts[-1].end
    wall = before.wall_seconds
    if end is None or end.fields["code"] != DONE:
        wall = max(wall, launch.fields["wall_seconds"] + now - launch.time)
    return Ledger(0.0, wall, restarts=before.restarts + 1)


def at_start(
    launched: Ledger,
    step: int,
    attempts: Sequence[Attempt],
    lines: Sequence[dict[str, Any]],
    heartbeat: Heartbeat | None,
) -> Ledger:
    """The ledger of an attempt whose first step can begin, after ``step`` earlier ones that count.

    Args:
        launched: its ledger at the launch.
        attempts: those before it.
        lines: of ``metrics.jsonl``, as the attempts before left it.
    """
    last = next((each for each in reversed(attempts) if each.start is not None), None)
    if last is None or last.start is None:
        return launched
    fields = last.start.fields
    # Records of steps that were done again are gone: those that are left, and the last start, are of one line of steps.
    points = {0: 0.0, fields["step"]: fields["good_seconds"]}
    points |= {line["step"]: line["ledger"]["good_seconds"] for line in lines if line.get("ledger")}
    seen = [fields["step"], *(line["step"] for line in lines[-1:])]
    seen += [last.end.fields["step"]] if last.end is not None else []
    seen += [heartbeat.step] if heartbeat is not None and heartbeat.ledger.restarts == last.restarts else []
    lost = fields["lost_steps"] + max(0, max(seen) - step)
    return Ledger(launched.elapsed_seconds, launched.wall_seconds, _good_at(step, points), lost, launched.restarts)


def _good_at(step: int, points: dict[int, float]) -> float:
    """The good seconds of the first ``step`` steps: between two records in proportion, after the last the same."""
    before = max(known for known in points if known <= step)
    after = min((known for known in points if known > step), default=None)
    if after is None:
        return points[before]
    return points[before] + (points[after] - points[before]) * (step - before) / (after - before)
