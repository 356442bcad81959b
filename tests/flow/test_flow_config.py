"""What recipes may say about flow matching."""

import pytest
from pydantic import ValidationError

from megatron_unimm.config.flow import (
    FlowConfig,
    FluxShiftConfig,
    ResolutionShiftConfig,
    SamplerConfig,
    StaticShiftConfig,
    TimestepConfig,
)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (3, StaticShiftConfig(factor=3.0)),
        (1.5, StaticShiftConfig(factor=1.5)),
        ({"factor": 2.0}, StaticShiftConfig(factor=2.0)),
        ("flux", FluxShiftConfig(rule="flux")),
        ("resolution", ResolutionShiftConfig(rule="resolution", base_tokens=256)),
        ({"rule": "resolution", "base_tokens": 64}, ResolutionShiftConfig(rule="resolution", base_tokens=64)),
        ({"rule": "flux", "max_mu": 2.0}, FluxShiftConfig(rule="flux", max_mu=2.0)),
    ],
)
def test_ways_to_write_a_shift(written: object, meant: object) -> None:
    config = TimestepConfig.model_validate({"shift": written})
    assert config.shift == meant
    assert TimestepConfig.model_validate(config.model_dump()) == config, "a dumped recipe reads the same"


@pytest.mark.parametrize("wrong", [0, -1.0, True, "sideways", {"rule": "flux", "base_tokens": 5000}, None])
def test_wrong_shifts(wrong: object) -> None:
    with pytest.raises(ValidationError):
        TimestepConfig.model_validate({"shift": wrong})


def test_training_and_drawing_have_shifts_of_their_own() -> None:
    assert FlowConfig().timesteps.shift == StaticShiftConfig(factor=1.0)
    assert SamplerConfig().shift == StaticShiftConfig(factor=3.0)


@pytest.mark.parametrize("scale", [-1.01, 1.76])
def test_mode_scale_stays_monotonic(scale: float) -> None:
    with pytest.raises(ValidationError, match="scale"):
        TimestepConfig(distribution="mode", scale=scale)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.7, 0.3), (-0.1, 1.0), (0.0, 1.1)])
def test_guidance_interval(interval: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match=r"is no interval in \[0, 1\]"):
        SamplerConfig(guidance_interval=interval)
