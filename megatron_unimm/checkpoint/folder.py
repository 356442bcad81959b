"""Writing a whole checkpoint folder, whoever makes its tensors: a training run's ranks, or a conversion."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_unimm.checkpoint.manifest import (
    FileRecord,
    commit,
    discard,
    hashed_file,
    remove_stale,
    sync_folder,
    temporary_name,
)
from megatron_unimm.checkpoint.ranks import Ranks, together
from megatron_unimm.checkpoint.torch_dist import Index, write_index

HF_FOLDER = "hf"
"""Folder inside a checkpoint with the config and tokenizer files of the Hugging Face model."""

LANGUAGE_MODEL = "language_model"
"""Folder in it with those of the language model, where the checkpoint is of an image generator that has one beside
it."""
CARRIED = "carried."
"""Before the names of tensors that an imported checkpoint keeps for the way back only (a text tower beside the vision
tower we build)."""
AVERAGE_PREFIX = "optimizer.average."
"""Before the names of tensors that are running averages of the weights."""

Part = tuple[Index, dict[str, FileRecord]]
"""What one rank wrote."""


def save_files(
    directory: Path,
    write: Callable[[Path], Part],
    meta: Mapping[str, Any],
    *,
    common: bytes,
    ranks: Ranks,
    hf_files: Mapping[str, Path] | None = None,
) -> None:
    """Write a checkpoint whose tensor files come from ``write(folder)``, and commit it; called on every rank.

    Where it fails, on any rank (a full disk), nothing of it is left.

    Args:
        common: the serialised dict of the values beside the tensors.
        hf_files: files to copy, by their path in :data:`HF_FOLDER`.
    """
    temporary = temporary_name(directory)
    try:
        with together(ranks):
            if ranks.rank == 0:
                remove_stale(directory)
                temporary.mkdir(parents=True)
        with together(ranks):
            part = write(temporary)
        parts = ranks.gather(part)
        with together(ranks):
            if ranks.rank == 0:
                files = _describe(temporary, parts, common)
                files |= _copy_hf_files(hf_files or {}, temporary)
                commit(directory, files, meta)
    except Exception:
        if ranks.rank == 0:
            discard(directory)
        raise


def _describe(
    folder: Path, parts: Sequence[tuple[Index, dict[str, FileRecord]]], common: bytes
) -> dict[str, FileRecord]:
    index, files = Index(), {}
    for part, written in parts:
        index.add(part)
        files |= written
    return files | write_index(folder, index, common)


def hf_files_in(folder: Path) -> dict[str, Path]:
    """Files under a folder by their path in it, those of its folders included; none where there is no such folder."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _copy_hf_files(paths: Mapping[str, Path], folder: Path) -> dict[str, FileRecord]:
    files = {}
    for name, path in paths.items():
        target = folder / HF_FOLDER / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as stream, hashed_file(target) as copy:
            shutil.copyfileobj(stream, copy)
        files[f"{HF_FOLDER}/{name}"] = copy.record()
    for changed in {(folder / name).parent for name in files}:
        sync_folder(changed)
    return files
