"""What the ranks of a pipeline stage hold at their fullest."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.errors import ConfigError
from megatron_unimm.methods.footprint import ChunkFootprint
from megatron_unimm.models.memory import FLOAT, Kept, Spread
from megatron_unimm.plan.chunks import Chunks
from megatron_unimm.plan.hardware import FRAGMENTATION, GIB, RUNTIME_GIB, Cluster
from megatron_unimm.plan.pipeline import in_flight, places
from megatron_unimm.plan.workload import Workload

PARTS = (
    "weights",
    "frozen",
    "gradients",
    "optimizer",
    "layers",
    "encoder",
    "loss",
    "messages",
    "working",
    "inputs",
    "runtime",
)
"""What a rank's memory is made of, in the order of :class:`RankMemory`."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each rank of a pipeline stage."""

    weights: float
    """Of the model, in the computing dtype."""
    frozen: float
    """Of frozen companions: teacher, target tower, VAE."""
    gradients: float
    """fp32, of all weights that train."""
    optimizer: float
    """Master weights and both moments in fp32, and the running average, of this rank's share of the weights."""
    layers: float
    """Activations of the trunk, of all micro-batches in flight."""
    encoder: float
    loss: float
    """Logits, softmax, and what heads keep."""
    messages: float
    """Between pipeline stages."""
    working: float
    """What one layer or loss needs besides while it is worked on, and the largest gradient before it is added up."""
    inputs: float
    """Of all micro-batches of a step."""
    runtime: float
    """Outside torch's tensors: context, libraries, NCCL, fragmentation."""
    of: str
    """The kind of sample that fills the rows that this is of."""

    @property
    def total(self) -> float:
        return sum(vars(self)[part] for part in PARTS)


def optimizer_bytes(stage: StageConfig) -> int:
    """Per weight that trains, before it is spread over the data-parallel ranks: two moments, in bf16 a master weight
    besides, and the running average where there is one."""
    master = stage.system.precision.dtype == "bfloat16"
    return FLOAT * (2 + master + (stage.train.ema_decay is not None))


def shard_sizes(stage: StageConfig, world_size: int) -> tuple[int, int]:
    """Ranks that the optimizer's state of dense weights, and of experts, is spread over."""
    parallel = stage.system.parallel
    return (
        world_size // (parallel.tensor * parallel.pipeline),
        world_size // (parallel.expert_tensor * parallel.expert * parallel.pipeline),
    )


def memory_of_stages(stage: StageConfig, workload: Workload, world_size: int, fused: bool) -> list[RankMemory]:
    """Of each pipeline stage, for the kind of row that needs most."""
    parallel = stage.system.parallel
    data_size = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    micro_batches = workload.micro_batches(stage, data_size)
    chunks, found = Chunks(stage, Spread.of(stage.system, fused)), []
    for rank, rank_places in enumerate(places(stage)):
        held = in_flight(rank, parallel.pipeline, parallel.virtual_pipeline, micro_batches)
        candidates = [
            _memory(chunks, [chunks.of(place, row) for place in rank_places], held, micro_batches, world_size, kind)
            for kind, row in workload.heavy.items()
        ]
        found.append(max(candidates, key=lambda memory: memory.total))
    return found


def _memory(
    chunks: Chunks, found: Sequence[ChunkFootprint], held: Sequence[int], micro_batches: int, world_size: int, kind: str
) -> RankMemory:
    """Args:
    held: micro-batches in flight on each chunk.
    kind: of the rows that ``found`` is of.
    """

    def kept(*parts: str) -> float:
        return sum(each.kept[part].bytes * count for each, count in zip(found, held, strict=True) for part in parts)

    working = max(_working(each, chunks.spread.itemsize) for each in found)
    activations = {
        "layers": kept("layers"),
        "encoder": kept("encoder"),
        "loss": kept("loss"),
        "messages": kept("received", "sent"),
        "working": working,
    }
    return RankMemory(
        **static_memory(chunks.stage, found, world_size),
        **activations,
        inputs=sum(each.inputs for each in found) * micro_batches,
        runtime=RUNTIME_GIB * GIB + FRAGMENTATION * sum(activations.values()),
        of=kind,
    )


def static_memory(stage: StageConfig, chunks: Sequence[ChunkFootprint], world_size: int) -> dict[str, float]:
    """Weights, gradients and optimizer of a rank with these chunks."""
    itemsize = Spread.of(stage.system, True).itemsize
    trained = [chunk.trained for chunk in chunks]
    companions = sum(chunk.companions.total for chunk in chunks)
    total = sum(chunk.trained.total + chunk.frozen.total for chunk in chunks)
    dense_size, expert_size = shard_sizes(stage, world_size)
    shard = sum(w.dense for w in trained) / dense_size + sum(w.expert for w in trained) / expert_size
    return {
        "weights": (total - companions) * itemsize,
        "frozen": companions * itemsize,
        "gradients": sum(w.total for w in trained) * FLOAT,
        "optimizer": shard * optimizer_bytes(stage),
    }


def static_memory_fits(stage: StageConfig, workload: Workload, cluster: Cluster) -> bool:
    """Whether there is room for the weights, the gradients and the optimizer alone."""
    chunks = Chunks(stage, Spread.of(stage.system, True))
    return all(
        sum(static_memory(stage, [chunks.of(place, workload.typical) for place in rank], cluster.world_size).values())
        <= cluster.memory
        for rank in places(stage)
    )


def _working(chunk: ChunkFootprint, itemsize: int) -> float:
    whole: Kept = chunk.all_kept
    return whole.again + chunk.largest_weight * itemsize


def check_fits(stage: StageConfig, memory: Sequence[RankMemory], capacity: float, advice: str) -> None:
    """Raises ConfigError where a pipeline stage needs more than a GPU has, with both numbers.

    Args:
        capacity: bytes.
        advice: what to do instead.
    """
    worst = max(range(len(memory)), key=lambda rank: memory[rank].total)
    total = memory[worst].total
    if total <= capacity:
        return
    largest = max(PARTS, key=lambda part: vars(memory[worst])[part])
    raise ConfigError(
        "system.parallel",
        f"pipeline stage {worst} of stage {stage.name} needs {total / GIB:.1f} GiB per rank (most of it {largest}, "
        f"{vars(memory[worst])[largest] / GIB:.1f}), but a GPU has {capacity / GIB:.1f}; {advice}",
    )
