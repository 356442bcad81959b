"""What happens to a run, as lines of JSON: starts, saves, resumes, troubles, ends.

Goodput, restarts and ``unimm status`` come from these files, and the launchers read how an attempt ended. They belong
to a stage's folder and outlive attempts:

    events.jsonl              appended by rank 0
    events_rank00017.jsonl    appended by other ranks, which write only when something is wrong with them

Legend  attempt: one start of the job's processes, by the scheduler, by torchrun or by hand.
"""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_unimm.train.json_lines import append_line, read_lines

FILE = "events.jsonl"


def attempt_name(environ: Mapping[str, str]) -> str:
    """What tells this attempt from others: ``slurm-1234.0.0`` (job, requeues, restarts by the launcher or torchrun) or
    ``local-PID.0``; the same on every rank.

    Args:
        environ: of the process.
    """
    restarts = environ.get("UNIMM_RESTARTS") or environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if "SLURM_JOB_ID" in environ:
        return f"slurm-{environ['SLURM_JOB_ID']}.{environ.get('SLURM_RESTART_COUNT', '0')}.{restarts}"
    launcher = environ.get("TORCHELASTIC_RUN_ID", str(os.getpid()))
    return f"local-{launcher}.{restarts}"


def host_name() -> str:
    """This host, as SLURM calls it where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class Event:
    """One line."""

    kind: str
    """``launch``, ``start``, ``resume``, ``saved``, ``trouble``, ``end`` …"""
    time: float
    """Unix seconds by the clock of the host that wrote it."""
    rank: int
    attempt: str
    fields: dict[str, Any]
    """Whatever belongs to the kind."""


class EventLog:
    """Appends events of one rank; each is one write of a whole line, on disk at once."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / (FILE if rank == 0 else f"events_rank{rank:05d}.jsonl")
        self.rank = rank
        self.attempt = attempt_name(os.environ)
        self.host = host_name()

    def add(self, kind: str, **fields: Any) -> None:
        """Append one event with JSON values."""
        head = {"kind": kind, "time": time.time(), "rank": self.rank, "attempt": self.attempt, "host": self.host}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, head | fields)


def read_events(folder: Path) -> list[Event]:
    """All events of a stage's folder: attempts in the order of rank 0's file, whatever their hosts' clocks said, and
    each in order of time. A line that a killed process left unfinished is passed over."""
    events = [event for path in sorted(folder.glob("events*.jsonl")) for event in read_file(path)]
    order = {name: number for number, name in enumerate(dict.fromkeys(event.attempt for event in events))}
    return sorted(events, key=lambda event: (order[event.attempt], event.time))


def read_file(path: Path) -> list[Event]:
    """The events of one rank in the order in which it wrote them, whatever its hosts' clocks said; none without a
    file."""
    events = []
    for fields in read_lines(path):
        kind, at, rank, attempt = (fields.pop(name) for name in ("kind", "time", "rank", "attempt"))
        events.append(Event(kind, at, rank, attempt, fields))
    return events
