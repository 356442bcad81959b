"""Quantile functions against published densities, shifts and grids against diffusers."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from megatron_unimm.config.flow import (
    FluxShiftConfig,
    ResolutionShiftConfig,
    SamplerConfig,
    StaticShiftConfig,
    TimestepConfig,
)
from megatron_unimm.flow.timesteps import logit_normal, mode, shift_factor, shifted, timestep_grid, timesteps_of

MIDDLES = (np.arange(2000) + 0.5) / 2000
FLUX = FluxShiftConfig(rule="flux")


def density_by_differences(quantile, u: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """1 / (dt/du): the density at t(u), by central differences."""
    return 2 * step / (quantile(u + step) - quantile(u - step))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6), (1.0, 1.5)])
def test_logit_normal_has_the_published_density(mean: float, std: float) -> None:
    u = MIDDLES[20:-20]
    t = logit_normal(u, mean, std)
    published = np.exp(-((np.log(t / (1 - t)) - mean) ** 2) / (2 * std**2)) / (
        std * math.sqrt(2 * math.pi) * t * (1 - t)
    )
    found = density_by_differences(lambda u: logit_normal(u, mean, std), u)
    np.testing.assert_allclose(found, published, rtol=1e-6)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 2 / (math.pi - 2)])
def test_mode_is_the_papers_map_and_a_quantile_function(scale: float) -> None:
    t = mode(MIDDLES, scale)
    u = 1 - MIDDLES
    np.testing.assert_allclose(t, 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u), atol=1e-15)
    assert np.all(np.diff(t) > 0)
    np.testing.assert_allclose(mode([0.0, 1.0], scale), [0.0, 1.0], atol=1e-15)


@pytest.mark.parametrize("scale", [-1.0, 0.81, 1.29])
def test_mode_density_favours_the_middle_or_the_ends(scale: float) -> None:
    """dt/du = 1 + scale - scale π/2 sin(πu), so the density at t = 1/2 and at the ends is known."""
    density = density_by_differences(lambda u: mode(u, scale), np.array([1e-5, 0.5, 1 - 1e-5]))
    end, middle = 1 / (1 + scale) if scale > -1 else np.inf, 1 / (1 + scale - scale * np.pi / 2)
    if scale > -1:
        np.testing.assert_allclose(density, [end, middle, end], rtol=1e-3)
    else:
        np.testing.assert_allclose(density[1], middle, rtol=1e-6)
        assert density[0] > 1000 < density[2]


@pytest.mark.parametrize(
    ("distribution", "options"),
    [
        ("logit_normal", dict(logit_mean=0.3, logit_std=0.8)),
        ("mode", dict(mode_scale=1.29)),
        ("uniform", {}),
    ],
)
def test_distributions_are_those_that_diffusers_draws_from(distribution: str, options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling(
        distribution if distribution != "uniform" else "none", 20_000, generator=generator, **options
    )
    config = TimestepConfig(distribution=distribution, mean=0.3, std=0.8, scale=1.29)  # type: ignore[arg-type]
    ours = timesteps_of(np.random.default_rng(1).random(20_000), config, num_tokens=256)
    # Kolmogorov-Smirnov: 0.0163 is the distance that equal distributions exceed once in 100 times.
    assert scipy.stats.ks_2samp(theirs.double().numpy(), ours).statistic < 0.0163
    other = TimestepConfig(distribution=distribution, mean=0.4, std=0.8, scale=1.0, shift=1.2)  # type: ignore[arg-type]
    assert scipy.stats.ks_2samp(theirs.double().numpy(), timesteps_of(MIDDLES, other, 256)).statistic > 0.03


def test_shift_moves_the_logit() -> None:
    t = MIDDLES
    moved = shifted(t, 3.0)
    np.testing.assert_allclose(np.log(moved / (1 - moved)), np.log(t / (1 - t)) + math.log(3.0), rtol=1e-9)
    np.testing.assert_allclose(shifted([0.0, 1.0], 7.0), [0.0, 1.0])
    np.testing.assert_allclose(shifted(shifted(t, 2.0), 1.5), moved, rtol=1e-12)


def test_a_shift_of_logit_normal_is_another_mean() -> None:
    shift_of_3 = TimestepConfig(shift=3.0)  # type: ignore[arg-type]
    np.testing.assert_allclose(
        timesteps_of(MIDDLES, shift_of_3, 1),
        timesteps_of(MIDDLES, TimestepConfig(mean=math.log(3.0)), 1),
        rtol=1e-12,
    )


def test_shift_factors() -> None:
    assert shift_factor(StaticShiftConfig(factor=2.5), 7) == 2.5
    resolution = ResolutionShiftConfig(rule="resolution", base_tokens=256)
    assert shift_factor(resolution, 256) == 1.0
    assert shift_factor(resolution, 4096) == 4.0
    assert shift_factor(FLUX, 256) == pytest.approx(math.exp(0.5))
    assert shift_factor(FLUX, 4096) == pytest.approx(math.exp(1.15))


@pytest.mark.parametrize("num_tokens", [64, 1024, 8192])
def test_flux_shift_is_diffusers(num_tokens: int) -> None:
    mu = calculate_shift(num_tokens)
    assert math.log(shift_factor(FLUX, num_tokens)) == pytest.approx(mu, abs=1e-12)
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).time_shift(mu, 1.0, torch.from_numpy(MIDDLES))
    np.testing.assert_allclose(shifted(MIDDLES, math.exp(mu)), theirs.numpy(), rtol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 4, 28, 50])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_sd3_grid_is_diffusers_by_number_of_steps(num_steps: int, factor: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=factor)
    scheduler.set_timesteps(num_steps)
    ours = timestep_grid(num_steps, StaticShiftConfig(factor=factor), 1024, "sd3")
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=1e-6, rtol=0)
    if num_steps > 1:
        # The end is shifted twice, see the docstring.
        np.testing.assert_allclose(ours[-2], shifted(shifted(0.001, factor), factor), rtol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 4, 28, 50])
@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
def test_grids_with_dynamic_shift_are_diffusers(num_steps: int, num_tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = calculate_shift(num_tokens)
    scheduler.set_timesteps(num_steps, mu=mu)
    np.testing.assert_allclose(
        timestep_grid(num_steps, FLUX, num_tokens, "sd3"), scheduler.sigmas.numpy(), atol=1e-6, rtol=0
    )
    # As the FLUX pipeline calls it.
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    np.testing.assert_allclose(timestep_grid(num_steps, FLUX, num_tokens), scheduler.sigmas.numpy(), atol=1e-6, rtol=0)


def test_bagel_grid() -> None:
    """Its own lines: 50 timesteps from 1 to 0, shifted, are 49 steps."""
    theirs = torch.linspace(1, 0, 50, dtype=torch.float64)
    theirs = 3 * theirs / (1 + 2 * theirs)
    np.testing.assert_allclose(timestep_grid(49, StaticShiftConfig(factor=3.0), 1), theirs.numpy(), atol=1e-15)


def test_grids_fall_from_1_to_0() -> None:
    for spacing in ("uniform", "sd3"):
        sampler = SamplerConfig(spacing=spacing)
        grid = timestep_grid(sampler.steps, sampler.shift, 1024, sampler.spacing)
        assert (grid[0], grid[-1], grid.shape, grid.dtype) == (1.0, 0.0, (51,), np.float64)
        assert np.all(np.diff(grid) < 0)
