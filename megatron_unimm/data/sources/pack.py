"""Writes the samples of any source as WebDataset shards of about equal size, with their indices.

A sample becomes ``000000017.json`` with ``id``, ``image`` (the names of its images, one for each mark) and
``conversations``, and ``000000017.0.jpg`` and so on: its images, byte by byte as they were.
"""

import io
import json
import math
import os
import secrets
import shutil
import tarfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import ImageFile
from megatron_unimm.data.sample import Sample, Turn
from megatron_unimm.data.sources.folder import IMAGE_SUFFIXES
from megatron_unimm.data.sources.index import open_index
from megatron_unimm.data.sources.records import IMAGE_MARK, ROLES
from megatron_unimm.data.sources.source import Source
from megatron_unimm.data.sources.tar import BLOCK
from megatron_unimm.data.sources.webdataset import TAR_INDEX, build_shard_index
from megatron_unimm.errors import DataError, UserError

SPEAKERS = {role: speaker for speaker, role in ROLES.items()}
SUFFIX_BY_START = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"GIF8", ".gif"), (b"BM", ".bmp"))
BAD = -1
"""Size of a sample that is left out."""


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote."""

    num_samples: int
    shards: tuple[Path, ...]
    num_bad: int
    """Samples that were left out."""


def pack(
    source: Source,
    to: Path,
    shard_bytes: int,
    *,
    check: Callable[[Sample], None],
    report: Callable[[SampleError], None],
    advance: Callable[[str, int], None],
) -> Packed:
    """Writes a source's samples to a new folder, which appears once it is complete.

    Args:
        source: what to pack.
        to: the folder; absent or empty.
        shard_bytes: no shard is larger, unless a single sample is.
        check: raises SampleError for a sample whose images cannot be used.
        report: is told of every sample that is left out.
        advance: is told "checking" or "writing" and the number of samples done.

    Raises:
        UserError: the folder holds something.
        DataError: no sample can be used, or the source changes meanwhile.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(str(to), "exists and is not empty; give another folder, or delete this one")
    sizes = _measure(source, check, report, advance)
    good = np.flatnonzero(sizes != BAD)
    if not len(good):
        raise DataError(source.where(0), f"none of the {len(source)} samples can be used")
    with _new_folder(to) as folder:
        names = []
        for number, places in enumerate(_split(good, sizes[good], shard_bytes)):
            names.append(f"shard-{number:06d}.tar")
            _write_shard(folder / names[-1], source, places, advance)
    return Packed(len(good), tuple(to / name for name in names), len(source) - len(good))


def _measure(
    source: Source,
    check: Callable[[Sample], None],
    report: Callable[[SampleError], None],
    advance: Callable[[str, int], None],
) -> np.ndarray:
    """Bytes of every sample in a shard, or BAD: int64 [samples]."""
    sizes = array("q")
    for index in range(len(source)):
        try:
            sample = source[index]
            check(sample)
        except SampleError as fault:
            where = source.where(index)
            report(fault if fault.where == where else SampleError(where, str(fault), fault.fault))
            sizes.append(BAD)
        else:
            sizes.append(sum(_member_size(length) for length in _lengths(index, sample, source.name)))
        advance("checking", 1)
    return np.array(sizes, dtype=np.int64)


def _split(places: np.ndarray, sizes: np.ndarray, shard_bytes: int) -> list[np.ndarray]:
    """Cuts the samples, in order, into runs of about equal size, none larger than a shard but of a single sample."""
    cuts: list[int] = []
    left, filled, fair = int(sizes.sum()), 0, 0.0
    for place, size in enumerate(sizes.tolist()):
        # A sample over the fair share goes to the side on which the larger part of it lies.
        if not place or filled + size > shard_bytes or filled + size / 2 > fair:
            cuts.append(place)
            filled, fair = 0, left / math.ceil(left / shard_bytes)
        filled += size
        left -= size
    return np.split(places, cuts[1:])


def _write_shard(path: Path, source: Source, places: np.ndarray, advance: Callable[[str, int], None]) -> None:
    with path.open("xb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index in places.tolist():
                for name, content in _members(index, source[index], source.name):
                    _add(tar, name, content)
                advance("writing", 1)
        file.flush()
        os.fsync(file.fileno())
    open_index(path, TAR_INDEX, build_shard_index, None)


def _members(index: int, sample: Sample, source_name: str) -> Iterator[tuple[str, bytes]]:
    yield f"{_key(index)}.json", _record(index, sample, source_name)
    for number, file in enumerate(sample.images):
        with file.open() as stream:
            yield _image_name(index, number, file), stream.read()


def _lengths(index: int, sample: Sample, source_name: str) -> Iterator[int]:
    """Bytes of the members, without reading images that lie in files of their own."""
    yield len(_record(index, sample, source_name))
    for file in sample.images:
        with file.open() as stream:
            yield stream.seek(0, os.SEEK_END)


def _member_size(length: int) -> int:
    return BLOCK + length + -length % BLOCK


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Appends a member. No time or owner is stored, so that equal samples give equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _record(index: int, sample: Sample, source_name: str) -> bytes:
    order = [part for turn in sample.turns for part in turn.parts if isinstance(part, int)]
    record: dict[str, Any] = {"id": sample.id.removeprefix(f"{source_name}/")}
    if order:
        record["image"] = [_image_name(index, number, sample.images[number]) for number in order]
    record["conversations"] = [_turn(turn) for turn in sample.turns]
    return json.dumps(record, ensure_ascii=False).encode()


def _turn(turn: Turn) -> dict[str, str]:
    value = "".join(part if isinstance(part, str) else IMAGE_MARK for part in turn.parts)
    return {"from": SPEAKERS[turn.role], "value": value}


def _key(index: int) -> str:
    """The sample's place in the source, so that what was left out can be seen."""
    return f"{index:09d}"


def _image_name(index: int, number: int, file: ImageFile) -> str:
    suffix = Path(file.name).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        with file.open() as stream:
            start = stream.read(8)
        suffix = next((suffix for begin, suffix in SUFFIX_BY_START if start.startswith(begin)), ".jpg")
    return f"{_key(index)}.{number}{suffix}"


@contextmanager
def _new_folder(to: Path) -> Iterator[Path]:
    """A folder that takes the name ``to`` once all went well, and else is deleted."""
    to.parent.mkdir(parents=True, exist_ok=True)
    folder = to.with_name(f".{to.name}.{secrets.token_hex(4)}.partial")
    folder.mkdir()
    try:
        yield folder
        folder.replace(to)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
