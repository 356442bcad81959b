"""Timesteps of training and of drawing, on the host: numpy float64 in and out.

In training a timestep is a quantile function of a uniform number u, because every sample draws its u from a generator
of its own (seed, sample, step). All quantile functions here increase: larger u, more noise.
"""

import math
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from megatron_unimm.config.flow import (
    FluxShiftConfig,
    ResolutionShiftConfig,
    Shift,
    Spacing,
    StaticShiftConfig,
    TimestepConfig,
)

Float64: TypeAlias = NDArray[np.float64]


def timesteps_of(u: ArrayLike, config: TimestepConfig, num_tokens: int) -> Float64:
    """Timesteps of training, shifted.

    Args:
        u: uniform in (0, 1), any shape.
        num_tokens: of the images that the timesteps are for, after patches; shifts by resolution go by it.
    """
    match config.distribution:
        case "uniform":
            t = uniform(u)
        case "logit_normal":
            t = logit_normal(u, config.mean, config.std)
        case "mode":
            t = mode(u, config.scale)
    return shifted(t, shift_factor(config.shift, num_tokens))


def uniform(u: ArrayLike) -> Float64:
    """t = u."""
    return np.asarray(u, np.float64)


def logit_normal(u: ArrayLike, mean: float, std: float) -> Float64:
    """logit(t) is normal: t = sigmoid(mean + std Φ⁻¹(u)) (arXiv 2403.03206, section 3.1)."""
    normal = torch.special.ndtri(torch.from_numpy(np.array(u, np.float64)))
    return torch.sigmoid(mean + std * normal).numpy()


def mode(u: ArrayLike, scale: float) -> Float64:
    """Mode sampling with heavy tails: f_mode(1 - u), with f_mode(u) = 1 - u - scale (cos²(πu/2) - 1 + u) of
    arXiv 2403.03206, section 3.1. The paper's function falls with u; u and 1 - u have the same distribution."""
    u = np.asarray(u, np.float64)
    return u - scale * (np.sin(np.pi / 2 * u) ** 2 - u)


def shifted(t: ArrayLike, factor: float) -> Float64:
    """t' = s t / (1 + (s - 1) t) (arXiv 2403.03206, equation 23). It moves logit(t) by log(s)."""
    t = np.asarray(t, np.float64)
    return factor * t / (1 + (factor - 1) * t)


def shift_factor(shift: Shift, num_tokens: int) -> float:
    """s of :func:`shifted` for an image of so many tokens.

    FLUX's t' = e^μ / (e^μ + 1/t - 1) is the same map with s = e^μ.
    """
    match shift:
        case StaticShiftConfig():
            return shift.factor
        case ResolutionShiftConfig():
            return math.sqrt(num_tokens / shift.base_tokens)
        case FluxShiftConfig():
            slope = (shift.max_mu - shift.base_mu) / (shift.max_tokens - shift.base_tokens)
            return math.exp(shift.base_mu + slope * (num_tokens - shift.base_tokens))


def timestep_grid(num_steps: int, shift: Shift, num_tokens: int, spacing: Spacing = "uniform") -> Float64:
    """Timesteps of drawing: descending ``[num_steps + 1]``, from exactly 1 to exactly 0.

    Spacing, in the words of diffusers' FlowMatchEulerDiscreteScheduler:

    - ``uniform``: what its FLUX pipeline hands in, ``sigmas=linspace(1, 1/n, n)``, shifted, then a 0. The zero
      continues the line, so these are n equal steps before the shift.
    - ``sd3``: what its Stable Diffusion 3 pipeline gets by handing in the number of steps only. The line ends at the
      smallest timestep of training (1/1000), then comes a 0, so the last step is a short one. With a static shift that
      end is itself shifted, so that it is shifted twice in all; with a shift by resolution it is not.
    """
    factor = shift_factor(shift, num_tokens)
    if spacing == "uniform":
        return shifted(np.linspace(1.0, 0.0, num_steps + 1), factor)
    end = shifted(1 / 1000, factor) if isinstance(shift, StaticShiftConfig) else 1 / 1000
    return np.append(shifted(np.linspace(1.0, end, num_steps), factor), 0.0)
