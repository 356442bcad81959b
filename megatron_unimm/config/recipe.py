"""A recipe: named stages, each a full description of one training run."""

from pydantic import Field

from megatron_unimm.config.base import Section
from megatron_unimm.config.data import DataConfig
from megatron_unimm.config.methods import MethodConfig
from megatron_unimm.config.model import ModelConfig
from megatron_unimm.config.parallel import SystemConfig
from megatron_unimm.config.train import TrainConfig


class StageConfig(Section):
    """One stage, complete: what stands at the top of a recipe file, overridden by the stage's own part."""

    name: str
    """The stage's name, from its key under ``stages``."""
    model: ModelConfig
    method: MethodConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    system: SystemConfig = SystemConfig()
    after: str | None = None
    """The stage whose last checkpoint this one starts from; null starts from the base model."""
    base_checkpoint: str = ""
    """Imported base model (``unimm convert import``): start of the first stage, and the frozen teacher of all."""


class Recipe(Section):
    """A recipe file, resolved."""

    name: str
    stages: dict[str, StageConfig] = Field(min_length=1)
    """Stages in the order in which they run."""
