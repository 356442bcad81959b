"""One optimizer step: micro-batches through Megatron-Core's schedule, exact normalisation, norm, skip, update. No
host synchronisation.

How a loss is normalised. Term k has sum S_k,m over micro-batch m (of any rank) and count N_k over the whole global
batch. The step minimises Σ_k w_k (Σ_m S_k,m) / N_k. Each micro-batch contributes Σ_k w_k S_k,m / N_k, gradients are
summed over micro-batches by autograd and over data- and context-parallel ranks by the wrapper (sum, not mean).
Nothing else divides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.interface import Method
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train.adam import FusedAdamW
from megatron_unimm.train.average import WeightAverage
from megatron_unimm.train.optimizer import GradientMeter, set_learning_rate
from megatron_unimm.train.spike import SpikeGuard
from megatron_unimm.train.timers import StepClock, TimedNeighbours


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device."""

    losses: Tensor
    """float32 ``[terms]``: mean of each term over its global count, on every rank."""
    gradient_norm: Tensor
    """float32 scalar, before clipping."""
    module_norms: Tensor
    """float32 ``[modules]``."""
    skip: Tensor
    """1.0 where the update was left out."""


class TrainStep:
    """Runs optimizer steps for a method's model chunks."""

    def __init__(
        self,
        stage: StageConfig,
        method: Method,
        chunks: list[DistributedDataParallel],
        optimizer: ChainedOptimizer,
        platform: Platform,
        groups: ParallelGroups,
    ) -> None:
        self.stage = stage
        self.method = method
        self.chunks = chunks
        self.optimizer = optimizer
        self.platform = platform
        self.groups = groups
        self.clock = StepClock.of(platform.device)
        self.meter = GradientMeter(optimizer, chunks, groups, platform.device)
        self.guard = SpikeGuard(stage.train.spike, platform.device)
        self.worst = torch.zeros(len(self.meter.tensor_names), device=platform.device)
        """Norm per tensor of the last skipped step, to name the worst."""
        decay = stage.train.ema_decay
        self.average = WeightAverage(optimizer, decay, platform.device) if decay is not None else None
        self._weights = torch.tensor(method.weights, device=platform.device)
        self._schedule = get_forward_backward_func(stage.system.parallel.pipeline, _virtual(stage))
        config = chunks[0].module.config
        pipelined = groups.config.pipeline > 1
        self._neighbours = TimedNeighbours(groups.collection.pp, config, self.clock) if pipelined else None
        for chunk in chunks:
            chunk.module.config.finalize_model_grads_func = partial(_finalize, groups=groups, clock=self.clock)
            if stage.system.overlap.grad_reduce:
                config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync

    def forward_backward(self, rows: Sequence[Any], forward_only: bool = False) -> Tensor:
        """Forward, backward and gradient reduction of this rank's rows of the global batch.

        Returns:
            float32 ``[terms]``: mean of each term over its global count, on every rank.
        """
        device = self.platform.device
        self.clock.begin("reduce")
        counts = torch.tensor(self.method.counts(rows), dtype=torch.float32, device=device)
        dist.all_reduce(counts, group=self.groups.collection.dp)
        scale = self._weights / counts.clamp(min=1)  # [terms]
        self.clock.begin("forward_backward")
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        outputs = self._schedule(
            forward_step_func=partial(_forward_step, scale=scale),
            data_iterator=self._iterators(rows),
            model=self.chunks,
            num_microbatches=len(rows),
            seq_length=self.method.travelling_rows(),
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=self._neighbours,
            pg_collection=self.groups.collection,
        )
        sums = torch.stack([output["sums"] for output in outputs]).sum(dim=0) if outputs else torch.zeros_like(scale)
        self.clock.begin("reduce")
        # Context ranks hold parts of each row, data ranks whole rows; tensor ranks hold copies.
        dist.all_reduce(sums, group=self.groups.collection.dp_cp)
        dist.all_reduce(sums, group=self.groups.collection.pp)  # zeros but on the last stage
        return sums / counts.clamp(min=1)

    def run(self, rows: Sequence[Any], learning_rate: float) -> StepResult:
        """One optimizer step."""
        losses = self.forward_backward(rows)
        self.clock.begin("optimizer")
        self.optimizer.prepare_grads()
        norms = self.meter.measure()
        skip = self.guard.judge(norms.total)
        self.worst = torch.where(skip.bool(), norms.per_tensor, self.worst)
        set_learning_rate(self.optimizer, learning_rate, self.stage.train.optimizer.weight_decay)
        self._update((norms.total / self.stage.train.optimizer.clip_norm).clamp(min=1.0), skip)
        if self.average is not None:
            self.average.update(skip)
        return StepResult(losses, norms.total, norms.per_module, skip)

    def _update(self, divisor: Tensor, skip: Tensor) -> None:
        """Divide gradients by ``divisor`` (clipping) and apply them, unless ``skip`` is 1. Both are device tensors."""
        parts = [part.optimizer for part in self.optimizer.chained_optimizers if not part.is_stub_optimizer]
        if all(isinstance(part, FusedAdamW) for part in parts):
            for part in parts:
                part.grad_scale = torch.nan_to_num(divisor, nan=1.0, posinf=1.0)
                part.found_inf = skip
        elif bool(skip.item()):  # Other kernels cannot leave a step out by themselves.
            return
        else:
            for part in parts:
                gradients = [p.grad for group in part.param_groups for p in group["params"] if p.grad is not None]
                torch._foreach_div_(gradients, divisor)
        self.optimizer.step_with_ready_grads()

    def _iterators(self, rows: Sequence[Any]) -> list[Iterator[Any]]:
        device = self.platform.device
        return [iter([self.method.batch(row, chunk.module, device) for row in rows]) for chunk in self.chunks]


def _virtual(stage: StageConfig) -> int | None:
    size = stage.system.parallel.virtual_pipeline
    return size if size > 1 else None


def _forward_step(iterator: Iterator[Any], model: DistributedDataParallel, *, scale: Tensor) -> tuple[Tensor, Any]:
    batch = next(iterator)
    return model(batch), partial(_total, scale=scale)


def _total(sums: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """This micro-batch's part of the total loss. The token count of Megatron-Core's triple is not used: see the head
    of this file."""
    return (sums * scale).sum(), torch.zeros((), dtype=torch.int32, device=sums.device), {"sums": sums.detach()}


def _finalize(
    chunks: list[DistributedDataParallel],
    num_tokens: Tensor | None = None,
    *,
    groups: ParallelGroups,
    clock: StepClock,
    **_: Any,
) -> None:
    """Reduce gradients over ranks without dividing them by a token count."""
    clock.begin("reduce")
    finalize_model_grads(chunks, None, pg_collection=groups.collection)
