"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linears of a backbone or an MMDiT, at every layout.

An adapted linear computes ``W x + (alpha / rank) B A x``. W is the base model's, under its own name and in
Megatron-Core's layout (the heads of linear_qkv in their groups, gate and up of linear_fc1 behind one another), so that
B has W's rows and A its columns, each cut over tensor-parallel ranks as W is.

Legend  r rank, I and O a linear's input and output size; s tokens of this rank between layers, t tokens of its context
        rank (s, or tensor s under sequence parallelism).

    column parallel: linear_qkv, linear_fc1           row parallel: linear_proj, linear_fc2, linear_out
    A [r, I] on every rank                            A [r, I / tensor]
    B [O / tensor, r]                                 B [O, r] on every rank
    x [s, 1, I] ─A─► [s, 1, r] ─gather─► [t, 1, r]    x [t, 1, I / tensor] ─A─► [t, 1, r] ─reduce, scatter─► [s, 1, r]
      ─B─► [t, 1, O / tensor]                           ─B─► [s, 1, O]

What ranks exchange is r wide. Under sequence parallelism the matrix that every rank has sees some of the tokens only;
it carries Megatron-Core's mark for a gradient that is summed over tensor-parallel ranks.

Init: A normal, of variance 1 / I, drawn whole from the seed and the linear's name, thus the same at every layout (the
paper says Gaussian and no variance; with this one A x is as large as x). B zero, so that the start is the base model.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.nn import Module

from megatron_unimm.config.lora import LINEARS, ROUTED, LoraConfig
from megatron_unimm.errors import CheckpointError, ConfigError
from megatron_unimm.models.mmdit.blocks import SingleBlock
from megatron_unimm.models.specs import layers_provider

ADAPTERS = "*.lora_[ab].weight"
"""Glob over the adapters' tensors in checkpoints, which a base model lacks."""
LORA_A, LORA_B, WEIGHT = ".lora_a.weight", ".lora_b.weight", ".weight"
"""How the names of a linear's tensors end."""


# ---------------------------------------------------------------------------------------------- building


def add_lora(trunk: Module, config: LoraConfig, backend: str, groups: ProcessGroupCollection, seed: int) -> set[str]:
    """Give linears of a trunk adapters, in place, before its weights are loaded and its distributed wrapper is made.

    What trains is for the stage's table to say (``backbone.*lora_*``, then ``*`` frozen).

    Args:
        trunk: this rank's stage of a backbone or an MMDiT.
        backend: that it was built with, see ``models/specs.py``.
        seed: A comes from it and from names, not from what was drawn before.

    Returns:
        Patterns that matched something on this rank; :func:`check_lora_used` wants those of all.
    """
    used: set[str] = set()
    for name, linear, parent in list(_linears(trunk)):
        patterns = config.patterns_of(name)
        used |= patterns
        if patterns:
            adapter = _adapter_of(linear, backend)
            _adapt(linear, adapter, _cut(linear, parent, adapter, groups), config, f"{seed}/{name}")
    for block in trunk.modules():
        if isinstance(block, TransformerBlock) and block.config.recompute_granularity is not None:
            block.register_forward_pre_hook(_with_gradient)
    return used


def check_lora_used(used: set[str], config: LoraConfig, field: str) -> None:
    """Every pattern of the config must match something on some rank.

    Args:
        field: of the recipe, that holds the config, e.g. ``method.lora``.

    Raises:
        ConfigError: the first that does not.
    """
    for number, pattern in enumerate(config.modules or ()):
        if pattern not in used:
            raise ConfigError(
                f"{field}.modules.{number}",
                f"pattern {pattern!r} matches none of the linears that take adapters ({', '.join(LINEARS)} outside of "
                "routed experts); correct or remove it",
            )


def _linears(module: Module, prefix: str = "") -> Iterator[tuple[str, Module, Module]]:
    """Linears that can have an adapter: (name as in checkpoints, linear, what it is a part of)."""
    for key, child in module.named_children():
        if key in LINEARS:
            yield prefix + key, child, module
        elif isinstance(module, TransformerBlock) and key == "layers":
            for layer in child.children():
                assert isinstance(layer.layer_number, int)  # over all stages, 1 first
                yield from _linears(layer, f"{prefix}layers.{layer.layer_number - 1}.")
        elif not (isinstance(module, MoELayer) and key in ROUTED):
            yield from _linears(child, f"{prefix}{key}.")


def _adapter_of(linear: Module, backend: str) -> type["LoraLinear"]:
    provider = layers_provider(backend)
    kinds = {
        provider.column_parallel_linear(): LoraColumn,
        provider.row_parallel_linear(): LoraRow,
        provider.column_parallel_layer_norm_linear(): LoraNormedColumn,
    }
    return kinds[type(linear)]


def _cut(linear: Module, parent: Module, adapter: type["LoraLinear"], groups: ProcessGroupCollection) -> "Cut":
    """As the linear's own weight is cut."""
    tp = groups.tp
    outputs, inputs = _shape(linear)
    if issubclass(adapter, LoraRow):
        whole = inputs * tp.size()
        if isinstance(parent, SingleBlock):  # what attention made, and behind it what the MLP made
            return Cut(1, (parent.config.hidden_size, whole - parent.config.hidden_size), tp)
        return Cut(1, (whole,), tp)
    whole = outputs * tp.size()
    if isinstance(parent, MLP) and parent.config.gated_linear_unit:  # gate and up
        return Cut(0, (whole // 2, whole // 2), tp)
    return Cut(0, (whole,), tp)


def _adapt(linear: Module, adapter: type["LoraLinear"], cut: "Cut", config: LoraConfig, key: str) -> None:
    """Make an adapted linear of a plain one: two more parts, and the class that uses them.

    Args:
        key: what A is drawn from.
    """
    assert not isinstance(linear, LoraLinear), "has an adapter"
    outputs, inputs = _shape(linear)
    matrix_a = _draw(key, (config.rank, sum(cut.parts) if cut.axis == 1 else inputs))
    matrix_b = torch.zeros(outputs, config.rank, device="cpu")
    target = dict(device=linear.weight.device, dtype=linear.config.params_dtype)
    linear.lora_a = Matrix((cut.mine(matrix_a) if cut.axis == 1 else matrix_a).to(**target))
    linear.lora_b = Matrix(matrix_b.to(**target))
    linear.lora_cut = cut
    linear.lora_scaling = config.alpha / config.rank
    shared, mine = (linear.lora_a, linear.lora_b) if cut.axis == 0 else (linear.lora_b, linear.lora_a)
    shared.weight.sequence_parallel = linear.sequence_parallel
    set_tensor_model_parallel_attributes(mine.weight, True, cut.axis, 1)
    linear.__class__ = _adapted(adapter, type(linear))
    linear.return_normed(True)


def _shape(linear: Module) -> torch.Size:
    """Outputs and inputs of this rank's part of a linear."""
    assert isinstance(linear.weight, Tensor)
    return linear.weight.shape


def _draw(key: str, shape: tuple[int, int]) -> Tensor:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(shape, generator=generator, device="cpu") / math.sqrt(shape[1])


@functools.cache
def _adapted(adapter: type["LoraLinear"], plain: type[Module]) -> type["LoraLinear"]:
    """A linear's class with an adapter's in front of it."""
    return type(f"Lora{plain.__name__}", (adapter, plain), {"plain": plain})


def _with_gradient(block: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Full recompute builds a graph only where the hidden states that come in have one; below the first of the
    adapters nothing trains, so they have none."""
    hidden, *rest = inputs
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return hidden, *rest


# ---------------------------------------------------------------------------------------------- adapted linears


class Matrix(Module):
    """A linear map without bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(values, self.weight)


class LoraLinear(Module):
    """What is put in front of the class of a linear that gets an adapter (never made by itself).

    Attributes:
        plain: class of the linear without the adapter.
        lora_a, lora_b: the matrices. lora_cut: how one of them is cut. lora_scaling: alpha / rank.
        sequence_parallel: Megatron-Core's and Transformer Engine's linears read this switch when they run, and so do
            adapters.
    """

    plain: type[Module]
    lora_a: Matrix
    lora_b: Matrix
    lora_cut: "Cut"
    lora_scaling: float
    sequence_parallel: bool

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output and bias, as the plain linear returns them."""
        output, bias, read = self.unpack(super().forward(input_), input_)
        return output + self.update(read), bias

    def unpack(self, result: tuple, input_: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Output, bias, and what the weight was multiplied with."""
        output, bias = result
        return output, bias, input_

    def return_normed(self, switch: bool) -> None:
        """Whether the linear hands out its input behind a norm that it has fused."""

    def update(self, input_: Tensor) -> Tensor:
        """What the adapter adds to the output."""
        raise NotImplementedError

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The plain linear's tensors, and A and B; the one that is cut as its weight is."""
        assert metadata is not None
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        key = prefix + (LORA_B if self.lora_cut.axis == 0 else LORA_A).removeprefix(".")
        state[key] = self.lora_cut.sharded(key, state[key].data, sharded_offsets, metadata)
        return state


class LoraColumn(LoraLinear):
    """The output is cut over tensor-parallel ranks."""

    def update(self, input_: Tensor) -> Tensor:
        """``[s, 1, I]`` to ``[t, 1, O / tensor]``."""
        low = self.lora_a(input_) * self.lora_scaling  # [s, 1, r]
        group = self.lora_cut.group
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=group)
        return self.lora_b(low)  # [t, 1, r] before B


class LoraNormedColumn(LoraColumn):
    """Transformer Engine's linear with the norm in front of it: the adapter reads what comes out of the norm, in the
    precision of the hidden states and each rank its own tokens."""

    def unpack(self, result: tuple, input_: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        if len(result) == 3:
            return result
        (output, normed), bias = result  # Megatron-Core puts a bias of None beside what has none
        return output, bias, normed

    def return_normed(self, switch: bool) -> None:
        self.return_layernorm_output = switch


class LoraRow(LoraLinear):
    """The input is cut over tensor-parallel ranks."""

    def update(self, input_: Tensor) -> Tensor:
        """``[t, 1, I / tensor]`` to ``[s, 1, O]``."""
        low = self.lora_a(input_) * self.lora_scaling  # [t, 1, r], a part of the sum
        group = self.lora_cut.group
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=group)
        return self.lora_b(low)  # [s, 1, r] before B


@dataclass(frozen=True)
class Cut:
    """How an axis of a matrix lies over tensor-parallel ranks: it has parts behind one another, and each rank holds its
    stretch of every part."""

    axis: int
    parts: tuple[int, ...]
    """Their sizes, over all ranks."""
    group: torch.distributed.ProcessGroup

    def mine(self, whole: Tensor) -> Tensor:
        """This rank's stretches of a whole matrix."""
        rank, size = self.group.rank(), self.group.size()
        return torch.cat([part.chunk(size, self.axis)[rank] for part in whole.split(self.parts, self.axis)], self.axis)

    def sharded(
        self, key: str, tensor: Tensor, offsets: tuple, metadata: dict[str, Any]
    ) -> ShardedTensor | ShardedTensorFactory:
        """This rank's part as a checkpoint sees it."""
        groups = dict(tp_group=self.group, dp_cp_group=metadata["dp_cp_group"])
        single = make_tp_sharded_tensor_for_checkpoint(tensor, key, self.axis, prepend_offsets=offsets, **groups)
        if len(self.parts) == 1:
            return single
        rank, size = self.group.rank(), self.group.size()
        # In pieces as wide as all stretches allow, the whole matrix is a regular grid.
        width = math.gcd(*(part // size for part in self.parts))
        numbers, before = [], 0
        for part in self.parts:
            count = part // size // width
            numbers += range(before + rank * count, before + (rank + 1) * count)
            before += size * count

        @torch.no_grad()
        def build(key: str, data: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
            assert flattened_range is None
            axis = len(offsets) + self.axis
            return [
                ShardedTensor.from_rank_offsets(
                    key, piece, *offsets, (axis, number, before), replica_id=replica_id, prepend_axis_num=len(offsets)
                )
                for piece, number in zip(data.split(width, self.axis), numbers, strict=True)
            ]

        @torch.no_grad()
        def merge(pieces: list[Tensor]) -> Tensor:
            return torch.cat(pieces, self.axis)

        return ShardedTensorFactory(key, tensor, build, merge, single.replica_id)


# ---------------------------------------------------------------------------------------------- merging


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, alpha: float) -> Tensor:
    """``W + (alpha / rank) B A``, computed in fp32 at least, in W's dtype."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    update = lora_b.to(exact) @ lora_a.to(exact)
    return (weight.to(exact) + (alpha / len(lora_a)) * update).to(weight.dtype)


def merge_lora(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A whole checkpoint's tensors by name without adapters: each is in the weight of its linear.

    Raises:
        CheckpointError: an adapter without its other half or its linear.
    """
    merged = {key: value for key, value in state.items() if not key.endswith((LORA_A, LORA_B))}
    for linear in sorted({key.removesuffix(end) for key in state for end in (LORA_A, LORA_B) if key.endswith(end)}):
        for end in (LORA_A, LORA_B, WEIGHT):
            if linear + end not in state:
                raise CheckpointError(
                    linear, f"has an adapter, but no tensor {linear}{end}; the checkpoint is incomplete"
                )
        weight, lora_a, lora_b = (state[linear + end] for end in (WEIGHT, LORA_A, LORA_B))
        merged[linear + WEIGHT] = merged_weight(weight, lora_a, lora_b, alpha)
    return merged


@torch.no_grad()
def merge_lora_in_place(trunk: Module) -> None:
    """Put the adapters of a live model into the weights, each rank its part, and take them away: no ranks talk."""
    for linear in [module for module in trunk.modules() if isinstance(module, LoraLinear)]:
        alpha = linear.lora_scaling * len(linear.lora_a.weight)
        linear.weight.copy_(merged_weight(linear.weight, linear.lora_a.weight, linear.lora_b.weight, alpha))
        linear.return_normed(False)
        linear.__class__ = linear.plain
        for name in ("lora_a", "lora_b", "lora_cut", "lora_scaling"):
            delattr(linear, name)
