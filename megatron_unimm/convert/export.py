"""Megatron checkpoint to Hugging Face folder, tensor by tensor. Training checkpoints may be exported as they are."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_unimm.checkpoint.folder import AVERAGE_PREFIX, CARRIED, HF_FOLDER, LANGUAGE_MODEL, hf_files_in
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
from megatron_unimm.config.mmdit import ImageGeneratorConfig
from megatron_unimm.config.model import ModelConfig
from megatron_unimm.convert.adapters import Adapter, find_adapters
from megatron_unimm.convert.families import family_named
from megatron_unimm.convert.folders import check_target, nothing_half_written
from megatron_unimm.convert.parts import PARTS, check_parts, part_config, readme_of
from megatron_unimm.convert.pipeline import CONFIG, PIPELINE, config_files, without_text_encoders
from megatron_unimm.convert.progress import progress
from megatron_unimm.convert.reader import DTYPES, INDEX_SUFFIX, WEIGHTS
from megatron_unimm.convert.table import Box, Family, Mapping, same
from megatron_unimm.convert.transforms import Shape
from megatron_unimm.errors import CheckpointError

OPTIMIZER = "optimizer."
"""Prefix of the optimizer's tensors in a training checkpoint."""
MAX_SHARD_BYTES = 5_000_000_000
"""As transformers splits; diffusers takes twice as much."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Member:
    """A model that a Hugging Face class loads."""

    folder: str
    """In the exported folder; "" for itself."""
    family: Family
    config: Section
    mappings: list[Mapping]
    """Of the family's model, carried tensors included."""


@dataclass(frozen=True)
class Model:
    """What a checkpoint holds beside the optimizer."""

    members: list[Member]
    """The model, and perhaps a language model beside it."""
    parts: dict[str, list[Mapping]]
    """Of our own parts, by name."""
    part_configs: dict[str, dict[str, Any]]
    adapters: dict[str, Adapter]
    """By the name of the Megatron weight that they go into."""

    @property
    def all_mappings(self) -> list[Mapping]:
        lists = [*(member.mappings for member in self.members), *self.parts.values()]
        return [mapping for mappings in lists for mapping in mappings]


def export_checkpoint(ckpt_dir: Path, hf_dir: Path) -> None:
    """Make a Hugging Face folder of a Megatron checkpoint: ``from_pretrained`` loads it. Dtypes stay as they are.

    Parts of ours go to folders of their own in it (``vision_head/``), a language model beside an image generator to
    ``language_model/``; optimizer state is left out. Where training kept a running average of the weights, it is what
    is written, in the dtype of the weights. Low-rank adapters are put into the weights beside them.

    Raises:
        CheckpointError: the checkpoint is unfinished or damaged, holds another architecture than it says, or the target
            exists or has no room.
    """
    manifest = read_manifest(ckpt_dir)
    with Reader(ckpt_dir) as reader:
        model = describe(ckpt_dir, manifest, reader)
        total = sum(reader.tensors[mapping.megatron].nbytes for mapping in model.all_mappings)
        check_target(hf_dir, total)
        check_files(ckpt_dir, manifest, _files_read(manifest, reader, model))
        with nothing_half_written(hf_dir), progress("export", total) as advance:
            _write_folder(hf_dir, ckpt_dir, reader, model, advance)


def _write_folder(hf_dir: Path, ckpt_dir: Path, reader: Reader, model: Model, advance: Callable[[int], None]) -> None:
    """All files under a temporary name, then the name: a folder that is there is whole."""
    temporary = temporary_name(hf_dir)
    remove_stale(hf_dir)
    temporary.mkdir(parents=True)
    for count in _write_weights(temporary, reader, model):
        advance(count)
    for member in model.members:
        _write_companions(temporary, ckpt_dir, member, len(model.members) > 1, _dtype(reader, member.mappings))
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
    members = [_member("", meta, reader, where)]
    members[0].mappings.extend(_found(reader, CARRIED))
    if LANGUAGE_MODEL in meta:
        members.append(_member(LANGUAGE_MODEL, meta[LANGUAGE_MODEL], reader, where))
    taken = {mapping.megatron for member in members for mapping in member.mappings}
    # A connector's language model (convert/qwen2.py) has a part's names by itself.
    parts = {part: found for part in PARTS if (found := _found(reader, f"{part}.", taken))}
    configs = {part: part_config(part, meta, where) for part in parts}
    _check_parts(parts, configs, members, where)
    model = Model(members, parts, configs, find_adapters(reader.tensors, meta, where))
    known = {mapping.megatron for mapping in model.all_mappings}
    known |= {name for adapter in model.adapters.values() for name in (adapter.lora_a, adapter.lora_b)}
    extra = sorted(key for key in reader.tensors if key not in known and not key.startswith(OPTIMIZER))
    if extra:
        names = " and ".join(member.family.architectures[0] for member in members)
        raise CheckpointError(where, f"tensor {extra[0]} has no place in {names} ({len(extra)} such tensors)")
    return model


def _member(folder: str, meta: dict[str, Any], reader: Reader, where: str) -> Member:
    """A model that meta describes, with its tensors checked."""
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
    return Member(folder, family, config, mappings)


def _check_parts(
    parts: dict[str, list[Mapping]], configs: dict[str, dict[str, Any]], members: Sequence[Member], where: str
) -> None:
    shapes = {part: {mapping.names[0]: mapping.shapes[0] for mapping in found} for part, found in parts.items()}
    drawn, spoken = members[0].config, members[-1].config
    check_parts(
        shapes,
        configs.get("query_tokens"),
        spoken if isinstance(spoken, ModelConfig) else None,
        drawn if isinstance(drawn, ImageGeneratorConfig) else None,
        where,
    )


def _found(reader: Reader, prefix: str, taken: Collection[str] = ()) -> list[Mapping]:
    """The tensors under a prefix, but those that are taken, which go to a folder under the rest of their names."""
    keys = sorted(key for key in reader.tensors if key.startswith(prefix) and key not in taken)
    return [same(key.removeprefix(prefix), reader.tensors[key].shape, prefix) for key in keys]


def _files_read(manifest: Manifest, reader: Reader, model: Model) -> list[str]:
    """Files of the checkpoint that an export reads; those with nothing but optimizer state are not among them."""
    names = [mapping.megatron for mapping in model.all_mappings]
    names += [name for adapter in model.adapters.values() for name in (adapter.lora_a, adapter.lora_b)]
    tensors = {chunk.file for name in names for chunk in reader.tensors[_stored_key(reader, name)].chunks}
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
    for member in model.members:
        root = folder / member.folder
        root.mkdir(exist_ok=True)
        outputs = _outputs(reader, member.mappings)
        for name in member.family.folders(member.config):
            mine = [output for output in outputs if output.folder == name]
            (root / name).mkdir(exist_ok=True)
            yield from _write_shards(root / name, mine, _LastPart(reader, model.adapters), member.family)
            sync_folder(root / name)
    for part, mappings in model.parts.items():
        part_dir = folder / part
        part_dir.mkdir()
        outputs = _outputs(reader, mappings)
        yield from write_safetensors(part_dir / "model.safetensors", outputs, _LastPart(reader, model.adapters))
        write_bytes(part_dir / CONFIG, (json.dumps(model.part_configs[part], indent=2) + "\n").encode())
        write_bytes(part_dir / "README.md", readme_of(part).encode())
        sync_folder(part_dir)


def _write_shards(folder: Path, outputs: Sequence[Output], weights: "_LastPart", family: Family) -> Iterator[int]:
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
        yield from write_safetensors(folder / name, shard, weights)


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


def write_safetensors(path: Path, outputs: Sequence[Output], weights: "_LastPart") -> Iterator[int]:
    """Write one file: the header, then the tensors one by one. Yields the bytes of each."""
    # Wide dtypes first, so that every tensor is aligned to its own size.
    ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    with path.open("wb") as stream:
        stream.write(_header(ordered))
        for output in ordered:
            for box, number in output.mapping.boxes_of(output.number):
                part = weights.inverse(box)[number]
                stream.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            yield output.nbytes
        sync_file(stream)


class _LastPart:
    """Reads boxes, and keeps the last: the Hugging Face tensors of a Megatron tensor come one after another."""

    def __init__(self, reader: Reader, adapters: dict[str, Adapter]) -> None:
        self.reader = reader
        self.adapters = adapters
        self.box: Box | None = None
        self.parts: tuple[Tensor, ...] = ()

    def inverse(self, box: Box) -> tuple[Tensor, ...]:
        if self.box != box:
            name = box.mapping.megatron
            key = _stored_key(self.reader, name)
            whole = self.reader.read(key) if box.slice is None else self.reader.read_slice(key, box.slice)
            if name in self.adapters:
                assert box.slice is None, "routed experts take no adapters"
                whole = self._merged(whole, self.adapters[name])
            self.box, self.parts = box, box.inverse(whole.to(self.reader.tensors[name].dtype))
        return self.parts

    def _merged(self, weight: Tensor, adapter: Adapter) -> Tensor:
        from megatron_unimm.models.lora import merged_weight  # loads Megatron-Core

        lora_a, lora_b = (self.reader.read(_stored_key(self.reader, name)) for name in (adapter.lora_a, adapter.lora_b))
        return merged_weight(weight, lora_a, lora_b, adapter.alpha)


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


def _write_companions(
    folder: Path, ckpt_dir: Path, member: Member, has_language_model: bool, dtype: torch.dtype
) -> None:
    beside = f"{LANGUAGE_MODEL}/"
    files = {
        name: path.read_bytes()
        for name, path in hf_files_in(ckpt_dir / HF_FOLDER / member.folder).items()
        if member.folder or not name.startswith(beside)
    }
    if not files.keys() & {CONFIG, PIPELINE}:
        configs = config_files(member.family.to_hf_config(member.config))
        files |= {name: json.dumps(config, indent=2).encode() for name, config in configs.items()}
    if member.family.library == "transformers":
        files[CONFIG] = _with_dtype(files[CONFIG].decode(), dtype).encode()
    elif has_language_model:
        files = without_text_encoders(files)
    for name, content in files.items():
        path = folder / member.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    for changed in {(folder / member.folder / name).parent for name in files}:
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
