"""Solvers of the flow's ordinary differential equation dx/dt = v(x, t), from noise at t = 1 down to data at t = 0.

Each solver is a generator that yields the state after every step. Times are Python floats, so that nothing waits for
the device. The state keeps the type of the noise: give float32 (float64 for studies of accuracy), whatever the network
computes in; velocities are brought to it.

Velocity evaluations for n steps: Euler n, Heun 2n (2n - 1 where the last step ends at t = 0), DPM-Solver++(2M) n.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.flow import SolverName
from megatron_unimm.flow.path import data_from_velocity

Velocity: TypeAlias = Callable[[Tensor, float], Tensor]
OnStep: TypeAlias = Callable[[int, Tensor, float], None]


def starting_noise(seed: int, number: int, tokens: int, width: int) -> Tensor:
    """float32 ``[tokens, width]`` that one picture is drawn from, the same on every machine and rank."""
    generator = np.random.Generator(np.random.Philox(key=[seed, number]))
    return torch.from_numpy(generator.standard_normal((tokens, width), dtype=np.float32))


def solve(
    velocity: Velocity, noise: Tensor, times: Sequence[float], solver: SolverName, on_step: OnStep | None = None
) -> Tensor:
    """The state at the last of the times.

    Args:
        velocity: v of a state like ``noise`` at a time; guidance is its own business.
        noise: the state at ``times[0]``: noise at 1, or a noised image at an earlier time.
        times: descending within [0, 1], see :func:`~megatron_unimm.flow.timesteps.timestep_grid`.
        on_step: called after every step with the number of steps done, the state, and the time reached.
    """
    times = [float(time) for time in times]
    falls = len(times) > 1 and all(1 >= earlier > later >= 0 for earlier, later in pairwise(times))
    assert falls, f"{times} do not fall within [0, 1]"
    state = noise
    for step, state in enumerate(SOLVERS[solver](velocity, noise, times), 1):
        if on_step is not None:
            on_step(step, state, times[step])
    return state


def euler(velocity: Velocity, state: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """Euler's method, first order; on this path the same as DDIM (arXiv 2010.02502). One evaluation per step."""
    for t, t_next in pairwise(times):
        state = state + (t_next - t) * velocity(state, t).to(state.dtype)
        yield state


def heun(velocity: Velocity, state: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """Heun's method, second order, as in EDM (arXiv 2206.00364, algorithm 1). Two evaluations per step.

    A step that ends at t = 0 stays Euler's, one evaluation, as there: networks are hardly trained at t = 0.
    """
    for t, t_next in pairwise(times):
        slope = velocity(state, t).to(state.dtype)
        predicted = state + (t_next - t) * slope
        if t_next > 0:
            slope_next = velocity(predicted, t_next).to(state.dtype)
            state = state + (t_next - t) * 0.5 * (slope + slope_next)
        else:
            state = predicted
        yield state


def dpm_solver_2m(velocity: Velocity, state: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """DPM-Solver++(2M), second order, multistep (arXiv 2211.01095, algorithm 2). One evaluation per step.

    With α = 1 - t, σ = t, λ = log(α/σ), h the step in λ and D the data prediction extrapolated from the last two,
    the paper's x' = (σ'/σ) x - α' (e^(-h) - 1) D is x' = r x + (1 - r) D with r = t'/t on this path, which is finite at
    both ends. D needs both steps in λ to be finite: it is the plain data prediction (first order) in the first step,
    in the step after one that began at t = 1 (λ = -∞), and in a step that ends at t = 0 (λ = ∞). Between such ends the
    order is 2; over the whole path the error is h² log(1/h), as steps in λ do not shrink next to the ends.
    """
    previous_data, previous_width = None, math.inf
    for t, t_next in pairwise(times):
        data = data_from_velocity(state, velocity(state, t).to(state.dtype), t)
        width = _log_snr(t_next) - _log_snr(t)
        guess = data
        if previous_data is not None and math.isfinite(previous_width) and math.isfinite(width):
            guess = data + 0.5 * (width / previous_width) * (data - previous_data)
        ratio = t_next / t
        state = ratio * state + (1 - ratio) * guess
        previous_data, previous_width = data, width
        yield state


def _log_snr(t: float) -> float:
    """λ = log((1 - t) / t), infinite at both ends."""
    if t in (0.0, 1.0):
        return math.inf if t == 0.0 else -math.inf
    return math.log1p(-t) - math.log(t)


SOLVERS: dict[SolverName, Callable[[Velocity, Tensor, Sequence[float]], Iterator[Tensor]]] = {
    "euler": euler,
    "heun": heun,
    "dpm++2m": dpm_solver_2m,
}
