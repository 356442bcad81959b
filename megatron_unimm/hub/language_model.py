"""A VLM with query tokens on a model of transformers: what it says of a conversation's words, and at its queries.

Legend  T tokens of the row, Q queries, H hidden size, V visual tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.model import Qwen3VisionConfig, VisionEncoderConfig
from megatron_unimm.data.sample import PackedRow
from megatron_unimm.hub.order import reorder

PutQueries = Callable[[Tensor, Tensor], Tensor]
"""Puts queries at places (int64 ``[Q]``) among token embeddings ``[T, H]``."""


class LanguageModel:
    """The VLM with its queries.

    Args:
        model: transformers' of a Qwen VLM; :func:`~megatron_unimm.hub.order.reorder` changes it.
    """

    def __init__(self, model: Any, encoder: VisionEncoderConfig, put_queries: PutQueries) -> None:
        reorder(model)
        self.model = model
        self.encoder = encoder
        self.put_queries = put_queries

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def __call__(self, row: PackedRow, query_index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Last hidden states of one conversation ``[T, H]``, and of these those at its queries ``[Q, H]``."""
        device = self.device
        index = torch.from_numpy(query_index).to(device)
        words = self.model.get_input_embeddings()(torch.from_numpy(row.input_ids).to(device))  # [T, H]
        words = self.put_queries(words, index)
        levels = {}
        if len(row.grids):
            words, levels = self._with_images(words, row)
        positions = torch.from_numpy(row.position_ids).to(device)[:, None]  # [3, 1, T]
        decoder = self.model.get_decoder()
        output = decoder(inputs_embeds=words[None], position_ids=positions, use_cache=False, **levels)
        hidden = output.last_hidden_state[0]
        return hidden, hidden.index_select(0, index)

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
