"""Deepstack (arXiv 2406.04334; Qwen3-VL, arXiv 2511.21631): what the vision encoder saw at K of its layers is added to
the visual tokens after each of the backbone's first K layers.

The first pipeline stage has the vision encoder, but may have fewer than K layers. What its layers do not use travels
on beside the hidden states: with n layers on the first chunk, K' = max(0, K - n) blocks of rows under them,

    [hidden states | level n | level n + 1 | … | level K - 1]        (1 + K') t rows

the same on all stages (the schedule's messages have one shape), gradients included. Published models have K = 3 and at
least 3 layers on their first chunk, so that K' = 0 and nothing is paid.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_unimm.config.model import ModelConfig
from megatron_unimm.config.parallel import ParallelConfig


def travelling_levels(model: ModelConfig, parallel: ParallelConfig) -> int:
    """K' of a layout."""
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    if num_chunks == 1:
        return 0
    layers = parallel.layers_per_stage
    on_first = layers[0] if layers is not None else model.backbone.num_layers // num_chunks
    return max(0, len(model.vision_encoder.deepstack_layers) - on_first)


class Deepstack:
    """Where one model chunk finds the levels, and what it hands on.

    Args:
        num_levels: K.
        num_travelling: K'.
        first: the chunk that has the vision encoder; it gets all K levels. last: hands nothing on.
    """

    def __init__(self, num_levels: int = 0, num_travelling: int = 0, first: bool = True, last: bool = True) -> None:
        self.num_levels = num_levels
        self.num_travelling = num_travelling
        self.num_received = num_levels if first else num_travelling
        self.last = last

    def place(self, level: int) -> int:
        """Where a level stands among those that this chunk receives."""
        return level - (self.num_levels - self.num_received)

    def split(self, rows_r1H: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states ``[t, 1, H]`` and levels ``[num_received, t, 1, H]`` (None without any)."""
        if not self.num_received:
            return rows_r1H, None
        blocks = rows_r1H.unflatten(0, (1 + self.num_received, -1))
        return blocks[0], blocks[1:]

    def join(self, hidden_t1H: Tensor, levels: Tensor | None) -> Tensor:
        """Rows for the next chunk, or on the last the hidden states alone."""
        if self.last or not self.num_travelling:
            return hidden_t1H
        assert levels is not None
        travelling = levels[self.num_received - self.num_travelling :]
        return torch.cat([hidden_t1H, travelling.flatten(0, 1)])


class DeepstackLayer(TransformerLayer):
    """A layer whose output gets a level of visual features added.

    The levels come as ``context``, the argument that Megatron-Core's block hands from layer to layer (for
    cross-attention, which there is none of), also under recompute.
    """

    def __init__(self, *args: Any, level: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.level = level

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """``[t, 1, H]`` and the levels, unchanged."""
        hidden, levels = super().forward(*args, **kwargs)
        assert isinstance(hidden, Tensor)
        assert levels is not None, "the first chunk always gets its levels, zeros where there is no image"
        return hidden + levels[self.level], levels


def place_levels(levels_VKH: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Levels of V visual tokens at their positions (int64 ``[V]``) in a row, zeros elsewhere: ``[K, T, 1, H]``."""
    row = levels_VKH.new_zeros(levels_VKH.shape[1], num_tokens, 1, levels_VKH.shape[2])
    return row.index_copy(1, index, levels_VKH.transpose(0, 1)[:, :, None])
