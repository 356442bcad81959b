"""Layers of connectors on plain torch: pre-norm, attention in both directions, gated MLPs (``models/queries.py``,
``models/scale_connector.py``). Parameters have the names and shapes of a checkpoint, so that they load as they are.

Legend  Q tokens in groups that see one another, H hidden size, N heads, G of keys and values, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_unimm.models.rotary import rotate

Angles = tuple[Tensor, Tensor]
"""Cosines and sines ``[Q, D / 2]`` of rotary positions."""


@dataclass(frozen=True)
class LayerSizes:
    """Of each layer."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    qkv_bias: bool = False
    epsilon: float = 1e-6


class ConnectorLayers(nn.Module):
    """Layers, and a norm behind them."""

    def __init__(self, num_layers: int, sizes: LayerSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConnectorLayer(sizes) for _ in range(num_layers))
        self.final_layernorm = nn.RMSNorm(sizes.hidden, eps=sizes.epsilon)

    def forward(self, hidden_QH: Tensor, lengths: Sequence[int], angles: Angles | None = None) -> Tensor:
        """
        Args:
            lengths: of the groups, one behind the other.
        """
        for layer in self.layers:
            hidden_QH = layer(hidden_QH, lengths, angles)
        return self.final_layernorm(hidden_QH)


class ConnectorLayer(nn.Module):
    """Attention and a gated MLP, without biases but for those of queries, keys and values, where they have any."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        hidden, heads = sizes.hidden, sizes.heads * sizes.head_size
        wide = heads + 2 * sizes.kv_heads * sizes.head_size
        self.self_attention = nn.ModuleDict(
            {
                "linear_qkv": NormedLinear(hidden, wide, sizes.qkv_bias, sizes.epsilon),
                "linear_proj": nn.Linear(heads, hidden, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "linear_fc1": NormedLinear(hidden, 2 * sizes.mlp, False, sizes.epsilon),
                "linear_fc2": nn.Linear(sizes.mlp, hidden, bias=False),
            }
        )

    def forward(self, hidden_QH: Tensor, lengths: Sequence[int], angles: Angles | None) -> Tensor:
        query, key, value = self._heads(self.self_attention["linear_qkv"](hidden_QH))
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        attended = [
            F.scaled_dot_product_attention(*(heads.transpose(0, 1)[None] for heads in group))[0].transpose(0, 1)
            for group in zip(*(heads.split(list(lengths)) for heads in (query, key, value)), strict=True)
        ]
        hidden = hidden_QH + self.self_attention["linear_proj"](torch.cat(attended).flatten(1))
        gate, grown = self.mlp["linear_fc1"](hidden).chunk(2, dim=-1)
        return hidden + self.mlp["linear_fc2"](F.silu(gate) * grown)

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[Q, N, D]`` each. Megatron-Core has them group by group: queries, their keys, their values."""
        each = self.sizes.heads // self.sizes.kv_heads
        groups = mixed.unflatten(1, (self.sizes.kv_heads, each + 2, -1))  # [Q, G, N / G + 2, D]
        query, key, value = groups.split([each, 1, 1], dim=2)
        key, value = (heads[:, :, 0].repeat_interleave(each, dim=1) for heads in (key, value))
        return query.flatten(1, 2), key, value


class NormedLinear(nn.Module):
    """RMSNorm, then a linear layer, named as Transformer Engine names the two in one."""

    def __init__(self, in_size: int, out_size: int, bias: bool, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.layer_norm_weight = nn.Parameter(torch.ones(in_size))
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.empty(out_size)) if bias else None

    def forward(self, values: Tensor) -> Tensor:
        normed = F.rms_norm(values, self.layer_norm_weight.shape, self.layer_norm_weight, self.epsilon)
        found = F.linear(normed, self.weight)
        return found if self.bias is None else found + self.bias
