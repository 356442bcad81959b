"""Flow matching: which timesteps are trained and how they weigh, and how images are drawn.

The shift of training (``FlowConfig.timesteps.shift``) and that of drawing (``SamplerConfig.shift``) are two settings:
BAGEL trains at 1 and draws at 3. Time is 1 at noise and 0 at data, see ``flow/path.py``.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_unimm.config.base import Section

TimestepDistribution = Literal["uniform", "logit_normal", "mode"]
Weighting = Literal["uniform", "cosmap", "sigma_sqrt", "gaussian"]
SolverName = Literal["euler", "heun", "dpm++2m"]
Spacing = Literal["uniform", "sd3"]

MAX_MODE_SCALE = 2 / (math.pi - 2)
"""Beyond it the quantile function of ``mode`` is not monotonic (arXiv 2403.03206, section 3.1)."""


class StaticShiftConfig(Section):
    """One shift for every image."""

    rule: Literal["static"] = "static"
    factor: float = Field(default=1.0, gt=0)
    """s in t' = s t / (1 + (s - 1) t). 1 changes nothing; more puts more steps near noise. SD3 has 3."""


class ResolutionShiftConfig(Section):
    """s = sqrt(tokens of the image / ``base_tokens``), so that an image of any size is equally destroyed at the same
    timestep (arXiv 2403.03206, equation 23)."""

    rule: Literal["resolution"]
    base_tokens: int = Field(default=256, gt=0)
    """Tokens of an image at which nothing is shifted."""


class FluxShiftConfig(Section):
    """s = e^μ with μ linear in the tokens of the image: FLUX. The defaults are those of FLUX.1 dev."""

    rule: Literal["flux"]
    base_tokens: int = Field(default=256, gt=0)
    base_mu: float = 0.5
    """μ of an image of ``base_tokens``."""
    max_tokens: int = Field(default=4096, gt=0)
    max_mu: float = 1.15
    """μ of an image of ``max_tokens``; beyond, the line goes on."""

    @model_validator(mode="after")
    def _check(self) -> "FluxShiftConfig":
        if self.base_tokens >= self.max_tokens:
            raise ValueError(f"base_tokens {self.base_tokens} is not below max_tokens {self.max_tokens}")
        return self


def _spell_out(value: Any) -> Any:
    """Recipes may write a static shift as a number, and a rule with its defaults as its name."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"rule": "static", "factor": value}
    if isinstance(value, str):
        return {"rule": value}
    return {"rule": "static", **value} if isinstance(value, dict) else value


Shift = Annotated[
    Annotated[StaticShiftConfig | ResolutionShiftConfig | FluxShiftConfig, Field(discriminator="rule")],
    BeforeValidator(_spell_out),
]
"""How timesteps are moved towards noise: ``3.0``, ``flux``, or a section with its ``rule``."""


class TimestepConfig(Section):
    """The distribution of timesteps in training: a quantile function, then the shift."""

    distribution: TimestepDistribution = "logit_normal"
    """``logit_normal`` is SD3's choice and BAGEL's, ``uniform`` Nexus-Gen's."""
    mean: float = 0.0
    """Of logit(t), for logit_normal. Above 0 leans towards noise."""
    std: float = Field(default=1.0, gt=0)
    """Of logit(t), for logit_normal."""
    scale: float = Field(default=1.29, ge=-1, le=MAX_MODE_SCALE)
    """For mode: above 0 favours the middle, below 0 the ends, 0 is uniform."""
    shift: Shift = StaticShiftConfig()
    """Of training. Drawing has its own."""


class FlowConfig(Section):
    """Flow matching in training."""

    timesteps: TimestepConfig = Field(default_factory=TimestepConfig)
    weighting: Weighting = "uniform"
    """Of the squared error of the velocity, by timestep. ``cosmap`` and ``sigma_sqrt`` are diffusers' (the latter is
    1/t², without bound near data); ``gaussian`` is Nexus-Gen's bump around the middle, 0 at both ends, of mean 1 over
    the timesteps that are drawn."""


class SamplerConfig(Section):
    """How an image is drawn from noise."""

    solver: SolverName = "euler"
    """Per step, ``euler`` and ``dpm++2m`` evaluate the velocity once, ``heun`` twice (once in the last step)."""
    steps: int = Field(default=50, gt=0)
    shift: Shift = StaticShiftConfig(factor=3.0)
    """Of drawing. Training has its own."""
    spacing: Spacing = "uniform"
    """Timesteps before the shift: ``uniform`` is ``steps`` equal steps from noise to data (FLUX; BAGEL's 50 timesteps
    are 49 steps of it); ``sd3`` is diffusers' Stable Diffusion 3, whose last step is a short one."""
    guidance_scale: float = Field(default=4.0, ge=0)
    """Of the prompt. 1 is no guidance, and then the unconditional velocity is not computed."""
    image_guidance_scale: float = Field(default=1.0, ge=0)
    """Of the images that the prompt comes with, for editing (InstructPix2Pix, arXiv 2211.09800, equation 3)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance is on where low < t <= high. BAGEL has 0.4 and 1."""
    guidance_renorm_min: float | None = Field(default=None, ge=0, le=1)
    """BAGEL's global renormalisation: a guided velocity longer than the conditional one is shortened to its length, but
    to no less than this share of its own. null leaves it as it is."""

    @model_validator(mode="after")
    def _check(self) -> "SamplerConfig":
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance_interval {low}, {high} is no interval in [0, 1]")
        return self
