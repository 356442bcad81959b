"""Keeps the attempt's ledger: goodput in every record, and a sign of life now and then."""

import time
from dataclasses import asdict

import torch.distributed as dist

from megatron_unimm.data.loader import StepBatch
from megatron_unimm.train.attempt import AttemptLog
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.goodput import Heartbeat, Ledger
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.record import Record

HEARTBEAT_SECONDS = 10.0


class Progress(Callback):
    """Writes the attempt's ``start``, and ``heartbeat.json`` after a step, at most every ten seconds, and with each
    record; adds the ledger to records. Put it before the callback that drops records of steps that will be done again:
    they tell how many were lost.
    """

    def __init__(self, attempt: AttemptLog) -> None:
        self.attempt = attempt
        self._ledger = Ledger()
        self._beat_at = 0.0

    def on_start(self, loop: Loop) -> None:
        self._note(loop)
        if dist.get_rank() == 0:
            self._ledger = self.attempt.start(loop.step, loop.total_steps, dist.get_world_size())
            self._beat(loop)

    def on_step(self, loop: Loop, batch: StepBatch) -> None:
        self._note(loop)
        if dist.get_rank() == 0 and time.perf_counter() - self._beat_at > HEARTBEAT_SECONDS:
            self._beat(loop)

    def on_record(self, loop: Loop, record: Record) -> None:
        if dist.get_rank() == 0:
            good = self._ledger.good_seconds + record.useful_seconds
            self._ledger = self.attempt.at(self._ledger, good)
            record.ledger.update(asdict(self._ledger))
            self._beat(loop)

    def _note(self, loop: Loop) -> None:
        self.attempt.step, self.attempt.total_steps = loop.step, loop.total_steps

    def _beat(self, loop: Loop) -> None:
        self._beat_at = time.perf_counter()
        self._ledger = self.attempt.at(self._ledger, self._ledger.good_seconds)
        Heartbeat(time.time(), loop.step, self._ledger).write(self.attempt.folder)
