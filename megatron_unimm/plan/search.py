"""Layouts of a stage on a cluster, ranked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from megatron_unimm.config.layout import check_layout, trunk_of
from megatron_unimm.config.parallel import ParallelConfig, RecomputeConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.errors import ConfigError
from megatron_unimm.plan.hardware import GIB, Cluster
from megatron_unimm.plan.memory import RankMemory, memory_of_stages, static_memory_fits
from megatron_unimm.plan.step import StepPlan, StepPlanner
from megatron_unimm.plan.workload import Workload

TENSOR = (1, 2, 4, 8)
PIPELINE = (1, 2, 4, 8, 16)
VIRTUAL = (1, 2, 4)
CONTEXT = (1, 2, 4, 8)
SHORTEST_PART = 4096
"""Tokens of a row that a context rank should have at least; with fewer, its products are too small."""
EXPERT = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Plan:
    """A stage at one layout on a cluster."""

    stage: StageConfig
    memory: Sequence[RankMemory]
    """Of each pipeline stage."""
    step: StepPlan
    capacity: float

    @property
    def largest(self) -> float:
        """Bytes of the fullest rank."""
        return max(memory.total for memory in self.memory)

    @property
    def fits(self) -> bool:
        return self.largest <= self.capacity

    @property
    def overrides(self) -> dict[str, object]:
        """Settings of this layout, as a recipe has them."""
        system = self.stage.system
        settings: dict[str, object] = {
            f"system.parallel.{axis}": value
            for axis, value in system.parallel.model_dump(exclude_defaults=True).items()
        }
        settings["system.recompute.granularity"] = system.recompute.granularity
        if system.recompute.granularity == "selective":
            settings["system.recompute.modules"] = list(system.recompute.modules)
        settings["data.sequence_length"] = self.stage.data.sequence_length
        return settings

    @property
    def summary(self) -> str:
        """The same in a few words."""
        parallel, recompute = self.stage.system.parallel, self.stage.system.recompute
        words = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}"]
        words += [f"chunks {parallel.virtual_pipeline}"] if parallel.virtual_pipeline > 1 else []
        words += [f"context {parallel.context}"] if parallel.context > 1 else []
        words += [f"expert {parallel.expert}"] if parallel.expert > 1 else []
        words.append("no recompute" if recompute.granularity == "none" else f"recompute {_recompute_words(recompute)}")
        return ", ".join([*words, f"rows of {self.stage.data.sequence_length}"])


def _recompute_words(recompute: RecomputeConfig) -> str:
    return "full" if recompute.granularity == "full" else "+".join(recompute.modules)


def plan(stage: StageConfig, cluster: Cluster, workload: Workload | None = None) -> Plan:
    """One layout.

    Raises:
        ConfigError: it cannot run on so many ranks.
    """
    check_layout(stage, cluster.world_size)
    workload = workload or Workload.of(stage)
    memory = memory_of_stages(stage, workload, cluster.world_size, fused=True)
    return Plan(stage, memory, StepPlanner(stage, workload, cluster).plan(), cluster.memory)


def search(stage: StageConfig, cluster: Cluster, row_lengths: Sequence[int] = ()) -> list[Plan]:
    """Layouts that run and fit, fastest first. Of each, only the least recompute with which it fits.

    Args:
        row_lengths: tokens of a micro-batch to try besides the recipe's, where its batch is given in samples. Samples
            that are longer than a row are left out of training.
    """
    found = []
    workloads = _Workloads()
    varies = stage.train.global_batch_rows is None
    lengths = dict.fromkeys((stage.data.sequence_length, *(row_lengths if varies else ())))
    for layout in (layout for length in lengths for layout in _layouts(stage, cluster, length)):
        for recompute in _recomputes(stage):
            candidate = _with(layout, recompute=recompute)
            try:
                check_layout(candidate, cluster.world_size)
            except ConfigError:
                break
            workload = workloads.of(candidate)
            if not workload.typical.sample_ids or not static_memory_fits(candidate, workload, cluster):
                break
            memory = memory_of_stages(candidate, workload, cluster.world_size, fused=True)
            if max(each.total for each in memory) <= cluster.memory:
                step = StepPlanner(candidate, workload, cluster).plan()
                found.append(Plan(candidate, memory, step, cluster.memory))
                break
    return sorted(found, key=lambda plan: (round(plan.step.seconds, 6), plan.largest))


class _Workloads:
    """Rows depend on little of a layout, and take longer to make than all that is worked out of them."""

    def __init__(self) -> None:
        self._made: dict[tuple, Workload] = {}

    def of(self, stage: StageConfig) -> Workload:
        parallel = stage.system.parallel
        shards = parallel.tensor if parallel.sequence and stage.method.trunk == "mmdit" else 1
        key = (stage.data.sequence_length, parallel.context, shards)
        if key not in self._made:
            self._made[key] = Workload.of(stage)
        return self._made[key]


def _layouts(stage: StageConfig, cluster: Cluster, length: int) -> Iterator[StageConfig]:
    # A diffusion transformer may have the language model beside it.
    moe = stage.model.backbone.moe if stage.method.trunk == "backbone" or stage.method.query_section else None
    num_layers = trunk_of(stage).num_layers
    axes = (TENSOR, CONTEXT, PIPELINE, VIRTUAL, EXPERT if moe is not None else (1,))
    for tensor, context, pipeline, virtual, expert in product(*axes):
        chunks = pipeline * virtual
        if tensor > cluster.gpus_per_node or chunks > num_layers or (virtual > 1 and pipeline == 1):
            continue
        if context > max(1, length // SHORTEST_PART):
            continue
        parallel = ParallelConfig(
            tensor=tensor,
            sequence=tensor > 1,
            pipeline=pipeline,
            virtual_pipeline=virtual,
            context=context,
            expert=expert,
            layers_per_stage=_uneven(num_layers, chunks),
        )
        yield _with(stage, parallel=parallel, length=length)


def _uneven(num_layers: int, chunks: int) -> list[int] | None:
    """Layers of each chunk where they do not divide: the ends, which have more to do, have fewer."""
    each, rest = divmod(num_layers, chunks)
    if not rest:
        return None
    middle = sorted(range(chunks), key=lambda number: abs(number - (chunks - 1) / 2))[:rest]
    return [each + (number in middle) for number in range(chunks)]


@lru_cache
def _choices(moe: bool, mmdit: bool) -> tuple[RecomputeConfig, ...]:
    # With fused attention, recomputing attention alone saves next to nothing.
    modules = ["mlp"] if mmdit or not moe else ["moe"]
    return (
        RecomputeConfig(granularity="none"),
        RecomputeConfig.model_validate({"granularity": "selective", "modules": modules}),
        RecomputeConfig(granularity="full"),
    )


def _recomputes(stage: StageConfig) -> tuple[RecomputeConfig, ...]:
    """From none to all."""
    return _choices(stage.model.backbone.moe is not None, stage.method.trunk == "mmdit")


def _with(
    stage: StageConfig,
    parallel: ParallelConfig | None = None,
    recompute: RecomputeConfig | None = None,
    length: int | None = None,
) -> StageConfig:
    """The stage with another layout."""
    changed = {"parallel": parallel, "recompute": recompute}
    system = stage.system.model_copy(update={name: value for name, value in changed.items() if value is not None})
    data = stage.data if length is None else stage.data.model_copy(update={"sequence_length": length})
    return stage.model_copy(update={"system": system, "data": data})


def advice(found: Sequence[Plan], cluster: Cluster) -> str:
    """What to do where a layout does not fit."""
    if not found:
        return (
            f"no layout of {cluster.world_size} GPUs fits; take more of them, or a shorter data.sequence_length, "
            "or lower data.understanding_size"
        )
    best = found[0]
    settings = " ".join(f"{key}={_text(value)}" for key, value in best.overrides.items())
    return f"the fastest that fits ({best.largest / GIB:.1f}) is {settings}"


def _text(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_overlap(stage: StageConfig) -> StageConfig:
    """The stage with its gradients and weights exchanged beside computation."""
    overlap = stage.system.overlap.model_copy(update={"grad_reduce": True, "param_gather": True})
    return stage.model_copy(update={"system": stage.system.model_copy(update={"overlap": overlap})})
