"""From a checkpoint to the stage that builds its model for generation."""

from typing import Any, Literal

import yaml

from megatron_unimm.config.methods import OrionConfig
from megatron_unimm.config.model import ModelConfig, VisionHeadConfig
from megatron_unimm.config.parallel import ParallelConfig, PrecisionConfig, SystemConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.config.train import ScheduleConfig, TrainableRule, TrainConfig
from megatron_unimm.data.packing import round_up


def generation_stage(
    meta: dict[str, Any],
    parallel: ParallelConfig,
    *,
    world_size: int,
    dtype: Literal["float32"] | None,
    with_base: bool,
) -> StageConfig:
    """The stage of a checkpoint's meta, at a layout's sizes, with nothing in it that only training needs.

    Args:
        parallel: its sizes along tensor, pipeline and context.
        dtype: None for the checkpoint's own.
        with_base: make room for the base model's vision encoder.
    """
    stage = StageConfig.model_validate(yaml.safe_load(meta["config"])) if "config" in meta else _base_stage(meta)
    # A mixture of experts wants sequence parallelism when it is built; decoding switches it off (staged.decoding_mode).
    sequence = parallel.tensor > 1 and stage.model.backbone.moe is not None
    stage.system = SystemConfig(
        platform="auto",
        parallel=ParallelConfig(
            tensor=parallel.tensor, pipeline=parallel.pipeline, context=parallel.context, sequence=sequence
        ),
        precision=PrecisionConfig(dtype=dtype or stage.system.precision.dtype),
        timeout_minutes=stage.system.timeout_minutes,
        cpu_threads=stage.system.cpu_threads,
    )
    # Rows are never packed to this length here; it only has to divide.
    stage.data.sequence_length = round_up(stage.data.sequence_length, 2 * parallel.tensor * parallel.context)
    # No teacher; and where nothing trains, the model's own vision encoder is taken for the base model's.
    if isinstance(stage.method, OrionConfig):
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


def drawing_stage(
    meta: dict[str, Any], parallel: ParallelConfig, world_size: int, dtype: Literal["float32"] | None
) -> StageConfig:
    """The stage that trained a diffusion transformer, at the layout of ``parallel`` (its layers per stage aside) and
    with nothing in it that only training needs.

    Args:
        dtype: None for the checkpoint's own.
    """
    stage = StageConfig.model_validate(yaml.safe_load(meta["config"]))
    assert stage.generator is not None
    chunks = parallel.pipeline * parallel.virtual_pipeline
    # A mixture of experts beside it wants sequence parallelism when it is built; decoding switches it off.
    beside = bool(stage.method.query_section) and stage.model.backbone.moe is not None
    stage.system = SystemConfig(
        platform="auto",
        parallel=ParallelConfig(
            tensor=parallel.tensor,
            sequence=parallel.tensor > 1 and beside,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline,
            context=parallel.context,
            layers_per_stage=_shared_out(stage.generator.mmdit.num_blocks, chunks),
        ),
        precision=PrecisionConfig(dtype=dtype or stage.system.precision.dtype),
        timeout_minutes=stage.system.timeout_minutes,
        cpu_threads=stage.system.cpu_threads,
    )
    stage.data.latent_cache = "none"  # nothing is compared with, so that the last stage needs no VAE
    multiple = parallel.tensor * parallel.context  # as in generation_stage()
    stage.data.sequence_length = round_up(stage.data.sequence_length, multiple)
    stage.train = no_training(world_size)
    return stage


def _shared_out(layers: int, chunks: int) -> list[int] | None:
    """Layers of each of the chunks where they have not all as many; the first ones have one more."""
    if layers % chunks == 0:
        return None
    return [layers // chunks + (number < layers % chunks) for number in range(chunks)]
