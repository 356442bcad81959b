"""One attempt at a stage, from the launch of its processes to their end, in the stage's files."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_unimm.errors import UserError
from megatron_unimm.train.events import FILE, EventLog, read_file
from megatron_unimm.train.goodput import METRICS, Heartbeat, Ledger, at_launch, at_start, attempts_of
from megatron_unimm.train.json_lines import last_lines, read_lines

CRASHED, USER_ERROR, INTERRUPTED = 1, 2, 130
"""Exit codes of the command for exceptions, as ``cli/main.py`` has them."""
PATIENCE_SECONDS = 1.0
"""How long another rank waits for rank 0 to say the same."""


class AttemptLog:
    """Adds ``launch``, ``start`` and ``end`` to a stage's events, however the attempt ends, and keeps its ledger.

    Rank 0 speaks for all. Of an error every rank tells that meets it, since rank 0 may be waiting for that one; errors
    of the user, which most often all ranks meet alike, only where rank 0 has not said the same.

        with AttemptLog(folder, stages) as attempt:
            …
            return attempt.finish(loop.run())

    Args:
        folder: the stage's.
        stages: names of the recipe's stages in their order.
    """

    def __init__(self, folder: Path, stages: Sequence[str]) -> None:
        self.folder = folder
        self.rank = int(os.environ.get("RANK", "0"))
        self.events = EventLog(folder, self.rank)
        self.step = self.total_steps = 0
        """Where training is; kept up to date by ``callbacks/progress.py``."""
        self.origin = ""
        """Folder of the checkpoint that it begins from."""
        self.launched = Ledger()
        self._code: int | None = None
        self._began = time.perf_counter()
        if self.rank == 0:
            before, last = attempts_of(read_file(folder / FILE)), last_lines(folder / METRICS)[-1:]
            self.launched = at_launch(before, time.time(), last, Heartbeat.read(folder))
            self.events.add(
                "launch",
                wall_seconds=self.launched.wall_seconds,
                restarts=self.launched.restarts,
                world_size=int(os.environ.get("WORLD_SIZE", "1")),
                stages=list(stages),
            )

    def elapsed(self) -> float:
        """Seconds since the launch."""
        return time.perf_counter() - self._began

    def start(self, step: int, total_steps: int, world_size: int) -> Ledger:
        """Note on rank 0 that the first step can begin; the records of steps that will be done again are still there.

        Returns:
            the ledger so far.
        """
        before = attempts_of(read_file(self.folder / FILE))[:-1]
        lines = read_lines(self.folder / METRICS)
        ledger = at_start(self.launched, step, before, lines, Heartbeat.read(self.folder))
        ledger = self.at(ledger, ledger.good_seconds)
        self.events.add(
            "start",
            step=step,
            total_steps=total_steps,
            world_size=world_size,
            origin=self.origin,
            elapsed_seconds=ledger.elapsed_seconds,
            good_seconds=ledger.good_seconds,
            lost_steps=ledger.lost_steps,
        )
        return ledger

    def at(self, ledger: Ledger, good_seconds: float) -> Ledger:
        """A ledger brought up to now."""
        elapsed = self.elapsed()
        wall = self.launched.wall_seconds + elapsed
        return replace(ledger, elapsed_seconds=elapsed, wall_seconds=wall, good_seconds=good_seconds)

    def finish(self, code: int) -> int:
        """The command's exit code, which it returns."""
        self._code = code
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            assert self._code is not None, "finish() was not called"
            if self.rank == 0:
                self._end(self._code, "signal" if self._code else "done")
            return
        code, reason = exit_code(error), told(error)
        if self.rank == 0 or code != USER_ERROR or not self._rank_0_says(reason):
            self._end(code, reason)

    def _end(self, code: int, reason: str) -> None:
        self.events.add(
            "end",
            code=code,
            step=self.step,
            total_steps=self.total_steps,
            reason=reason,
            elapsed_seconds=self.elapsed(),
        )

    def _rank_0_says(self, reason: str) -> bool:
        time.sleep(PATIENCE_SECONDS)
        attempts = attempts_of(read_file(self.folder / FILE))
        end = attempts[-1].end if attempts else None
        return end is not None and end.fields["reason"] == reason


def exit_code(error: BaseException) -> int:
    """The command's exit code for an exception that ends it."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    is_for_user = isinstance(error, UserError) or (isinstance(error, OSError) and error.strerror is not None)
    return USER_ERROR if is_for_user else CRASHED


def told(error: BaseException) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".removesuffix(": ")
