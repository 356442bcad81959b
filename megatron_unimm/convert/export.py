"""Megatron checkpoint to Hugging Face folder, tensor by tensor. Training checkpoints may be exported as they are."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_unimm.checkpoint.folder import HF_FOLDER
from megatron_unimm.checkpoint.manifest import (
    Manifest,
    check_files,
    hashed_file,
    read_manifest,
    remove_stale,
    sync_folder,
    temporary_name,
    write_bytes,
)
from megatron_unimm.checkpoint.torch_dist import INDEX as CHECKPOINT_INDEX
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.model import ModelConfig
from megatron_unimm.convert.families import family_named
from megatron_unimm.convert.folders import VISION_HEAD, check_target
from megatron_unimm.convert.progress import progress
from megatron_unimm.convert.reader import DTYPES, INDEX
from megatron_unimm.convert.table import Family, Mapping, expand
from megatron_unimm.convert.transforms import Copy, Shape
from megatron_unimm.errors import CheckpointError

OPTIMIZER = "optimizer."
"""Prefix of the optimizer's tensors in a training checkpoint."""
MAX_SHARD_BYTES = 5_000_000_000
"""As transformers splits."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEAD_README = """# Vision head

Maps a hidden state of the language model to the next visual token. It is no part of the Hugging Face model in the
folder above, which loads without it; `unimm convert import` takes it back in, and `unimm generate` uses it.
`config.json` says how it is built, `model.safetensors` holds its weights.
"""


@dataclass(frozen=True)
class Model:
    """What a checkpoint holds beside the optimizer: the family's model and the vision head."""

    family: Family
    config: ModelConfig
    mappings: list[Mapping]
    head: list[Mapping]
    head_config: dict[str, Any]


def export_checkpoint(ckpt_dir: Path, hf_dir: Path) -> None:
    """Make a Hugging Face folder of a Megatron checkpoint: ``from_pretrained`` loads it. Dtypes stay as they are.

    The vision head goes to ``vision_head/`` in the folder; optimizer state is left out.

    Raises:
        CheckpointError: the checkpoint is unfinished or damaged, holds another architecture than it says, or the target
            exists or has no room.
    """
    manifest = read_manifest(ckpt_dir)
    with Reader(ckpt_dir) as reader:
        model = describe(ckpt_dir, manifest, reader)
        mappings = [*model.mappings, *model.head]
        total = sum(reader.tensors[mapping.megatron].nbytes for mapping in mappings)
        check_target(hf_dir, total)
        check_files(ckpt_dir, manifest, _files_read(manifest, reader, mappings))
        temporary = temporary_name(hf_dir)
        remove_stale(hf_dir)
        temporary.mkdir(parents=True)
        with progress("export", total) as advance:
            for count in _write_weights(temporary, reader, model):
                advance(count)
    _write_companions(temporary, ckpt_dir, model, _dtype(reader, model.mappings))
    sync_folder(temporary)
    if hf_dir.exists():
        hf_dir.rmdir()  # check_target made sure that it is empty.
    temporary.rename(hf_dir)
    sync_folder(hf_dir.absolute().parent)


def describe(ckpt_dir: Path, manifest: Manifest, reader: Reader) -> Model:
    """What a checkpoint holds, compared tensor by tensor with what its manifest says it is.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape; names the first.
    """
    where, meta = str(ckpt_dir), manifest.meta
    family = family_named(meta.get("family"), where)
    config = ModelConfig.model_validate(meta["architecture"])
    mappings = expand(family.rows(config))
    for mapping in mappings:
        entry = reader.tensors.get(mapping.megatron)
        if entry is None:
            raise CheckpointError(where, f"has no tensor {mapping.megatron} {list(mapping.megatron_shape)}")
        if entry.shape != mapping.megatron_shape:
            raise CheckpointError(
                where,
                f"tensor {mapping.megatron} is {list(entry.shape)}, but its architecture makes it "
                f"{list(mapping.megatron_shape)}",
            )
    head = [_head_mapping(key, reader.tensors[key].shape) for key in sorted(reader.tensors) if _is_of(key, VISION_HEAD)]
    if head and VISION_HEAD not in meta:
        raise CheckpointError(where, f"holds a vision head, but its manifest has no meta.{VISION_HEAD}")
    known = {mapping.megatron for mapping in [*mappings, *head]}
    extra = sorted(key for key in reader.tensors if key not in known and not key.startswith(OPTIMIZER))
    if extra:
        raise CheckpointError(
            where, f"tensor {extra[0]} has no place in {family.architecture} ({len(extra)} such tensors)"
        )
    return Model(family, config, mappings, head, meta.get(VISION_HEAD) or {})


def _head_mapping(key: str, shape: Shape) -> Mapping:
    return Mapping(names=(key.removeprefix(VISION_HEAD + "."),), shapes=(shape,), megatron=key, transform=Copy())


def _is_of(key: str, part: str) -> bool:
    return key.startswith(part + ".")


def _files_read(manifest: Manifest, reader: Reader, mappings: Sequence[Mapping]) -> list[str]:
    """Files of the checkpoint that an export reads; those with nothing but optimizer state are not among them."""
    tensors = {chunk.file for mapping in mappings for chunk in reader.tensors[mapping.megatron].chunks}
    return sorted({CHECKPOINT_INDEX, *tensors, *(name for name in manifest.files if name.startswith(HF_FOLDER + "/"))})


# ---------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Output:
    """A Hugging Face tensor to write: part ``number`` of what a Megatron tensor becomes."""

    mapping: Mapping
    number: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.mapping.names[self.number]

    @property
    def shape(self) -> Shape:
        return self.mapping.shapes[self.number]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _write_weights(folder: Path, reader: Reader, model: Model) -> Iterator[int]:
    """Write all safetensors files, yielding the bytes of each tensor as it is done."""
    shards = _shards(_outputs(reader, model.mappings))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard}
        index = {
            "metadata": {"total_size": sum(output.nbytes for shard in shards for output in shard)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_bytes(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    for name, shard in zip(names, shards, strict=True):
        yield from write_safetensors(folder / name, shard, reader)
    if model.head:
        head_dir = folder / VISION_HEAD
        head_dir.mkdir()
        yield from write_safetensors(head_dir / "model.safetensors", _outputs(reader, model.head), reader)
        write_bytes(head_dir / "config.json", (json.dumps(model.head_config, indent=2) + "\n").encode())
        write_bytes(head_dir / "README.md", HEAD_README.encode())
        sync_folder(head_dir)


def _outputs(reader: Reader, mappings: Sequence[Mapping]) -> list[Output]:
    return [Output(m, number, reader.tensors[m.megatron].dtype) for m in mappings for number in range(len(m.names))]


def _shards(outputs: Sequence[Output]) -> list[list[Output]]:
    """Split in order; a tensor larger than a shard gets one to itself."""
    shards: list[list[Output]] = [[]]
    room = MAX_SHARD_BYTES
    for output in outputs:
        if shards[-1] and output.nbytes > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(output)
        room -= output.nbytes
    return shards


def write_safetensors(path: Path, outputs: Sequence[Output], reader: Reader) -> Iterator[int]:
    """Write one file: the header, then the tensors one by one. Yields the bytes of each."""
    # Wide dtypes first, so that every tensor is aligned to its own size.
    ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    with hashed_file(path) as stream:
        stream.write(_header(ordered))
        last: Mapping | None = None
        parts: tuple[Tensor, ...] = ()
        for output in ordered:
            if output.mapping is not last:
                parts = output.mapping.transform.inverse(reader.read(output.mapping.megatron))
                last = output.mapping
            part = parts[output.number]
            assert tuple(part.shape) == output.shape, (output.name, part.shape, output.shape)
            stream.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            yield output.nbytes


def _header(outputs: Sequence[Output]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        end = offset + output.nbytes
        header[output.name] = {
            "dtype": DTYPE_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# ---------------------------------------------------------------------------------------------- other files


def _write_companions(folder: Path, ckpt_dir: Path, model: Model, dtype: torch.dtype) -> None:
    source = ckpt_dir / HF_FOLDER
    for path in sorted(source.iterdir()) if source.is_dir() else []:
        write_bytes(folder / path.name, path.read_bytes())
    path = folder / "config.json"
    text = path.read_text() if path.exists() else json.dumps(model.family.to_hf_config(model.config), indent=2)
    write_bytes(path, _with_dtype(text, dtype).encode())


def _with_dtype(text: str, dtype: torch.dtype) -> str:
    """``config.json`` with the dtype of the weights; byte for byte as it was where that is right already."""
    config: dict[str, Any] = json.loads(text)
    name = str(dtype).removeprefix("torch.")
    stale = [section for section in (config, config.get("text_config"), config.get("vision_config")) if section]
    keys = [(section, key) for section in stale for key in ("dtype", "torch_dtype") if key in section]
    if keys and all(section[key] == name for section, key in keys):
        return text
    for section, key in keys or [(config, "torch_dtype")]:
        section[key] = name
    return json.dumps(config, indent=2) + "\n"


def _dtype(reader: Reader, mappings: Sequence[Mapping]) -> torch.dtype:
    """The dtype that most of the weights have."""
    counts: dict[torch.dtype, int] = {}
    for mapping in mappings:
        entry = reader.tensors[mapping.megatron]
        counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
    return max(counts, key=lambda dtype: counts[dtype])
