"""What import and export share about folders: room on the disk, targets, and the files beside the weights."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_unimm.checkpoint.folder import LANGUAGE_MODEL
from megatron_unimm.checkpoint.manifest import MANIFEST, MARKER, temporary_name
from megatron_unimm.convert.pipeline import part_names
from megatron_unimm.errors import CheckpointError

SPARE_BYTES = 64 << 20
"""Room for headers, indices and tokenizer files."""
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "LICENSE*",
    "model_index.json",
    "scheduler_config.json",
    "spiece.model",
)
"""Files that are copied with the weights. Never weights, never code."""
SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ""}


def companions(folder: Path) -> dict[str, Path]:
    """Config, tokenizer and processor files of a Hugging Face folder, by their path in it; of a pipeline also those of
    its parts, and of a language model beside it."""
    parts = [folder, *(folder / name for name in (*part_names(folder), LANGUAGE_MODEL))]
    found = {path for part in parts for pattern in COMPANIONS for path in part.glob(pattern)}
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(found)
        if path.is_file() and path.suffix in SUFFIXES and "safetensors" not in path.name
    }


def check_target(target: Path, nbytes: int) -> None:
    """Refuse a target that exists already, and one without room for ``nbytes``.

    A checkpoint whose writer was killed just before it put the marker on it does not count as existing: it is replaced.

    Raises:
        CheckpointError: with what to do.
    """
    unfinished = (target / MANIFEST).is_file() and not (target / MARKER).is_file()
    if target.exists() and not unfinished and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(str(target), "exists already; choose another name or delete it")
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes + SPARE_BYTES:
        needed = (nbytes + SPARE_BYTES) / 1e9
        raise CheckpointError(str(target), f"needs {needed:.1f} GB, but {free / 1e9:.1f} GB are free there; make room")


@contextmanager
def nothing_half_written(target: Path) -> Iterator[None]:
    """Remove what was written towards ``target`` if the block ends with an error or an interrupt."""
    try:
        yield
    except BaseException:
        shutil.rmtree(temporary_name(target), ignore_errors=True)
        raise
