"""``unimm train --dry-run``: everything of a job that can be had without its data, its GPUs and its other ranks.

One process plays one rank (or one of each pipeline stage): the layout's rules, what files are there, the mix, that
rank's process groups and its model without memory, and one micro-batch forward and backward on it, a full row that
``data/typical.py`` makes up. What is wrong with a shape, a layout or a table of what trains shows here.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from rich.console import Console
from rich.table import Table

from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.parallel import RecomputeConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.interface import Method
from megatron_unimm.methods.registry import build_method, footprints_of
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.models.trainable import apply_rules, check_used
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.parallel.platform_meta import META, pretend_rank
from megatron_unimm.plan.hardware import GIB
from megatron_unimm.plan.memory import PARTS, RankMemory, memory_of_stages
from megatron_unimm.plan.pipeline import places
from megatron_unimm.plan.workload import Workload
from megatron_unimm.train.setup import describe_trainable

STATIC = ("weights", "frozen", "gradients", "optimizer")
"""Parts of a rank's memory before the first step."""


@dataclass(frozen=True)
class ChunkStep:
    """One model chunk, and a micro-batch on it."""

    rank: int
    pipeline_stage: int
    virtual_stage: int
    num_layers: int
    parameters: int
    trained: int
    received: tuple[int, ...] | None
    """Shape of what comes from the stage before; None on the first."""
    sent: tuple[int, ...]
    """Of what goes to the next, or on the last of the sums of the loss terms."""
    num_trained_tensors: int
    num_gradients: int
    """Tensors that got one."""


def smallest_world(stage: StageConfig) -> int:
    """Ranks of one replica of the model."""
    parallel = stage.system.parallel
    dense = parallel.tensor * parallel.context * parallel.pipeline
    experts = parallel.expert * parallel.expert_tensor * parallel.pipeline
    return dense if experts <= 1 or dense % experts == 0 else dense * experts // parallel.pipeline


def dry_run_stage(
    stage: StageConfig, world_size: int | None = None, rank: int = 0, all_stages: bool = False
) -> list[ChunkStep]:
    """Check a stage as one rank would have it, and print what it holds and exchanges.

    Args:
        world_size: ranks of the job; ``WORLD_SIZE``, or one replica, if left out.
        all_stages: one rank of each pipeline stage, in place of ``rank``.

    Raises:
        ConfigError: the layout cannot run, or the table of what trains does not fit the model.
    """
    world = world_size or int(os.environ.get("WORLD_SIZE", smallest_world(stage)))
    data_size = check_layout(stage, world)
    per_stage = world // stage.system.parallel.pipeline
    ranks = range(0, world, per_stage) if all_stages else [rank]
    console = Console() if Console().is_terminal else Console(width=160)
    workload = Workload.of(stage)
    _print_head(stage, workload, world, data_size, console)
    row = footprints_of(stage).typical_row(stage)
    steps, used = [], set()
    for number in ranks:
        found, patterns, description = run_rank(stage, number, world, row)
        steps += found
        used |= patterns
        if not all_stages:
            console.print(f"what trains on rank {number}:\n{description}", highlight=False, soft_wrap=True)
    if all_stages or stage.system.parallel.pipeline == 1:
        check_used(used, stage.train.trainable)
    fused = stage.system.layers != "torch" and stage.system.platform != "cpu"
    memory = memory_of_stages(stage, workload, world, fused=fused)
    console.print(_table(steps, memory))
    return steps


def run_rank(stage: StageConfig, rank: int, world_size: int, row: Any) -> tuple[list[ChunkStep], set[str], str]:
    """Build a rank's chunks and run one row through each.

    Returns:
        The chunks; patterns of the table of what trains that matched something; that table's outcome in words.
    """
    # What is computed twice has the same shapes both times.
    once = stage.system.model_copy(update={"recompute": RecomputeConfig()})
    stage = stage.model_copy(update={"system": once})
    steps, used, descriptions = [], set(), []
    with pretend_rank(stage.system.parallel, rank, world_size, stage.train.seed) as groups:
        method = build_method(stage, META, groups)
        for number in range(stage.system.parallel.virtual_pipeline):
            chunk, patterns = build_chunk(stage, method, number)
            used |= patterns
            descriptions.append(describe_trainable([chunk]))
            steps.append(_run_chunk(stage, method, chunk, rank, groups.pipeline_rank, number, row))
    return steps, used, "\n".join(descriptions)


def build_chunk(stage: StageConfig, method: Method, number: int) -> tuple[StageModel, set[str]]:
    """Chunk ``number`` of a rank on the meta device, frozen as the stage says, and the patterns that matched.

    Every expert gets as many tokens as on average: how many it would get is a number that nobody has here.
    """
    with torch.device(META.device):
        chunk = method.build(number).to(DTYPES[stage.system.precision.dtype])
    used = apply_rules([chunk], stage.train.trainable)
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            module.config.moe_expert_capacity_factor = 1.0
            module.config.moe_pad_expert_input_to_capacity = True
            assert isinstance(module.token_dispatcher, MoEAlltoAllTokenDispatcher)
            module.token_dispatcher.drop_and_pad = True
            module.token_dispatcher.moe_expert_capacity_factor = 1.0
    return chunk, used


def receive(stage: StageConfig, method: Method, chunk: StageModel) -> tuple[int, ...]:
    """Hand a chunk what the stage before would send, where there is one. Returns the shape of all such messages."""
    parallel = stage.system.parallel
    rows = method.travelling_rows() // parallel.context // (parallel.tensor if parallel.sequence else 1)
    message = (rows, 1, chunk.config.hidden_size)
    if not chunk.pre_process:
        dtype = DTYPES[stage.system.precision.dtype]
        chunk.set_input_tensor(torch.empty(message, dtype=dtype, device=META.device, requires_grad=True))
    return message


def _run_chunk(
    stage: StageConfig, method: Method, chunk: StageModel, rank: int, pipeline_stage: int, number: int, row: Any
) -> ChunkStep:
    """Forward and backward of a micro-batch, as the schedule would call for them."""
    message = receive(stage, method, chunk)
    output = chunk(method.batch(row, chunk, META.device))
    expected = (len(method.terms),) if chunk.post_process else message
    assert tuple(output.shape) == expected, f"rank {rank} sends {tuple(output.shape)}, wanted {expected}"
    if output.requires_grad:
        output.backward(torch.empty_like(output))
    trained = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
    return ChunkStep(
        rank=rank,
        pipeline_stage=pipeline_stage,
        virtual_stage=number,
        num_layers=_num_layers(stage, pipeline_stage, number),
        parameters=sum(parameter.numel() for parameter in chunk.parameters()),
        trained=sum(parameter.numel() for parameter in trained),
        received=None if chunk.pre_process else message,
        sent=tuple(output.shape),
        num_trained_tensors=len(trained),
        num_gradients=len([parameter for parameter in trained if parameter.grad is not None]),
    )


def _num_layers(stage: StageConfig, pipeline_stage: int, number: int) -> int:
    return len(places(stage)[pipeline_stage][number].layers)


# -- what is printed


def _print_head(stage: StageConfig, workload: Workload, world: int, data_size: int, console: Console) -> None:
    parallel = stage.system.parallel
    sizes = [f"{axis} {size}" for axis, size in parallel.model_dump().items() if isinstance(size, int) and size > 1]
    lines = [
        f"stage {stage.name}: {world} ranks, " + ", ".join([*sizes, f"data {data_size}"]),
        f"a step: {workload.rows(stage)} rows of {stage.data.sequence_length} tokens, "
        f"{workload.micro_batches(stage, data_size)} micro-batches per rank",
        "mix: " + ", ".join(_mix_words(stage)),
        *_paths(stage),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _mix_words(stage: StageConfig) -> Sequence[str]:
    active = {name: source.weight for name, source in stage.data.sources.items() if source.weight > 0}
    return [f"{name} {weight / sum(active.values()):.1%}" for name, weight in active.items()]


def _paths(stage: StageConfig) -> list[str]:
    """Files and folders that the stage names, and whether they are there. None of them is needed here."""
    named = {f"data.sources.{name}.path": source.path for name, source in stage.data.sources.items()}
    keys = ("tokenizer", "feature_cache", "latent_cache", "condition_cache")
    named |= {f"data.{key}": vars(stage.data)[key] for key in keys}
    named |= {key: vars(stage)[key] for key in ("base_checkpoint", "generator_checkpoint", "tokenizer_checkpoint")}
    named |= {
        "train.evaluation.data": stage.train.evaluation.data,
        "train.logging.decoder": stage.train.logging.decoder,
    }
    return [f"{key}: {path} ({'is there' if _exists(path) else 'missing'})" for key, path in named.items() if path]


def _exists(path: str) -> bool:
    """Patterns name several files; those with braces are looked for up to the first."""
    plain = path.split("{")[0]
    if "*" in path or plain != path:
        folder = Path(plain.split("*")[0]).parent
        return folder.is_dir() and any(folder.glob(Path(plain).name.split("*")[0] + "*"))
    return Path(path).exists()


def _table(steps: Sequence[ChunkStep], memory: Sequence[RankMemory]) -> Table:
    """A line for each chunk; a rank's memory stands with its first."""
    table = Table(title="GiB per rank; activations as planned, see unimm plan", title_justify="left", box=None)
    for title in ("rank", "stage", "layers", "parameters", "trained", *STATIC, "activations", "total", "in", "out"):
        table.add_column(title, justify="right")
    table.add_column("gradients of")
    for step in steps:
        rank_memory = memory[step.pipeline_stage]
        numbers = [f"{vars(rank_memory)[part] / GIB:.2f}" for part in STATIC]
        rest = sum(vars(rank_memory)[part] for part in PARTS if part not in STATIC)
        numbers += [f"{rest / GIB:.2f}", f"{rank_memory.total / GIB:.2f}"]
        if step.virtual_stage:
            numbers = [""] * len(numbers)
        virtual = f".{step.virtual_stage}" if any(other.virtual_stage for other in steps) else ""
        table.add_row(
            str(step.rank),
            f"{step.pipeline_stage}{virtual}",
            str(step.num_layers),
            f"{step.parameters:,}",
            f"{step.trained:,}",
            *numbers,
            "" if step.received is None else "x".join(map(str, step.received)),
            "x".join(map(str, step.sent)),
            f"{step.num_gradients} of {step.num_trained_tensors} tensors",
        )
    return table
