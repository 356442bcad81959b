"""Whether a stage can be spread over a number of ranks: every rule that Megatron-Core, Transformer Engine or we have.

Checked before any process group exists, so that a wrong layout ends in one line and not in 512 tracebacks.
"""

from collections.abc import Iterator

from megatron_unimm.config.model import BackboneConfig
from megatron_unimm.config.parallel import Fp8Config, ParallelConfig, SystemConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.errors import ConfigError

FP8_WEIGHT_MULTIPLE = 16
"""Sides of a matrix in an FP8 product (cuBLASLt)."""
FP8_ROW_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Tokens per rank of an FP8 product, by recipe."""


def check_layout(stage: StageConfig, world_size: int) -> int:
    """The data parallel size of a stage on ``world_size`` ranks.

    Raises:
        ConfigError: for the first rule that is broken, with the field, both numbers, and what to change.
    """
    parallel, backbone = stage.system.parallel, stage.model.backbone
    _check_switches(parallel, backbone)
    _check_world(parallel, world_size)
    _check_tensor(stage)
    _check_experts(parallel, backbone)
    _check_pipeline(parallel, backbone)
    _check_sequence_length(stage)
    _check_rows(stage, world_size)
    _check_system(stage.system)
    if stage.system.precision.fp8 is not None:
        _check_fp8(stage, stage.system.precision.fp8)
    return world_size // (parallel.tensor * parallel.pipeline * parallel.context)


def _check_switches(parallel: ParallelConfig, backbone: BackboneConfig) -> None:
    """Options that need one another."""
    if parallel.sequence and parallel.tensor == 1:
        raise _error(
            "sequence", "true, but tensor is 1; sequence parallel needs tensor > 1, set it to false or raise tensor"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        chunks = parallel.virtual_pipeline
        raise _error("virtual_pipeline", f"{chunks}, but pipeline is 1; model chunks interleave only with pipeline > 1")
    if backbone.moe is None:
        for axis, size in (("expert", parallel.expert), ("expert_tensor", parallel.expert_tensor)):
            if size > 1:
                raise _error(axis, f"{size}, but model.backbone.moe is null; a dense model has no experts, set it to 1")
    elif parallel.tensor > 1 and not parallel.sequence:
        raise _error("sequence", f"false, but tensor is {parallel.tensor} and the model has experts; set it to true")


def _check_world(parallel: ParallelConfig, world_size: int) -> None:
    dense = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % dense:
        sizes = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
        raise ConfigError(
            "system.parallel",
            f"{sizes} = {dense} does not divide {world_size} ranks; change a size or start a multiple of {dense}",
        )
    expert = parallel.expert_tensor * parallel.expert * parallel.pipeline
    if world_size % expert:
        sizes = f"expert_tensor {parallel.expert_tensor} x expert {parallel.expert} x pipeline {parallel.pipeline}"
        raise ConfigError(
            "system.parallel",
            f"{sizes} = {expert} does not divide {world_size} ranks; change a size or start a multiple of {expert}",
        )


def _check_tensor(stage: StageConfig) -> None:
    tensor = stage.system.parallel.tensor
    for field, size in _tensor_sharded(stage):
        if size % tensor:
            raise _error("tensor", f"{tensor} does not divide {field} {size}; choose a divisor of {size}")
    kv_heads = stage.model.backbone.num_kv_heads
    if kv_heads % tensor and tensor % kv_heads:
        raise _error(
            "tensor",
            f"{tensor} is neither a divisor nor a multiple of model.backbone.num_kv_heads {kv_heads}; "
            "choose one, so that every rank has whole key-value heads",
        )


def _tensor_sharded(stage: StageConfig) -> Iterator[tuple[str, int]]:
    """Sizes that are cut into ``tensor`` pieces, by the name of their field."""
    vision, backbone = stage.model.vision_encoder, stage.model.backbone
    yield "model.backbone.num_heads", backbone.num_heads
    yield "model.backbone.mlp_size", backbone.mlp_size
    yield "model.backbone.vocab_size", backbone.vocab_size
    if backbone.moe is not None:
        yield "model.backbone.moe.shared_expert_size", backbone.moe.shared_expert_size
    yield "model.vision_encoder.num_heads", vision.num_heads
    yield "model.vision_encoder.mlp_size", vision.mlp_size
    yield from stage.method.tensor_sharded(backbone.hidden_size).items()


def _check_experts(parallel: ParallelConfig, backbone: BackboneConfig) -> None:
    if backbone.moe is None:
        return
    if backbone.moe.num_experts % parallel.expert:
        raise _error(
            "expert", f"{parallel.expert} does not divide model.backbone.moe.num_experts {backbone.moe.num_experts}"
        )
    if backbone.moe.expert_mlp_size % parallel.expert_tensor:
        size = backbone.moe.expert_mlp_size
        raise _error(
            "expert_tensor", f"{parallel.expert_tensor} does not divide model.backbone.moe.expert_mlp_size {size}"
        )


def _check_pipeline(parallel: ParallelConfig, backbone: BackboneConfig) -> None:
    chunks = parallel.pipeline * parallel.virtual_pipeline
    product = f"pipeline {parallel.pipeline} x virtual_pipeline {parallel.virtual_pipeline} = {chunks}"
    layers = parallel.layers_per_stage
    if layers is None:
        if backbone.num_layers % chunks:
            raise _error(
                "pipeline",
                f"{product} does not divide model.backbone.num_layers {backbone.num_layers}; "
                f"change one, or give system.parallel.layers_per_stage as {chunks} numbers",
            )
        return
    if len(layers) != chunks:
        raise _error("layers_per_stage", f"has {len(layers)} numbers, but {product}; give {chunks}")
    if min(layers) < 0 or sum(layers) != backbone.num_layers:
        raise _error(
            "layers_per_stage",
            f"{layers} sums to {sum(layers)}, but model.backbone.num_layers is {backbone.num_layers}; "
            "the numbers are layers per stage, none negative, and sum to all",
        )


def _check_sequence_length(stage: StageConfig) -> None:
    parallel, length = stage.system.parallel, stage.data.sequence_length
    factors = [f"tensor {parallel.tensor}"] if parallel.sequence else []
    multiple = parallel.tensor if parallel.sequence else 1
    if parallel.context > 1:
        # Each rank holds two chunks, one from each end of the row, so that all have the same share of the causal mask.
        multiple *= 2 * parallel.context
        factors.append(f"2 x context {parallel.context}")
    if length % multiple:
        raise ConfigError(
            "data.sequence_length",
            f"{length} is not a multiple of {' x '.join(factors)} = {multiple}; take {_round_up(length, multiple)}",
        )


def _check_rows(stage: StageConfig, world_size: int) -> None:
    """Every data-parallel rank has as many rows, and with model chunks a multiple of the stages."""
    parallel, rows = stage.system.parallel, stage.train.global_batch_rows
    if rows is None:
        return
    data = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    multiple = data * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
    if rows % multiple:
        parts = f"data parallel {data}" + (f" x pipeline {parallel.pipeline}" if multiple > data else "")
        raise ConfigError(
            "train.global_batch_rows",
            f"{rows} is no multiple of {parts} = {multiple}; take {_round_up(rows, multiple)}",
        )


def _check_system(system: SystemConfig) -> None:
    """Options of the platform that need one another."""
    overlap = system.overlap
    if overlap.param_gather and not overlap.grad_reduce:
        raise ConfigError(
            "system.overlap.param_gather", "true, but system.overlap.grad_reduce is false; set that to true"
        )
    if overlap.tensor_parallel and not system.parallel.sequence:
        raise ConfigError(
            "system.overlap.tensor_parallel", "true, but system.parallel.sequence is false; set that to true"
        )
    for field, on in (
        ("system.precision.fp8", system.precision.fp8 is not None),
        ("system.overlap.tensor_parallel", overlap.tensor_parallel),
        ("system.cuda_graph", system.cuda_graph != "none"),
    ):
        if on and system.platform == "cpu":
            raise ConfigError(
                field, "set, but system.platform is cpu; it needs a GPU, switch it off or set platform: cuda"
            )
        if on and system.layers == "torch" and field != "system.cuda_graph":
            raise ConfigError(
                field, "set, but system.layers is torch; it needs layers: transformer_engine, or switch it off"
            )


def _check_fp8(stage: StageConfig, fp8: Fp8Config) -> None:
    system, backbone = stage.system, stage.model.backbone
    if system.precision.dtype != "bfloat16":
        raise ConfigError("system.precision.dtype", f"{system.precision.dtype}, but fp8 is set; FP8 goes with bfloat16")
    if fp8.recipe == "delayed" and fp8.first_last_layers_bf16:
        raise ConfigError(
            "system.precision.fp8.first_last_layers_bf16", "true, but the recipe is delayed; choose another recipe"
        )
    if fp8.recipe == "delayed" and system.recompute.granularity == "selective":
        refused = [module for module in system.recompute.modules if module in ("moe_act", "layernorm")]
        if refused:
            raise ConfigError("system.recompute.modules", f"{', '.join(refused)} do not go with the delayed FP8 recipe")
    tensor = system.parallel.tensor
    for field, size in (
        ("model.backbone.hidden_size", backbone.hidden_size),
        ("model.backbone.mlp_size / tensor", backbone.mlp_size // tensor),
        ("model.backbone.num_heads x head_size / tensor", backbone.num_heads * backbone.head_size // tensor),
    ):
        if size % FP8_WEIGHT_MULTIPLE:
            raise ConfigError(
                "system.precision.fp8", f"{field} is {size}, no multiple of {FP8_WEIGHT_MULTIPLE}; lower tensor"
            )
    shards = system.parallel.context * (tensor if system.parallel.sequence else 1)
    multiple = FP8_ROW_MULTIPLE[fp8.recipe] * shards
    if stage.data.sequence_length % multiple:
        length = stage.data.sequence_length
        raise ConfigError(
            "data.sequence_length",
            f"{length} over {shards} ranks is no multiple of the {FP8_ROW_MULTIPLE[fp8.recipe]} rows of FP8 recipe "
            f"{fp8.recipe}; take {_round_up(length, multiple)}",
        )


def _error(axis: str, what: str) -> ConfigError:
    return ConfigError(f"system.parallel.{axis}", what)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
