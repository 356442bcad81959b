"""Every record as one line of JSON: what scripts and summaries read."""

from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.json_lines import append_line, keep_lines
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.record import Record


class MetricsFile(Callback):
    """Appends to ``metrics.jsonl`` of the stage, on rank 0. After a resume, lines of steps that will be done again
    are dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, loop: Loop) -> None:
        if dist.get_rank() == 0:
            keep_lines(self.path, lambda line: line["step"] <= loop.step)

    def on_record(self, loop: Loop, record: Record) -> None:
        if dist.get_rank() == 0:
            append_line(self.path, asdict(record))
