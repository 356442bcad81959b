"""Layers of a vision tower that let others see what happens between them."""

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_unimm.models.attention import PackedContext


class TappedBlock(TransformerBlock):
    """A stack of layers that also gives out what some of them put out.

    Megatron-Core's block returns its last layer's output only. :meth:`tapped` has none of its pipeline and FP8
    handling, which a tower does not use, and no norm behind the last layer.
    """

    def tapped(self, hidden_P1H: Tensor, context: PackedContext, taps: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The last layer's output, and those of the zero-based layers ``taps``; all ``[P, 1, H]``."""
        tapped: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            hidden_P1H = self._through(layer, hidden_P1H, context)
            if number in taps:
                tapped.append(hidden_P1H)
        return hidden_P1H, tapped

    def _through(self, layer: torch.nn.Module, hidden_P1H: Tensor, context: PackedContext) -> Tensor:
        def run(hidden: Tensor) -> Tensor:
            return layer(hidden, attention_mask=None, packed_seq_params=context)[0]

        if self.config.recompute_granularity == "full" and self.training and hidden_P1H.requires_grad:
            return tensor_parallel.checkpoint(run, False, hidden_P1H)
        return run(hidden_P1H)
