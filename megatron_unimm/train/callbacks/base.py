"""Hooks around the loop. A callback is one small file with one concern."""

from typing import TYPE_CHECKING

from megatron_unimm.data.loader import StepBatch
from megatron_unimm.train.record import Record

if TYPE_CHECKING:
    from megatron_unimm.train.loop import Loop


class Callback:
    """Every hook may be left out. All are called on all ranks, in the order of the list."""

    def on_start(self, loop: "Loop") -> None:
        """Before the first step, after a resume."""

    def on_step(self, loop: "Loop", batch: StepBatch) -> None:
        """After every optimizer step. Must not wait for the device."""

    def on_record(self, loop: "Loop", record: Record) -> None:
        """At every logging interval."""

    def on_end(self, loop: "Loop") -> None:
        """After the last step, or after a signal."""
