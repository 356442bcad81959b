"""Learning rate over the steps of a stage."""

import math

from megatron_unimm.config.train import ScheduleConfig


def learning_rate(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step ``step`` (0 first): linear warm-up over ``warmup_ratio`` of the steps, then constant or
    cosine to the minimum.

    The first step already moves (rate max / warm-up steps), the last one runs at the minimum.
    """
    warmup = round(schedule.warmup_ratio * total_steps)
    if step < warmup:
        return schedule.max_learning_rate * (step + 1) / warmup
    if schedule.kind == "constant":
        return schedule.max_learning_rate
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    span = schedule.max_learning_rate - schedule.min_learning_rate
    return schedule.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
