"""Adaptive layer norm (arXiv 2212.09748, adaLN-Zero): shift, scale and gate of a stream, from a conditioning vector.

Legend  n conditioning vectors of a row, H hidden size, s tokens of a stream on this rank, ``[s, 1, H]``.
A row packs several pictures, each with its own vector, so that every token names the one that it goes by.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_unimm.models.transformer_config import whole_sequence

NORM_EPSILON = 1e-6


class Modulation(MegatronModule):
    """A linear layer from the conditioning vector to ``num_parts`` vectors of width H.

    Its outputs are cut over tensor-parallel ranks and gathered. Under sequence parallelism each rank modulates its own
    tokens, so that gradients of what was gathered are summed over ranks; otherwise all ranks have the same. It stays
    out of FP8 (a plain linear layer), as its inputs are a few rows only.
    """

    def __init__(self, num_parts: int, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.num_parts = num_parts
        self.tp_group = groups.tp
        self.linear = ColumnParallelLinear(
            config.hidden_size,
            num_parts * config.hidden_size,
            config=whole_sequence(config),
            init_method=config.init_method,
            bias=True,
            gather_output=False,
            skip_bias_add=False,
            tp_group=groups.tp,
        )

    def forward(self, activated_nH: Tensor) -> tuple[Tensor, ...]:
        """From SiLU of the conditioning vectors to ``num_parts`` times ``[n, H]``."""
        mine = self.linear(activated_nH)[0]  # [n, num_parts H / tensor]
        if self.config.sequence_parallel:
            whole = all_gather_last_dim_from_tensor_parallel_region(mine, group=self.tp_group)
        else:
            whole = gather_from_tensor_model_parallel_region(mine, group=self.tp_group)
        return whole.chunk(self.num_parts, dim=-1)


def plain_norm(hidden_s1H: Tensor) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(hidden_s1H, hidden_s1H.shape[-1:], eps=NORM_EPSILON)


@dataclass(frozen=True)
class VectorOfToken:
    """Which conditioning vector each of s tokens goes by; made once per micro-batch."""

    index: Tensor
    """int64 ``[s]``."""
    members: Tensor
    """``[n, s]`` in the computing dtype: 1 where a token goes by a vector. Sums over the tokens of a vector are
    products with it: unlike scattered additions they have an order, and no token waits for another."""

    @classmethod
    def build(cls, index: np.ndarray, num_vectors: int, device: torch.device, dtype: torch.dtype) -> "VectorOfToken":
        """From int64 ``[s]``."""
        on_device = torch.from_numpy(np.ascontiguousarray(index)).to(device, non_blocking=True)
        return cls(on_device, F.one_hot(on_device, num_vectors).T.to(dtype).contiguous())


def modulate(normed_s1H: Tensor, shift_nH: Tensor, scale_nH: Tensor, vectors: VectorOfToken) -> Tensor:
    """``normed (1 + scale) + shift``, each token by its own vector."""
    return _Modulate.apply(normed_s1H, shift_nH, scale_nH, vectors)


def add_gated(residual_s1H: Tensor, update_s1H: Tensor, gate_nH: Tensor, vectors: VectorOfToken) -> Tensor:
    """``residual + gate update``, each token by its own vector."""
    return _AddGated.apply(residual_s1H, update_s1H, gate_nH, vectors)


class _Modulate(torch.autograd.Function):
    """Keeps the vectors for the backward pass, and not their copies for every token."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, shift: Tensor, scale: Tensor, vectors: VectorOfToken) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(normed, scale)
        ctx.vectors = vectors
        return torch.addcmul(_of_tokens(shift, vectors) + normed, normed, _of_tokens(scale, vectors))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        normed, scale = ctx.saved_tensors
        to_normed = torch.addcmul(gradient, gradient, _of_tokens(scale, ctx.vectors))
        return to_normed, _of_vectors(gradient, ctx.vectors), _of_vectors(gradient * normed, ctx.vectors), None


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, update: Tensor, gate: Tensor, vectors: VectorOfToken) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(update, gate)
        ctx.vectors = vectors
        return torch.addcmul(residual, update, _of_tokens(gate, vectors))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        update, gate = ctx.saved_tensors
        to_update = gradient * _of_tokens(gate, ctx.vectors)
        return gradient, to_update, _of_vectors(gradient * update, ctx.vectors), None


def _of_tokens(values_nH: Tensor, vectors: VectorOfToken) -> Tensor:
    """Each token's: ``[s, 1, H]``."""
    return values_nH.index_select(0, vectors.index)[:, None]


def _of_vectors(values_s1H: Tensor, vectors: VectorOfToken) -> Tensor:
    """Summed over the tokens of each vector: ``[n, H]``."""
    return vectors.members @ values_s1H[:, 0]
