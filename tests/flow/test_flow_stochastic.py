"""Stochastic steps against the exact law of Gaussian data, Euler's solver and torch.distributions.

The exact flow: data ~ N(m, s²). Then x_t ~ N((1 - t) m, V) with V = (1 - t)² s² + t², and the velocity is affine in x:
v = slope x + offset with slope = (t - (1 - t) s²) / V, offset = -m - slope (1 - t) m. So every step maps a Gaussian to
a Gaussian, and mean and variance of the whole chain follow from a recursion, without sampling.
"""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from megatron_unimm.config.flow import StaticShiftConfig
from megatron_unimm.config.rl import FlowGrpoConfig, StepFraction, StepWindow
from megatron_unimm.flow.solvers import euler
from megatron_unimm.flow.stochastic import (
    Transition,
    divergence,
    log_probability,
    roll_out,
    stochastic_step,
    stochastic_steps,
    trained_steps,
)
from megatron_unimm.flow.timesteps import timestep_grid

MEAN, DEVIATION = 1.5, 0.5
SHAPES = {"shapes": {"kind": "shapes"}}


def affine_velocity(t: float) -> tuple[float, float]:
    """(slope, offset) of the exact velocity."""
    slope = (t - (1 - t) * DEVIATION**2) / ((1 - t) ** 2 * DEVIATION**2 + t**2)
    return slope, -MEAN - slope * (1 - t) * MEAN


def exact_velocity(x: Tensor, t: float) -> Tensor:
    slope, offset = affine_velocity(t)
    return slope * x + offset


def law_of_chain(times: list[float], a: float) -> tuple[float, float]:
    """Mean and standard deviation at the last time of Euler-Maruyama from the exact law at the first."""
    mean, variance = (1 - times[0]) * MEAN, (1 - times[0]) ** 2 * DEVIATION**2 + times[0] ** 2
    for t, t_next in pairwise(times):
        dt = t_next - t
        sigma2 = a * a * t / (1 - (t_next if t == 1 else t))
        slope, offset = affine_velocity(t)
        drift_of_x = slope + sigma2 / (2 * t) * (1 + (1 - t) * slope)
        drift = offset + sigma2 / (2 * t) * (1 - t) * offset
        mean = mean + (drift_of_x * mean + drift) * dt
        variance = (1 + drift_of_x * dt) ** 2 * variance + sigma2 * -dt
    return mean, math.sqrt(variance)


def grid(num_steps: int, shift: float = 1.0, first: float = 1.0) -> list[float]:
    return [first * t for t in timestep_grid(num_steps, StaticShiftConfig(factor=shift), 1).tolist()]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(times: list[float], a: float, num_samples: int) -> Tensor:
    """Ends of the chain as the package draws it."""
    numbers = generator(1)
    start = torch.randn(num_samples, 1, generator=generator(0)) * (times[0] ** 2 + (1 - times[0]) ** 2 * 0.25) ** 0.5
    steps = stochastic_steps(times, a, range(len(times) - 1))
    end, _ = roll_out(
        exact_velocity,
        start + (1 - times[0]) * MEAN,
        steps,
        lambda _place, like: torch.randn(like.shape, generator=numbers),
    )
    return end


@pytest.mark.parametrize(("a", "shift"), [(0.3, 1.0), (0.7, 1.0), (0.7, 3.0), (1.0, 1.0)])
def test_end_has_the_law_of_the_data(a: float, shift: float) -> None:
    """With 400 steps. 100,000 samples know the mean to 0.0016 and the standard deviation to 0.0011 (one standard
    error). By the recursion the chain itself is off by at most 0.0014, Euler's steps of the ordinary equation by
    0.0036."""
    times, n = grid(400, shift), 100_000
    end = drawn(times, a, n)
    chain_mean, chain_std = law_of_chain(times, a)
    ode_mean, ode_std = law_of_chain(times, 0.0)
    print(f"\na {a} shift {shift}: {end.mean():.5f} {end.std():.5f}, chain {chain_mean:.5f} {chain_std:.5f}")
    mean_error, std_error = DEVIATION / math.sqrt(n), DEVIATION / math.sqrt(2 * n)
    # The code is the chain: nothing but the Monte Carlo error.
    assert end.mean().item() == pytest.approx(chain_mean, abs=4 * mean_error)
    assert end.std().item() == pytest.approx(chain_std, abs=4 * std_error)
    # The chain ends at the data, where the ordinary equation ends too.
    for mean, std in ((chain_mean, chain_std), (ode_mean, ode_std)):
        assert mean == pytest.approx(MEAN, abs=1e-9)
        assert std == pytest.approx(DEVIATION, abs=0.004)
    assert end.std().item() == pytest.approx(ode_std, abs=0.005 + 4 * std_error)


def test_law_half_way() -> None:
    """Not only the end: at t = 0.5 as well (mean 0.75, standard deviation 0.559)."""
    times, n = [t for t in grid(400) if t >= 0.5], 100_000
    assert times[-1] == 0.5
    middle = drawn(times, 0.7, n)
    assert middle.mean().item() == pytest.approx(0.5 * MEAN, abs=4 * 0.56 / math.sqrt(n))
    assert middle.std().item() == pytest.approx(math.sqrt(0.25 * DEVIATION**2 + 0.25), abs=0.01)


@pytest.mark.parametrize("a", [0.0, 0.7])
def test_error_falls_as_the_steps_shrink(a: float) -> None:
    """First order, as of Euler, away from t = 1 where σ is infinite; ten times the steps, a tenth of the error."""
    errors = [abs(law_of_chain(grid(n, first=0.9), a)[1] - DEVIATION) for n in (100, 1000, 10_000)]
    assert [coarse / fine for coarse, fine in pairwise(errors)] == pytest.approx([10, 10], rel=0.15)


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.9), (0.6, 0.4), (0.1, 0.0)])
def test_mean_and_std(t: float, t_next: float, noise_level: float) -> None:
    """Against the paper's step written out."""
    step = stochastic_step(t, t_next, noise_level)
    x, v = torch.randn(2, 3, 5, generator=generator(2), dtype=torch.float64)
    sigma = noise_level * math.sqrt(t / (1 - (0.9 if t == 1 else t)))
    expected = x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * (t_next - t)
    torch.testing.assert_close(step.mean(x, v), expected, rtol=1e-14, atol=1e-14)
    assert step.diffusion == pytest.approx(sigma, rel=1e-14)
    assert step.std == pytest.approx(sigma * math.sqrt(t - t_next), rel=1e-14)


def test_first_step_adds_noise_of_the_level_itself() -> None:
    assert stochastic_step(1.0, 0.987, 0.7).std == pytest.approx(0.7)


def test_without_noise_it_is_eulers_step_to_the_last_bit() -> None:
    times = grid(10, shift=3.0)
    start = torch.randn(64, 4, generator=generator(3))
    steps = [stochastic_step(t, t_next, 0.0) for t, t_next in pairwise(times)]
    end, transitions = roll_out(exact_velocity, start, steps, never)
    assert not transitions
    assert torch.equal(end, list(euler(exact_velocity, start, times))[-1])


def never(place: int, like: Tensor) -> Tensor:
    raise AssertionError(f"numbers were asked for in step {place}, which has no noise")


def test_a_bfloat16_velocity_does_not_lower_the_state() -> None:
    x = torch.randn(2, 3, generator=generator(4))
    v = torch.randn(2, 3, generator=generator(5)).bfloat16()
    step = stochastic_step(0.5, 0.4, 0.7)
    assert torch.equal(step.mean(x, v), step.mean(x, v.float()))


def test_rollout_keeps_what_an_update_needs() -> None:
    """The probabilities that were noted are found again from states and velocities; Euler's steps note nothing."""
    times, asked = grid(6), []

    def normal(place: int, like: Tensor) -> Tensor:
        asked.append(place)
        return torch.randn(like.shape, generator=generator(100 + place))

    start = torch.randn(4, 7, generator=generator(6))
    end, transitions = roll_out(exact_velocity, start, stochastic_steps(times, 0.7, range(2, 4)), normal)
    assert asked == [2, 3]
    assert [transition.step.t for transition in transitions] == times[2:4]
    assert torch.equal(transitions[0].before, list(euler(exact_velocity, start, times[:3]))[-1])
    assert torch.equal(transitions[0].after, transitions[1].before)
    for transition in transitions:
        mean = transition.step.mean(transition.before, exact_velocity(transition.before, transition.step.t))
        assert torch.equal(transition.log_prob, log_probability(transition.after, mean, transition.step.std))
    assert torch.equal(end, list(euler(exact_velocity, transitions[-1].after, times[4:]))[-1])


def ratio_of(transition: Transition, velocity: Tensor) -> Tensor:
    mean = transition.step.mean(transition.before, velocity)
    return (log_probability(transition.after, mean, transition.step.std) - transition.log_prob).exp()


def test_unchanged_model_has_ratio_one() -> None:
    start = torch.randn(4, 7, generator=generator(7))
    steps = stochastic_steps(grid(4), 0.7, range(3))
    _, transitions = roll_out(
        exact_velocity, start, steps, lambda place, like: torch.randn(like.shape, generator=generator(place))
    )
    for transition in transitions:
        same = exact_velocity(transition.before, transition.step.t)
        assert torch.equal(ratio_of(transition, same), torch.ones(4))
        assert (ratio_of(transition, same + 1) != 1).all()


def test_log_probability() -> None:
    x, mean = torch.randn(2, 5, 3, 4, generator=generator(8))
    expected = Normal(mean, 0.37).log_prob(x).mean(dim=(1, 2))
    torch.testing.assert_close(log_probability(x, mean, 0.37), expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_the_log_probability() -> None:
    """(x - mean) / std² per coordinate, over their number."""
    x, mean = torch.randn(2, 5, 12, generator=generator(9))
    mean.requires_grad_()
    log_probability(x, mean, 0.37).sum().backward()
    torch.testing.assert_close(mean.grad, (x - mean.detach()) / 0.37**2 / 12)


def test_divergence() -> None:
    mean, reference = torch.randn(2, 5, 3, 4, generator=generator(10))
    whole = kl_divergence(Independent(Normal(mean, 0.37), 2), Independent(Normal(reference, 0.37), 2))
    torch.testing.assert_close(divergence(mean, reference, 0.37), whole / 12)


def test_divergence_in_terms_of_the_velocities() -> None:
    """The paper's second form: Δt/2 (σ (1 - t) / (2t) + 1/σ)² ||v - v_ref||²."""
    x, v, reference = torch.randn(3, 5, 12, generator=generator(11), dtype=torch.float64)
    step = stochastic_step(0.6, 0.45, 0.7)
    factor = 0.15 / 2 * (step.diffusion * 0.4 / 1.2 + 1 / step.diffusion) ** 2
    ours = divergence(step.mean(x, v), step.mean(x, reference), step.std)
    torch.testing.assert_close(ours, factor * (v - reference).square().mean(dim=1))


@pytest.mark.parametrize(
    ("fraction", "num_steps", "expected"), [(0.99, 10, 9), (1.0, 10, 10), (0.5, 10, 5), (0.29, 100, 29), (0.05, 20, 1)]
)
def test_fraction_of_the_steps(fraction: float, num_steps: int, expected: int) -> None:
    """0.29 x 100 is 28.999999999999996 in floats."""
    assert trained_steps(StepFraction(fraction=fraction), num_steps, u=0.5) == range(expected)


def test_window_visits_every_place_equally() -> None:
    window = StepWindow(rule="window", size=2, within=(1, 6))
    starts = [trained_steps(window, 10, (i + 0.5) / 400) for i in range(400)]
    assert [starts.count(range(s, s + 2)) for s in range(10)] == [0, 100, 100, 100, 100, 0, 0, 0, 0, 0]
    assert trained_steps(window, 10, math.nextafter(1.0, 0.0)) == range(4, 6)


def test_steps_outside_the_trained_ones_have_no_noise() -> None:
    steps = stochastic_steps(grid(5), 0.7, range(1, 3))
    assert [step.std > 0 for step in steps] == [False, True, True, False, False]


# -- what recipes may say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (0.5, StepFraction(fraction=0.5)),
        ({"fraction": 0.5}, StepFraction(fraction=0.5)),
        ({"rule": "window", "size": 3}, StepWindow(rule="window", size=3, within=(0, 5))),
    ],
)
def test_ways_to_write_trained_steps(written: object, meant: object) -> None:
    config = FlowGrpoConfig.model_validate({"rewards": SHAPES, "trained_steps": written})
    assert config.trained_steps == meant
    assert FlowGrpoConfig.model_validate(config.model_dump()) == config, "a dumped recipe reads the same"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": {}}, "no reward with a weight"),
        ({"sampler": {"solver": "heun"}}, "solver is heun"),
        ({"sampler": {"steps": 4}, "trained_steps": 0.2}, "no whole step"),
        ({"sampler": {"steps": 4}, "trained_steps": {"rule": "window"}}, r"ends at 5, but sampler.steps is 4"),
        ({"trained_steps": {"rule": "window", "size": 3, "within": (2, 4)}}, "no window of 3 steps"),
        ({"num_prompts": 3, "group_size": 3}, "9 pictures do not divide into num_updates 2"),
        ({"group_size": 1}, "group_size"),
        ({"noise_level": 0}, "noise_level"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FlowGrpoConfig.model_validate({"rewards": SHAPES, **settings})
