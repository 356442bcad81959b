"""Loss weights against diffusers and against DiffSynth's recipe written anew."""

import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from megatron_unimm.config.flow import FlowConfig, TimestepConfig
from megatron_unimm.flow.timesteps import timesteps_of
from megatron_unimm.flow.weighting import bump, weights_of

T = torch.linspace(0.01, 1.0, 100)
NEXUS_GEN = FlowConfig(
    timesteps=TimestepConfig(distribution="uniform", shift=3.0),  # type: ignore[arg-type]
    weighting="gaussian",
)


@pytest.mark.parametrize("weighting", ["uniform", "cosmap", "sigma_sqrt"])
def test_weights_are_diffusers(weighting: str) -> None:
    ours = weights_of(T, FlowConfig(weighting=weighting), 256)  # type: ignore[arg-type]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, compute_loss_weighting_for_sd3(weighting, T), rtol=1e-6, atol=0)


def test_cosmap_is_a_density() -> None:
    """It is CosMap's density, so its mean over uniform timesteps is 1."""
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert weights_of(t, FlowConfig(weighting="cosmap"), 1).mean().item() == pytest.approx(1.0, abs=1e-8)


def test_gaussian_is_diffsynths() -> None:
    """1000 timesteps of shift 3 that end at 0.003 / 1.002, the smallest weight taken off, the mean made 1."""
    t = torch.linspace(1.0, 0.003 / 1.002, 1000, dtype=torch.float64)
    t = 3 * t / (1 + 2 * t)
    theirs = torch.exp(-2 * (t - 0.5) ** 2)
    theirs = theirs - theirs.min()
    theirs = theirs / theirs.mean()
    ratio = weights_of(t, NEXUS_GEN, 1024)[1:] / theirs[1:]
    print(f"\nour weight / DiffSynth's: {ratio.min():.6f} to {ratio.max():.6f}")
    # One factor for all timesteps: their grid leaves out the last 0.3 % next to data.
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-9, atol=0)
    assert ratio[0].item() == pytest.approx(1.0, abs=3e-3)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal", "mode"])
@pytest.mark.parametrize("shift", [1.0, 3.0, "flux"])
def test_gaussian_has_mean_1_over_what_is_drawn(distribution: str, shift: float | str) -> None:
    config = FlowConfig.model_validate(
        {"timesteps": {"distribution": distribution, "shift": shift}, "weighting": "gaussian"}
    )
    t = torch.from_numpy(timesteps_of(np.random.default_rng(3).random(200_000), config.timesteps, 1024))
    weights = weights_of(t, config, 1024)
    # Five standard errors of the mean.
    assert abs(weights.mean().item() - 1) < 5 * weights.std().item() / math.sqrt(len(t))


def test_bump() -> None:
    ends_and_middle = bump(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    expected = torch.tensor([0.0, 1 - math.exp(-0.5), 0.0], dtype=torch.float64)
    torch.testing.assert_close(ends_and_middle, expected, rtol=0, atol=1e-15)
