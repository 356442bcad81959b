"""The loop: steps, clocks, records, checkpoints, signals. It knows no method."""

import logging
import signal
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.loader import StepBatch, StepLoader
from megatron_unimm.errors import UserError
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.events import host_name
from megatron_unimm.train.flops import stage_peak_tflops
from megatron_unimm.train.record import Record, Totals, Window
from megatron_unimm.train.rollout import Rollouts
from megatron_unimm.train.safety import Safety
from megatron_unimm.train.schedule import check_resumed_rate, learning_rate
from megatron_unimm.train.step import StepResult, TrainStep
from megatron_unimm.train.stragglers import Peer, slowest
from megatron_unimm.train.timers import BUSY, gather_times, mean_times, useful_seconds
from megatron_unimm.train.watchdog import LONG

logger = logging.getLogger(__name__)

STOPPED = 75
"""Exit code after a signal and a save: run me again (EX_TEMPFAIL)."""


class StopSignal:
    """Turns SIGTERM and SIGUSR1 into an agreement between all ranks to save and stop, without waiting in the step.

    A flag is summed over ranks in the background during one step and read after it, so that all ranks stop after the
    same step.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._raised = False
        self._flag = torch.zeros(1)
        self._work: dist.Work | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._raised = True

    def agreed(self) -> bool:
        """Whether some rank had been told to stop before the step that has just ended."""
        stop = False
        if self._work is not None:
            self._work.wait()
            stop = bool(self._flag)
        self._flag = torch.tensor([float(self._raised)])
        self._work = dist.all_reduce(self._flag, group=self.group, async_op=True)
        return stop

    def finish(self) -> None:
        if self._work is not None:
            self._work.wait()
        # A signal that comes while the interpreter shuts down would kill a process that has done its work.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Loop:
    """Runs a stage from its current step to its last."""

    def __init__(
        self,
        stage: StageConfig,
        total_steps: int,
        loader: StepLoader,
        step: TrainStep,
        safety: Safety,
        callbacks: Sequence[Callback],
        rollouts: Rollouts | None = None,
    ) -> None:
        self.stage = stage
        self.total_steps = total_steps
        self.loader = loader
        self.train_step = step
        self.clock = step.clock
        self.groups = step.groups
        self.platform = step.platform
        self.saver, self.watchdog, self.skipped = safety.saver, safety.watchdog, safety.skipped
        self.callbacks = callbacks
        self.rollouts = rollouts
        """Makes the rows of updates of the loader's prompts, for methods that learn from rewards."""
        self.step = 0
        self.totals = Totals()
        self.rate = 0.0
        self._skipped_before = 0
        self._peers: list[Peer] = []
        self._peak_tflops = stage_peak_tflops(stage, self.platform.device_name())

    def run(self) -> int:
        """Train; returns the exit code: 0 done, 75 stopped by a signal after saving.

        Raises:
            UserError: more steps in a row were skipped than ``train.spike.max_consecutive``, or more checkpoints in a
                row could not be written than ``train.checkpoint.max_failures``.
        """
        stop = StopSignal(self.groups.host)
        window = Window(self.platform.device, len(self.train_step.method.terms), self.train_step.method.row_flops)
        self._peers = self._gather_peers()
        self.watchdog.total_steps, self.watchdog.background = self.total_steps, self.saver.under_way
        self.watchdog.now("in callbacks before the first step", self.step, LONG)
        for callback in self.callbacks:
            callback.on_start(self)
        stopped, first = False, self.step
        self._reset(window)
        while self.step < self.total_steps and not stopped:
            patience = LONG if self.step == first else 1.0
            self.clock.begin("data")
            self.watchdog.now("waiting for data", self.step, patience, self.loader.waiting_for)
            batch = next(self.loader)
            self.watchdog.now("in the step that follows", self.step, patience)
            self._one_step(batch, window)
            self.watchdog.now("agreeing with the others", self.step)
            stopped = stop.agreed()
            with self.clock.within("save"):
                self.saver.poll()
            if self.step % self.stage.train.logging.every_steps == 0 or self.step == self.total_steps or stopped:
                self._record(window)
            if self.step % self.stage.train.checkpoint.every_steps == 0 and self.step < self.total_steps:
                self.watchdog.now("agreeing with the others to save", self.step)
                with self.clock.within("save"):
                    if self.saver.is_free(self.step):
                        self.watchdog.now("saving", self.step, LONG)
                        self.saver.save(self.step, self.progress)
        self.watchdog.now("agreeing with the others to end", self.step)
        stop.finish()
        self.watchdog.now("saving for the last time", self.step, LONG)
        self.saver.finish(self.step, self.progress)
        self.watchdog.now("closing the data and in callbacks after the last step", self.step, LONG)
        self.loader.close()
        for callback in self.callbacks:
            callback.on_end(self)
        return STOPPED if stopped and self.step < self.total_steps else 0

    def close(self) -> None:
        """Let go of what works in the background, however training ended; what it is busy with is finished."""
        self.watchdog.now("finishing what is being saved", self.step)
        self.saver.close()
        self.watchdog.now("closing the data", self.step, detail=self.loader.waiting_for)
        self.loader.close()

    def _one_step(self, batch: StepBatch, window: Window) -> None:
        self.rate = learning_rate(self.step, self.total_steps, self.stage.train.schedule)
        result = self._train_on(batch.rows)
        self.clock.begin("other")
        self.step += 1
        window.add(result, batch)
        self.skipped.add(self.step, result.skip, batch)
        self.totals.add(batch)
        self.watchdog.now("in callbacks", self.step, LONG)
        for callback in self.callbacks:
            callback.on_step(self, batch)

    def _train_on(self, rows: Sequence[Any]) -> StepResult:
        """One update, or all of a rollout; the last one's result."""
        if self.rollouts is None:
            return self.train_step.run(rows, self.rate)
        self.clock.begin("other")
        self.watchdog.now("in a rollout", self.step, LONG)
        results = [self.train_step.run(update, self.rate) for update in self.rollouts.updates(rows, self.step)]
        return results[-1]

    def _record(self, window: Window) -> None:
        self.watchdog.now("waiting for the device and the others to record", self.step)
        record = self._summarise(window)
        if self.rollouts is not None:
            record.extra.update(self.rollouts.figures.take())
        self.skipped.settle()
        self.watchdog.now("in callbacks", self.step, LONG)
        if record.skipped_now:
            self._name_worst(record)
        for callback in self.callbacks:
            callback.on_record(self, record)
        in_a_row = int(self.train_step.guard.in_a_row.item())
        if in_a_row > self.stage.train.spike.max_consecutive:
            raise UserError(
                f"step {self.step}",
                f"{in_a_row} steps in a row had anomalous gradients, and train.spike.max_consecutive is "
                f"{self.stage.train.spike.max_consecutive}; {self.skipped.named()}; look at these samples, go back to "
                "an earlier checkpoint with --resume DIR, or lower the learning rate",
            )
        self._reset(window)

    def _reset(self, window: Window) -> None:
        # Ranks are differently long in callbacks; they begin to measure together.
        dist.barrier(group=self.groups.host)
        window.reset()
        self.clock.reset()

    def _gather_peers(self) -> list[Peer]:
        peers: list[Any] = [None] * self.groups.world_size
        mine = Peer(host_name(), self.groups.pipeline_rank)
        dist.all_gather_object(peers, mine, group=self.groups.host)
        return peers

    def _summarise(self, window: Window) -> Record:
        """The one place where the host waits for the device."""
        method, last = self.train_step.method, window.last
        assert last is not None
        means = (window.losses / window.good_steps.clamp(min=1)).tolist()
        losses = dict(zip(method.terms, means, strict=True))
        weighted = {name: weight * losses[name] for name, weight in zip(method.terms, method.weights, strict=True)}
        times, seconds = self.clock.read(), time.perf_counter() - window.started
        everyone = gather_times(times, self.groups.host)
        # Each data-parallel rank has its own rows; the others repeat them.
        sources = list(self.stage.data.sources)
        mine = [window.tokens, window.positions, window.images, window.samples, window.flops]
        mine += [window.broken_images[source] for source in sources]
        counts = torch.tensor(mine, dtype=torch.float64, device=self.platform.device)
        dist.all_reduce(counts, group=self.groups.collection.dp)
        tokens, positions, images, samples, flops, *broken = counts.tolist()
        for source, count in zip(sources, broken, strict=True):
            self.totals.add_broken_images(source, int(count))
        model_tflops = flops / seconds / self.groups.world_size / 1e12
        multipliers = sorted({rule.learning_rate_multiplier for rule in self.stage.train.trainable if rule.train})
        skipped = int(self.train_step.guard.skipped.item())
        skipped_now, self._skipped_before = skipped - self._skipped_before, skipped
        return Record(
            step=self.step,
            total_steps=self.total_steps,
            losses=losses,
            weighted=weighted,
            total_loss=sum(weighted.values()),
            learning_rates={f"x{multiplier:g}": self.rate * multiplier for multiplier in multipliers},
            gradient_norm=last.gradient_norm.item(),
            module_norms=dict(zip(self.train_step.meter.modules, last.module_norms.tolist(), strict=True)),
            skipped_steps=skipped,
            skipped_now=skipped_now,
            step_seconds=seconds / window.steps,
            tokens_per_second=tokens / seconds,
            images_per_second=images / seconds,
            samples_per_second=samples / seconds,
            model_tflops=model_tflops,
            mfu=None if self._peak_tflops is None else model_tflops / self._peak_tflops,
            padding_share=1 - tokens / max(1.0, positions),
            draws=dict(self.totals.draws),
            faults=dict(self.totals.faults),
            memory_bytes=self.platform.max_memory_allocated(),
            times=mean_times(everyone, window.steps),
            useful_seconds=useful_seconds(everyone, 1 - skipped_now / window.steps),
            straggler=slowest([sum(own[phase] for phase in BUSY) for own in everyone], self._peers),
        )

    def _name_worst(self, record: Record) -> None:
        """Say which tensors had the largest gradients in the last skipped step; every rank may hold some."""
        worst = torch.nan_to_num(self.train_step.worst, nan=float("inf"), posinf=float("inf")).tolist()
        mine = sorted(zip(worst, self.train_step.meter.tensor_names, strict=True), reverse=True)[:3]
        everyone: list[list[tuple[float, str]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine, group=self.groups.host)
        top = sorted({entry for part in everyone for entry in part}, reverse=True)[:3]
        record.extra.update({f"skipped_tensor/{name}": norm for norm, name in top})

    def progress(self) -> dict[str, Any]:
        """Small state beside the tensors."""
        return {
            "loader": self.loader.state_dict(),
            "totals": self.totals.state_dict(),
            "spike": self.train_step.guard.state.tolist(),
            "rate": self.rate,
            "schedule": {"total_steps": self.total_steps, **self.stage.train.schedule.model_dump()},
        }

    def restore(self, meta: dict[str, Any]) -> None:
        """Go on from a checkpoint's meta.

        Raises:
            CheckpointError: its learning rate is not that of the schedule, although the schedule is the same.
        """
        progress = meta["progress"]
        self.step = meta["step"]
        changed = check_resumed_rate(self.step, self.total_steps, self.stage.train.schedule, progress)
        if changed and dist.get_rank() == 0:
            logger.warning("%s", changed)
        self.loader.load_state_dict(progress["loader"])
        self.totals.load_state_dict(progress["totals"])
        self.train_step.guard.state = torch.tensor(progress["spike"], device=self.platform.device)
        self._skipped_before = int(progress["spike"][2])
