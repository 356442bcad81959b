"""Adaptive layer norm (arXiv 2212.09748, adaLN-Zero): shift, scale and gate of a stream, from a conditioning vector.

Legend  n conditioning vectors of a row, H hidden size, t tokens of a stream on this rank, ``[t, 1, H]``.
A row packs several pictures, each with its own vector, so that every token names the one that it goes by.
"""

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


def plain_norm(hidden_t1H: Tensor) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(hidden_t1H, hidden_t1H.shape[-1:], eps=NORM_EPSILON)


def modulate(normed_t1H: Tensor, shift_nH: Tensor, scale_nH: Tensor, vector_index: Tensor) -> Tensor:
    """``normed (1 + scale) + shift``, each token by its own vector (int64 ``[t]``)."""
    scale, shift = scale_nH.index_select(0, vector_index), shift_nH.index_select(0, vector_index)  # [t, H]
    return torch.addcmul(shift[:, None] + normed_t1H, normed_t1H, scale[:, None])


def add_gated(residual_t1H: Tensor, update_t1H: Tensor, gate_nH: Tensor, vector_index: Tensor) -> Tensor:
    """``residual + gate update``."""
    return torch.addcmul(residual_t1H, update_t1H, gate_nH.index_select(0, vector_index)[:, None])
