"""Megatron checkpoint to Hugging Face folder, tensor by tensor. Training checkpoints may be exported as they are."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_unimm.checkpoint.folder import AVERAGE_PREFIX, HF_FOLDER, hf_files_in
from megatron_unimm.checkpoint.manifest import (
    Manifest,
    check_files,
    read_manifest,
    remove_stale,
    sync_file,
    sync_folder,
    temporary_name,
    write_bytes,
)
from megatron_unimm.checkpoint.torch_dist import INDEX as CHECKPOINT_INDEX
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.base import Section
from megatron_unimm.convert.families import family_named
from megatron_unimm.convert.folders import PART_README, PARTS, check_target, nothing_half_written
from megatron_unimm.convert.pipeline import CONFIG, PIPELINE, config_files
from megatron_unimm.convert.progress import progress
from megatron_unimm.convert.reader import DTYPES, INDEX_SUFFIX, WEIGHTS
from megatron_unimm.convert.table import CARRIED, Box, Family, Mapping, same
from megatron_unimm.convert.transforms import Shape
from megatron_unimm.errors import CheckpointError

OPTIMIZER = "optimizer."
"""Prefix of the optimizer's tensors in a training checkpoint."""
MAX_SHARD_BYTES = 5_000_000_000
"""As transformers splits; diffusers takes twice as much."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Model:
    """What a checkpoint holds beside the optimizer."""

    family: Family
    config: Section
    mappings: list[Mapping]
    """Of the family's model, carried tensors included."""
    parts: dict[str, list[Mapping]]
    """Of our own parts, by name."""
    part_configs: dict[str, dict[str, Any]]

    @property
    def all_mappings(self) -> list[Mapping]:
        return [*self.mappings, *(mapping for part in self.parts.values() for mapping in part)]


def export_checkpoint(ckpt_dir: Path, hf_dir: Path) -> None:
    """Make a Hugging Face folder of a Megatron checkpoint: ``from_pretrained`` loads it. Dtypes stay as they are.

    Parts of ours go to folders of their own in it (``vision_head/``); optimizer state is left out. Where training kept
    a running average of the weights, it is what is written, in the dtype of the weights.

    Raises:
        CheckpointError: the checkpoint is unfinished or damaged, holds another architecture than it says, or the target
            exists or has no room.
    """
    manifest = read_manifest(ckpt_dir)
    with Reader(ckpt_dir) as reader:
        model = describe(ckpt_dir, manifest, reader)
        total = sum(reader.tensors[mapping.megatron].nbytes for mapping in model.all_mappings)
        check_target(hf_dir, total)
        check_files(ckpt_dir, manifest, _files_read(manifest, reader, model.all_mappings))
        with nothing_half_written(hf_dir), progress("export", total) as advance:
            _write_folder(hf_dir, ckpt_dir, reader, model, advance)


def _write_folder(hf_dir: Path, ckpt_dir: Path, reader: Reader, model: Model, advance: Callable[[int], None]) -> None:
    """All files under a temporary name, then the name: a folder that is there is whole."""
    temporary = temporary_name(hf_dir)
    remove_stale(hf_dir)
    temporary.mkdir(parents=True)
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
    config = family.config_class.model_validate(meta["architecture"])
    mappings = family.mappings(config, meta.get("layout", family.layouts[0]))
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
    mappings += _found(reader, CARRIED)
    parts = {part: found for part in PARTS if (found := _found(reader, f"{part}."))}
    for part in parts:
        if part not in meta:
            raise CheckpointError(where, f"holds a {part}, but its manifest has no meta.{part}")
    model = Model(family, config, mappings, parts, {part: meta[part] for part in parts})
    known = {mapping.megatron for mapping in model.all_mappings}
    extra = sorted(key for key in reader.tensors if key not in known and not key.startswith(OPTIMIZER))
    if extra:
        raise CheckpointError(
            where, f"tensor {extra[0]} has no place in {family.architectures[0]} ({len(extra)} such tensors)"
        )
    return model


def _found(reader: Reader, prefix: str) -> list[Mapping]:
    """The tensors under a prefix, which go to a folder under the rest of their names."""
    keys = sorted(key for key in reader.tensors if key.startswith(prefix))
    return [same(key.removeprefix(prefix), reader.tensors[key].shape, prefix) for key in keys]


def _files_read(manifest: Manifest, reader: Reader, mappings: Sequence[Mapping]) -> list[str]:
    """Files of the checkpoint that an export reads; those with nothing but optimizer state are not among them."""
    keys = [_stored_key(reader, mapping.megatron) for mapping in mappings]
    tensors = {chunk.file for key in keys for chunk in reader.tensors[key].chunks}
    return sorted({CHECKPOINT_INDEX, *tensors, *(name for name in manifest.files if name.startswith(HF_FOLDER + "/"))})


# ---------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Output:
    """A Hugging Face tensor to write: part ``number`` of what a Megatron tensor becomes."""

    mapping: Mapping
    number: int
    dtype: torch.dtype

    @property
    def folder(self) -> str:
        """Folder inside the model's, or ""."""
        return self.mapping.names[self.number].rpartition("/")[0]

    @property
    def name(self) -> str:
        """In its file."""
        return self.mapping.names[self.number].rpartition("/")[2]

    @property
    def shape(self) -> Shape:
        return self.mapping.shapes[self.number]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _write_weights(folder: Path, reader: Reader, model: Model) -> Iterator[int]:
    """Write all safetensors files, yielding the bytes of each tensor as it is done."""
    outputs = _outputs(reader, model.mappings)
    for name in model.family.folders(model.config):
        mine = [output for output in outputs if output.folder == name]
        (folder / name).mkdir(exist_ok=True)
        yield from _write_shards(folder / name, mine, reader, model.family)
        sync_folder(folder / name)
    for part, mappings in model.parts.items():
        part_dir = folder / part
        part_dir.mkdir()
        yield from write_safetensors(part_dir / "model.safetensors", _outputs(reader, mappings), reader)
        write_bytes(part_dir / "config.json", (json.dumps(model.part_configs[part], indent=2) + "\n").encode())
        readme = PART_README.format(title=part.replace("_", " ").capitalize(), what=PARTS[part])
        write_bytes(part_dir / "README.md", readme.encode())
        sync_folder(part_dir)


def _write_shards(folder: Path, outputs: Sequence[Output], reader: Reader, family: Family) -> Iterator[int]:
    """The files of one folder, with an index where there are several."""
    stem = WEIGHTS[family.library]
    shards = _shards(outputs, MAX_SHARD_BYTES if family.library == "transformers" else 2 * MAX_SHARD_BYTES)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        weight_map = {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard}
        index = {
            "metadata": {"total_size": sum(output.nbytes for shard in shards for output in shard)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_bytes(folder / f"{stem}{INDEX_SUFFIX}", (json.dumps(index, indent=2) + "\n").encode())
    for name, shard in zip(names, shards, strict=True):
        yield from write_safetensors(folder / name, shard, reader)


def _outputs(reader: Reader, mappings: Sequence[Mapping]) -> list[Output]:
    return [Output(m, number, reader.tensors[m.megatron].dtype) for m in mappings for number in range(len(m.names))]


def _shards(outputs: Sequence[Output], max_bytes: int) -> list[list[Output]]:
    """Split in order; a tensor larger than a shard gets one to itself."""
    shards: list[list[Output]] = [[]]
    room = max_bytes
    for output in outputs:
        if shards[-1] and output.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(output)
        room -= output.nbytes
    return shards


def write_safetensors(path: Path, outputs: Sequence[Output], reader: Reader) -> Iterator[int]:
    """Write one file: the header, then the tensors one by one. Yields the bytes of each."""
    # Wide dtypes first, so that every tensor is aligned to its own size.
    ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    with path.open("wb") as stream:
        stream.write(_header(ordered))
        cache = _LastPart(reader)
        for output in ordered:
            for box in output.mapping.boxes():
                part = cache.inverse(box)[output.number]
                stream.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            yield output.nbytes
        sync_file(stream)


class _LastPart:
    """Reads boxes, and keeps the last: the Hugging Face tensors of a Megatron tensor come one after another."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.box: Box | None = None
        self.parts: tuple[Tensor, ...] = ()

    def inverse(self, box: Box) -> tuple[Tensor, ...]:
        if self.box != box:
            key = _stored_key(self.reader, box.mapping.megatron)
            whole = self.reader.read(key) if box.slice is None else self.reader.read_slice(key, box.slice)
            dtype = self.reader.tensors[box.mapping.megatron].dtype
            self.box, self.parts = box, box.inverse(whole.to(dtype))
        return self.parts


def _stored_key(reader: Reader, key: str) -> str:
    """Where a tensor's numbers are: in its running average (``train.ema_decay``), if it has one."""
    return AVERAGE_PREFIX + key if AVERAGE_PREFIX + key in reader.tensors else key


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
    files = {name: path.read_bytes() for name, path in hf_files_in(ckpt_dir / HF_FOLDER).items()}
    if not files.keys() & {CONFIG, PIPELINE}:
        configs = config_files(model.family.to_hf_config(model.config))
        files |= {name: json.dumps(config, indent=2).encode() for name, config in configs.items()}
    if model.family.library == "transformers":
        files[CONFIG] = _with_dtype(files[CONFIG].decode(), dtype).encode()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, content)
    for changed in {(folder / name).parent for name in files}:
        sync_folder(changed)


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
