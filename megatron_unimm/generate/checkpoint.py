"""From a checkpoint to the stage that builds its model for generation."""

from typing import Any, Literal

import yaml

from megatron_unimm.config.methods import OrionConfig
from megatron_unimm.config.model import ModelConfig, VisionHeadConfig
from megatron_unimm.config.parallel import ParallelConfig, PrecisionConfig, SystemConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.config.train import ScheduleConfig, TrainableRule, TrainConfig


def generation_stage(
    meta: dict[str, Any],
    *,
    tensor: int,
    pipeline: int,
    world_size: int,
    dtype: Literal["float32"] | None,
    with_base: bool,
) -> StageConfig:
    """The stage of a checkpoint's meta, spread over this layout, with nothing in it that only training needs.

    Args:
        dtype: None for the checkpoint's own.
        with_base: make room for the base model's vision encoder.
    """
    stage = StageConfig.model_validate(yaml.safe_load(meta["config"])) if "config" in meta else _base_stage(meta)
    # A mixture of experts wants sequence parallelism when it is built; decoding switches it off (staged.decoding_mode).
    sequence = tensor > 1 and stage.model.backbone.moe is not None
    stage.system = SystemConfig(
        platform="auto",
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence),
        precision=PrecisionConfig(dtype=dtype or stage.system.precision.dtype),
        timeout_minutes=stage.system.timeout_minutes,
    )
    # Rows are never packed to this length here; it only has to divide.
    stage.data.sequence_length += -stage.data.sequence_length % tensor
    # No teacher; and where nothing trains, the model's own vision encoder is taken for the base model's.
    assert isinstance(stage.method, OrionConfig)
    stage.method.loss_weights.kl = 0.0
    stage.train = no_training(world_size, trains=with_base)
    return stage


def no_training(world_size: int, trains: bool = False) -> TrainConfig:
    """The section of a stage that only its layout is checked of.

    Args:
        trains: whether parameters count as trained.
    """
    return TrainConfig(
        steps=1,
        global_batch_size=world_size,
        schedule=ScheduleConfig(max_learning_rate=1.0, min_learning_rate=0.0),
        trainable=[TrainableRule(pattern="*", train=trains)],
    )


def _base_stage(meta: dict[str, Any]) -> StageConfig:
    """A base model has no config: ORION's network is the plain VLM with a head beside it, fresh unless there is one."""
    head = VisionHeadConfig.model_validate(meta["vision_head"]) if "vision_head" in meta else VisionHeadConfig()
    return StageConfig(
        name="base_model",
        model=ModelConfig.model_validate(meta["architecture"]),
        method=OrionConfig(vision_head=head),
        train=no_training(world_size=1),
    )
