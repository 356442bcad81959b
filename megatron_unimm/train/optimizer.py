"""Megatron-Core's distributed optimizer, with our learning-rate table, and gradient norms that stay on the device."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import megatron.core.optimizer as megatron_optimizer
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    ParamKey,
    ParamWithNamePredicate,
    distrib_optimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import MegatronModule, param_is_not_shared
from torch import Tensor

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.errors import ConfigError
from megatron_unimm.models.trainable import matching_rule
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.train.adam import FusedAdamW

WRAPPER_PREFIX = "module."


def wrap_data_parallel(
    chunks: list[MegatronModule], stage: StageConfig, groups: ParallelGroups
) -> list[DistributedDataParallel]:
    """Gradient buffers and reduction over data-parallel ranks. Gradients are summed in fp32: losses are already
    divided by global counts."""
    overlap = stage.system.overlap
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,  # that check ends the job; ours skips the step
        average_in_collective=False,
    )
    wrapped = []
    for number, chunk in enumerate(chunks):
        wrapped.append(
            DistributedDataParallel(
                chunk.config, config, chunk, disable_bucketing=number > 0, pg_collection=groups.collection
            )
        )
    return wrapped


@contextmanager
def gathered_parameters(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Whole parameters, where the optimizer otherwise lets them arrive layer by layer during the next forward pass."""
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()


def build_optimizer(
    chunks: list[DistributedDataParallel], stage: StageConfig, groups: ParallelGroups
) -> ChainedOptimizer:
    """One parameter group per (learning-rate multiplier, weight decay or not) of the stage's table.

    Megatron-Core tells groups apart after a resume by ``lr_mult`` and ``wd_mult``; these are all that ours differ in.
    """
    settings = stage.train.optimizer
    _use_adam(settings.implementation)
    config = OptimizerConfig(
        optimizer="adam",
        lr=stage.train.schedule.max_learning_rate,
        min_lr=stage.train.schedule.min_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_norm,
        bf16=stage.system.precision.dtype == "bfloat16",
        use_distributed_optimizer=True,
        overlap_param_gather=stage.system.overlap.param_gather,
    )
    overrides = {_no_decay(): {"wd_mult": 0.0}}
    for multiplier in sorted({rule.learning_rate_multiplier for rule in stage.train.trainable if rule.train}):
        overrides[_with_multiplier(multiplier, stage)] = {"lr_mult": multiplier}
    optimizer = get_megatron_optimizer(
        config, chunks, overrides, use_gloo_process_groups=False, pg_collection=groups.collection
    )
    assert isinstance(optimizer, ChainedOptimizer)
    return optimizer


def _use_adam(implementation: str) -> None:
    """Put the wanted Adam where Megatron-Core looks for Apex's.

    Its own torch fallback can be neither saved nor loaded, and it takes Transformer Engine's where that is installed.

    Raises:
        ConfigError: the package of that Adam is not installed.
    """
    adam = _adam_class(implementation)
    for module in (megatron_optimizer, distrib_optimizer):
        module.Adam = adam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = implementation == "transformer_engine"
    distrib_optimizer.USING_APEX_OPTIMIZER = implementation != "transformer_engine"


def _adam_class(implementation: str) -> type[torch.optim.Optimizer]:
    if implementation == "torch":
        return FusedAdamW
    module = "transformer_engine.pytorch.optimizers" if implementation == "transformer_engine" else "apex.optimizers"
    try:
        return importlib.import_module(module).FusedAdam
    except ImportError as error:
        raise ConfigError(
            "train.optimizer.implementation", f"{implementation} is not installed ({error}); install it or use torch"
        ) from error


def _no_decay() -> ParamKey:
    return ParamKey(
        with_name_predicate=ParamWithNamePredicate(
            "bias_or_norm", lambda p, name: p.dim() == 1 or name.endswith(".bias")
        )
    )


def _with_multiplier(multiplier: float, stage: StageConfig) -> ParamKey:
    def matches(parameter: Tensor, name: str) -> bool:
        rule = matching_rule(name.removeprefix(WRAPPER_PREFIX), stage.train.trainable)
        return rule is not None and rule.learning_rate_multiplier == multiplier

    return ParamKey(with_name_predicate=ParamWithNamePredicate(f"lr_mult_{multiplier}", matches))


def set_learning_rate(optimizer: ChainedOptimizer, rate: float, weight_decay: float) -> None:
    """Write the rate and the weight decay of this step into every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


def module_of(name: str) -> str:
    """Module that a parameter's norm is reported under: ``vision_encoder``, ``backbone.decoder`` …"""
    parts = name.removeprefix(WRAPPER_PREFIX).split(".")
    return ".".join(parts[:2]) if parts[0] == "backbone" else parts[0]


@dataclass(frozen=True)
class GradientNorms:
    """Norms of one step on the device."""

    total: Tensor
    """float32 scalar, the same on all ranks; not finite if any gradient is not."""
    per_module: Tensor
    """float32 ``[modules]``, the same on all ranks."""
    per_tensor: Tensor
    """float32 ``[tensors of this rank's shard]``."""


class GradientMeter:
    """Global and per-module gradient norms with one all-reduce and no host synchronisation."""

    def __init__(
        self,
        optimizer: ChainedOptimizer,
        chunks: list[DistributedDataParallel],
        groups: ParallelGroups,
        device: torch.device,
    ) -> None:
        names = {
            id(parameter): name.removeprefix(WRAPPER_PREFIX)
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
        }
        self.tensor_names: list[str] = []
        self._parameters: list[Tensor] = []
        for part in optimizer.chained_optimizers:
            for name, shard in _shards(part, names):
                if param_is_not_shared(shard) and param_is_not_tensor_parallel_duplicate(shard, groups.collection.tp):
                    self.tensor_names.append(name)
                    self._parameters.append(shard)
        mine = sorted({module_of(name) for name in names.values() if not name.startswith("base.")})
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine, group=groups.host)
        self.modules = sorted({module for part in everyone for module in part})
        rows = [self.modules.index(module_of(name)) for name in self.tensor_names]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self._device = device

    @torch.no_grad()
    def measure(self) -> GradientNorms:
        """Norms of the gradients that the optimizer is about to apply (after ``prepare_grads``)."""
        squares = torch.zeros(len(self.modules), device=self._device)
        gradients = [parameter.grad for parameter in self._parameters]
        per_tensor = torch.zeros(0, device=self._device)
        if gradients:
            per_tensor = torch.stack(torch._foreach_norm(gradients)).float()
            squares.index_add_(0, self._rows, per_tensor.square())
        dist.all_reduce(squares)
        return GradientNorms(squares.sum().sqrt(), squares.sqrt(), per_tensor)


def _shards(optimizer: DistributedOptimizer, names: dict[int, str]) -> list[tuple[str, Tensor]]:
    """(model parameter's name, this rank's fp32 shard of it) for everything that the optimizer updates."""
    if optimizer.is_stub_optimizer:
        return []
    pairs = []
    for model_groups, shard_groups in (
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
    ):
        for model_group, shard_group in zip(model_groups, shard_groups, strict=True):
            pairs += [(names[id(parameter)], shard) for parameter, shard in zip(model_group, shard_group, strict=True)]
    return pairs
