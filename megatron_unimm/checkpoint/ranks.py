"""The few collectives that checkpoints need, with a single process as the trivial case.

Every helper works without an initialised ``torch.distributed`` (conversion), where the world is this process.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_unimm.errors import CheckpointError, UserError

T = TypeVar("T")


def new_io_group(timeout_minutes: float = 30.0) -> dist.ProcessGroup | None:
    """A gloo group of all ranks for :func:`~megatron_unimm.checkpoint.store.save` alone; call it once, on every rank.

    A save in the background talks to the other ranks while training goes on, so it must not share a group with it.
    Returns None in a single process. The timeout ends a save whose other ranks are gone.
    """
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
    assert isinstance(group, dist.ProcessGroup)
    return group


@dataclass(frozen=True)
class Ranks:
    """This process among those that save or load together."""

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> "Ranks":
        """The ranks of ``group``; None means all ranks, or this process alone where nothing is initialised."""
        if not dist.is_initialized():
            return cls(rank=0, size=1, group=None)
        return cls(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)

    @classmethod
    def alone(cls) -> "Ranks":
        """Just this process, whatever is initialised around it."""
        return cls(rank=0, size=1, group=None)

    def all_gather(self, value: T) -> list[T]:
        """The value of every rank, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, value: T) -> list[T]:
        """The value of every rank on rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        root = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=root, group=self.group)
        return values or []

    def from_first(self, find: Callable[[], T]) -> T:
        """What rank 0 finds, on every rank: folders may look different to ranks on other hosts for a while.

        Raises:
            what rank 0 raised, as :meth:`agree`.
        """
        found: list[T] = []
        with together(self):
            if self.rank == 0:
                found.append(find())
        return self.all_gather(found)[0][0]

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank where one of them failed: its own error on that rank, a report of it on the others.

        Raises:
            CheckpointError: another rank failed with an error addressed to the user, or the file system refused it.
            RuntimeError: another rank failed otherwise.
        """
        reports = self.all_gather(None if error is None else _report(error))
        if error is not None:
            raise error
        for rank, report in enumerate(reports):
            if report is not None:
                where, what = report
                raise CheckpointError(where, what) if where else RuntimeError(f"checkpoint: rank {rank} failed: {what}")


class together:
    """A block that every rank leaves only once all have run it, and that raises everywhere if it raised on one."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, Exception):
            self.ranks.agree(error)


def _report(error: Exception) -> tuple[str, str]:
    """(where, what) of an error for the user, and ("", text) of any other."""
    if isinstance(error, UserError):
        return error.where, error.what
    if isinstance(error, OSError) and error.strerror is not None:
        return str(error.filename or "file system"), f"{error.strerror} (on {socket.gethostname()})"
    return "", f"{type(error).__name__}: {error}"
