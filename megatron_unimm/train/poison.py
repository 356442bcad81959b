"""Which samples were in steps that were skipped, for whoever must find out what is wrong with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_unimm.data.loader import StepBatch
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.train.json_lines import append_line

FILE = "skipped_steps.jsonl"
SHOWN = 8
"""Sample ids that a message names."""


@dataclass(frozen=True)
class SkippedStep:
    """A step whose update was left out."""

    step: int
    samples: list[str]
    """Ids of the whole global batch."""


class SkippedSteps:
    """Remembers the samples of steps until it is known which were skipped, and writes those down.

    Args:
        path: ``skipped_steps.jsonl`` of the stage, written by rank 0.
    """

    def __init__(self, path: Path, groups: ParallelGroups) -> None:
        self.path = path
        self.groups = groups
        self.in_a_row: list[SkippedStep] = []
        """The last steps, as far as they were skipped, since the start of the process; the same on every rank."""
        self._unknown: list[tuple[int, Tensor, list[str]]] = []

    def add(self, step: int, skip: Tensor, batch: StepBatch) -> None:
        """A step was done; ``skip`` is 1.0 where its update was left out. Does not wait for the device."""
        self._unknown.append((step, skip, [name for row in batch.rows for name in row.sample_ids]))

    def settle(self) -> None:
        """Find out which of the steps since the last call were skipped, and write them down. Waits for the device;
        called on every rank."""
        steps, self._unknown = self._unknown, []
        if not steps:
            return
        flags = torch.stack([skip.reshape(()) for _, skip, _ in steps]).tolist()
        skipped = [(step, names) for (step, _, names), flag in zip(steps, flags, strict=True) if flag]
        found = iter(self._of_all_ranks(skipped) if skipped else [])  # the same steps on every rank
        for flag in flags:
            if flag:
                self.in_a_row.append(next(found))
            else:
                self.in_a_row.clear()

    def _of_all_ranks(self, mine: Sequence[tuple[int, list[str]]]) -> list[SkippedStep]:
        everyone: list[list[list[str]]] = [[] for _ in range(self.groups.world_size)]
        dist.all_gather_object(everyone, [names for _, names in mine], group=self.groups.host)
        found = []
        for number, (step, _) in enumerate(mine):
            # Ranks that share a row name the same samples.
            names = dict.fromkeys(name for rank in everyone for name in rank[number])
            found.append(SkippedStep(step, list(names)))
            if self.groups.rank == 0:
                append_line(self.path, {"step": step, "samples": list(names)})
        return found

    def named(self) -> str:
        """The samples of the last steps in a row, in short."""
        if not self.in_a_row:
            return ""
        names = list(dict.fromkeys(name for step in self.in_a_row for name in step.samples))
        repeated = [n for n in names if all(n in step.samples for step in self.in_a_row)]
        shown = repeated or names
        more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
        what = "samples in all of them" if repeated and len(self.in_a_row) > 1 else "samples"
        steps = f"{self.in_a_row[0].step} to {self.in_a_row[-1].step}"
        return f"{what} (steps {steps}): {', '.join(shown[:SHOWN])}{more}; all are in {self.path}"
