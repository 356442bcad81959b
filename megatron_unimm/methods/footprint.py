"""What a model chunk of a method's stage asks of a rank, worked out from the configuration alone: what a plan is made
of. The formulas are those of ``models/memory.py`` and ``models/flops.py``; a method says which of its parts are where.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.models.flops import Work
from megatron_unimm.models.memory import Kept, Spread, Weights


@dataclass(frozen=True)
class Flops:
    """Of one row, over all ranks that share it, by what GPUs do them with different efficiency."""

    products: float = 0.0
    """Dense products with weights."""
    experts: float = 0.0
    """Products with weights of routed experts."""
    attention: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.products + other.products, self.experts + other.experts, self.attention + other.attention)

    @property
    def total(self) -> float:
        return self.products + self.experts + self.attention

    @classmethod
    def forward(cls, work: Work, expert_share: float = 0.0) -> "Flops":
        """Of a part's forward pass.

        Args:
            expert_share: how much of its products are experts'.
        """
        return cls(work.products * (1 - expert_share), work.products * expert_share, work.attention)

    @classmethod
    def backward(cls, work: Work, trains: bool, passes_gradient: bool, expert_share: float = 0.0) -> "Flops":
        """Of its backward pass; arguments as of :meth:`Work.cost`, of which this and the forward pass are the whole."""
        products = work.products * (trains + passes_gradient)
        attention = work.attention * (2 if trains or passes_gradient else 0)
        return cls(products * (1 - expert_share), products * expert_share, attention)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends for one row, by group."""

    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.tensor + other.tensor, self.context + other.context, self.expert + other.expert)

    def times(self, count: float) -> "Traffic":
        return Traffic(self.tensor * count, self.context * count, self.expert * count)


@dataclass(frozen=True)
class ChunkPlace:
    """Which part of the model a chunk is."""

    first: bool
    last: bool
    layers: range
    """Of the trunk, zero-based."""

    @property
    def whole(self) -> bool:
        """There is no pipeline."""
        return self.first and self.last


@dataclass(frozen=True)
class ChunkFootprint:
    """A chunk, and one row on it."""

    trained: Weights
    frozen: Weights
    """Frozen parts, companions included."""
    companions: Weights
    """Of these, copies beside the model: teacher, target tower, VAE."""
    kept: Mapping[str, Kept]
    """Activations by part: ``layers``, ``encoder``, ``loss``, ``received`` from and ``sent`` to other stages."""
    inputs: float
    """Bytes of a row's inputs on the device, where the rows of all micro-batches of a step are from its start."""
    largest_weight: int
    """Numbers of the largest weight that trains; its gradient comes in the computing dtype before it is added up."""
    forward: Flops
    backward: Flops
    again: Flops = Flops()
    """Of recompute."""
    forward_traffic: Traffic = Traffic()
    backward_traffic: Traffic = Traffic()

    @property
    def all_kept(self) -> Kept:
        return sum(self.kept.values(), Kept())


class Footprints(Protocol):
    """A method's side of planning."""

    def typical_row(
        self,
        stage: StageConfig,
        kinds: tuple[SampleKind, ...] | None = None,
        large: bool = False,
        pixels: bool = True,
    ) -> Any:
        """A row as the stage's data would fill it, see ``data/typical.py``.

        Args:
            kinds: only of these.
            large: images that are read have the largest size that the recipe allows.
            pixels: False leaves out what fills patches and pictures, where only their number matters.
        """
        ...

    def row_flops(self, stage: StageConfig, row: Any) -> float:
        """Model FLOPs of a row, forward and backward, over all ranks that share it."""
        ...

    def travelling_rows(self, stage: StageConfig) -> int:
        """As a method's; see ``methods/interface.py``."""
        ...

    def alike(self, stage: StageConfig, place: ChunkPlace) -> Hashable:
        """The same for chunks that ask the same."""
        ...

    def chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: Any) -> ChunkFootprint:
        """What a chunk asks."""
        ...


def exchanged(size: int) -> float:
    """Share of a tensor that a rank of a group of ``size`` sends when it is gathered, or summed and scattered, by a
    ring, or exchanged all to all."""
    return (size - 1) / size
