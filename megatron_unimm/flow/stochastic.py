"""Drawing by a stochastic differential equation: Flow-GRPO's steps (arXiv 2505.05470), whose probability is known.

The flow's ordinary equation dx = v dt (:mod:`~megatron_unimm.flow.solvers`) has no randomness to learn from. Run from
noise to data (dt < 0), the stochastic one

    dx = [v + σ_t² / (2t) (x + (1 - t) v)] dt + σ_t dw,        σ_t = a sqrt(t / (1 - t)),

has the same distribution of x at every t: x + (1 - t) v is the predicted noise, and minus that over t is the score. A
step of Euler and Maruyama is a Gaussian whose every coordinate has one standard deviation, so its log-probability, and
its divergence from another model's step, are closed forms.

Legend  n samples; states, velocities and means are ``[n, ...]``, log-probabilities and divergences ``[n]``. Times are
        Python floats, so that nothing waits for the device. States keep their type: give float32, in which the
        published code computes too; velocities are brought to it. Standard normal numbers come from the caller, who
        draws them by sample, never by rank.

What is trained with probabilities must hold the states before and after a step in float32: bf16 would round the noise
of which the log-probability is made.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_unimm.config.rl import StepFraction, StepWindow, TrainedSteps
from megatron_unimm.flow.solvers import Velocity

Normal: TypeAlias = Callable[[int, Tensor], Tensor]
"""Standard normal numbers for a step (its place in the grid), of the shape and type of the state that it is given."""


@dataclass(frozen=True)
class StochasticStep:
    """One step from t to t_next: x_next ~ N(``keep`` x + ``pull`` v, ``std``² I)."""

    t: float
    t_next: float
    keep: float
    """What the mean has of the state: 1 + σ²/(2t) (t_next - t)."""
    pull: float
    """What the mean has of the velocity: (1 + σ² (1 - t)/(2t)) (t_next - t)."""
    diffusion: float
    """σ_t, the noise per square root of time."""

    @property
    def std(self) -> float:
        """Standard deviation of every coordinate: σ_t sqrt(t - t_next)."""
        return self.diffusion * math.sqrt(self.t - self.t_next)

    def mean(self, state: Tensor, velocity: Tensor) -> Tensor:
        """Of the next state ``[n, ...]``. Without noise it is Euler's step, to the last bit."""
        return self.keep * state + self.pull * velocity.to(state.dtype)


def stochastic_step(t: float, t_next: float, noise_level: float) -> StochasticStep:
    """A step from t down to t_next.

    At t = 1 σ_t is infinite; there, as in the published code, 1 - t_next stands for 1 - t, so that the first step adds
    noise of standard deviation ``noise_level``. (Its distribution is then off by a factor 1 + a⁴/4 in the variance, at
    any number of steps; the following steps forget that.)

    Args:
        noise_level: a of σ_t. 0 is Euler's step of the ordinary equation.
    """
    assert 1 >= t > t_next >= 0, f"a step from {t} to {t_next} does not fall within [0, 1]"
    variance = noise_level**2 * t / (1 - (t_next if t == 1 else t))
    duration = t_next - t
    return StochasticStep(
        t,
        t_next,
        keep=1 + variance / (2 * t) * duration,
        pull=(1 + variance * (1 - t) / (2 * t)) * duration,
        diffusion=math.sqrt(variance),
    )


def stochastic_steps(times: Sequence[float], noise_level: float, trained: range) -> list[StochasticStep]:
    """The steps between descending times; those outside ``trained`` are Euler's, without noise.

    The published code does so since its release of October 2025: noise that is not learned from only blurs the reward,
    and that of the last step stays in the picture.
    """
    grid = [float(time) for time in times]
    assert 0 <= trained.start < trained.stop < len(grid), f"steps {trained} of {len(grid) - 1}"
    return [
        stochastic_step(t, t_next, noise_level if place in trained else 0.0)
        for place, (t, t_next) in enumerate(pairwise(grid))
    ]


def trained_steps(which: TrainedSteps, num_steps: int, u: float) -> range:
    """The steps of a rollout that carry noise and are trained.

    Args:
        u: uniform in [0, 1), which places a window; drawn by the rollout's number, so that all ranks have the same.
    """
    match which:
        case StepFraction():
            return range(which.count(num_steps))
        case StepWindow():
            first, last = which.within
            return range(start := first + int(u * (last - first - which.size + 1)), start + which.size)


@dataclass(frozen=True)
class Transition:
    """One step that was drawn with noise: what a policy update needs of it."""

    step: StochasticStep
    before: Tensor
    """``[n, ...]``"""
    after: Tensor
    """``[n, ...]``"""
    log_prob: Tensor
    """``[n]``, under the model that drew it."""


def roll_out(
    velocity: Velocity, noise: Tensor, steps: Sequence[StochasticStep], normal: Normal
) -> tuple[Tensor, list[Transition]]:
    """Draw samples; the final state, and every step that had noise.

    Args:
        velocity: v of a state like ``noise`` at a time; guidance is its own business.
        noise: the state at the first step's t.
        normal: called for the steps that have noise.
    """
    state, transitions = noise, []
    for place, step in enumerate(steps):
        mean = step.mean(state, velocity(state, step.t))
        if step.std == 0:
            state = mean
            continue
        after = mean + step.std * normal(place, mean)
        transitions.append(Transition(step, state, after, log_probability(after, mean, step.std)))
        state = after
    return state, transitions


def log_probability(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(x; mean, std² I) **averaged over the coordinates** of a sample, ``[n]``.

    The published code averages, as DDPO's does (arXiv 2305.13301): a ratio of two of these is the geometric mean of the
    coordinates' ratios, and its clip range (1e-4) is meant for that.
    """
    assert std > 0, "a step without noise has no density"
    stds = torch.full((len(x),), std, dtype=x.dtype, device=x.device)
    return gaussian_log_probability(x, mean, stds)


def gaussian_log_probability(x: Tensor, mean: Tensor, std_n: Tensor) -> Tensor:
    """The same where each sample has a standard deviation of its own, ``[n]``."""
    squares = ((x - mean) / std_n.reshape(-1, *(1,) * (x.ndim - 1))).square()
    return -0.5 * _over_coordinates(squares) - std_n.log() - 0.5 * math.log(2 * math.pi)


def divergence(mean: Tensor, reference: Tensor, std: float) -> Tensor:
    """KL(N(mean, std² I) || N(reference, std² I)) = ||mean - reference||² / (2 std²), averaged over the coordinates of
    a sample like :func:`log_probability`, ``[n]``."""
    assert std > 0, "steps without noise diverge infinitely"
    return _over_coordinates(((mean - reference) / std).square()) / 2


def _over_coordinates(values: Tensor) -> Tensor:
    """Mean over all but the first dimension."""
    return values.flatten(1).mean(dim=1)
