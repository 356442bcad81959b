"""What the shared loop asks of a method."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_unimm.data.sample import PackedRow


class Method(Protocol):
    """A paper's method, set up for one stage on one rank."""

    terms: tuple[str, ...]
    """Names of the loss terms, in the order in which a model's forward returns their sums."""
    weights: tuple[float, ...]
    """Weight of each term in the total."""

    def build(self, virtual_stage: int, with_base: bool = True) -> MegatronModule:
        """This rank's model chunk; its forward maps a batch to the next chunk's input or, on the last, to float32
        ``[terms]`` sums.

        Args:
            with_base: hold the frozen companions (teacher, target tower) too, which generating does without.
        """
        ...

    def batch(self, row: PackedRow, model: Any, device: torch.device) -> Any:
        """A packed row on the device, for one model chunk."""
        ...

    def counts(self, rows: Sequence[PackedRow]) -> list[int]:
        """What each term's sum over these rows is divided by."""
        ...

    def streams(self) -> int:
        """How many sequences travel between pipeline stages side by side (a teacher's, deepstack levels)."""
        ...


@runtime_checkable
class ShowsText(Protocol):
    """A model chunk that lets monitoring see what text it predicts."""

    text_observer: Callable[[Tensor], None] | None
    """Where it is set, each forward pass hands it the text logits ``[n, vocab / tensor]`` of this rank's labels."""
