"""The path and its conversions, in float64 against each other and against the formula element by element."""

import pytest
import torch
from torch import Tensor

from megatron_unimm.flow.path import (
    data_from_velocity,
    interpolate,
    noise_from_velocity,
    over_trailing,
    velocity,
    velocity_from_data,
    velocity_from_noise,
)

TIMES = [0.25, 0.03, torch.tensor([0.9, 0.4, 0.001], dtype=torch.float64)]


def pair() -> tuple[Tensor, Tensor]:
    """Data and noise ``[3, 2, 4, 4]``."""
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def test_noise_is_at_1_and_data_at_0() -> None:
    data, noise = pair()
    assert torch.equal(interpolate(data, noise, 1.0), noise)
    assert torch.equal(interpolate(data, noise, 0.0), data)
    t = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    x_t = interpolate(data, noise, t)
    assert torch.equal(x_t[0], data[0])
    assert torch.equal(x_t[1], noise[1])
    assert torch.equal(x_t[2], (data[2] + noise[2]) / 2)


def test_velocity_is_the_derivative_of_the_path() -> None:
    data, noise = pair()
    slope = (interpolate(data, noise, 0.7) - interpolate(data, noise, 0.2)) / 0.5
    assert largest(slope - velocity(data, noise)) < 1e-12


@pytest.mark.parametrize("t", TIMES, ids=["number", "near data", "per sample"])
def test_conversions_go_round(t: Tensor | float) -> None:
    data, noise = pair()
    x_t, v = interpolate(data, noise, t), velocity(data, noise)
    assert largest(data_from_velocity(x_t, v, t) - data) < 1e-12
    assert largest(noise_from_velocity(x_t, v, t) - noise) < 1e-12
    # Dividing by t = 0.001 costs three digits.
    assert largest(velocity_from_data(x_t, data, t) - v) < 1e-12
    assert largest(velocity_from_noise(x_t, noise, t) - v) < 1e-12


def test_timesteps_over_packed_tokens() -> None:
    """A ``[T, 1, 1]`` timestep broadcasts as it is: each token has its own."""
    generator = torch.Generator().manual_seed(1)
    data, noise = (torch.randn(5, 1, 3, generator=generator) for _ in range(2))
    t = torch.rand(5, 1, 1, generator=generator)
    x_t = interpolate(data, noise, t)
    for token in range(5):
        assert torch.equal(x_t[token], interpolate(data[token], noise[token], t[token, 0, 0].item()))
    assert torch.equal(interpolate(data, noise, t[:, 0, 0]), x_t)


def test_shapes_of_timesteps() -> None:
    like = torch.zeros(3, 2, 4, 4)
    assert over_trailing(torch.zeros(3), like).shape == (3, 1, 1, 1)
    assert over_trailing(torch.zeros(3, 1, 4, 1), like).shape == (3, 1, 4, 1)
    assert over_trailing(torch.tensor(0.5), like).shape == (1, 1, 1, 1)
    with pytest.raises(AssertionError, match=r"\[4\] do not lead the data's shape \[3, 2, 4, 4\]"):
        over_trailing(torch.zeros(4), like)


def test_float32_timesteps_lift_bf16_and_numbers_do_not() -> None:
    data, noise = (x.bfloat16() for x in pair())
    t = torch.tensor([0.3, 0.6, 0.9])
    assert interpolate(data, noise, t).dtype == torch.float32
    assert interpolate(data, noise, 0.3).dtype == torch.bfloat16
