"""Learning rate over the steps of a stage."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_unimm.config.train import ScheduleConfig
from megatron_unimm.errors import CheckpointError


def learning_rate(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step ``step`` (0 first): linear warm-up over ``warmup_ratio`` of the steps, then constant or
    cosine to the minimum.

    The first step already moves (from ``initial_learning_rate`` by one part in warm-up steps), the last one runs at the
    minimum.
    """
    warmup, initial = round(schedule.warmup_ratio * total_steps), schedule.initial_learning_rate
    if step < warmup:
        return initial + (schedule.max_learning_rate - initial) * (step + 1) / warmup
    if schedule.kind == "constant":
        return schedule.max_learning_rate
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    span = schedule.max_learning_rate - schedule.min_learning_rate
    return schedule.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def check_resumed_rate(step: int, total_steps: int, schedule: ScheduleConfig, saved: Mapping[str, Any]) -> str:
    """What to tell of the learning rate after a resume: nothing where it goes on as the checkpoint's schedule would.

    Args:
        step: steps done.
        saved: of the checkpoint: ``rate`` of its last step, and ``schedule``, its settings with ``total_steps``.

    Raises:
        CheckpointError: the rates differ, although the schedule is the same.
    """
    before, ours = saved["rate"], learning_rate(step - 1, total_steps, schedule)
    mine = {"total_steps": total_steps, **schedule.model_dump()}
    theirs = {"initial_learning_rate": 0.0} | saved["schedule"]  # which older checkpoints do not have
    changed = [f"{name} was {theirs[name]}, is {value}" for name, value in mine.items() if theirs[name] != value]
    if math.isclose(before, ours, rel_tol=1e-9):
        return ""
    rates = f"the learning rate of step {step} was {before:g}, and by the recipe's schedule it is {ours:g}"
    if not changed:
        what = f"{rates}, although the schedule did not change; take another checkpoint"
        raise CheckpointError("train.schedule", what)
    return f"{rates} ({', '.join(changed)}); training goes on with the recipe's"
