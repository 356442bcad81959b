"""Builds what a stage needs on this rank, in the order in which the parts depend on one another."""

import logging
import os
from pathlib import Path

import torch.distributed as dist

from megatron_unimm.checkpoint.folder import HF_FOLDER
from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.lora import LoraConfig
from megatron_unimm.config.methods import MMCoreDrawing
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.chat import ChatFormat, ChatTokenizer
from megatron_unimm.data.loader import DataShard, StepLoader
from megatron_unimm.data.mix import Mix
from megatron_unimm.data.plan import BatchSize
from megatron_unimm.data.sizes import check_size
from megatron_unimm.data.sources.opening import open_sources
from megatron_unimm.errors import ConfigError
from megatron_unimm.methods.interface import DataSetup, LooksAtPictures, Method
from megatron_unimm.methods.registry import build_method
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.models.lora import check_lora_used
from megatron_unimm.models.trainable import apply_rules, check_used
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.parallel.groups import ParallelGroups, initialize_groups
from megatron_unimm.parallel.platform import Platform, select_platform
from megatron_unimm.train.caches import open_caches
from megatron_unimm.train.state import Start, base_directory, check_architecture, check_base, load_base, load_weights

logger = logging.getLogger(__name__)


def world_size() -> int:
    """Ranks that torchrun or srun started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def enter(stage: StageConfig) -> tuple[Platform, ParallelGroups]:
    """Check the layout, choose the device, join the other ranks."""
    check_layout(stage, world_size())
    platform = select_platform(stage.system.platform, stage.system.cpu_threads)
    groups = initialize_groups(stage.system.parallel, platform, stage.train.seed, stage.system.timeout_minutes)
    return platform, groups


def build_model(stage: StageConfig, platform: Platform, groups: ParallelGroups) -> tuple[Method, list[StageModel]]:
    """The method and this rank's model chunks, frozen where the stage's table says so.

    Raises:
        ConfigError: a parameter without a rule, or a rule without a parameter.
    """
    method = build_method(stage, platform, groups)
    dtype = DTYPES[stage.system.precision.dtype]
    chunks = [
        method.build(number).to(platform.device, dtype) for number in range(stage.system.parallel.virtual_pipeline)
    ]
    used: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(used, apply_rules(chunks, stage.train.trainable), group=groups.host)
    check_used(set().union(*used), stage.train.trainable)
    _check_adapters(chunks, stage, groups)
    return method, chunks


def _check_adapters(chunks: list[StageModel], stage: StageConfig, groups: ParallelGroups) -> None:
    """Every pattern of low-rank adapters must match something on some rank."""
    sections: dict[str, LoraConfig | None] = {}
    if stage.queries is not None:
        sections["queries.lora"] = stage.queries.lora
    if isinstance(stage.method, MMCoreDrawing):
        sections["method.lora"] = stage.method.lora
    for field, lora in sections.items():
        if lora is not None:
            used: list[set[str]] = [set() for _ in range(dist.get_world_size())]
            mine = set().union(*(chunk.lora_used.get(field, set()) for chunk in chunks))
            dist.all_gather_object(used, mine, group=groups.host)
            check_lora_used(set().union(*used), lora, field)


def fill(chunks: list[StageModel], stage: StageConfig, method: Method, start: Start, groups: ParallelGroups) -> None:
    """Weights of the model (unless a resume brings them) and of its frozen companions."""
    parts = method.base_parts()
    check_base(stage, parts)
    load_base(chunks, parts, groups)
    if not start.resume:
        check_architecture(start.directory, stage)
        # A tokenizer begins with the vision encoder of a base model alone.
        unread = ("backbone.*",) if stage.method.trunk == "tokenizer" else ()
        load_weights(chunks, start.directory, groups, method.model_parts(), unread)


def chat_format(stage: StageConfig) -> ChatFormat:
    """Tokenizer and sizes: the recipe's tokenizer, or the one that was imported with the base model."""
    folder = stage.data.tokenizer or str(base_directory(stage) / HF_FOLDER)
    if not stage.data.tokenizer:
        read_meta(base_directory(stage))  # an unfinished import is a clearer error than a missing folder
    for name in ("generation_size", "understanding_size"):
        check_size(vars(stage.data)[name], stage.model.vision_encoder.token_pixels, f"data.{name}")
    return ChatFormat(ChatTokenizer(folder, stage.model), stage.model.vision_encoder, stage.data)


def open_data(
    stage: StageConfig, method: Method, start: Start, platform: Platform, groups: ParallelGroups
) -> tuple[StepLoader, int]:
    """The loader of this rank and the number of optimizer steps of the stage.

    Raises:
        ConfigError: the stage has no source, or the mix is shorter than one step.
    """
    active = {name: source for name, source in stage.data.sources.items() if source is not None and source.weight > 0}
    if not active:
        raise ConfigError("data.sources", f"stage {stage.name} has no source with a weight above 0; give it one")
    sources = open_sources(active, stage.data.index_cache)
    weights = {name: source.weight for name, source in active.items()}
    mix = Mix(sources, weights, stage.train.seed, {name: source.max_epochs for name, source in active.items()})
    size = BatchSize(stage.train.global_batch_size, stage.train.global_batch_rows)
    steps = stage.train.steps
    if steps is None:
        assert stage.train.epochs is not None
        assert size.samples is not None
        steps = mix.num_steps(stage.train.epochs, size.samples)
    if steps < 1:
        raise ConfigError(
            "train.epochs",
            f"{stage.train.epochs} epochs of {mix.epoch_size} samples make no step of {size.samples}; use train.steps",
        )
    if mix.num_draws is not None and size.samples is not None and steps * size.samples > mix.num_draws:
        raise ConfigError(
            "data.sources",
            f"all have max_epochs, which makes {mix.num_draws} samples, but {steps} steps of {size.samples} want "
            f"{steps * size.samples}; raise max_epochs or take fewer steps",
        )
    parallel = stage.system.parallel
    looks = isinstance(method, LooksAtPictures) and method.looks_here()
    shard = DataShard(
        dp_rank=groups.data_rank,
        dp_size=groups.data_size,
        rows_multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        alignment=2 * parallel.context if parallel.context > 1 and stage.method.trunk == "backbone" else 1,
        need_pixels=groups.is_first_stage() or groups.is_last_stage() or looks,
        device=platform.device.index if platform.is_gpu else None,
    )
    loader = StepLoader(
        work=method.work(DataSetup(sources, lambda: chat_format(stage), *open_caches(stage, start.directory, groups))),
        mix=mix,
        size=size,
        shard=shard,
        cost=method.sample_flops,
    )
    return loader, steps


def describe_trainable(chunks: list[StageModel]) -> str:
    """One line per module of this rank: trained and frozen parameters."""
    lines = []
    for chunk in chunks:
        for name, module in chunk.named_children():
            total = sum(parameter.numel() for parameter in module.parameters())
            trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
            lines.append(f"  {name:<16} {total:>14,} parameters on this rank, {trained:>14,} train")
    return "\n".join(lines)


def stage_folder(run_dir: Path, stage: StageConfig) -> Path:
    """Folder of a stage's logs and checkpoints."""
    return run_dir / stage.name
