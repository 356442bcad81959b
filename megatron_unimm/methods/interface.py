"""What the shared loop asks of a method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_unimm.config.rl import FlowGrpoConfig
from megatron_unimm.data.chat import ChatFormat
from megatron_unimm.data.conditions import ConditionStore
from megatron_unimm.data.features import FeatureStore
from megatron_unimm.data.sources.source import Source
from megatron_unimm.data.workers import SampleWork
from megatron_unimm.methods.stage_model import StageModel


@dataclass(frozen=True)
class DataSetup:
    """What a method makes its samples of."""

    sources: Mapping[str, Source]
    chat: Callable[[], ChatFormat]
    """Reads the tokenizer, which not every method needs."""
    features: FeatureStore | None = None
    """Of images, computed beforehand."""
    latents: FeatureStore | None = None
    """Of pictures, computed beforehand."""
    conditions: ConditionStore | None = None
    """What a VLM says of conversations, computed beforehand."""


class Method(Protocol):
    """A paper's method, set up for one stage on one rank."""

    terms: tuple[str, ...]
    """Names of the loss terms, in the order in which a model's forward returns their sums. One with a ``/`` in its name
    is a part of another, for monitoring."""
    weights: tuple[float, ...]
    """Weight of each term in the total."""

    def build(self, virtual_stage: int, with_base: bool = True) -> StageModel:
        """This rank's model chunk; its forward maps a batch to the next chunk's input or, on the last, to float32
        ``[terms]`` sums.

        Args:
            with_base: hold the frozen companions (teacher, target tower) too, which generating does without.
        """
        ...

    def batch(self, row: Any, model: Any, device: torch.device) -> Any:
        """A packed row on the device, for one model chunk."""
        ...

    def counts(self, rows: Sequence[Any]) -> list[int]:
        """What each term's sum over these rows is divided by."""
        ...

    def travelling_rows(self) -> int:
        """How many rows of hidden states travel between pipeline stages for a micro-batch, over all ranks of a
        stage."""
        ...

    def base_parts(self) -> dict[str, Path]:
        """The imported checkpoint that each frozen companion comes from."""
        ...

    def model_parts(self) -> dict[str, Path]:
        """Checkpoints of parts of the model (a tensor's first word) that the stage before may lack as a whole."""
        ...

    def work(self, data: DataSetup) -> SampleWork:
        """What is done to samples before they are rows."""
        ...

    def row_flops(self, row: Any) -> float:
        """Model FLOPs of a row, forward and backward, over all ranks that share it."""
        ...

    def sample_flops(self, sample: Any) -> float:
        """What a sample costs beyond its tokens' share of a row."""
        ...

    def part_configs(self) -> dict[str, Any]:
        """How parts that no Hugging Face class has are built, by name: what exports write beside the model."""
        ...


@runtime_checkable
class ShowsText(Protocol):
    """A model chunk that lets monitoring see what text it predicts."""

    text_observer: Callable[[Tensor], None] | None
    """Where it is set, each forward pass hands it the text logits ``[n, vocab / tensor]`` of this rank's labels."""


@runtime_checkable
class LooksAtPictures(Protocol):
    """A method for which not only the first and the last stage of a pipeline read pictures."""

    def looks_here(self) -> bool:
        """Whether this rank's stage does too."""
        ...


@runtime_checkable
class ShowsRouting(Protocol):
    """A model chunk that lets monitoring see which layers its tokens take."""

    routing_observer: Callable[[Tensor], None] | None
    """Where it is set, each forward pass hands it weights ``[tokens, layers]`` of this rank's tokens."""


@runtime_checkable
class LearnsFromRewards(Protocol):
    """A method whose loader gives prompts, and whose training rows are made of what the model draws of them."""

    grpo: FlowGrpoConfig
