"""Sums in the order in which our own layers add.

On a CPU a matrix product gives the same bits however many rows it has (beyond a few) and whether weights are fused or
not. What changes the last bit: a bias that joins the product (torch's Linear does so, Megatron-Core adds it
afterwards) where the sum is longer than some 256 terms; a convolution in place of a product; an activation of numbers
that lie apart in memory, whose last few of a line go another way than the rest; norms and gates that are multiplied
out differently.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


def product(linear: nn.Linear, values: Tensor) -> Tensor:
    """The linear layer, its bias added to the finished sums."""
    assert linear.bias is not None
    return torch.matmul(values, linear.weight.t()) + linear.bias


class BiasBehind(nn.Module):
    """A linear layer with :func:`product`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, values: Tensor) -> Tensor:
        return product(self.linear, values)


class PatchProduct(nn.Module):
    """The convolution that embeds patches, as a product."""

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class GatedMlp(nn.Module):
    """A gated MLP whose gate and value come out of one product, side by side."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([gate.weight, up.weight]))
        self.bias = None if gate.bias is None else nn.Parameter(torch.cat([gate.bias, up.bias]))
        self.down = down

    def forward(self, hidden: Tensor) -> Tensor:
        grown = torch.matmul(hidden, self.weight.t())
        if self.bias is not None:
            grown = grown + self.bias
        gate, value = grown.chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


def reorder(model: PreTrainedModel) -> None:
    """Have a VLM of transformers add up as our layers do; in place, the numbers are the same but for rounding."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            parts = dict(child.named_children())
            if {"gate_proj", "up_proj", "down_proj"} <= parts.keys() and isinstance(parts["gate_proj"], nn.Linear):
                gate, up, down = (parts[f"{part}_proj"] for part in ("gate", "up", "down"))
                assert isinstance(gate, nn.Linear)
                assert isinstance(up, nn.Linear)
                module.register_module(name, GatedMlp(gate, up, down))
            elif isinstance(child, nn.Conv3d):
                module.register_module(name, PatchProduct(child))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.bias is not None and not isinstance(module, BiasBehind):
                module.register_module(name, BiasBehind(child))
