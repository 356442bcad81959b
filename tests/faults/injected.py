"""Faults that tests put into the ranks of a job, each a function of the rank and the run's folder."""

import errno
import functools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from job import kill

from megatron_unimm.checkpoint import folder as checkpoint_folder
from megatron_unimm.checkpoint import manifest, store, torch_dist
from megatron_unimm.data.loader import StepBatch, StepLoader
from megatron_unimm.train import average, loop, run, saving
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.step import TrainStep

At = tuple[Any, str]
POINTS: dict[str, At] = {
    "reads data": (StepLoader, "__next__"),
    "computes": (TrainStep, "forward_backward"),
    "updates": (TrainStep, "_update"),
    "averages": (average.WeightAverage, "update"),
    "copies for a save": (store, "_piece"),
    "writes a tensor": (torch_dist, "_write_piece"),
    "writes the index": (checkpoint_folder, "_describe"),
    "commits": (checkpoint_folder, "commit"),
    "marks": (manifest, "write_bytes"),
    "prunes": (saving, "prune"),
}
"""Where a rank can be interrupted. The last four are reached by rank 0 alone, the last five in the thread of a save or
after one; ``marks`` lies behind the rename, when all but the marker is there."""


def before(point: str, act: Callable[..., None]) -> None:
    """Call ``act`` with the arguments of each call that reaches a point, before it goes on."""
    owner, name = POINTS[point]
    original = getattr(owner, name)

    @functools.wraps(original)
    def interrupted(*arguments: Any, **named: Any) -> Any:
        act(*arguments)
        return original(*arguments, **named)

    setattr(owner, name, interrupted)


class Steps:
    """Counts the steps that a rank has begun, through the loop."""

    def __init__(self) -> None:
        self.now = -1
        original = loop.Loop._one_step

        def counted(itself: loop.Loop, *arguments: Any) -> None:
            self.now = itself.step
            original(itself, *arguments)

        loop.Loop._one_step = counted
        data = loop.StepLoader.__next__

        def drawn(itself: StepLoader) -> StepBatch:
            self.now = itself._state.step
            return data(itself)

        loop.StepLoader.__next__ = drawn


def kill_at(rank: int, run_dir: Path, *, point: str, step: int, by: int, victims: Sequence[int], call: int = 1) -> None:
    """SIGKILL ``victims`` when rank ``by`` reaches a point for the ``call``-th time, from the begin of a step on."""
    if rank != by:
        return
    calls = 0

    def act(*arguments: Any) -> None:
        nonlocal calls
        if steps.now < step or (point == "marks" and arguments[0].name != manifest.MARKER):
            return
        calls += 1
        if calls == call:
            kill(run_dir, victims)

    before(point, act)
    steps = Steps()


def record_samples(rank: int, run_dir: Path) -> None:
    """Write down the samples of every step that is done, also of steps that are done again."""
    original = run.default_callbacks

    class Recorder(Callback):
        def on_step(self, loop: loop.Loop, batch: StepBatch) -> None:
            names = [name for row in batch.rows for name in row.sample_ids]
            with (run_dir / f"drawn_{rank}.jsonl").open("a") as file:
                file.write(json.dumps({"step": loop.step, "samples": names}) + "\n")

    run.default_callbacks = lambda *arguments: [*original(*arguments), Recorder()]


def in_step(rank: int, run_dir: Path, *, step: int, on: int, act: Callable[[], None]) -> None:
    """Call ``act`` in a callback after step ``step`` on rank ``on``."""
    original = run.default_callbacks

    class Acting(Callback):
        def on_step(self, loop: loop.Loop, batch: StepBatch) -> None:
            if loop.step == step and rank == on:
                act()

    run.default_callbacks = lambda *arguments: [*original(*arguments), Acting()]


def no_hurry(rank: int, run_dir: Path) -> None:
    """After each step wait for the save that is under way, so that none is left out on a busy machine."""
    original = run.default_callbacks

    class Waiting(Callback):
        def on_step(self, loop: loop.Loop, batch: StepBatch) -> None:
            pending = loop.saver.checkpointer.pending
            while pending is not None and pending.seconds is None:
                time.sleep(0.01)

    run.default_callbacks = lambda *arguments: [*original(*arguments), Waiting()]


def sleep_for_ever() -> None:
    while True:
        time.sleep(1)


def stop_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def full_disk(rank: int, run_dir: Path, *, on: int, saves: Sequence[int]) -> None:
    """Writing fails on rank ``on`` in the named saves of the attempt (1 first), after a first tensor was written."""
    count, written = 0, 0

    def begin(*_: Any) -> None:
        nonlocal count, written
        count, written = count + 1, 0

    def write(*_: Any) -> None:
        nonlocal written
        written += 1
        if count in saves and written > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == on:
        original = store.write_pieces

        @functools.wraps(original)
        def counted(*arguments: Any, **named: Any) -> Any:
            begin()
            return original(*arguments, **named)

        store.write_pieces = counted
        before("writes a tensor", write)


def bad_gradient(rank: int, run_dir: Path, *, on: int, steps: Sequence[int], name: str, factor: float) -> None:
    """Multiply the gradient of one tensor on rank ``on`` in some steps (1 first), before it is summed over ranks."""
    original = TrainStep.run
    count = 0

    def run_step(itself: TrainStep, *arguments: Any) -> Any:
        nonlocal count
        if count == 0 and rank == on:
            parameters = {key: value for chunk in itself.chunks for key, value in chunk.module.named_parameters()}
            parameters[name].register_hook(lambda g: g * torch.tensor(factor) if count in steps else g)
        count += 1
        return original(itself, *arguments)

    TrainStep.run = run_step
