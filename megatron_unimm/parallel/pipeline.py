"""What the pipeline schedule needs from models whose parts may be frozen."""

from typing import Any

import torch
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
