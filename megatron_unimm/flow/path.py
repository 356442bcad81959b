"""The straight path between data and noise, and what a network may predict along it.

The convention, stated here once: **t = 1 is noise and t = 0 is data**,

    x_t = (1 - t) x_0 + t ε,        v = dx_t/dt = ε - x_0,

as in SD3 (arXiv 2403.03206) and FLUX; rectified flow (arXiv 2209.03003) and OmniGen2 count the other way. A network
learns v; drawing integrates from t = 1 down to t = 0.

Legend  n samples; all tensors are ``[n, ...]``. A timestep is a number, ``[n]``, or anything that broadcasts already,
such as ``[T, 1, 1]`` over packed tokens ``[T, 1, C]``. Give it in float32: it lifts bf16 data, as it must, since bf16
has three digits; a float64 tensor would lift everything to float64.
"""

from torch import Tensor


def over_trailing(t: Tensor | float, like: Tensor) -> Tensor | float:
    """A timestep with as many dimensions as ``like``: ``[n]`` becomes ``[n, 1, ...]``. Numbers stay numbers."""
    if not isinstance(t, Tensor):
        return t
    leads = t.ndim <= like.ndim and all(a in (1, b) for a, b in zip(t.shape, like.shape, strict=False))
    assert leads, f"timesteps {list(t.shape)} do not lead the data's shape {list(like.shape)}"
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def interpolate(data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t between data ``[n, ...]`` and noise of the same shape."""
    t = over_trailing(t, data)
    return (1 - t) * data + t * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """What the network learns: dx_t/dt, the same at every t."""
    return noise - data


def data_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """x_0 = x_t - t v."""
    return x_t - over_trailing(t, x_t) * velocity


def noise_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """ε = x_t + (1 - t) v."""
    return x_t + (1 - over_trailing(t, x_t)) * velocity


def velocity_from_data(x_t: Tensor, data: Tensor, t: Tensor | float) -> Tensor:
    """v = (x_t - x_0) / t. Undefined at t = 0, where x_t says nothing about the noise."""
    return (x_t - data) / over_trailing(t, x_t)


def velocity_from_noise(x_t: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """v = (ε - x_t) / (1 - t). Undefined at t = 1, where x_t says nothing about the data."""
    return (noise - x_t) / (1 - over_trailing(t, x_t))
