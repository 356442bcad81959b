"""A look into a Megatron checkpoint or a Hugging Face folder, without reading any weights."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from megatron_unimm.checkpoint.folder import LANGUAGE_MODEL
from megatron_unimm.checkpoint.manifest import MARKER, STEP_NAME, is_committed, read_manifest
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.convert.parts import PARTS
from megatron_unimm.convert.pipeline import PIPELINE, TRANSFORMER, VAE, architectures_of, is_model_folder, read_model
from megatron_unimm.convert.reader import HfFolder
from megatron_unimm.convert.transforms import Shape


@dataclass(frozen=True)
class Line:
    """A tensor to show."""

    name: str
    shape: Shape
    dtype: torch.dtype
    nbytes: int


def inspect_path(path: Path) -> Group:
    """What is in a Megatron checkpoint, a run folder or a Hugging Face folder; print it with a rich console.

    Tensors that differ only in a layer's number share a line.

    Raises:
        CheckpointError: it is none of these, or unfinished.
    """
    if path.is_dir() and any(STEP_NAME.fullmatch(child.name) for child in path.iterdir()):
        return Group(_run_table(path))
    if is_model_folder(path) and not (path / MARKER).is_file():
        return _hf_folder(path)
    return _checkpoint(path)


def _checkpoint(path: Path) -> Group:
    manifest = read_manifest(path)
    with Reader(path) as reader:
        lines = [Line(key, entry.shape, entry.dtype, entry.nbytes) for key, entry in reader.tensors.items()]
    stored = sum(record.bytes for record in manifest.files.values())
    head = Text(f"Megatron checkpoint {path}: {len(manifest.files)} files, {stored / 1e9:.3f} GB, finished")
    return Group(head, *_meta_lines(manifest.meta), _tensor_table(lines))


def _hf_folder(path: Path) -> Group:
    architectures = ", ".join(architectures_of(read_model(path)) or ["of an unnamed architecture"])
    models = (TRANSFORMER, VAE) if (path / PIPELINE).is_file() else ("",)
    beside = [folder for folder in (LANGUAGE_MODEL, *PARTS) if (path / folder).is_dir()]
    lines = [line for folder in (*models, *beside) for line in _hf_lines(path / folder, folder and f"{folder}/")]
    return Group(Text(f"Hugging Face folder {path}: {architectures}"), _tensor_table(lines))


def _hf_lines(path: Path, prefix: str) -> list[Line]:
    with HfFolder(path) as folder:
        return [Line(prefix + name, info.shape, info.dtype, info.nbytes) for name, info in folder.tensors.items()]


def _run_table(path: Path) -> Table:
    table = Table("checkpoint", "state", "GB", title=f"run {path}", title_justify="left")
    for child in sorted(child for child in path.iterdir() if child.name.startswith("step_")):
        good = is_committed(child)
        stored = sum(file.stat().st_size for file in child.rglob("*") if file.is_file())
        table.add_row(child.name, "finished" if good else "unfinished or damaged", f"{stored / 1e9:.3f}")
    return table


def _meta_lines(meta: dict[str, Any]) -> Iterable[Text]:
    for key, value in meta.items():
        text = str(value)
        yield Text(f"  {key}: {text if len(text) <= 400 else text[:400] + ' …'}")


def _tensor_table(lines: Iterable[Line]) -> Table:
    """One row per kind of tensor; the layers it stands for as ``{0..27}``."""
    groups: dict[tuple[str, Shape, torch.dtype], list[Line]] = {}
    for line in lines:
        groups.setdefault((re.sub(r"\.\d+\.", ".{}.", line.name, count=1), line.shape, line.dtype), []).append(line)
    table = Table(Column("tensor", overflow="fold"), "shape", "dtype", "count", "MB")
    for (pattern, shape, dtype), members in groups.items():
        numbers = [int(match[1]) for line in members if (match := re.search(r"\.(\d+)\.", line.name))]
        name = pattern.replace("{}", f"{{{min(numbers)}..{max(numbers)}}}") if len(members) > 1 else members[0].name
        megabytes = sum(line.nbytes for line in members) / 1e6
        table.add_row(
            name, " × ".join(map(str, shape)), str(dtype).removeprefix("torch."), str(len(members)), f"{megabytes:.1f}"
        )
    total = [line for members in groups.values() for line in members]
    table.add_section()
    table.add_row("total", "", "", str(len(total)), f"{sum(line.nbytes for line in total) / 1e6:.1f}")
    return table
