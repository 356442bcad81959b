"""Whether two models are the same, number by number: each a Hugging Face folder or a Megatron checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_unimm.checkpoint.manifest import MARKER, check_files, read_manifest
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.convert.export import OPTIMIZER
from megatron_unimm.convert.pipeline import is_model_folder
from megatron_unimm.convert.progress import progress
from megatron_unimm.convert.source import HfModel

Place = tuple[str, int | None]
"""A Megatron tensor's name, and which slice of it where it is worked on in slices."""


@dataclass(frozen=True)
class Weights:
    """A model's tensors under their Megatron names: how large each is, and how to read a part of one."""

    nbytes: dict[str, int]
    slices: dict[str, int]
    """Of tensors that are better read in parts, the length of the leading axis."""
    read: Callable[[Place], Tensor]

    def parts(self, name: str) -> list[Place]:
        """What to read of a tensor, one after another."""
        count = self.slices.get(name)
        return [(name, None)] if count is None else [(name, number) for number in range(count)]


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` compared."""

    tensors: int
    """Tensors that both have."""
    bytes: int
    """Size of those tensors, once."""
    differences: tuple[str, ...]
    """One line per tensor that differs, or that one side lacks."""

    @property
    def identical(self) -> bool:
        """Whether both hold the same tensors, bit for bit."""
        return not self.differences


def verify(a: Path, b: Path) -> VerifyReport:
    """Compare the weights of two models bit by bit; optimizer state is left out. A checkpoint's files are hashed too.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    differences: list[str] = []
    with open_weights(a) as left, open_weights(b) as right:
        for name in sorted(left.nbytes.keys() ^ right.nbytes.keys()):
            differences.append(f"{name} is only in {a if name in left.nbytes else b}")
        common = [name for name in left.nbytes if name in right.nbytes]
        with progress("verify", sum(left.nbytes[name] for name in common)) as advance:
            for name in common:
                difference = _first_difference(left, right, name)
                if difference:
                    differences.append(f"{name}: {difference}")
                advance(left.nbytes[name])
    return VerifyReport(len(common), sum(left.nbytes[name] for name in common), tuple(differences))


def _first_difference(left: Weights, right: Weights, name: str) -> str:
    places = left if name in left.slices else right
    for place in places.parts(name):
        difference = _difference(left.read(place), right.read(place))
        if difference:
            return difference if place[1] is None else f"slice {place[1]}: {difference}"
    return ""


def _difference(left: Tensor, right: Tensor) -> str:
    """How two tensors differ, or ""."""
    if left.shape != right.shape:
        return f"{list(left.shape)} and {list(right.shape)}"
    if left.dtype != right.dtype:
        return f"{left.dtype} and {right.dtype}, largest difference {_largest(left, right):.3g}"
    # Bits rather than values, so that NaN equals itself and -0.0 differs from 0.0.
    if torch.equal(_bits(left), _bits(right)):
        return ""
    return f"largest difference {_largest(left, right):.3g}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _largest(left: Tensor, right: Tensor) -> float:
    return (left.double() - right.double()).abs().max().item()


@contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """Open a finished Megatron checkpoint or a Hugging Face folder.

    Raises:
        CheckpointError: it is neither, or damaged.
    """
    with ExitStack() as stack:
        if is_model_folder(path) and not (path / MARKER).is_file():
            yield _hf_weights(path, stack)
        else:
            yield _checkpoint_weights(path, stack)


def _checkpoint_weights(path: Path, stack: ExitStack) -> Weights:
    manifest = read_manifest(path)
    check_files(path, manifest, manifest.files)
    reader = stack.enter_context(Reader(path))
    nbytes = {key: entry.nbytes for key, entry in reader.tensors.items() if not key.startswith(OPTIMIZER)}

    def read(place: Place) -> Tensor:
        name, number = place
        return reader.read(name) if number is None else reader.read_slice(name, number)

    return Weights(nbytes, {}, read)


def _hf_weights(path: Path, stack: ExitStack) -> Weights:
    entries = {entry.mapping.megatron: entry for entry in stack.enter_context(HfModel(path)).entries}
    boxes = {name: list(entry.mapping.boxes()) for name, entry in entries.items()}

    def read(place: Place) -> Tensor:
        name, number = place
        if number is None and len(boxes[name]) > 1:
            return torch.cat([entries[name].read(box) for box in boxes[name]])
        return entries[name].read(boxes[name][number or 0])

    return Weights(
        nbytes={
            name: sum(entry.folder.tensors[source].nbytes for source in entry.mapping.names)
            for name, entry in entries.items()
        },
        slices={name: count for name, entry in entries.items() if (count := entry.mapping.num_slices) is not None},
        read=read,
    )
