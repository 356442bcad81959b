"""Which steps are skipped, and what the guard remembers of them."""

import math

import pytest
import torch

from megatron_unimm.config.train import SpikeConfig
from megatron_unimm.train.spike import SpikeGuard


def guard(**settings: float) -> SpikeGuard:
    config = SpikeConfig.model_validate({"factor": 10.0, "warmup_steps": 3, "decay": 0.5} | settings)
    return SpikeGuard(config, torch.device("cpu"))


def judge(watch: SpikeGuard, *norms: float) -> list[float]:
    return [watch.judge(torch.tensor(norm)).item() for norm in norms]


def mean(watch: SpikeGuard) -> float:
    return watch.state[0].item()


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_not_finite_is_always_skipped(norm: float) -> None:
    """Also as the very first step, and it leaves nothing behind in the mean."""
    watch = guard()
    assert judge(watch, norm, 1.0, norm) == [1.0, 0.0, 1.0]
    assert mean(watch) == 1.0
    assert watch.skipped == 2


def test_spike_after_warm_up_only() -> None:
    watch = guard()
    assert judge(watch, 1.0, 50.0) == [0.0, 0.0]
    watch = guard()
    assert judge(watch, 1.0, 1.0, 1.0, 10.5) == [0.0, 0.0, 0.0, 1.0]


def test_factor_is_of_the_running_mean() -> None:
    watch = guard()
    assert judge(watch, 2.0, 2.0, 2.0, 20.0) == [0.0] * 4, "exactly the factor is not more than it"
    watch = guard()
    assert judge(watch, 2.0, 2.0, 2.0, 20.1) == [0.0, 0.0, 0.0, 1.0]


def test_running_mean_known_answers() -> None:
    """The first norm starts it, the others decay it."""
    watch = guard()
    judge(watch, 4.0)
    assert mean(watch) == 4.0
    judge(watch, 2.0)
    assert mean(watch) == 3.0
    judge(watch, 1.0)
    assert mean(watch) == 2.0


def test_skipped_steps_leave_the_mean_and_the_warm_up_alone() -> None:
    watch = guard()
    judge(watch, 1.0, math.nan, math.inf, 1.0)
    assert mean(watch) == 1.0
    assert judge(watch, 11.0) == [0.0], "two good steps: the warm-up of three is not over"
    watch = guard()
    judge(watch, 1.0, 1.0, 1.0, 100.0, 200.0)
    assert mean(watch) == 1.0
    assert watch.skipped == 2


def test_in_a_row_counts_and_resets() -> None:
    watch = guard()
    judge(watch, 1.0, math.nan, math.nan, math.nan)
    assert watch.in_a_row == 3
    judge(watch, 1.0)
    assert watch.in_a_row == 0
    judge(watch, math.inf)
    assert (watch.in_a_row, watch.skipped) == (1, 4)


def test_state_carries_over_a_resume() -> None:
    watch, other = guard(), guard()
    judge(watch, 1.0, 1.2, 0.8, math.nan)
    other.state = torch.tensor(watch.state.tolist())
    norms = (1.0, 30.0, 0.9)
    assert judge(watch, *norms) == judge(other, *norms)
    assert torch.equal(watch.state, other.state)
