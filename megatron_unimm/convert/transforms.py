"""How tensors of one layout become those of another: typed, shape-checked and exact in both directions.

Each transform maps a fixed number of Hugging Face tensors to one Megatron tensor (``forward``) and back (``inverse``).
They only reorder numbers, so that a round trip is bit-identical in any dtype.

Legend  h hidden size, n attention heads, g key/value heads (groups), d head size, m MLP width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Transform(Protocol):
    """A lossless change of layout."""

    def shape(self, sources: Sequence[Shape]) -> Shape:
        """Shape of the Megatron tensor, from those of the Hugging Face tensors."""
        ...

    def forward(self, *sources: Tensor) -> Tensor:
        """Hugging Face to Megatron."""
        ...

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Megatron to Hugging Face; views where possible."""
        ...


@dataclass(frozen=True)
class Copy:
    """The same tensor on both sides."""

    def shape(self, sources: Sequence[Shape]) -> Shape:
        (source,) = sources
        return source

    def forward(self, *sources: Tensor) -> Tensor:
        (source,) = sources
        return source

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,)


@dataclass(frozen=True)
class QkvInterleave:
    """q [n d, ...], k and v [g d, ...] to mcore's linear_qkv [g (n/g + 2) d, ...]: each group's queries, key, value."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def _queries(self) -> int:
        """Query heads per group."""
        return self.num_heads // self.num_kv_heads

    def shape(self, sources: Sequence[Shape]) -> Shape:
        return (self.num_kv_heads * (self._queries + 2) * self.head_size, *sources[0][1:])

    def forward(self, *sources: Tensor) -> Tensor:
        q, k, v = sources
        rest = q.shape[1:]
        grouped = [
            q.reshape(self.num_kv_heads, self._queries * self.head_size, *rest),
            k.reshape(self.num_kv_heads, self.head_size, *rest),
            v.reshape(self.num_kv_heads, self.head_size, *rest),
        ]
        return torch.cat(grouped, dim=1).reshape(-1, *rest)

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        rest = tensor.shape[1:]
        grouped = tensor.reshape(self.num_kv_heads, (self._queries + 2) * self.head_size, *rest)
        parts = grouped.split([self._queries * self.head_size, self.head_size, self.head_size], dim=1)
        return tuple(part.reshape(-1, *rest) for part in parts)


@dataclass(frozen=True)
class FusedQkv:
    """qkv stored as [(n + 2 g) d, ...] (all q, all k, all v) to mcore's linear_qkv [g (n/g + 2) d, ...]."""

    parts: QkvInterleave

    @property
    def _rows(self) -> list[int]:
        parts = self.parts
        return [heads * parts.head_size for heads in (parts.num_heads, parts.num_kv_heads, parts.num_kv_heads)]

    def shape(self, sources: Sequence[Shape]) -> Shape:
        (source,) = sources
        return source

    def forward(self, *sources: Tensor) -> Tensor:
        (source,) = sources
        return self.parts.forward(*source.split(self._rows))

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(self.parts.inverse(tensor)),)


@dataclass(frozen=True)
class GateUp:
    """gate and up [m, ...] to mcore's linear_fc1 [2 m, ...]: gate above up."""

    def shape(self, sources: Sequence[Shape]) -> Shape:
        gate, _ = sources
        return (2 * gate[0], *gate[1:])

    def forward(self, *sources: Tensor) -> Tensor:
        gate, up = sources
        return torch.cat([gate, up])

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(2)


@dataclass(frozen=True)
class Transpose:
    """A matrix [m, h] to [h, m]: products are stored input first on one side and output first on the other."""

    def shape(self, sources: Sequence[Shape]) -> Shape:
        (source,) = sources
        return source[::-1]

    def forward(self, *sources: Tensor) -> Tensor:
        (source,) = sources
        return source.T

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor.T,)


@dataclass(frozen=True)
class ConvToLinear:
    """A convolution whose stride is its kernel, [h, *kernel], to the linear layer [h, product of the kernel].

    ``kernel`` has the input's channels first: (channels, t, p, p) or (channels, p, p).
    """

    kernel: Shape

    def shape(self, sources: Sequence[Shape]) -> Shape:
        (source,) = sources
        return (source[0], math.prod(self.kernel))

    def forward(self, *sources: Tensor) -> Tensor:
        (source,) = sources
        return source.reshape(source.shape[0], -1)

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor.reshape(-1, *self.kernel),)


@dataclass(frozen=True)
class ChannelsFirst:
    """A linear layer over patches stored pixel by pixel, [h, p p channels], to one channel by channel,
    [h, channels p p]."""

    channels: int

    def shape(self, sources: Sequence[Shape]) -> Shape:
        (source,) = sources
        return source

    def forward(self, *sources: Tensor) -> Tensor:
        (source,) = sources
        return source.reshape(source.shape[0], -1, self.channels).transpose(1, 2).reshape(source.shape)

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor.reshape(tensor.shape[0], self.channels, -1).transpose(1, 2).reshape(tensor.shape),)


@dataclass(frozen=True)
class ChannelsFirstOutput:
    """Outputs of a linear layer that are a patch stored pixel by pixel, [p p channels, ...], to one channel by channel,
    [channels p p, ...]."""

    channels: int

    def shape(self, sources: Sequence[Shape]) -> Shape:
        (source,) = sources
        return source

    def forward(self, *sources: Tensor) -> Tensor:
        (source,) = sources
        return source.reshape(-1, self.channels, *source.shape[1:]).transpose(0, 1).reshape(source.shape)

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor.reshape(self.channels, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape),)


@dataclass(frozen=True)
class KvInterleave:
    """k and v [n d, ...] to a linear layer [n 2 d, ...]: key and value of each head."""

    num_heads: int

    def shape(self, sources: Sequence[Shape]) -> Shape:
        key, _ = sources
        return (2 * key[0], *key[1:])

    def forward(self, *sources: Tensor) -> Tensor:
        heads = [source.reshape(self.num_heads, -1, *source.shape[1:]) for source in sources]
        return torch.cat(heads, dim=1).flatten(0, 1)

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        heads = tensor.reshape(self.num_heads, -1, *tensor.shape[1:])
        return tuple(part.flatten(0, 1) for part in heads.chunk(2, dim=1))


@dataclass(frozen=True)
class ValueGatePairs:
    """[2 m, ...] (all values, all gates) to [m 2, ...]: value and gate of each channel."""

    def shape(self, sources: Sequence[Shape]) -> Shape:
        (source,) = sources
        return source

    def forward(self, *sources: Tensor) -> Tensor:
        (source,) = sources
        return source.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1),)


@dataclass(frozen=True)
class Chain:
    """One tensor through several transforms."""

    parts: tuple[Transform, ...]

    def shape(self, sources: Sequence[Shape]) -> Shape:
        (shape,) = sources
        for part in self.parts:
            shape = part.shape([shape])
        return shape

    def forward(self, *sources: Tensor) -> Tensor:
        (tensor,) = sources
        for part in self.parts:
            tensor = part.forward(tensor)
        return tensor

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        for part in reversed(self.parts):
            (tensor,) = part.inverse(tensor)
        return (tensor,)


@dataclass(frozen=True)
class Squeeze:
    """[1, ...] to [...]: a tensor that is stored with a batch axis."""

    def shape(self, sources: Sequence[Shape]) -> Shape:
        (source,) = sources
        return source[1:]

    def forward(self, *sources: Tensor) -> Tensor:
        (source,) = sources
        return source[0]

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor[None],)
