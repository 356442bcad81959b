"""What the pipeline schedule needs from models whose parts may be frozen."""

from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor


class _ZeroGradientLink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:  # type: ignore[override]
        ctx.shape = anchor.shape
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, gradient.new_zeros(ctx.shape)


def with_zero_gradient(output: Tensor, anchor: Tensor) -> Tensor:
    """``output``, with a zero gradient for ``anchor`` in the backward pass.

    A stage behind which everything is frozen computes no gradient for its input, but Megatron-Core's schedule sends
    one to the stage before, which waits for it. This link makes it zeros, at the cost of one fill.
    """
    return _ZeroGradientLink.apply(output, anchor)


def through_layers(block: TransformerBlock, hidden: Tensor, **inputs: Any) -> Tensor:
    """A stage's layers on hidden states that were cut out of what the stage before sent: Megatron-Core would read all
    of it, from a field that its schedule sets. The field is empty again behind the layers: it would keep the step's
    graph until the next one, and for good once a training ends, process groups and their threads with it."""
    block.input_tensor = hidden
    output = block(hidden, attention_mask=None, **inputs)
    block.input_tensor = None
    return output
