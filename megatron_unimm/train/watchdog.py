"""Watches over the ranks of a job: when one comes no further, all write down where they stand, and end.

Three threads, so that nothing that is stuck can stop the one that decides:

    watch      looks at memory alone. No progress within the limit, or another rank that gave up: starts a report, and
               ends the process with exit code 70 once it is done, or after REPORT_SECONDS, done or not
    exchange   tells the job's store how far this rank is, and asks it whether some rank gave up
    report     stacks, an event, a message: needs storage and network, which may be what is stuck

Beneath them, faulthandler's timer in C ends a process whose interpreter itself is stuck (a library that keeps the GIL);
it can only exit with 1. A rank tells of progress by :meth:`Watchdog.now`, a few times per step, without touching the
device or the network. All ranks run the same program, so that the one that has told least often is behind.
"""

import faulthandler
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from megatron_unimm.errors import UserError
from megatron_unimm.train.attempt import USER_ERROR, exit_code
from megatron_unimm.train.events import EventLog

logger = logging.getLogger(__name__)

HUNG = 70
"""Exit code of a job that the watchdog ended: run me again."""
LONG = 6
"""Times the limit that starting up, the first step, checkpoints and evaluations may take."""
REPORT_SECONDS = 30.0
"""What writing the report may take before the process ends without it."""
LOOKS = 10
"""Looks per limit, at least one in MAX_INTERVAL seconds."""
MAX_INTERVAL = 5.0
PEER_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|[Tt]imed out|remote process exited|NCCL")
"""What gloo and NCCL say where another rank is gone."""
GAVE_UP = "gave_up"
"""Key in the store of the first :class:`Verdict`."""
STACKS = "stacks"
"""Folder in a stage's, with a file for each rank."""


@dataclass(frozen=True)
class Progress:
    """Where a rank stands."""

    told: int
    """How often it has told."""
    step: int
    """Optimizer steps done."""
    doing: str
    since: float
    """Seconds of ``time.monotonic()``."""
    patience: float
    """Times the limit that this may take."""
    detail: Callable[[], str] | None
    """More of what it is doing, asked only when it takes long."""


@dataclass(frozen=True)
class Verdict:
    """Why the job ends, as the first rank that gave up says it."""

    rank: int
    code: int
    what: str


class Watchdog:
    """Runs from before the ranks join until after they part.

        with Watchdog(folder, minutes, events) as watchdog:
            …
            watchdog.connect()
            …

    Args:
        folder: the stage's.
        minutes: ``system.watchdog_minutes``; None watches nothing.
        events: hears of what happened.
    """

    def __init__(self, folder: Path, minutes: float | None, events: EventLog) -> None:
        self.folder = folder
        self.limit = None if minutes is None else 60 * minutes
        self.events = events
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.total_steps = 0
        self.background: Callable[[], tuple[str, float] | None] = lambda: None
        """What is under way beside the steps, and for how many seconds: a checkpoint being written."""
        self.interval = MAX_INTERVAL if self.limit is None else min(MAX_INTERVAL, self.limit / LOOKS)
        self._began = time.perf_counter()
        self._progress = Progress(0, 0, "starting up", time.monotonic(), LONG, None)
        self._verdict: Verdict | None = None
        self._heard_at = 0.0
        self._stopped = threading.Event()
        self._store: dist.Store | None = None
        self._threads: list[threading.Thread] = []

    def now(self, doing: str, step: int, patience: float = 1.0, detail: Callable[[], str] | None = None) -> None:
        """Progress: this rank begins something else.

        Args:
            step: optimizer steps done.
            patience: times the limit that it may take.
            detail: more of what it is doing, asked only where it takes long; must not block.
        """
        self._progress = Progress(self._progress.told + 1, step, doing, time.monotonic(), patience, detail)

    def connect(self) -> None:
        """The ranks have joined: exchange with them from here on."""
        if self.world_size > 1:
            self._store = _store_of_its_own()
            self._publish()
            self._start_thread("exchange", self._exchange)

    def __enter__(self) -> Self:
        if self.limit is not None:
            self._start_thread("watch", self._watch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(REPORT_SECONDS)
        if self.limit is not None:
            faulthandler.cancel_dump_traceback_later()

    def tell_error(self, error: Exception) -> Exception:
        """Tell the other ranks why this one ends; returns the error that was first: this one, or another rank's.

        A rank whose neighbour died first meets an error of the network, which says nothing.
        """
        code = exit_code(error)
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        first = self._give_up(Verdict(self.rank, code, what))
        if code != USER_ERROR and PEER_LOST.search(what):
            gone = "rank %d lost the connection to another rank, which was killed, crashed or is cut off"
            logger.error(f"{gone} (its own output says more); started again, the stage goes on", self.rank)
        if first.rank == self.rank or code == USER_ERROR:
            return error
        logger.error("rank %d ends because rank %d did: %s", self.rank, first.rank, first.what)
        return UserError(f"rank {first.rank}", first.what) if first.code == USER_ERROR else error

    # ------------------------------------------------------------------------------------------ watch

    def _start_thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, name=f"watchdog-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _watch(self) -> None:
        assert self.limit is not None
        while not self._stopped.wait(self.interval):
            progress = self._progress
            # Ends the process if this thread does not come back to set it anew.
            faulthandler.dump_traceback_later(
                self.limit * progress.patience + REPORT_SECONDS, exit=True, file=sys.__stderr__
            )
            why = self._why_to_end(progress)
            if why is not None:
                report = self._start_thread("report", lambda why=why: self._report(why))
                report.join(REPORT_SECONDS)
                os._exit(self._code())

    def _code(self) -> int:
        """What to exit with: another rank's error of the user is not to be run again."""
        return USER_ERROR if self._verdict is not None and self._verdict.code == USER_ERROR else HUNG

    def _why_to_end(self, progress: Progress) -> str | None:
        """What is wrong, in words; None while all is well."""
        assert self.limit is not None
        verdict = self._verdict
        if verdict is not None and (verdict.code == HUNG or time.monotonic() - self._heard_at > self.limit):
            # After an error elsewhere a rank soon meets one of its own; this one waits for what never comes.
            return verdict.what
        stuck = time.monotonic() - progress.since
        if stuck > self.limit * progress.patience:
            return f"rank {self.rank} came no further for {stuck:.0f} s"
        written = self.background()
        if written is not None and written[1] > self.limit * LONG:
            return f"rank {self.rank} has been {written[0]} for {written[1]:.0f} s"
        return None

    # ------------------------------------------------------------------------------------------ exchange

    def _exchange(self) -> None:
        """Runs until the store has gone with the process that kept it."""
        while not self._stopped.wait(self.interval):
            try:
                self._publish()
                if self._verdict is None:
                    self._verdict, self._heard_at = self._ask(), time.monotonic()
            except RuntimeError:
                return

    def _publish(self) -> None:
        if self._store is not None:
            self._store.set(f"rank{self.rank}", json.dumps(self._standing()))

    def _standing(self) -> dict[str, Any]:
        """Where this rank stands, for others."""
        progress = self._progress
        stuck = time.monotonic() - progress.since
        doing = progress.doing
        if progress.detail is not None and stuck > self.interval:
            doing = f"{doing}: {progress.detail()}"
        written = self.background()
        if written is not None and written[1] > self.interval:
            doing = f"{doing} (also {written[0]}, for {written[1]:.0f} s)"
        return {"told": progress.told, "step": progress.step, "doing": doing, "host": socket.gethostname()}

    def _ask(self) -> Verdict | None:
        assert self._store is not None
        return Verdict(**json.loads(self._store.get(GAVE_UP))) if self._store.check([GAVE_UP]) else None

    def _give_up(self, mine: Verdict) -> Verdict:
        """Leave a verdict for all; returns the first that was left."""
        if self._store is None:
            return mine
        try:
            first = self._store.compare_set(GAVE_UP, "", json.dumps(vars(mine)))
        except RuntimeError:  # The store has gone with the process that kept it.
            return mine
        return Verdict(**json.loads(first))

    def _everyone(self) -> list[dict[str, Any]] | None:
        """Where each rank stands; None where some have not begun."""
        if self._store is None:
            return [self._standing()]
        self._publish()
        keys = [f"rank{rank}" for rank in range(self.world_size)]
        return [json.loads(standing) for standing in self._store.multi_get(keys)] if self._store.check(keys) else None

    # ------------------------------------------------------------------------------------------ report

    def _report(self, why: str) -> None:
        """Own stacks first; then what needs the others."""
        assert self.limit is not None
        heard = self._verdict is not None
        if not heard:
            logger.error("watchdog: %s, after step %d %s", why, self._progress.step, self._progress.doing)
        path = self.folder / STACKS / f"rank{self.rank:05d}.txt"
        _try(lambda: write_stacks(path, why, self._standing()))
        if not heard:
            why += f" (system.watchdog_minutes {self.limit / 60:g}); {self._behind()}"
            first = self._give_up(Verdict(self.rank, HUNG, why))
            heard, why = (True, first.what) if first.rank != self.rank else (False, why)
        _try(lambda: self._tell(why, heard))
        # The process that keeps the store must not go before the others have heard.
        time.sleep(2 * self.interval)

    def _tell(self, why: str, heard: bool) -> None:
        """Rank 0 says for all how the attempt ended, and the rank that gave up first says why."""
        step, code, stacks = self._progress.step, self._code(), self.folder / STACKS
        if not heard:
            self.events.add("trouble", what=why, step=step, stacks=str(stacks))
        if self.rank == 0 or not heard:
            elapsed = time.perf_counter() - self._began
            end = {"step": step, "total_steps": self.total_steps, "reason": why, "elapsed_seconds": elapsed}
            self.events.add("end", code=code, **end)
            logger.error("watchdog: %s; the stacks of all ranks are in %s; ending with exit code %d", why, stacks, code)

    def _behind(self) -> str:
        """Who holds the others up."""
        try:
            everyone = self._everyone()
        except RuntimeError:
            return "the other ranks cannot be asked"
        if everyone is None:
            return "some ranks have not even begun"
        least = min(standing["told"] for standing in everyone)
        if self.world_size > 1 and all(standing["told"] == least for standing in everyone):
            standing = everyone[self.rank]
            return f"all ranks are at step {standing['step']}, {standing['doing']}"
        behind = [rank for rank, standing in enumerate(everyone) if standing["told"] == least]
        first = everyone[behind[0]]
        others = f" and {len(behind) - 1} more" if len(behind) > 1 else ""
        at = f"rank {behind[0]} on {first['host']}{others}"
        return f"behind is {at}: after step {first['step']}, {first['doing']}"


def _try(write: Callable[[], None]) -> None:
    """Storage may be what is broken; the rest of a report goes on without it."""
    try:
        write()
    except OSError as error:
        logger.error("watchdog: %s", error)


def write_stacks(path: Path, why: str, standing: dict[str, Any]) -> None:
    """The stacks of all threads of this process, under what is known of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write(f"{why}\nprocess {os.getpid()} on {socket.gethostname()}, {json.dumps(standing)}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def _store_of_its_own() -> dist.Store:
    """A connection to the job's store that nothing else waits on."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=REPORT_SECONDS),
    )
    # torchrun's store outlives restarts.
    return dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
