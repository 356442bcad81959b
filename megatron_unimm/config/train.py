"""Optimizer, schedule, what trains, and everything that happens around the steps."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_unimm.config.base import Section


class OptimizerConfig(Section):
    """AdamW. The defaults are ORION's Table 1."""

    implementation: Literal["torch", "transformer_engine", "apex"] = "torch"
    """Whose fused kernel: torch's clips and skips on the device; the others' FusedAdam costs one host read per step."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-15, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Applied to matrices; not to biases and norms."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Global gradient norm after clipping."""


class ScheduleConfig(Section):
    """Learning rate over the steps of a stage: linear warm-up, then constant or cosine."""

    kind: Literal["constant", "cosine"] = "cosine"
    max_learning_rate: float = Field(gt=0)
    min_learning_rate: float = Field(ge=0)
    initial_learning_rate: float = Field(default=0.0, ge=0)
    """Where the warm-up starts."""
    warmup_ratio: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps over which the rate rises."""

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        if self.min_learning_rate > self.max_learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is larger than max_learning_rate {self.max_learning_rate}"
            )
        if self.initial_learning_rate > self.max_learning_rate:
            initial, most = self.initial_learning_rate, self.max_learning_rate
            raise ValueError(f"initial_learning_rate {initial} is larger than max_learning_rate {most}")
        return self


class TrainableRule(Section):
    """One line of the table of what trains: first match wins."""

    pattern: str
    """Glob over parameter names, e.g. ``vision_head.*``."""
    train: bool = True
    learning_rate_multiplier: float = Field(default=1.0, gt=0)


class SpikeConfig(Section):
    """When an optimizer step is skipped (ORION, section 4.1). A gradient that is not finite always is."""

    factor: float = Field(default=10.0, gt=1)
    """Skip where the gradient norm exceeds this many times its running mean."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps that only feed the running mean."""
    decay: float = Field(default=0.95, gt=0, lt=1)
    """Decay per step of the running mean."""
    max_consecutive: int = Field(default=20, gt=0)
    """More skipped steps in a row end the run."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every_steps: int = Field(default=1000, gt=0)
    keep_last: int = Field(default=2, gt=0)
    """With 1 there is none to fall back to when the newest gets damaged."""
    keep_every_steps: int | None = Field(default=None, gt=0)
    """Checkpoints at multiples of this are kept for ever."""
    asynchronous: bool = True
    """Write in a thread while training goes on."""
    max_failures: int = Field(default=3, ge=0)
    """Checkpoints in a row that may fail to be written (a full disk) before the run ends; the last of a stage may not
    fail."""


class EvaluationConfig(Section):
    """The evaluation hook."""

    every_steps: int | None = Field(default=None, gt=0)
    """Null evaluates only at the end of the stage."""
    at_start: bool = False
    """Also before the first step: what the stage starts from."""
    suites: list[str] = Field(default_factory=list)
    """Names of the suites, see ``unimm evaluate --help``."""
    num_samples: int = Field(default=64, gt=0)
    data: str = ""
    """Folder with the evaluation files of the suites."""


class LoggingConfig(Section):
    """Monitoring."""

    every_steps: int = Field(default=10, gt=0)
    text_every_steps: int = Field(default=500, gt=0)
    """How often decoded text samples go to TensorBoard."""
    pictures_every_steps: int | None = Field(default=None, gt=0)
    """How often pictures go to TensorBoard: those of the stage's sources drawn again, where it trains an image decoder,
    else ``picture_prompts``. null for never."""
    num_pictures: int = Field(default=8, gt=0)
    """How many are drawn again."""
    picture_prompts: list[str] = Field(default_factory=list)
    """What a stage of the language model draws, through ``decoder``."""
    decoder: str = ""
    """An image decoder's checkpoint, or the folder of its stage."""
    straggler_ratio: float = Field(default=1.3, gt=1)
    """Warn of a rank whose own work takes this many times the median of its like …"""
    straggler_intervals: int = Field(default=5, gt=0)
    """… in so many records in a row, on the same host."""
    tensorboard: bool = True
    per_module_grad_norm: bool = True
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak of one device in TFLOP/s for MFU; null looks the GPU up by name, and shows no MFU on CPU."""


class ProfileConfig(Section):
    """A trace of some steps by torch's profiler, in ``profile/`` of the stage's folder: Chrome's format, for
    https://ui.perfetto.dev, and a table of the operators that take longest. A profiled rank is slower meanwhile."""

    first_step: int = Field(default=10, gt=0)
    """The first step of the trace, counted from 1. The first few steps of a launch are unlike the others."""
    steps: int = Field(default=2, gt=0)
    ranks: list[int] = Field(default=[0], min_length=1)
    memory: bool = False
    """Also what each operator allocates."""
    shapes: bool = False
    """Operators with different shapes of inputs are told apart."""
    stacks: bool = False
    """Also the lines of Python that called them: larger and slower."""


class TrainConfig(Section):
    """Length and batch of a stage."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the mix; exclusive with steps."""
    steps: int | None = Field(default=None, gt=0)
    global_batch_size: int | None = Field(default=None, gt=0)
    """Samples per optimizer step over all ranks; exclusive with global_batch_rows."""
    global_batch_rows: int | None = Field(default=None, gt=0)
    """Packed rows per optimizer step over all ranks, filled with as many samples as find room: hardly any padding, and
    even work. Exclusive with global_batch_size; wants steps rather than epochs."""
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep a running average of the weights with this decay per step, saved with the checkpoint; what is drawn then
    comes from it, and exports leave it out. null for none."""
    spike: SpikeConfig = SpikeConfig()
    trainable: list[TrainableRule]
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig | None = None
    """null for none; ``train.profile.first_step=10`` on the command line for one."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give exactly one of epochs and steps (epochs={self.epochs}, steps={self.steps})")
        if (self.global_batch_size is None) == (self.global_batch_rows is None):
            sizes = f"global_batch_size={self.global_batch_size}, global_batch_rows={self.global_batch_rows}"
            raise ValueError(f"give exactly one of global_batch_size and global_batch_rows ({sizes})")
        if self.global_batch_rows is not None and self.steps is None:
            raise ValueError(
                "global_batch_rows draws as many samples as find room, so that epochs make no number of "
                "steps; give steps"
            )
        return self
