"""MMCORE's VLM (arXiv 2604.19902, section 3.1) on a model of transformers: what it says of a conversation's words, and
at its query tokens.

Legend  T tokens of the row, Q queries, H hidden size, D width of a visual latent, V visual tokens.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_unimm.config.model import Qwen3VisionConfig, VisionEncoderConfig
from megatron_unimm.config.queries import CONNECTOR_HEAD_SIZE, CONNECTOR_MLP_RATIO, QueryConnectorConfig
from megatron_unimm.data.sample import PackedRow
from megatron_unimm.hub.order import reorder

NORM_EPSILON = 1e-6


class LanguageModel:
    """The VLM with its queries.

    Args:
        model: transformers' of a Qwen VLM; :func:`~megatron_unimm.hub.order.reorder` changes it.
        queries: ``[N, H]``.
    """

    def __init__(self, model: Any, encoder: VisionEncoderConfig, queries: Tensor, connector: "Connector") -> None:
        reorder(model)
        self.model = model
        self.encoder = encoder
        self.queries = queries
        self.connector = connector

    def __call__(self, row: PackedRow, query_index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Last hidden states ``[T, H]`` of one conversation, and visual latents ``[Q, D]``."""
        device = self.queries.device
        index = torch.from_numpy(query_index).to(device)
        words = self.model.get_input_embeddings()(torch.from_numpy(row.input_ids).to(device))  # [T, H]
        words = words.index_copy(0, index, self.queries.repeat(len(index) // len(self.queries), 1))
        levels = {}
        if len(row.grids):
            words, levels = self._with_images(words, row)
        positions = torch.from_numpy(row.position_ids).to(device)[:, None]  # [3, 1, T]
        decoder = self.model.get_decoder()
        output = decoder(inputs_embeds=words[None], position_ids=positions, use_cache=False, **levels)
        hidden = output.last_hidden_state[0]
        return hidden, self.connector(hidden.index_select(0, index))

    def _with_images(self, words_TH: Tensor, row: PackedRow) -> tuple[Tensor, dict[str, Any]]:
        """Images in their places, and what their deepstack levels (Qwen3-VL) are handed in as."""
        device = words_TH.device
        patches = torch.from_numpy(row.patches).to(device, words_TH.dtype)
        places = torch.from_numpy(row.visual_index).to(device)
        inputs = {"grid_thw": torch.from_numpy(row.grids).to(device), "return_dict": True}
        if isinstance(self.encoder, Qwen3VisionConfig):
            index, weight = position_weights(row.grids, self.encoder)
            inputs |= {"interp_indices": index.to(device), "interp_weights": weight.to(device)}
        seen = self.model.base_model.visual(patches, **inputs)
        words = words_TH.index_copy(0, places, seen.pooler_output)
        if not isinstance(self.encoder, Qwen3VisionConfig):
            return words, {}
        is_visual = torch.zeros(1, len(words), dtype=torch.bool, device=device).index_fill(1, places, True)
        return words, {"visual_pos_masks": is_visual, "deepstack_visual_embeds": seen.deepstack_features}


def position_weights(grids: np.ndarray, encoder: Qwen3VisionConfig) -> tuple[Tensor, Tensor]:
    """Of each patch, the four learned positions around it and their weights, int64 and float32 ``[P, 4]``, as
    transformers takes them; its own weights are rounded before they are multiplied."""
    merge, side = encoder.spatial_merge_size, math.isqrt(encoder.num_position_embeddings)
    indices, weights = [], []
    for _, rows, columns in grids:
        row, column = (
            np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge).swapaxes(2, 3)
        )
        low_row, high_row, along_row = _between(row.reshape(-1), rows, side)
        low_column, high_column, along_column = _between(column.reshape(-1), columns, side)
        index = [low * side + other for low in (low_row, high_row) for other in (low_column, high_column)]
        weight = [one * other for one in (1 - along_row, along_row) for other in (1 - along_column, along_column)]
        indices.append(np.stack(index, axis=1))
        weights.append(np.stack(weight, axis=1))
    return torch.from_numpy(np.concatenate(indices)), torch.from_numpy(np.concatenate(weights).astype(np.float32))


def _between(place: np.ndarray, length: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The table's points below and above a place of ``length``, and how far it is from the one to the other."""
    scaled = place * (side - 1) / max(length - 1, 1)
    low = np.floor(scaled).astype(np.int64)
    return low, np.minimum(low + 1, side - 1), scaled - low


class Connector(nn.Module):
    """From hidden states at the queries to visual latents: ``[Q, H]`` to ``[Q, D]`` (``models/queries.py``).

    Its parameters have the names and shapes of a checkpoint, so that they load as they are.
    """

    def __init__(self, model: QueryConnectorConfig, num_queries: int, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.num_queries = num_queries
        sizes = [hidden_size, latent_size] if model.projection == "linear" else [hidden_size, hidden_size, latent_size]
        self.layers = ConnectorLayers(model.num_layers, hidden_size) if model.num_layers else None
        self.projection = nn.ModuleList(nn.Linear(wide, to) for wide, to in pairwise(sizes))

    def forward(self, hidden_QH: Tensor) -> Tensor:
        hidden = hidden_QH
        if self.layers is not None:
            hidden = self.layers(hidden.unflatten(0, (-1, self.num_queries))).flatten(0, 1)
        for number, linear in enumerate(self.projection):
            hidden = linear(F.gelu(hidden) if number else hidden)
        return hidden


class ConnectorLayers(nn.Module):
    """Pre-norm layers over a picture's queries, and a norm behind them."""

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConnectorLayer(hidden_size) for _ in range(num_layers))
        self.final_layernorm = nn.RMSNorm(hidden_size, eps=NORM_EPSILON)

    def forward(self, hidden_FNH: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_FNH = layer(hidden_FNH)
        return self.final_layernorm(hidden_FNH)


class ConnectorLayer(nn.Module):
    """Attention and a gated MLP, without biases."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        wide = CONNECTOR_MLP_RATIO * hidden_size
        self.self_attention = nn.ModuleDict(
            {
                "linear_qkv": NormedLinear(hidden_size, 3 * hidden_size),
                "linear_proj": nn.Linear(hidden_size, hidden_size, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "linear_fc1": NormedLinear(hidden_size, 2 * wide),
                "linear_fc2": nn.Linear(wide, hidden_size, bias=False),
            }
        )

    def forward(self, hidden_FNH: Tensor) -> Tensor:
        mixed = self.self_attention["linear_qkv"](hidden_FNH).unflatten(-1, (-1, 3, CONNECTOR_HEAD_SIZE))
        query, key, value = (heads.transpose(1, 2) for heads in mixed.unbind(3))  # [F, heads, N, 64]
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = hidden_FNH + self.self_attention["linear_proj"](attended)
        gate, grown = self.mlp["linear_fc1"](hidden).chunk(2, dim=-1)
        return hidden + self.mlp["linear_fc2"](F.silu(gate) * grown)


class NormedLinear(nn.Module):
    """RMSNorm, then a linear layer, named as Transformer Engine names the two in one."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(torch.ones(in_size))
        self.weight = nn.Parameter(torch.empty(out_size, in_size))

    def forward(self, values: Tensor) -> Tensor:
        normed = F.rms_norm(values, self.layer_norm_weight.shape, self.layer_norm_weight, NORM_EPSILON)
        return F.linear(normed, self.weight)
