"""A list of the samples that cannot be used, to mend or to leave out next time."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_unimm.data.loader import StepBatch
from megatron_unimm.data.plan import BadSample
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.json_lines import read_lines
from megatron_unimm.train.loop import Loop


class Quarantine(Callback):
    """Appends a line for every bad sample to ``quarantine.jsonl`` of the stage, once however often it is drawn.

    Samples that were left out are the same on all ranks, and rank 0 writes them. Images that turn out broken when they
    are decoded are known to the ranks of their row only; the first of these writes them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: set[str] = set()

    def on_start(self, loop: Loop) -> None:
        self.known = {line["what"] for line in read_lines(self.path)}

    def on_step(self, loop: Loop, batch: StepBatch) -> None:
        if dist.get_rank() == 0:
            self._write(batch.bad)
        groups = loop.groups
        if groups.is_first_stage() and groups.context_rank == 0 and groups.collection.tp.rank() == 0:
            self._write(batch.voided)

    def _write(self, bad: Sequence[BadSample]) -> None:
        fresh = [each for each in bad if str(each.error) not in self.known]
        if not fresh:
            return
        lines = ""
        for each in fresh:
            self.known.add(str(each.error))
            fields = {"source": each.source, "fault": each.error.fault, "where": each.error.where}
            lines += json.dumps({**fields, "what": str(each.error)}, ensure_ascii=False) + "\n"
        # One write of whole lines: ranks append to the same file.
        with self.path.open("a") as file:
            file.write(lines)
