"""Every record as one line of JSON: what scripts and summaries read."""

import json
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.record import Record


class MetricsFile(Callback):
    """Appends to ``metrics.jsonl`` of the stage, on rank 0. After a resume, lines of steps that will be done again
    are dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, loop: Loop) -> None:
        if dist.get_rank() == 0 and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= loop.step]
            self.path.write_text("".join(f"{line}\n" for line in kept))

    def on_record(self, loop: Loop, record: Record) -> None:
        if dist.get_rank() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")
