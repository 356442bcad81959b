"""The declared table of a model family: which Hugging Face tensors make which Megatron tensor, for both directions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_unimm.config.model import ModelConfig
from megatron_unimm.convert.transforms import Shape, Transform

LAYER = "{layer}"


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor: its name as on the hub, where ``{layer}`` stands for the layer's number, and its shape."""

    pattern: str
    shape: Shape


@dataclass(frozen=True)
class Row:
    """One line of the table, repeated for each of ``num_layers`` layers where its names have ``{layer}``."""

    sources: tuple[Source, ...]
    megatron: str
    transform: Transform
    num_layers: int | None = None

    def __post_init__(self) -> None:
        names = [self.megatron, *(source.pattern for source in self.sources)]
        assert all((LAYER in name) == (self.num_layers is not None) for name in names), names


@dataclass(frozen=True)
class Mapping:
    """A row for one layer."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    megatron: str
    transform: Transform

    @property
    def megatron_shape(self) -> Shape:
        """Shape of the Megatron tensor."""
        return self.transform.shape(self.shapes)


@dataclass(frozen=True)
class TiedTo:
    """A Hugging Face tensor that is another name for one of the table. Folders may hold it; it is never written."""

    name: str
    same_as: str


@dataclass(frozen=True)
class Family:
    """Everything that converting a kind of model takes."""

    name: str
    """What checkpoints record."""
    architecture: str
    """``architectures[0]`` of ``config.json``."""
    to_model_config: Callable[[dict[str, Any], dict[str, int]], ModelConfig]
    """Reads ``config.json`` and the tokenizer's added tokens; raises CheckpointError on what we cannot build."""
    to_hf_config: Callable[[ModelConfig], dict[str, Any]]
    """Writes ``config.json`` for a model that never had one."""
    rows: Callable[[ModelConfig], Sequence[Row]]
    tied: Callable[[ModelConfig], Sequence[TiedTo]]
    hub_name: Callable[[str], str]
    """Brings a name as some version of transformers writes it to the hub's form."""


def expand(rows: Sequence[Row]) -> list[Mapping]:
    """The rows with their layers filled in, checked to name every tensor once."""
    mappings = [
        _fill_in(row, layer) for row in rows for layer in range(1 if row.num_layers is None else row.num_layers)
    ]
    for names in ([name for m in mappings for name in m.names], [m.megatron for m in mappings]):
        assert len(set(names)) == len(names), "a tensor is named twice in the table"
    return mappings


def _fill_in(row: Row, layer: int) -> Mapping:
    return Mapping(
        names=tuple(source.pattern.replace(LAYER, str(layer)) for source in row.sources),
        shapes=tuple(source.shape for source in row.sources),
        megatron=row.megatron.replace(LAYER, str(layer)),
        transform=row.transform,
    )
