"""The declared table of a model family: which Hugging Face tensors make which Megatron tensor, for both directions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from megatron_unimm.config.base import Section
from megatron_unimm.convert.transforms import Copy, Shape, Transform

LAYER = "{layer}"
SLICE = "{slice}"


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor: its name as on the hub, where ``{layer}`` stands for the layer's number and ``{slice}``
    for the expert's, and its shape."""

    pattern: str
    shape: Shape


@dataclass(frozen=True)
class Row:
    """One line of the table, repeated for each of ``layers`` where its names have ``{layer}``.

    With ``num_slices`` (experts), the Megatron tensor has a leading axis of that length, and the transform works on one
    slice at a time, so that no more than one is in memory. The sources have that axis, too, or are tensors of one slice
    each, and their names have ``{slice}``.
    """

    sources: tuple[Source, ...]
    megatron: str
    transform: Transform
    layers: Sequence[int] | None = None
    """Their numbers on the hub."""
    first_layer: int = 0
    """Megatron's number of layer 0."""
    num_slices: int | None = None

    def __post_init__(self) -> None:
        names = [self.megatron, *(source.pattern for source in self.sources)]
        assert all((LAYER in name) == (self.layers is not None) for name in names), names
        if self.one_each:
            assert all(SLICE in source.pattern for source in self.sources), names
        elif self.num_slices is not None:
            assert all(source.shape[0] == self.num_slices for source in self.sources), names

    @property
    def one_each(self) -> bool:
        """Whether every slice has source tensors of its own."""
        return self.num_slices is not None and SLICE in self.sources[0].pattern


@dataclass(frozen=True)
class Mapping:
    """A row for one layer."""

    names: tuple[str, ...]
    """Where slices have sources of their own, those of the first, then those of the second, …"""
    shapes: tuple[Shape, ...]
    megatron: str
    transform: Transform
    num_slices: int | None = None
    one_each: bool = False

    @property
    def per_slice(self) -> int:
        """How many sources a slice has, where it has its own."""
        assert self.num_slices is not None
        return len(self.names) // self.num_slices

    @property
    def megatron_shape(self) -> Shape:
        """Shape of the Megatron tensor."""
        if self.num_slices is None:
            return self.transform.shape(self.shapes)
        of_one = self.shapes[: self.per_slice] if self.one_each else [shape[1:] for shape in self.shapes]
        return (self.num_slices, *self.transform.shape(of_one))

    def boxes(self) -> Iterator["Box"]:
        """The parts of the Megatron tensor that are worked on one at a time: all of it, or its slices."""
        shape = self.megatron_shape
        if self.num_slices is None:
            yield Box(self, None, (0,) * len(shape), shape)
            return
        yield from (self._box(number) for number in range(self.num_slices))

    def boxes_of(self, number: int) -> Iterator[tuple["Box", int]]:
        """The boxes that source ``number`` consists of, in order, and which of their sources it is."""
        if not self.one_each:
            yield from ((box, number) for box in self.boxes())
            return
        which, place = divmod(number, self.per_slice)
        yield self._box(which), place

    def _box(self, number: int) -> "Box":
        shape = self.megatron_shape
        return Box(self, number, (number, *(0,) * (len(shape) - 1)), (1, *shape[1:]))


@dataclass(frozen=True)
class Box:
    """A part of a Megatron tensor, and which slice of the sources it comes from (None: all of them)."""

    mapping: Mapping
    slice: int | None
    offset: Shape
    shape: Shape

    @property
    def sources(self) -> list[tuple[str, int | None]]:
        """Hugging Face tensors to read for it, and which slice of each (None: all of it)."""
        mapping = self.mapping
        if self.slice is None or not mapping.one_each:
            return [(name, self.slice) for name in mapping.names]
        first = self.slice * mapping.per_slice
        return [(name, None) for name in mapping.names[first : first + mapping.per_slice]]

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        """The part, from what :attr:`sources` names."""
        part = self.mapping.transform.forward(*sources)
        return part if self.slice is None else part[None]

    def inverse(self, part: Tensor) -> tuple[Tensor, ...]:
        """What :attr:`sources` names."""
        return self.mapping.transform.inverse(part if self.slice is None else part[0])


def same(name: str, shape: Shape, prefix: str) -> Mapping:
    """A tensor that both sides have, which Megatron's side calls ``prefix`` and its name."""
    return Mapping(names=(name,), shapes=(shape,), megatron=prefix + name, transform=Copy())


@dataclass(frozen=True)
class TiedTo:
    """A Hugging Face tensor that is another name for one of the table. Folders may hold it; it is never written."""

    name: str
    same_as: str


def _nothing(name: str) -> bool:
    return False


@dataclass(frozen=True)
class Family:
    """Everything that converting a kind of model takes."""

    name: str
    """What checkpoints record."""
    architectures: tuple[str, ...]
    """``architectures[0]`` of ``config.json`` (diffusers: ``_class_name``); the first is written where there never was
    one."""
    config_class: type[Section]
    """Our config of it."""
    to_config: Callable[[dict[str, Any], dict[str, int]], Any]
    """Reads ``config.json`` and the tokenizer's added tokens; raises CheckpointError on what we cannot build."""
    to_hf_config: Callable[[Any], dict[str, Any]]
    """Writes ``config.json`` for a model that never had one."""
    rows: Callable[[Any, str], Sequence[Row]]
    """The table of a model in one of the layouts."""
    tied: Callable[[Any], Sequence[TiedTo]] = lambda model: ()
    hub_name: Callable[[str], str] = str
    """Brings a name as some version of transformers writes it to the hub's form."""
    layouts: tuple[str, ...] = ("hub",)
    """Forms in which the same tensors are found in folders; the first is written where none was read."""
    carried: Callable[[str], bool] = _nothing
    """Whether a tensor, by its hub name, is kept for the way back though we do not build what it belongs to."""
    library: Literal["transformers", "diffusers"] = "transformers"
    """Whose folders these are: names of their files, and what ``config.json`` says of the weights."""
    folders: Callable[[Any], Sequence[str]] = lambda model: ("",)
    """Folders inside the model's that hold the weights; the names of their tensors begin with them (``vae/…``)."""

    def mappings(self, model: Any, layout: str) -> list[Mapping]:
        """The rows with their layers filled in, checked to name every tensor once."""
        return expand(self.rows(model, layout))

    def layout_of(self, model: Any, shapes: dict[str, Shape]) -> str:
        """The layout that a folder's tensors have: the one that most of them fit, the first of equals."""

        def fitting(layout: str) -> int:
            pairs = [pair for m in self.mappings(model, layout) for pair in zip(m.names, m.shapes, strict=True)]
            return sum(shapes.get(name) == shape for name, shape in pairs)

        return max(self.layouts, key=fitting)


def expand(rows: Sequence[Row]) -> list[Mapping]:
    """The rows with their layers filled in, checked to name every tensor once."""
    mappings = [_fill_in(row, layer) for row in rows for layer in ((0,) if row.layers is None else row.layers)]
    for names in ([name for m in mappings for name in m.names], [m.megatron for m in mappings]):
        assert len(set(names)) == len(names), "a tensor is named twice in the table"
    return mappings


def _fill_in(row: Row, layer: int) -> Mapping:
    slices = range(row.num_slices) if row.one_each and row.num_slices is not None else range(1)
    sources = [(each.pattern.replace(SLICE, str(number)), each.shape) for number in slices for each in row.sources]
    return Mapping(
        names=tuple(pattern.replace(LAYER, str(layer)) for pattern, _ in sources),
        shapes=tuple(shape for _, shape in sources),
        megatron=row.megatron.replace(LAYER, str(row.first_layer + layer)),
        transform=row.transform,
        num_slices=row.num_slices,
        one_each=row.one_each,
    )
