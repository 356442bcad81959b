"""A Hugging Face folder of safetensors, checked before anything is read, and read tensor by tensor.

Pickled weights (``.bin``, ``.pt``) are refused: unpickling runs code that came with the file.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_unimm.convert.table import Mapping, TiedTo
from megatron_unimm.convert.transforms import Shape
from megatron_unimm.errors import CheckpointError

WEIGHTS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}
"""What each library calls files of weights."""
INDEX_SUFFIX = ".safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a safetensors file."""

    file: Path
    name: str
    shape: Shape
    dtype: torch.dtype
    nbytes: int


class HfFolder(AbstractContextManager["HfFolder"]):
    """The tensors of a folder under their hub names. Nothing is read before :meth:`read`.

    Args:
        subfolders: where the files lie; names begin with that (``vae/…``).

    Raises:
        CheckpointError: no safetensors, a file that is absent or cut off, or a name that occurs twice.
    """

    def __init__(self, folder: Path, hub_name: Callable[[str], str] = str, subfolders: Sequence[str] = ("",)) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        for subfolder in subfolders:
            prefix = subfolder and f"{subfolder}/"
            for file in weight_files(folder / subfolder):
                for info in read_header(file):
                    self._add(prefix + hub_name(info.name), info)
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def _add(self, name: str, info: TensorInfo) -> None:
        if name in self.tensors:
            raise CheckpointError(str(info.file), f"tensor {name} occurs twice, also in {self.tensors[name].file.name}")
        self.tensors[name] = info

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._open.clear()

    def read(self, name: str, number: int | None = None) -> Tensor:
        """One tensor, or slice ``number`` of its leading axis."""
        info = self.tensors[name]
        if info.file not in self._open:
            # Read rather than mapped: a file that is not in memory yet comes three times faster so.
            file = safe_open(info.file, framework="pt", device="cpu", backend="pread")
            self._open[info.file] = self._stack.enter_context(file)
        if number is not None:
            return self._open[info.file].get_slice(info.name)[number]
        return self._open[info.file].get_tensor(info.name)

    def check(
        self, mappings: Sequence[Mapping], tied: Sequence[TiedTo], carried: Callable[[str], bool] = lambda name: False
    ) -> None:
        """Compare with a family's table.

        Raises:
            CheckpointError: a tensor is missing, left over, or of another shape; names the first.
        """
        expected = {name: shape for m in mappings for name, shape in zip(m.names, m.shapes, strict=True)}
        where = str(self.folder)
        for name, shape in expected.items():
            info = self.tensors.get(name)
            if info is None:
                raise CheckpointError(where, f"tensor {name} {list(shape)} is missing; is the download complete?")
            if info.shape != shape:
                raise CheckpointError(
                    str(info.file), f"tensor {name} is {list(info.shape)}, but config.json makes it {list(shape)}"
                )
        for mapping in mappings:
            dtypes = {self.tensors[name].dtype for name in mapping.names}
            if len(dtypes) > 1:
                raise CheckpointError(
                    where, f"tensors {', '.join(mapping.names)} have several dtypes: {sorted(map(str, dtypes))}"
                )
        self._check_tied(tied)
        extra = self.tensors.keys() - expected.keys() - {entry.name for entry in tied}
        extra = sorted(name for name in extra if not carried(name))
        if extra:
            raise CheckpointError(
                where,
                f"tensor {extra[0]} {list(self.tensors[extra[0]].shape)} has no place in the model ({len(extra)} such)",
            )

    def _check_tied(self, tied: Sequence[TiedTo]) -> None:
        """A tied tensor that is stored all the same must hold the same numbers, or something would get lost."""
        for entry in tied:
            if entry.name in self.tensors and not torch.equal(self.read(entry.name), self.read(entry.same_as)):
                raise CheckpointError(
                    str(self.folder),
                    f"config.json ties {entry.name} to {entry.same_as}, but they differ; set tie_word_embeddings",
                )


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder.

    Raises:
        CheckpointError: absent or not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(str(folder), "has no config.json; name a Hugging Face model folder")
    return read_json(path)


def read_added_tokens(folder: Path) -> dict[str, int]:
    """Special tokens of ``tokenizer.json`` and their numbers; none where the folder has no such file.

    Raises:
        CheckpointError: it is not JSON.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    return {token["content"]: token["id"] for token in read_json(path).get("added_tokens", [])}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is none.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(str(path), f"is no JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(str(path), "is no JSON object; download it again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
        CheckpointError: there are none, or one that the index names is absent.
    """
    if not folder.is_dir():
        raise CheckpointError(str(folder), "there is no such folder; check the path")
    for name in WEIGHTS.values():
        if (folder / f"{name}{INDEX_SUFFIX}").is_file():
            return _files_of_index(folder / f"{name}{INDEX_SUFFIX}")
    single = folder / f"{WEIGHTS['diffusers']}.safetensors"
    if single.is_file():  # Beside it may lie the same weights in another precision (….fp16.safetensors).
        return [single]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(True for pattern in PICKLES for _ in folder.glob(pattern)):
        raise CheckpointError(
            str(folder), "has pickled weights only, which can run code; take the safetensors files instead"
        )
    raise CheckpointError(str(folder), "has no safetensors file; is the download complete?")


def _files_of_index(index: Path) -> list[Path]:
    folder, where = index.parent, str(index)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(where, f"is no index of safetensors files ({error}); download it again") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(where, f"names {name!r}, which is no safetensors file of this folder")
        if not (folder / name).is_file():
            raise CheckpointError(str(folder / name), "is missing; is the download complete?")
    return [folder / name for name in names]


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of a safetensors file, from its header.

    Raises:
        CheckpointError: the file is no safetensors file, or is cut off.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                str(file), f"has no safetensors header in its {size} bytes; is the download complete?"
            )
        text = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        tensors = [_tensor_info(file, name, entry) for name, entry in header.items()]
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(file), f"has a damaged safetensors header ({error!r}); download it again") from error
    if size != end:
        raise CheckpointError(str(file), f"has {size} bytes instead of {end}; is the download complete?")
    return tensors


def _tensor_info(file: Path, name: str, entry: dict[str, Any]) -> TensorInfo:
    start, end = entry["data_offsets"]
    return TensorInfo(
        file=file, name=name, shape=tuple(entry["shape"]), dtype=DTYPES[entry["dtype"]], nbytes=end - start
    )
