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
from megatron_unimm.convert.families import family_of
from megatron_unimm.convert.folders import VISION_HEAD
from megatron_unimm.convert.import_ import read_mapped
from megatron_unimm.convert.progress import progress
from megatron_unimm.convert.reader import HfFolder, read_added_tokens, read_config
from megatron_unimm.convert.table import expand


@dataclass(frozen=True)
class Weights:
    """A model's tensors under their Megatron names: how large each is, and how to read one."""

    nbytes: dict[str, int]
    read: Callable[[str], Tensor]


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
                difference = _difference(left.read(name), right.read(name))
                if difference:
                    differences.append(f"{name}: {difference}")
                advance(left.nbytes[name])
    return VerifyReport(len(common), sum(left.nbytes[name] for name in common), tuple(differences))


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
        if (path / "config.json").is_file() and not (path / MARKER).is_file():
            yield _hf_weights(path, stack)
        else:
            yield _checkpoint_weights(path, stack)


def _checkpoint_weights(path: Path, stack: ExitStack) -> Weights:
    manifest = read_manifest(path)
    check_files(path, manifest, manifest.files)
    reader = stack.enter_context(Reader(path))
    nbytes = {key: entry.nbytes for key, entry in reader.tensors.items() if not key.startswith(OPTIMIZER)}
    return Weights(nbytes, reader.read)


def _hf_weights(path: Path, stack: ExitStack) -> Weights:
    config = read_config(path)
    family = family_of(config, str(path / "config.json"))
    model = family.to_model_config(config, read_added_tokens(path))
    mappings = {mapping.megatron: mapping for mapping in expand(family.rows(model))}
    folder = stack.enter_context(HfFolder(path, family.hub_name))
    folder.check(list(mappings.values()), family.tied(model))
    nbytes = {key: sum(folder.tensors[name].nbytes for name in mapping.names) for key, mapping in mappings.items()}
    if not (path / VISION_HEAD).is_dir():
        return Weights(nbytes, lambda key: read_mapped(folder, mappings[key]))
    head = stack.enter_context(HfFolder(path / VISION_HEAD))
    nbytes |= {f"{VISION_HEAD}.{name}": info.nbytes for name, info in head.tensors.items()}

    def read(key: str) -> Tensor:
        return read_mapped(folder, mappings[key]) if key in mappings else head.read(key.removeprefix(VISION_HEAD + "."))

    return Weights(nbytes, read)
