"""What makes a folder a finished checkpoint: a manifest with the hash of every file, and a marker written last.

    step_00001000/
        COMMITTED       sha256 of manifest.json; present only when everything else is on disk
        manifest.json   {"format", "files": {name: {"bytes", "sha256"}}, "meta": {...}}
        ...             the files that the manifest lists

A save writes to ``step_00001000.tmp`` and renames. A folder without the marker was interrupted and is never read. One
whose files changed since is set aside as ``step_00001000.damaged``, for someone to look at. Which checkpoint is newer
is told by steps, never by the clocks of hosts.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from megatron_unimm.errors import CheckpointError

FORMAT = "megatron_unimm/torch_dist/1"
MANIFEST = "manifest.json"
MARKER = "COMMITTED"
REPLACED = ".replaced.tmp"
"""After the name of a finished checkpoint while another takes its place."""
DAMAGED = ".damaged"
"""After the name of a checkpoint that is set aside."""
STEP_NAME = re.compile(r"step_(\d{8,})")
HASH_BLOCK = 1 << 24
"""Bytes read at a time while hashing."""


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``."""

    files: dict[str, FileRecord]
    meta: dict[str, Any]


# ---------------------------------------------------------------------------------------------- writing


class HashingFile:
    """A binary file that hashes what is written, so that no second pass over the data is needed."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.bytes = 0
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write a bytes-like object and return its size in bytes."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.raw.write(view)
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Hand buffered bytes to the operating system."""
        self.raw.flush()

    def record(self) -> FileRecord:
        """Size and hash of what was written so far."""
        return FileRecord(bytes=self.bytes, sha256=self._hash.hexdigest())


@contextmanager
def hashed_file(path: Path) -> Iterator[HashingFile]:
    """Create ``path``; it is on disk when the block ends."""
    with path.open("w+b") as raw:
        yield HashingFile(raw)
        sync_file(raw)


def sync_file(raw: IO[bytes]) -> None:
    """Wait until a file's bytes are on disk."""
    raw.flush()
    os.fsync(raw.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries (new files, renames) are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write a small file durably."""
    with hashed_file(path) as stream:
        stream.write(data)
    return stream.record()


def temporary_name(directory: Path) -> Path:
    """Where ``directory`` is written before it is renamed."""
    return directory.with_name(directory.name + ".tmp")


def remove_stale(directory: Path) -> None:
    """Remove what interrupted saves left: the temporary folder of ``directory`` and, in a run, those of other steps.

    One save at a time may run in a folder, so that every temporary folder found at its start is stale.
    """
    stale = {temporary_name(directory)}
    if STEP_NAME.fullmatch(directory.name):
        stale |= {path for path in directory.parent.glob("step_*.tmp") if STEP_NAME.fullmatch(path.stem)}
    for path in stale:
        if path.exists():
            shutil.rmtree(path)


def discard(directory: Path) -> None:
    """Remove what a save of ``directory`` left that failed at any point; what it was to replace is put back."""
    shutil.rmtree(temporary_name(directory), ignore_errors=True)
    if not (directory / MARKER).exists():
        shutil.rmtree(directory, ignore_errors=True)
    put_back(directory.parent)


def put_back(run_dir: Path) -> None:
    """Undo replacements of checkpoints that were interrupted (:func:`commit`): the old one returns, unless the new one
    is finished. Call it on one rank, with no save under way."""
    for replaced in run_dir.glob(f"step_*{REPLACED}"):
        directory = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if is_committed(directory):
            shutil.rmtree(replaced)
        else:
            shutil.rmtree(directory, ignore_errors=True)
            replaced.rename(directory)


def commit(directory: Path, files: Mapping[str, FileRecord], meta: Mapping[str, Any]) -> None:
    """Turn the temporary folder of ``directory``, whose ``files`` are on disk, into the finished checkpoint.

    A folder already at that name is replaced; it is deleted only once the new one is committed.
    """
    temporary = temporary_name(directory)
    content = {
        "format": FORMAT,
        "files": {name: asdict(files[name]) for name in sorted(files)},
        "meta": dict(meta),
    }
    manifest = write_bytes(temporary / MANIFEST, json.dumps(content, indent=1, sort_keys=False).encode())
    sync_folder(temporary)
    replaced = directory.with_name(directory.name + REPLACED)
    if replaced.exists():
        shutil.rmtree(replaced)
    if directory.exists():
        directory.rename(replaced)
    temporary.rename(directory)
    sync_folder(directory.parent)
    write_bytes(directory / MARKER, (manifest.sha256 + "\n").encode())
    sync_folder(directory)
    if replaced.exists():
        shutil.rmtree(replaced)


# ---------------------------------------------------------------------------------------------- reading


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a finished checkpoint.

    Raises:
        CheckpointError: there is no such folder, it is not finished, or its manifest is damaged.
    """
    _check_is_finished(directory)
    text = (directory / MANIFEST).read_bytes()
    if hashlib.sha256(text).hexdigest() != (directory / MARKER).read_text(errors="replace").strip():
        raise _damaged(directory / MANIFEST, f"its hash differs from the one in {MARKER}")
    content = json.loads(text)
    if content["format"] != FORMAT:
        raise CheckpointError(
            str(directory),
            f"has format {content['format']!r}, this version reads {FORMAT!r}; use the version that wrote it",
        )
    files = {name: FileRecord(**record) for name, record in content["files"].items()}
    return Manifest(files=files, meta=content["meta"])


def _check_is_finished(directory: Path) -> None:
    where = str(directory)
    if not directory.is_dir():
        raise CheckpointError(where, "there is no such folder; check the path")
    if (directory / MARKER).is_file() and (directory / MANIFEST).is_file():
        return
    is_model = (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))
    if is_model or (directory / "model_index.json").is_file():
        raise CheckpointError(
            where, "is a Hugging Face folder; import it first: unimm convert import --from HF_DIR --to CKPT_DIR"
        )
    if any(STEP_NAME.fullmatch(path.name) for path in directory.iterdir()):
        raise CheckpointError(where, "holds several checkpoints; name one of its step_ folders")
    raise CheckpointError(
        where, f"is not a finished checkpoint ({MARKER} is missing: its save was interrupted); take an earlier one"
    )


def find_checkpoint(folder: Path, wanted: Callable[[dict[str, Any]], bool] = lambda meta: True) -> Path:
    """The checkpoint that a folder is or holds: itself, the newest of a stage's folder, or of a run's last stage.

    The last stage is the one with the longest chain of stages before it; among equals, the one with most steps.

    Args:
        wanted: by its meta, whether a stage's newest checkpoint is what is looked for in a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    if (folder / MANIFEST).is_file():
        return folder
    own = latest(folder) or latest(folder / "checkpoints")
    if own is not None:
        return own
    newest = [step for stage in sorted(folder.glob("*/checkpoints")) if (step := latest(stage)) is not None]
    metas = {step: read_meta(step) for step in newest}
    found = [step for step in newest if wanted(metas[step])]
    if found:
        after = dict(_stage_and_predecessor(meta) for meta in metas.values())
        return max(found, key=lambda step: (_chain_length(metas[step], after), step.name, str(step)))
    read_meta(folder)  # says what the folder is instead, if it knows
    raise CheckpointError(
        str(folder), "holds no finished checkpoint; give a folder of `unimm convert import` or of a training run"
    )


def _stage_and_predecessor(meta: Mapping[str, Any]) -> tuple[str, str | None]:
    config = yaml.safe_load(meta.get("config", "")) or {}
    return meta.get("stage", ""), config.get("after")


def _chain_length(meta: Mapping[str, Any], after: Mapping[str, str | None]) -> int:
    """Stages before a checkpoint's own, as far as the run has them."""
    length, stage = 0, after[meta.get("stage", "")]
    while stage is not None and length < len(after):
        length, stage = length + 1, after.get(stage)
    return length


def read_meta(directory: Path) -> dict[str, Any]:
    """What was saved beside the tensors.

    Raises:
        CheckpointError: as :func:`read_manifest`.
    """
    return read_manifest(directory).meta


def check_files(directory: Path, manifest: Manifest, names: Iterable[str], *, hashes: bool = True) -> None:
    """Compare files with the manifest.

    Raises:
        CheckpointError: a file is absent, has another size or, with ``hashes``, another content; names the file.
    """

    def check(name: str) -> None:
        record, path = manifest.files[name], directory / name
        if not path.is_file():
            raise _damaged(path, "the file is missing")
        size = path.stat().st_size
        if size != record.bytes:
            raise _damaged(path, f"it has {size} bytes instead of {record.bytes}")
        if hashes and hash_file(path) != record.sha256:
            raise _damaged(path, "its content changed since it was written (sha256 differs)")

    # Two at a time: one is read while another is hashed.
    with ThreadPoolExecutor(2, "checkpoint-hash") as pool:
        for _ in pool.map(check, names):
            pass


def share_of_files(manifest: Manifest, rank: int, size: int) -> list[str]:
    """The files that one of ``size`` ranks checks; large ones are spread evenly."""
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    return by_size[rank::size]


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(str(path), f"damaged: {why}; take another checkpoint or copy it again")


# ---------------------------------------------------------------------------------------------- a run's checkpoints


def step_directory(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` optimizer steps."""
    return run_dir / f"step_{step:08d}"


def is_committed(directory: Path) -> bool:
    """Whether ``directory`` is finished and every file has its size. Contents are not hashed."""
    try:
        manifest = read_manifest(directory)
        check_files(directory, manifest, manifest.files, hashes=False)
    except CheckpointError:
        return False
    return True


def committed_steps(run_dir: Path) -> dict[int, Path]:
    """The finished checkpoints of a run by step, oldest first."""
    return {step: path for step, path in _named_steps(run_dir).items() if is_committed(path)}


def _named_steps(run_dir: Path) -> dict[int, Path]:
    if not run_dir.is_dir():
        return {}
    named = {int(match[1]): path for path in run_dir.iterdir() if (match := STEP_NAME.fullmatch(path.name))}
    return dict(sorted(named.items()))


def latest(run_dir: Path) -> Path | None:
    """The newest finished checkpoint of a run, or None; unfinished and truncated ones are passed over."""
    return next((path for path in reversed(_named_steps(run_dir).values()) if is_committed(path)), None)


def set_aside(directory: Path) -> Path:
    """Take a damaged checkpoint out of the way, keeping it; returns its new place. Call it on one rank."""
    number, place = 1, directory.with_name(directory.name + DAMAGED)
    while place.exists():
        number, place = number + 1, directory.with_name(f"{directory.name}{DAMAGED}-{number + 1}")
    directory.rename(place)
    sync_folder(directory.parent)
    return place


def newest_with_marker(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that was finished once, or None; whether it is still whole is not looked at."""
    return next((path for path in reversed(_named_steps(run_dir).values()) if (path / MARKER).exists()), None)


def prune(run_dir: Path, keep_last: int, keep_every_steps: int | None = None) -> list[Path]:
    """Delete old checkpoints of a run; call it on one rank, with no save under way.

    Args:
        run_dir: folder of the ``step_`` folders.
        keep_last: finished checkpoints to keep, at least 1. Unfinished and damaged ones do not count.
        keep_every_steps: those at multiples of this are kept as well.

    Returns:
        the folders deleted: old checkpoints, and older folders that never got their marker.
    """
    assert keep_last > 0, keep_last
    good = committed_steps(run_dir)
    if not good:
        return []
    kept = {step for step in good if keep_every_steps and step % keep_every_steps == 0} | set(list(good)[-keep_last:])
    gone = [path for step, path in good.items() if step not in kept]
    gone += [path for step, path in _named_steps(run_dir).items() if step < max(good) and not (path / MARKER).exists()]
    for path in gone:
        # Without its marker the folder is no checkpoint any more, should the deletion be interrupted.
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)
    return gone
