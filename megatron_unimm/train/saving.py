"""When checkpoints are written, what happens when that fails, and what a stage's events say of it."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_unimm.checkpoint.manifest import latest, prune, read_manifest
from megatron_unimm.config.train import CheckpointConfig
from megatron_unimm.errors import CheckpointError
from megatron_unimm.train.events import EventLog
from megatron_unimm.train.state import Checkpointer

logger = logging.getLogger(__name__)

Progress = Callable[[], dict[str, Any]]
"""The small state beside the tensors, made when it is needed."""
NOT_WRITTEN = (OSError, CheckpointError)
"""What a save raises where the file system refused it, on the rank that met it and on the others."""


class Saver:
    """Saves without holding training up, and goes on training where a save fails.

    A save in the background stalls training while tensors are copied to host memory. Where one is due while the last is
    still being written, it is left out. A save that fails is told loudly; after more than ``max_failures`` in a row the
    run ends. All ranks come to the same decisions: they agree where a save is due, and errors were agreed by the save.
    """

    def __init__(
        self, settings: CheckpointConfig, checkpointer: Checkpointer, group: dist.ProcessGroup, events: EventLog
    ) -> None:
        self.settings = settings
        self.checkpointer = checkpointer
        self.group = group
        self.events = events
        self.failures = 0
        """Saves in a row that were not written."""
        self.step: int | None = None
        """Of the last save that was begun, or of the stage's own checkpoint that it goes on from."""
        self._under_way = False
        self._began = 0.0
        self._stall_seconds = 0.0
        self._last_error = ""

    def under_way(self) -> tuple[str, float] | None:
        """For the watchdog: what is being written in the background, and for how many seconds."""
        if not self._under_way:
            return None
        return f"writing checkpoint {self.step}", time.perf_counter() - self._began

    def poll(self) -> None:
        """After a step, without waiting: tell of a save that has ended."""
        pending = self.checkpointer.pending
        if pending is not None and pending.seconds is not None:
            self._settle()

    def is_free(self, step: int) -> bool:
        """Whether the checkpoint that is due can be written; says so if not. Called on every rank: one may still be
        writing when another is done."""
        pending = self.checkpointer.pending
        writing = torch.tensor([float(pending is not None and pending.seconds is None)])
        dist.all_reduce(writing, dist.ReduceOp.MAX, group=self.group)
        if writing:
            what = f"checkpoint {step} is left out: {self.step} is still being written"
            self._tell("trouble", f"{what}; train.checkpoint.every_steps may be too few for the storage", step)
        return not writing

    def save(self, step: int, progress: Progress) -> None:
        """Write a checkpoint; called on every rank, where it is free.

        Raises:
            CheckpointError: too many in a row could not be written.
        """
        self._settle()
        if self.failures <= self.settings.max_failures:
            self._begin(step, progress, self.settings.asynchronous)
        if self.failures > self.settings.max_failures:
            raise self._too_many()

    def finish(self, step: int, progress: Progress) -> None:
        """Make sure that the state after ``step`` is on disk; called on every rank.

        Raises:
            CheckpointError: it could not be written.
        """
        self._settle()
        if self.step != step or self.failures:
            self._begin(step, progress, asynchronous=False)
        if self.failures:
            raise self._too_many()

    def close(self) -> None:
        """Wait for what is being written, if anything is, so that nothing is cut off that could be finished."""
        try:
            self._settle()
        except RuntimeError as error:  # The save talks to ranks that may be gone, as training does.
            logger.error("checkpoint %s could not be finished: %s", self.step, error)

    def _begin(self, step: int, progress: Progress, asynchronous: bool) -> None:
        self.step, self._under_way, self._began = step, True, time.perf_counter()
        try:
            self.checkpointer.save(step, progress(), asynchronous)
        except NOT_WRITTEN as error:
            self._failed(error)
            return
        self._stall_seconds = time.perf_counter() - self._began
        if not asynchronous:
            self._settle()

    def _settle(self) -> None:
        """Wait for the save that is under way, if one is, and tell how it went."""
        pending = self.checkpointer.pending
        if pending is None:
            return
        try:
            self.checkpointer.wait()
        except NOT_WRITTEN as error:
            self._failed(error)
            return
        self.failures, self._under_way = 0, False
        if dist.get_rank() == 0:
            total = sum(record.bytes for record in read_manifest(pending.directory).files.values())
            seconds, stall = round(pending.seconds or 0.0, 3), round(self._stall_seconds, 3)
            self.events.add("saved", step=self.step, seconds=seconds, stall_seconds=stall, bytes=total)
            size = f"{total / 2**30:.2f} GiB" if total >= 2**30 else f"{total / 2**20:.1f} MiB"
            logger.info(
                "saved %s: %s in %.1f s, training stood still for %.2f s", pending.directory, size, seconds, stall
            )
            prune(self.checkpointer.folder, self.settings.keep_last, self.settings.keep_every_steps)

    def _failed(self, error: OSError | CheckpointError) -> None:
        self.failures, self._under_way = self.failures + 1, False
        self._last_error = _in_words(error)
        left = self.settings.max_failures - self.failures
        more = f"training goes on, {left} more may fail" if left >= 0 else "that is too many in a row"
        self._tell("save_failed", f"checkpoint {self.step} could not be written: {self._last_error}; {more}", self.step)

    def _too_many(self) -> CheckpointError:
        good = latest(self.checkpointer.folder)
        return CheckpointError(
            str(self.checkpointer.folder),
            f"{self.failures} checkpoints in a row could not be written (train.checkpoint.max_failures is "
            f"{self.settings.max_failures}, and the last of a run must be), the last for {self._last_error}; the last "
            f"good one is {'none' if good is None else good.name}; mend the storage and start again",
        )

    def _tell(self, kind: str, what: str, step: int | None) -> None:
        if dist.get_rank() == 0:
            self.events.add(kind, what=what, step=step)
            logger.error("%s", what)


def _in_words(error: OSError | CheckpointError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'file system'}: {(error.strerror or str(error)).lower()}"
    return str(error)
