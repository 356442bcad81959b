"""Where the time of a step goes, without waiting for the device inside the step.

A mark is set where a phase begins; time up to the next mark belongs to it, so that the phases of a step add up to the
step. On CPU, where a call returns when its work is done, a mark is a reading of the clock. On a GPU it is an event in
the stream that computes, read at the logging interval, and what counts is when the device came to it: a host that runs
ahead costs nothing, data that is there in time shows as no wait, and data that is late as the time in which the device
stood still.

    data               the next batch is waited for
    forward_backward   model and losses of all micro-batches. Contains what tensor, context and expert ranks send each
                       other, and the reduction of gradients as far as it hides behind backward
    pipeline           activations and gradients travel to and from the neighbours in the pipeline; mostly waiting for
                       them: its bubble
    reduce             counts, gradients (what backward does not hide of them) and losses are summed over ranks;
                       contains the wait for slower ranks
    optimizer          gradient norms, the update, parameters gathered again (unless the next forward does that)
    save               what a checkpoint makes the step wait for
    other              callbacks, logging, agreeing on a signal
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

Phase = Literal["data", "forward_backward", "pipeline", "reduce", "optimizer", "save", "other"]
PHASES: tuple[Phase, ...] = ("data", "forward_backward", "pipeline", "reduce", "optimizer", "save", "other")
USEFUL: tuple[Phase, ...] = ("forward_backward", "pipeline", "reduce", "optimizer")
"""Phases that make optimizer steps."""
BUSY: tuple[Phase, ...] = ("data", "forward_backward")
"""A rank's own time; in the others it may be waiting for another."""


class Mark(Protocol):
    """A point in time: :class:`torch.Event` or :class:`HostMark`."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, other: Any, /) -> float: ...


class HostMark:
    """A point in the host's time, with the methods of :class:`torch.Event`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """The host is where it is."""

    def elapsed_time(self, other: "HostMark") -> float:
        """Milliseconds until ``other``."""
        return 1e3 * (other.seconds - self.seconds)


class StepClock:
    """Splits the time since its last reset by phase.

    Args:
        make: a mark for points in time of the device.
    """

    def __init__(self, make: Callable[[], Mark]) -> None:
        self._make = make
        self._marks: list[Mark] = []
        """Used again after a reset; the first ``len(_phases)`` are set, each at the begin of its phase."""
        self._phases: list[Phase] = []
        self.reset()

    @classmethod
    def of(cls, device: torch.device) -> "StepClock":
        """The clock of a device."""
        return cls(HostMark if device.type == "cpu" else partial(torch.Event, device, enable_timing=True))

    def reset(self) -> None:
        """Forget what was measured; the time from here on is ``other``."""
        self._phases.clear()
        self.begin("other")

    def begin(self, phase: Phase) -> None:
        """From here on time belongs to ``phase``."""
        if self._phases and self._phases[-1] == phase:
            return
        self._set_next()
        self._phases.append(phase)

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """The time of a block belongs to ``phase``, and the time after it to what went on before."""
        before = self._phases[-1]
        self.begin(phase)
        yield
        self.begin(before)

    def read(self) -> dict[Phase, float]:
        """Seconds of each phase since the reset. Waits for the device."""
        end = self._set_next()
        end.synchronize()
        seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        marks = [*self._marks[: len(self._phases)], end]
        for phase, (begin, stop) in zip(self._phases, pairwise(marks), strict=True):
            seconds[phase] += begin.elapsed_time(stop) / 1e3
        return seconds

    def _set_next(self) -> Mark:
        number = len(self._phases)
        if number == len(self._marks):
            self._marks.append(self._make())
        self._marks[number].record()
        return self._marks[number]


class TimedNeighbours(P2PCommunicator):
    """Megatron-Core's exchange between pipeline stages, on the clock."""

    def __init__(self, group: dist.ProcessGroup, config: ModelParallelConfig, clock: StepClock) -> None:
        super().__init__(group, config)
        self._clock = clock

    def _communicate(self, **arguments: Any) -> Any:
        # All sends and receives of a schedule go through this one method.
        with self._clock.within("pipeline"):
            return super()._communicate(**arguments)


def gather_times(mine: dict[Phase, float], group: dist.ProcessGroup) -> list[dict[Phase, float]]:
    """The times of every rank, on every rank; one small exchange between hosts."""
    own = torch.tensor([mine[phase] for phase in PHASES], dtype=torch.float64)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return [dict(zip(PHASES, times.tolist(), strict=True)) for times in everyone]


def mean_times(everyone: Sequence[dict[Phase, float]], steps: int) -> dict[str, float]:
    """Seconds of a step by phase, the mean over ranks. A phase that no rank has seen is left out."""
    means = {phase: sum(times[phase] for times in everyone) / len(everyone) / steps for phase in PHASES}
    return {phase: seconds for phase, seconds in means.items() if seconds > 0}


def useful_seconds(everyone: Sequence[dict[Phase, float]], good_share: float) -> float:
    """Of the time that the ranks spent together, what made optimizer steps.

    Ranks move in step, so that what one of them loses (to data, a save, a callback) is lost to all; the most that any
    lost is taken.

    Args:
        good_share: share of the steps that were not skipped.
    """
    total = min(sum(times.values()) for times in everyone)
    lost = max(sum(seconds for phase, seconds in times.items() if phase not in USEFUL) for times in everyone)
    return max(0.0, total - lost) * good_share
