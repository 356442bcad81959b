"""Traces of steps: where the time of a step goes, operator by operator."""

import logging
from pathlib import Path

import torch.distributed as dist
from torch.profiler import profile, record_function, supported_activities

from megatron_unimm.config.train import ProfileConfig
from megatron_unimm.data.loader import StepBatch
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.loop import Loop

logger = logging.getLogger(__name__)

TABLE_ROWS = 60


class Profiler(Callback):
    """Writes ``step_00000010.rank00000.json.gz`` (a trace, loaded by https://ui.perfetto.dev) and a table beside it,
    ``.txt``, named after the first step that is in it, from each of ``settings.ranks``.

    Comes first among callbacks, so that what the others do after a step belongs to that step's trace but for the last.
    """

    def __init__(self, settings: ProfileConfig, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self._running: profile | None = None
        self._step: record_function | None = None
        """The span of the step under way, in the trace."""
        self._first = 0

    def on_start(self, loop: Loop) -> None:
        if dist.get_rank() in self.settings.ranks:
            self._begin_before(loop.step + 1)

    def on_step(self, loop: Loop, batch: StepBatch) -> None:
        if dist.get_rank() not in self.settings.ranks:
            return
        if self._running is not None:
            self._end_step()
            if loop.step + 1 == self._first + self.settings.steps:
                self._finish(loop)
            else:
                self._begin_step(loop.step + 1)
        else:
            self._begin_before(loop.step + 1)

    def on_end(self, loop: Loop) -> None:
        self._finish(loop)

    def _begin_before(self, step: int) -> None:
        """Start if ``step``, the next one, is the first that is wanted."""
        if step != self.settings.first_step:
            return
        self._first = step
        self._running = profile(
            activities=supported_activities(),
            profile_memory=self.settings.memory,
            record_shapes=self.settings.shapes,
            with_stack=self.settings.stacks,
        )
        self._running.start()
        self._begin_step(step)

    def _begin_step(self, step: int) -> None:
        self._step = record_function(f"step {step}")
        self._step.__enter__()

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _finish(self, loop: Loop) -> None:
        if self._running is None:
            return
        self._end_step()
        self._running.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{self._first:08d}.rank{dist.get_rank():05d}.json.gz"
        self._running.export_chrome_trace(str(path))
        order = "self_device_time_total" if loop.platform.is_gpu else "self_cpu_time_total"
        operators = self._running.key_averages(group_by_input_shape=self.settings.shapes)
        table = operators.table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=80)
        path.with_name(path.name.removesuffix(".json.gz") + ".txt").write_text(table)
        logger.info("profile: %s, and a table beside it; open it at https://ui.perfetto.dev", path)
        self._running = None
