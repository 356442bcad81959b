"""Solvers against an exact flow, whose trajectories scipy integrates to 1e-12, and against diffusers' schedulers.

The exact flow: data are a mixture of Gaussians with weights w_k, means μ_k and variances s_k² I in 2-D. Then x_t is one
with means (1 - t) μ_k and variances V_k = (1 - t)² s_k² + t², and given x_t and k the parts of x_t are Gaussian:
E[x_0] = μ_k + (1 - t) s_k² / V_k (x_t - (1 - t) μ_k), E[ε] = t / V_k (x_t - (1 - t) μ_k). The velocity is the mean of
ε - x_0 over k with the posterior weights.
"""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from megatron_unimm.config.flow import FluxShiftConfig, Shift, SolverName, StaticShiftConfig
from megatron_unimm.flow.path import data_from_velocity
from megatron_unimm.flow.solvers import SOLVERS, solve
from megatron_unimm.flow.timesteps import timestep_grid

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[1.5, 0.5], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.5, 0.35, 0.6], dtype=torch.float64)
PLAIN = StaticShiftConfig()


def exact_velocity(x: Tensor, t: float) -> Tensor:
    """Of states ``[n, 2]``."""
    variance = (1 - t) ** 2 * DEVIATIONS**2 + t**2
    offset = x[:, None] - (1 - t) * MEANS
    posterior = (WEIGHTS.log() - variance.log() - offset.square().sum(-1) / (2 * variance)).softmax(dim=1)
    data = MEANS + ((1 - t) * DEVIATIONS**2 / variance)[:, None] * offset
    noise = (t / variance)[:, None] * offset
    return (posterior[..., None] * (noise - data)).sum(dim=1)


def gaussian(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(num_steps: int, shift: Shift = PLAIN) -> list[float]:
    return timestep_grid(num_steps, shift, num_tokens=1024).tolist()


@cache
def exact_ends(count: int, first: float = 1.0, last: float = 0.0) -> Tensor:
    """States at ``last`` of the trajectories that are at :func:`gaussian` noise at ``first``, by an integrator of order
    8 with error control."""

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        return exact_velocity(torch.from_numpy(flat).view(-1, 2), t).flatten().numpy()

    start = gaussian(count).flatten().numpy()
    end = scipy.integrate.solve_ivp(slope, (first, last), start, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    return torch.from_numpy(end).view(-1, 2)


def errors_at(solver: SolverName, grids: list[list[float]]) -> list[float]:
    """Root mean square distance from the exact ends over 256 trajectories."""
    exact = exact_ends(256, grids[0][0], grids[0][-1])
    return [
        (solve(exact_velocity, gaussian(256), grid, solver) - exact).square().mean().sqrt().item() for grid in grids
    ]


def orders_of(errors: list[float], what: str) -> list[float]:
    """Of grids each of which has twice the steps of the one before."""
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    print(f"\n{what}: errors {[f'{error:.1e}' for error in errors]}, orders {[f'{order:.2f}' for order in orders]}")
    return orders


# --- the exact flow


def test_exact_velocity_is_the_conditional_mean() -> None:
    """A regression of ε - x_0 on x_t by brute force: the mean within a small cell around a point."""
    generator = torch.Generator().manual_seed(8)
    count, t = 4_000_000, 0.4
    which = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    data = MEANS[which] + DEVIATIONS[which, None] * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    x_t = (1 - t) * data + t * noise
    for point in torch.tensor([[0.8, 0.3], [-0.2, 0.1]], dtype=torch.float64):
        near = (x_t - point).abs().amax(dim=1) < 0.05
        target = (noise - data)[near]
        error = target.mean(dim=0) - exact_velocity(x_t[near], t).mean(dim=0)
        assert torch.all(error.abs() < 4 * target.std(dim=0) / math.sqrt(len(target)))
        assert len(target) > 5000


@pytest.mark.parametrize(("solver", "low", "high"), [("euler", 0.8, 1.3), ("heun", 1.7, 2.4)])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_order_of_convergence(solver: SolverName, low: float, high: float, factor: float) -> None:
    grids = [times(num_steps, StaticShiftConfig(factor=factor)) for num_steps in (32, 64, 128, 256)]
    orders = orders_of(errors_at(solver, grids), f"{solver}, shift {factor}")
    assert all(low < order < high for order in orders)


@pytest.mark.parametrize("steps_in", ["t", "lambda"])
def test_order_of_dpm_solver_between_the_ends(steps_in: str) -> None:
    def grid(num_steps: int) -> list[float]:
        if steps_in == "t":
            return np.linspace(0.95, 0.05, num_steps + 1).tolist()
        log_snr = np.linspace(math.log(0.05 / 0.95), math.log(0.95 / 0.05), num_steps + 1)
        return (1 / (1 + np.exp(log_snr))).tolist()

    orders = orders_of(
        errors_at("dpm++2m", [grid(n) for n in (32, 64, 128, 256)]), f"dpm++2m, even steps in {steps_in}"
    )
    assert all(1.7 < order < 2.4 for order in orders)


def test_order_of_dpm_solver_over_the_whole_path() -> None:
    """Next to both ends the steps in λ do not shrink as steps in t do: the k-th from an end has width log((k + 1) / k),
    and leaves an error of h² / k. Their sum is h² log(1/h): errors × n² grow by the same amount with every doubling."""
    numbers = [128, 256, 512, 1024]
    errors = errors_at("dpm++2m", [times(n) for n in numbers])
    orders = orders_of(errors, "dpm++2m, whole path")
    assert all(1.7 < order < 2.0 for order in orders)
    scaled = [error * n**2 for error, n in zip(errors, numbers, strict=True)]
    growth = [later - earlier for earlier, later in pairwise(scaled)]
    print(f"errors × n²: {[f'{x:.2f}' for x in scaled]}")
    assert max(growth) / min(growth) < 1.1


@pytest.mark.parametrize(("factor", "gain"), [(1.0, 10), (3.0, 3)])
def test_second_order_pays_at_32_steps(factor: float, gain: float) -> None:
    grids = [times(32, StaticShiftConfig(factor=factor))]
    ratio = errors_at("euler", grids)[0] / errors_at("dpm++2m", grids)[0]
    print(f"\nEuler's error / DPM-Solver++'s at 32 steps, shift {factor}: {ratio:.1f}")
    assert ratio > gain


@pytest.mark.parametrize(("solver", "num_steps"), [("euler", 200), ("heun", 40), ("dpm++2m", 40)])
def test_samples_have_the_mixtures_moments(solver: SolverName, num_steps: int) -> None:
    count = 20_000
    samples = solve(exact_velocity, gaussian(count, seed=4), times(num_steps), solver)
    mean = WEIGHTS @ MEANS
    centred = MEANS - mean
    covariance = (WEIGHTS * DEVIATIONS**2).sum() * torch.eye(2) + (WEIGHTS[:, None] * centred).T @ centred
    # Five standard errors of a mean, and of a variance (the fourth moment of this mixture is below a Gaussian's).
    assert (samples.mean(dim=0) - mean).abs().max() < 5 * (covariance.diagonal() / count).sqrt().max()
    assert (samples.T.cov() - covariance).abs().max() < 5 * math.sqrt(2 / count) * covariance.max()
    nearest = (samples[:, None] - MEANS).square().sum(-1).argmin(dim=1)
    shares = torch.bincount(nearest, minlength=3) / count
    assert (shares - WEIGHTS).abs().max() < 0.02, "components overlap a little, so shares by the nearest mean are rough"


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_straight_flow_is_solved_in_one_step(solver: SolverName) -> None:
    """One data point: v = ε - x_0 is constant along each trajectory, so any number of steps is exact."""
    data = torch.tensor([[0.3, -2.0]], dtype=torch.float64)

    def towards(x: Tensor, t: float) -> Tensor:
        return (x - data) / t

    for num_steps in (1, 2, 7):
        end = solve(towards, gaussian(5), times(num_steps), solver)
        assert (end - data).abs().max() < 1e-13


# --- what a caller sees


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 10), ("heun", 19), ("dpm++2m", 10)])
def test_evaluations_and_callbacks(solver: SolverName, evaluations: int) -> None:
    grid, called, seen = times(10), [], []

    def counted(x: Tensor, t: float) -> Tensor:
        called.append(t)
        return exact_velocity(x, t)

    end = solve(counted, gaussian(4), grid, solver, on_step=lambda step, state, t: seen.append((step, state, t)))
    assert len(called) == evaluations
    assert all(type(t) is float and t > 0 for t in called), "no tensor of a device, and never at data"
    assert [(step, t) for step, _, t in seen] == [(step, grid[step]) for step in range(1, 11)]
    assert torch.equal(seen[-1][1], end)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_state_keeps_its_type(solver: SolverName) -> None:
    """A network in bf16 does not round the state."""
    end = solve(lambda x, t: exact_velocity(x.double(), t).bfloat16(), gaussian(4).float(), times(8), solver)
    assert end.dtype == torch.float32
    assert not torch.equal(end, end.bfloat16().float())


@pytest.mark.parametrize("wrong", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.2, 0.0], [1.0, -0.1]])
def test_times_must_fall(wrong: list[float]) -> None:
    with pytest.raises(AssertionError, match=r"do not fall within \[0, 1\]"):
        solve(exact_velocity, gaussian(1), wrong, "euler")


# --- against diffusers


class ToyNetwork(nn.Module):
    """A velocity of latents ``[n, 4, 8, 8]`` that depends on time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(5, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor, t: float) -> Tensor:
        time = torch.full_like(x[:, :1], t)
        return x - self.last(torch.tanh(self.first(torch.cat([x, time], dim=1))))


@pytest.fixture
def network() -> ToyNetwork:
    torch.manual_seed(3)
    return ToyNetwork().requires_grad_(False)


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))


def by_diffusers(network: ToyNetwork, scheduler) -> Tensor:
    """The loop of diffusers' pipelines over a scheduler whose timesteps are set."""
    x = latents()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.item() / 1000), t, x, return_dict=False)[0]
    return x


def report(what: str, ours: Tensor, theirs: Tensor) -> float:
    difference = (ours - theirs).abs().max().item()
    print(f"\n{what}: largest difference {difference:.1e} of values up to {theirs.abs().max():.1f}")
    return difference


@pytest.mark.parametrize("num_steps", [4, 28])
def test_euler_is_diffusers_with_static_shift(network: ToyNetwork, num_steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    grid = timestep_grid(num_steps, StaticShiftConfig(factor=3.0), 1024, "sd3")
    ours = solve(network, latents(), grid.tolist(), "euler")
    assert report("Euler, shift 3", ours, by_diffusers(network, scheduler)) < 1e-5


@pytest.mark.parametrize("num_tokens", [256, 4096])
def test_euler_is_diffusers_with_dynamic_shift(network: ToyNetwork, num_tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 28, 28).tolist(), mu=calculate_shift(num_tokens))
    grid = timestep_grid(28, FluxShiftConfig(rule="flux"), num_tokens)
    ours = solve(network, latents(), grid.tolist(), "euler")
    assert report(f"Euler, FLUX at {num_tokens}", ours, by_diffusers(network, scheduler)) < 1e-5


@pytest.mark.parametrize("num_steps", [4, 28])
def test_heun_is_diffusers(network: ToyNetwork, num_steps: int) -> None:
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    grid = timestep_grid(num_steps, StaticShiftConfig(factor=3.0), 1024, "sd3")
    ours = solve(network, latents(), grid.tolist(), "heun")
    assert report("Heun, shift 3", ours, by_diffusers(network, scheduler)) < 1e-5


@pytest.mark.parametrize("num_steps", [4, 20])
def test_dpm_solver_is_diffusers(network: ToyNetwork, num_steps: int) -> None:
    """At diffusers' own sigmas, which begin a little below 1. Its integer timesteps would round the network's time, so
    the network gets sigma here."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        flow_shift=3.0,
    )
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.tolist()
    theirs = latents()
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        theirs = scheduler.step(network(theirs, sigma), t, theirs, return_dict=False)[0]
    ours = solve(network, latents(), sigmas, "dpm++2m")
    assert report("DPM-Solver++(2M), shift 3", ours, theirs) < 1e-5
    assert (ours - solve(network, latents(), sigmas, "euler")).abs().max() > 1e-3, "the second order shows"


def test_first_order_dpm_solver_is_euler(network: ToyNetwork) -> None:
    """Of two steps from t = 1 to t = 0 neither may extrapolate."""
    two = [solve(network, latents(), times(2), solver) for solver in ("euler", "dpm++2m")]
    torch.testing.assert_close(*two, rtol=1e-6, atol=1e-6)
    middle = data_from_velocity(latents(), network(latents(), 1.0), 1.0) * 0.5 + latents() * 0.5
    assert torch.allclose(two[0], data_from_velocity(middle, network(middle, 0.5), 0.5), atol=1e-6)
