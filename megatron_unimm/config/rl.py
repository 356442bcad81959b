"""Reinforcement learning of a flow model from rewards: Flow-GRPO (arXiv 2505.05470).

Numbers are those of the published code (github.com/yifan123/flow_grpo, recipe ``geneval_sd3``, for SD3.5-M). Where the
code does something else than the paper's formulas, the formulas are the default, and the setting tells.
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from megatron_unimm.config.base import Section
from megatron_unimm.config.flow import SamplerConfig, StaticShiftConfig
from megatron_unimm.config.rewards import Rewards

AdvantageStd = Literal["group", "all"]


class StepFraction(Section):
    """The first steps of every rollout are trained, those nearest to noise."""

    rule: Literal["fraction"] = "fraction"
    fraction: float = Field(default=0.99, gt=0, le=1)
    """Of the rollout's steps, rounded down. The published code's 0.99 leaves the last step out: its Gaussian is the
    narrowest, and its noise would stay in the picture."""

    def count(self, num_steps: int) -> int:
        """Steps of so many that are trained."""
        return int(num_steps * self.fraction + 1e-9)  # 100 x 0.29 is 28.999999999999996


class StepWindow(Section):
    """A few neighbouring steps, elsewhere in each rollout, are trained: Flow-GRPO-Fast (in the published code; the idea
    is also MixGRPO's, arXiv 2507.21802). An update then costs ``size`` steps of each sample instead of nearly all."""

    rule: Literal["window"]
    size: int = Field(default=2, gt=0)
    """Steps. The published code has 2 to 3 of 10, and finds 2 as good as all, 1 slightly worse."""
    within: tuple[int, int] = (0, 5)
    """First step that the window may hold, counted from 0, and the step before which it ends. The published code has
    the half that is nearer to noise."""

    @model_validator(mode="after")
    def _check(self) -> "StepWindow":
        first, last = self.within
        if not 0 <= first <= last - self.size:
            raise ValueError(f"no window of {self.size} steps has room within {first}, {last}")
        return self


def _fraction_by_default(value: Any) -> Any:
    """Recipes may write a fraction as a number or without its rule."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"rule": "fraction", "fraction": value}
    return {"rule": "fraction", **value} if isinstance(value, dict) else value


TrainedSteps: TypeAlias = Annotated[
    Annotated[StepFraction | StepWindow, Field(discriminator="rule")], BeforeValidator(_fraction_by_default)
]
"""Which steps of a rollout have noise and are trained; the others are the ordinary equation's."""


class FlowGrpoConfig(Section):
    """Draw groups of pictures, score them, and make the better ones of each group more likely.

    A step of the trainer is one rollout: ``num_prompts`` x ``group_size`` pictures, then ``epochs`` x ``num_updates``
    updates of the weights.
    """

    rewards: Rewards
    """By name; what is learned is the weighted sum."""
    num_prompts: int = Field(default=48, gt=0)
    """Prompts per rollout, over all ranks. The published code's 48 (``group_number``)."""
    group_size: int = Field(default=24, gt=1)
    """Pictures of each prompt; the paper's G."""
    num_updates: int = Field(default=2, gt=0)
    """Updates in one pass over a rollout, each on an equal share of its pictures and on all their trained steps. The
    published code has 2: the first is on-policy, for the second the ratio does its work."""
    epochs: int = Field(default=1, gt=0)
    """Passes over a rollout (``num_inner_epochs``)."""
    noise_level: float = Field(default=0.7, gt=0)
    """a of σ_t = a sqrt(t / (1 - t)), the exploration of a rollout. Less tells the pictures of a group less apart, more
    spoils them."""
    sampler: SamplerConfig = SamplerConfig(steps=10, guidance_scale=4.5, shift=StaticShiftConfig(factor=3.0))
    """Of rollouts. The paper's denoising reduction: 10 steps are enough to learn from, where evaluations take 40."""
    trained_steps: TrainedSteps = StepFraction()
    advantage_std: AdvantageStd = "group"
    """Rewards are divided by the standard deviation of their ``group``, as in the paper, or of ``all`` rewards of the
    rollout, as the published recipes for SD3.5 do (``global_std``), so that a group of nearly equal rewards is not
    blown up."""
    advantage_clip: float = Field(default=5.0, gt=0)
    """Largest advantage either way, in standard deviations (``adv_clip_max``)."""
    clip_low: float = Field(default=1e-4, gt=0, lt=1)
    """How far below 1 a ratio of probabilities counts. The published code has 1e-4 both ways, 1e-5 where it trains
    windows: log-probabilities are averaged over coordinates, so ratios stay close to 1."""
    clip_high: float = Field(default=1e-4, gt=0)
    """How far above 1."""
    kl_weight: float = Field(default=0.04, ge=0)
    """β of the divergence from the model that the stage started from. The published recipes have 0.04 for GenEval and
    rendered text, 0.01 for PickScore, with ``kl_per: time``. 0 computes no reference model."""
    kl_per: Literal["step", "time"] = "step"
    """``step`` is the divergence of one step's Gaussians, ||Δmean||² / (2 σ_t² |Δt|), the paper's. ``time`` leaves |Δt|
    out as the published code does, so that the same β weighs about as many times less as there are steps."""

    @model_validator(mode="after")
    def _check(self) -> "FlowGrpoConfig":
        steps = self.sampler.steps
        if self.sampler.solver != "euler":
            raise ValueError(f"sampler.solver is {self.sampler.solver}, but stochastic steps are those of euler")
        if isinstance(self.trained_steps, StepFraction):
            if self.trained_steps.count(steps) == 0:
                raise ValueError(
                    f"trained_steps.fraction {self.trained_steps.fraction} of sampler.steps {steps} is no whole step"
                )
        elif self.trained_steps.within[1] > steps:
            raise ValueError(
                f"trained_steps.within ends at {self.trained_steps.within[1]}, but sampler.steps is {steps}"
            )
        pictures = self.num_prompts * self.group_size
        if pictures % self.num_updates:
            raise ValueError(
                f"num_prompts {self.num_prompts} x group_size {self.group_size} = {pictures} pictures do not divide "
                f"into num_updates {self.num_updates}"
            )
        return self
