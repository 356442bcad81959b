"""Warns of a rank that holds up the others for long."""

import logging

import torch.distributed as dist

from megatron_unimm.config.train import LoggingConfig
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.events import EventLog
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.record import Record

logger = logging.getLogger(__name__)


class StragglerWatch(Callback):
    """Says so, in the log and in the events, once for every time that a host's rank has been the slowest, over
    ``train.logging.straggler_ratio`` times the median, for ``straggler_intervals`` records in a row.
    """

    def __init__(self, settings: LoggingConfig, events: EventLog) -> None:
        self.settings = settings
        self.events = events
        self._host = ""
        self._in_a_row = 0

    def on_record(self, loop: Loop, record: Record) -> None:
        slowest = record.straggler
        if dist.get_rank() != 0 or slowest is None:
            return
        is_slow = slowest.ratio > self.settings.straggler_ratio
        self._in_a_row = (self._in_a_row if slowest.host == self._host else 0) + 1 if is_slow else 0
        self._host = slowest.host
        if self._in_a_row == self.settings.straggler_intervals:
            what = f"{slowest}, for {self._in_a_row} records in a row"
            logger.warning("step %d: %s", record.step, what)
            self.events.add("trouble", what=what, step=record.step, slowest_rank=slowest.rank)
