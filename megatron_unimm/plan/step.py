"""How long a step takes, and what it sends.

    step    = pipeline + gradients and weights that are exchanged and not hidden + optimizer
    pipeline: see ``pipeline_time``; a micro-batch takes a rank's chunks, forward and backward:
    chunk   = FLOPs / (peak × share)     products, experts, attention, each with its share; recompute included
            + passes × bytes that layers keep / HBM         norms, activations, residuals
            + what tensor, context, expert and pipeline groups send and computation does not hide

A group of neighbouring ranks that fits into a node talks over NVLink, any other over the network.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_unimm.config.parallel import RecomputeConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.footprint import ChunkFootprint, Flops, exchanged
from megatron_unimm.methods.registry import footprints_of
from megatron_unimm.models.memory import FLOAT, Spread
from megatron_unimm.plan.chunks import Chunks
from megatron_unimm.plan.hardware import Cluster, Shares
from megatron_unimm.plan.memory import optimizer_bytes, shard_sizes
from megatron_unimm.plan.pipeline import pipeline_time, places
from megatron_unimm.plan.workload import Workload

COMPUTE = ("products", "experts", "attention", "memory")
GROUPS = ("tensor", "context", "expert", "pipeline", "data")


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step."""

    seconds: float
    bubble: float
    """Share of the pipeline's time in which the average rank waits."""
    filled: float
    """Share of the rows that hold samples; the others are there to give each rank as many."""
    mfu: float
    """Model FLOPs of rows that hold samples, over the peak of all GPUs."""
    micro_batches: int
    data_size: int
    rows: int
    samples: int
    row_flops: float
    busy: Mapping[str, float]
    """Seconds of the slowest pipeline stage over the step, by :data:`COMPUTE`."""
    sent: Mapping[str, float]
    """Bytes that a rank of the slowest pipeline stage sends in a step, by :data:`GROUPS`."""
    waits: Mapping[str, float]
    """Seconds of them that nothing hides."""
    optimizer: float
    """Seconds of the update."""

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds


@dataclass(frozen=True)
class _StageTime:
    """A micro-batch on one rank of a pipeline stage."""

    forward: float
    backward: float
    busy: dict[str, float]
    sent: dict[str, float]
    waits: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


class StepPlanner:
    """Plans steps of one stage of one layout on a cluster."""

    def __init__(self, stage: StageConfig, workload: Workload, cluster: Cluster, shares: Shares | None = None) -> None:
        self.stage, self.workload, self.cluster = stage, workload, cluster
        self.shares = shares or Shares()
        self.parallel = stage.system.parallel
        self.spread = Spread.of(stage.system, fused=True)
        self.chunks = Chunks(stage, self.spread)
        self.plain_chunks = Chunks(stage, replace(self.spread, recompute=RecomputeConfig()))
        self.peak = cluster.peak(stage.system.precision.fp8 is not None)
        self.replica = self.parallel.tensor * self.parallel.context

    def plan(self) -> StepPlan:
        """The step."""
        parallel, workload = self.parallel, self.workload
        data_size = self.cluster.world_size // (self.replica * parallel.pipeline)
        micro_batches = workload.micro_batches(self.stage, data_size)
        chunks = [self._chunks(rank_places) for rank_places in places(self.stage)]
        times = [self._time(rank_chunks) for rank_chunks in chunks]
        seconds = [time.seconds for time in times]
        pipeline = pipeline_time(seconds, parallel.virtual_pipeline, micro_batches)
        slowest = max(range(len(times)), key=lambda rank: seconds[rank])
        data = [self._data(rank_chunks, time) for rank_chunks, time in zip(chunks, times, strict=True)]
        exchange, update = max(wait for _, wait in data), max(self._update(each) for each in chunks)
        total = pipeline + exchange + update
        rows = workload.rows(self.stage)
        samples = self.stage.train.global_batch_size or rows * workload.samples_per_row
        time = times[slowest]
        return StepPlan(
            seconds=total,
            bubble=1 - micro_batches * sum(seconds) / len(seconds) / pipeline,
            filled=rows / (micro_batches * data_size),
            mfu=workload.row_flops * rows / (total * self.cluster.world_size * self.peak),
            micro_batches=micro_batches,
            data_size=data_size,
            rows=rows,
            samples=samples,
            row_flops=workload.row_flops,
            busy={name: micro_batches * value for name, value in time.busy.items()},
            sent={name: micro_batches * value for name, value in time.sent.items()} | {"data": data[slowest][0]},
            waits={name: micro_batches * value for name, value in time.waits.items()} | {"data": exchange},
            optimizer=update,
        )

    def _chunks(self, rank_places: Any) -> list[tuple[ChunkFootprint, float]]:
        """Of a rank, with the bytes that its layers would keep without recompute."""
        row, found = self.workload.typical, []
        for place in rank_places:
            chunk = self.chunks.of(place, row)
            whole = chunk if self.spread.recompute.granularity == "none" else self.plain_chunks.of(place, row)
            found.append((chunk, whole.kept["layers"].bytes + whole.kept["encoder"].bytes))
        return found

    # -- a micro-batch

    def _time(self, chunks: list[tuple[ChunkFootprint, float]]) -> _StageTime:
        parallel, shares = self.parallel, self.shares
        forward = sum((chunk.forward for chunk, _ in chunks), Flops())
        backward = sum((chunk.backward + chunk.again for chunk, _ in chunks), Flops())
        fixed = shares.passes * sum(kept for _, kept in chunks) / (self._memory_rate())
        busy = {name: self._seconds(forward)[name] + self._seconds(backward)[name] for name in COMPUTE[:3]}
        busy["memory"] = fixed
        hidden_forward = shares.hidden_tensor if self.stage.system.overlap.tensor_parallel else 0.0
        hidden_backward = max(hidden_forward, shares.hidden_tensor_backward)
        sent, waits, returned = {}, {}, {}
        for name, span, hidden in (
            ("tensor", parallel.tensor, (hidden_forward, hidden_backward)),
            ("context", self.replica, (shares.hidden_context, shares.hidden_context)),
            ("expert", parallel.expert * parallel.expert_tensor, (0.0, 0.0)),
        ):
            there = sum(vars(chunk.forward_traffic)[name] for chunk, _ in chunks)
            back = sum(vars(chunk.backward_traffic)[name] for chunk, _ in chunks)
            rate = self.cluster.bandwidth(span, shares)
            sent[name] = there + back
            returned[name] = back * (1 - hidden[1]) / rate
            waits[name] = there * (1 - hidden[0]) / rate + returned[name]
        sent["pipeline"] = self._messages(len(chunks))
        waits["pipeline"] = sent["pipeline"] / self.cluster.bandwidth(self.cluster.world_size, shares)
        # A third of what is no product happens in the forward pass.
        on_way = sum(self._seconds(forward).values()) + fixed / 3
        on_way += sum(waits[name] - returned[name] for name in returned) + waits["pipeline"] / 2
        whole = sum(busy.values()) + sum(waits.values())
        return _StageTime(on_way, whole - on_way, busy, sent, waits)

    def _seconds(self, flops: Flops) -> dict[str, float]:
        """Of the ranks that share a row."""
        rates = {"products": self.shares.products, "experts": self.shares.experts, "attention": self.shares.attention}
        return {name: vars(flops)[name] / self.replica / (self.peak * share) for name, share in rates.items()}

    def _messages(self, num_chunks: int) -> float:
        """Bytes of hidden states to the next chunk and of their gradients back, for each chunk."""
        if self.parallel.pipeline == 1:
            return 0.0
        rows = self.spread.between(footprints_of(self.stage).travelling_rows(self.stage))
        return 2 * num_chunks * rows * self._hidden_size() * self.spread.itemsize

    def _hidden_size(self) -> int:
        if self.stage.method.trunk == "backbone":
            return self.stage.model.backbone.hidden_size
        assert self.stage.generator is not None
        return self.stage.generator.mmdit.hidden_size

    def _memory_rate(self) -> float:
        return self.cluster.gpu.memory_gb_per_s * 1e9 * self.shares.memory

    # -- a step

    def _data(self, chunks: list[tuple[ChunkFootprint, float]], time: _StageTime) -> tuple[float, float]:
        """Bytes that a rank sends to reduce gradients (fp32) and to gather weights, and the seconds that are seen."""
        dense_size, expert_size = shard_sizes(self.stage, self.cluster.world_size)
        dense = exchanged(dense_size) * sum(chunk.trained.dense for chunk, _ in chunks)
        experts = exchanged(expert_size) * sum(chunk.trained.expert for chunk, _ in chunks)
        rate = self.cluster.bandwidth(self.cluster.world_size if dense_size > 1 else 1, self.shares)
        numbers, overlap = dense + experts, self.stage.system.overlap
        reduce, gather = numbers * FLOAT / rate, numbers * self.spread.itemsize / rate
        if overlap.grad_reduce:
            reduce = max(0.0, reduce - self.shares.hidden_reduce * time.backward)
        if overlap.param_gather:
            gather = max(0.0, gather - self.shares.hidden_reduce * time.forward)
        return numbers * (FLOAT + self.spread.itemsize), reduce + gather

    def _update(self, chunks: list[tuple[ChunkFootprint, float]]) -> float:
        """The optimizer reads and writes its state, reads gradients and writes weights."""
        dense_size, expert_size = shard_sizes(self.stage, self.cluster.world_size)
        weights = sum(chunk.trained.dense / dense_size + chunk.trained.expert / expert_size for chunk, _ in chunks)
        moved = weights * (2 * optimizer_bytes(self.stage) + FLOAT + self.spread.itemsize)
        # Gradient buffers are set to zero and measured.
        moved += 2 * FLOAT * sum(chunk.trained.total for chunk, _ in chunks)
        return moved / self._memory_rate()
