"""What the person at the terminal, or the reader of the log, sees of the training."""

import atexit
import logging

import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from megatron_unimm.data.loader import StepBatch
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.log import terminal_console
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.record import Record
from megatron_unimm.train.wording import clock, compact

logger = logging.getLogger(__name__)

SHORT = {"cross_entropy": "ce"}
"""Names of loss terms that are long for one line."""
PHASES = {"forward_backward": "fb", "pipeline": "pipe", "reduce": "reduce", "optimizer": "opt"}
"""Short names of phases, where they have one."""
SMALLEST_SHARE = 0.02
"""Of a step's time; what takes less is left out of the line."""
SKIPPED_TENSOR = "skipped_tensor/"
"""Prefix in ``Record.extra`` of the tensors with the largest gradients of a skipped step."""


class Console(Callback):
    """On a terminal a progress bar with the last record beside it; elsewhere one line per record. Rank 0 only.

    A line reads ``step 120/300  ce 0.512  mse 0.034  kl 0.012  |g| 0.83  lr 9.1e-05  5.2k tok/s (fb 81 reduce 9 opt 6
    data 3 %)  0 skipped  eta 02:10``.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_start(self, loop: Loop) -> None:
        console = terminal_console()
        if dist.get_rank() != 0 or console is None:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[summary]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
        )
        self._task = self._bar.add_task(loop.stage.name, total=loop.total_steps, completed=loop.step, summary="")
        self._bar.start()
        # An error ends the run without on_end(); a bar that is not stopped leaves the terminal without its cursor.
        atexit.register(self._bar.stop)

    def on_step(self, loop: Loop, batch: StepBatch) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=loop.step)

    def on_record(self, loop: Loop, record: Record) -> None:
        if dist.get_rank() != 0:
            return
        if record.skipped_now:
            logger.warning("%s", skipped_line(record))
        if self._bar is not None:
            self._bar.update(self._task, summary=summary(record))
        else:
            eta = clock(record.step_seconds * (record.total_steps - record.step))
            logger.info("step %d/%d  %s  eta %s", record.step, record.total_steps, summary(record), eta)

    def on_end(self, loop: Loop) -> None:
        if self._bar is not None:
            self._bar.stop()


REWARD = "reward/total"
"""What a method that learns from rewards adds to records."""


def summary(record: Record) -> str:
    """Losses, gradient norm, learning rate and speed on one line."""
    parts = [f"{SHORT.get(name, name)} {value:.3g}" for name, value in record.losses.items() if "/" not in name]
    if REWARD in record.extra:
        parts.append(f"reward {record.extra[REWARD]:.3f}")
    parts += [f"|g| {record.gradient_norm:.3g}", f"lr {max(record.learning_rates.values(), default=0.0):.2g}"]
    split = time_split(record)
    parts.append(f"{compact(record.tokens_per_second)} tok/s" + (f" ({split})" if split else ""))
    if record.mfu is not None:
        parts.append(f"mfu {record.mfu:.1%}")
    parts.append(f"{record.skipped_steps} skipped")
    return "  ".join(parts)


def time_split(record: Record) -> str:
    """Per cent of a step's time by phase, without those that hardly count: ``fb 81 reduce 9 opt 6 data 3 %``."""
    whole = sum(record.times.values())
    shares = {phase: seconds / whole for phase, seconds in record.times.items() if seconds > SMALLEST_SHARE * whole}
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    text = " ".join(f"{PHASES.get(phase, phase)} {share:.0%}".removesuffix("%") for phase, share in ordered)
    return text and f"{text} %"


def skipped_line(record: Record) -> str:
    """How many steps were skipped since the last record, and which tensors had the largest gradients in the last of
    them.
    """
    norms = {
        key.removeprefix(SKIPPED_TENSOR): norm for key, norm in record.extra.items() if key.startswith(SKIPPED_TENSOR)
    }
    worst = ", ".join(f"{name} {norm:.3g}" for name, norm in sorted(norms.items(), key=lambda item: -item[1]))
    count = f"{record.skipped_now} of the last steps skipped for their gradients ({record.skipped_steps} in all)"
    return f"step {record.step}: {count}" + (f"; largest in the last of them: {worst}" if worst else "")
