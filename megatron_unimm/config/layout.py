"""Whether a stage can be spread over a number of ranks: every rule that Megatron-Core, Transformer Engine or we have.

Checked before any process group exists, so that a wrong layout ends in one line and not in 512 tracebacks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_unimm.config.mmdit import SanaConfig
from megatron_unimm.config.model import MoEConfig
from megatron_unimm.config.parallel import Fp8Config, ParallelConfig, SystemConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.errors import ConfigError

NEED_TRANSFORMER_ENGINE = ("layernorm", "moe_act")
"""Modules whose recompute Megatron-Core 0.16 does with Transformer Engine's FP8 state, which it misses without it."""
FP8_WEIGHT_MULTIPLE = 16
"""Sides of a matrix in an FP8 product (cuBLASLt)."""
FP8_ROW_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Tokens per rank of an FP8 product, by recipe."""


@dataclass(frozen=True)
class Trunk:
    """The part of a stage that is spread over the whole layout, as far as the rules go."""

    name: str
    """Its section."""
    layers_field: str
    num_layers: int
    num_kv_heads: int
    tensor_sharded: dict[str, int]
    """Sizes that are cut into ``tensor`` pieces, by the name of their field."""
    widths: dict[str, int]
    """Sides of its matrices that FP8 products see, before tensor parallelism cuts those in ``cut``."""
    cut: frozenset[str]
    along_context: bool = True
    """Whether context-parallel ranks can share its rows."""


def trunk_of(stage: StageConfig) -> Trunk:
    """The language model's decoder, the diffusion transformer, or the tokenizer."""
    return {"backbone": _backbone_trunk, "mmdit": _mmdit_trunk, "tokenizer": _tokenizer_trunk}[stage.method.trunk](
        stage
    )


def _backbone_trunk(stage: StageConfig) -> Trunk:
    model = stage.model.backbone
    sharded = {
        "model.backbone.num_heads": model.num_heads,
        "model.backbone.mlp_size": model.mlp_size,
        "model.backbone.vocab_size": model.vocab_size,
    }
    if model.moe is not None:
        sharded["model.backbone.moe.shared_expert_size"] = model.moe.shared_expert_size
    widths = {
        "model.backbone.hidden_size": model.hidden_size,
        "model.backbone.mlp_size": model.mlp_size,
        "model.backbone.num_heads x head_size": model.num_heads * model.head_size,
    }
    return Trunk(
        "model.backbone",
        "model.backbone.num_layers",
        model.num_layers,
        model.num_kv_heads,
        sharded,
        widths,
        frozenset(list(widths)[1:]),
    )


def _mmdit_trunk(stage: StageConfig) -> Trunk:
    assert stage.generator is not None
    mmdit = stage.generator.mmdit
    blocks = "num_layers + num_single_layers" if mmdit.family == "flux" else "num_layers"
    sharded = {"num_heads": mmdit.num_heads}
    cut = {"num_heads x head_size": mmdit.hidden_size}
    if isinstance(mmdit, SanaConfig):
        sharded |= {"num_cross_heads": mmdit.num_cross_heads, "mlp_ratio x hidden_size": mmdit.mlp_size}
        cut |= {"num_cross_heads x cross_head_size": mmdit.cross_size, "mlp_ratio x hidden_size": mmdit.mlp_size}
    return Trunk(
        "generator.mmdit",
        f"generator.mmdit.{blocks}",
        mmdit.num_blocks,
        mmdit.num_heads,
        {f"generator.mmdit.{field}": size for field, size in sharded.items()},
        {f"generator.mmdit.{field}": size for field, size in {"hidden_size": mmdit.hidden_size, **cut}.items()},
        frozenset(f"generator.mmdit.{field}" for field in cut),
        along_context=mmdit.along_context,
    )


def _tokenizer_trunk(stage: StageConfig) -> Trunk:
    assert stage.tokenizer is not None
    heads = stage.tokenizer.semantic.num_heads
    return Trunk("tokenizer", "tokenizer", 1, heads, stage.tokenizer.tensor_sharded(), {}, frozenset())


def check_layout(stage: StageConfig, world_size: int) -> int:
    """The data parallel size of a stage on ``world_size`` ranks.

    Raises:
        ConfigError: for the first rule that is broken, with the field, both numbers, and what to change.
    """
    parallel, trunk = stage.system.parallel, trunk_of(stage)
    # A diffusion transformer may have the language model beside it, on the same ranks.
    beside = stage.method.trunk == "mmdit" and bool(stage.method.query_section)
    moe = stage.model.backbone.moe if stage.method.trunk == "backbone" or beside else None
    if stage.method.trunk == "tokenizer":
        _check_tokenizer(stage.system)
    _check_switches(parallel, trunk, moe)
    _check_world(parallel, world_size)
    for each in [trunk, _backbone_trunk(stage)] if beside else [trunk]:
        _check_tensor(stage, each)
    _check_experts(parallel, moe)
    _check_pipeline(parallel, trunk)
    _check_sequence_length(stage)
    _check_rows(stage, world_size)
    _check_system(stage.system)
    _check_recompute(stage)
    if stage.system.precision.fp8 is not None:
        _check_fp8(stage, stage.system.precision.fp8, trunk)
    return world_size // (parallel.tensor * parallel.pipeline * parallel.context)


def _check_tokenizer(system: SystemConfig) -> None:
    """A picture is worked on where it is, from pixels to pixels."""
    for axis in ("pipeline", "context"):
        size = vars(system.parallel)[axis]
        if size > 1:
            raise _error(axis, f"{size}, but a tokenizer is spread by tensor and data parallel alone; set it to 1")
    if system.precision.fp8 is not None:
        raise ConfigError("system.precision.fp8", "set, but a tokenizer's rows fit no FP8 product; remove it")


def _check_switches(parallel: ParallelConfig, trunk: Trunk, moe: MoEConfig | None) -> None:
    """Options that need one another."""
    if parallel.sequence and parallel.tensor == 1:
        raise _error(
            "sequence", "true, but tensor is 1; sequence parallel needs tensor > 1, set it to false or raise tensor"
        )
    if parallel.context > 1 and not trunk.along_context:
        raise _error(
            "context",
            f"{parallel.context}, but the convolutions of {trunk.name} (family sana) see a picture whole; set it to 1",
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        chunks = parallel.virtual_pipeline
        raise _error("virtual_pipeline", f"{chunks}, but pipeline is 1; model chunks interleave only with pipeline > 1")
    if moe is None:
        for axis, size in (("expert", parallel.expert), ("expert_tensor", parallel.expert_tensor)):
            if size > 1:
                lacking = "model.backbone.moe is null" if trunk.name == "model.backbone" else f"{trunk.name} is dense"
                raise _error(axis, f"{size}, but {lacking}; a dense model has no experts, set it to 1")
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


def _check_tensor(stage: StageConfig, trunk: Trunk) -> None:
    tensor = stage.system.parallel.tensor
    for field, size in _tensor_sharded(stage, trunk):
        if size % tensor:
            raise _error("tensor", f"{tensor} does not divide {field} {size}; choose a divisor of {size}")
    kv_heads = trunk.num_kv_heads
    if kv_heads % tensor and tensor % kv_heads:
        raise _error(
            "tensor",
            f"{tensor} is neither a divisor nor a multiple of {trunk.name}.num_kv_heads {kv_heads}; "
            "choose one, so that every rank has whole key-value heads",
        )


def _tensor_sharded(stage: StageConfig, trunk: Trunk) -> Iterator[tuple[str, int]]:
    """Sizes that are cut into ``tensor`` pieces, by the name of their field."""
    vision = stage.model.vision_encoder
    yield from trunk.tensor_sharded.items()
    yield "model.vision_encoder.num_heads", vision.num_heads
    yield "model.vision_encoder.mlp_size", vision.mlp_size
    hidden = stage.model.backbone.hidden_size
    yield from stage.method.tensor_sharded(hidden).items()
    if stage.queries is not None:
        yield from stage.queries.tensor_sharded(hidden).items()
    if stage.hieraquery is not None:
        yield from stage.hieraquery.tensor_sharded.items()


def _check_experts(parallel: ParallelConfig, moe: MoEConfig | None) -> None:
    if moe is None:
        return
    if moe.num_experts % parallel.expert:
        raise _error("expert", f"{parallel.expert} does not divide model.backbone.moe.num_experts {moe.num_experts}")
    if moe.expert_mlp_size % parallel.expert_tensor:
        size = moe.expert_mlp_size
        raise _error(
            "expert_tensor", f"{parallel.expert_tensor} does not divide model.backbone.moe.expert_mlp_size {size}"
        )


def _check_pipeline(parallel: ParallelConfig, trunk: Trunk) -> None:
    chunks = parallel.pipeline * parallel.virtual_pipeline
    product = f"pipeline {parallel.pipeline} x virtual_pipeline {parallel.virtual_pipeline} = {chunks}"
    layers = parallel.layers_per_stage
    if layers is None:
        if trunk.num_layers % chunks:
            raise _error(
                "pipeline",
                f"{product} does not divide {trunk.layers_field} {trunk.num_layers}; "
                f"change one, or give system.parallel.layers_per_stage as {chunks} numbers",
            )
        return
    if len(layers) != chunks:
        raise _error("layers_per_stage", f"has {len(layers)} numbers, but {product}; give {chunks}")
    if min(layers) < 0 or sum(layers) != trunk.num_layers:
        raise _error(
            "layers_per_stage",
            f"{layers} sums to {sum(layers)}, but {trunk.layers_field} is {trunk.num_layers}; "
            "the numbers are layers per stage, none negative, and sum to all",
        )


def _check_sequence_length(stage: StageConfig) -> None:
    parallel, length = stage.system.parallel, stage.data.sequence_length
    factors = [f"tensor {parallel.tensor}"] if parallel.sequence else []
    multiple = parallel.tensor if parallel.sequence else 1
    if parallel.context > 1 and stage.method.trunk == "mmdit":
        multiple *= parallel.context
        factors.append(f"context {parallel.context}")
    elif parallel.context > 1:
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


def chunk_of_layer(stage: StageConfig, layer: int) -> tuple[int, int]:
    """Pipeline rank, and chunk on it, that have a layer of the trunk (1 first)."""
    parallel = stage.system.parallel
    chunks = parallel.pipeline * parallel.virtual_pipeline
    counts = parallel.layers_per_stage or [trunk_of(stage).num_layers // chunks] * chunks
    number = next(number for number in range(chunks) if sum(counts[: number + 1]) >= layer)
    return number % parallel.pipeline, number // parallel.pipeline


def stream_multiple(stage: StageConfig) -> int:
    """What each stream of a diffusion transformer's row must be a multiple of: ranks that cut it, times the rows of an
    FP8 product."""
    parallel, fp8 = stage.system.parallel, stage.system.precision.fp8
    shards = parallel.context * (parallel.tensor if parallel.sequence else 1)
    return shards * (FP8_ROW_MULTIPLE[fp8.recipe] if fp8 is not None else 1)


def _check_recompute(stage: StageConfig) -> None:
    recompute = stage.system.recompute
    if stage.method.trunk == "mmdit" and recompute.granularity == "selective":
        refused = [module for module in recompute.modules if module not in ("core_attn", "mlp")]
        if refused:
            what = f"{', '.join(refused)} are no parts of a diffusion transformer's layer; it has core_attn and mlp"
            raise ConfigError("system.recompute.modules", what)
    on_torch = stage.system.layers == "torch" or stage.system.platform == "cpu"
    refused = [module for module in recompute.modules if module in NEED_TRANSFORMER_ENGINE]
    if on_torch and recompute.granularity == "selective" and refused:
        what = f"{', '.join(refused)} can only be recomputed in Transformer Engine layers on a GPU; leave them out"
        raise ConfigError("system.recompute.modules", what)


def _check_fp8(stage: StageConfig, fp8: Fp8Config, trunk: Trunk) -> None:
    system = stage.system
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
    for field, width in trunk.widths.items():
        size, field = (width // tensor, f"{field} / tensor") if field in trunk.cut else (width, field)
        if size % FP8_WEIGHT_MULTIPLE:
            raise ConfigError(
                "system.precision.fp8", f"{field} is {size}, no multiple of {FP8_WEIGHT_MULTIPLE}; lower tensor"
            )
    shards = system.parallel.context * (tensor if system.parallel.sequence else 1)
    # A diffusion transformer's streams are each rounded up to it by themselves (stream_multiple).
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
