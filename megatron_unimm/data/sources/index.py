"""Indices of data files: where each sample lies, found once and kept beside the data.

The index of ``x.jsonl`` is ``x.jsonl.index``: one file of plain arrays that is mapped, so that opening reads its first
4096 bytes, however many samples there are::

    bytes 0 to 7     UNIMMIX1
    bytes 8 to 11    length of the header, unsigned, little-endian
    bytes 12 on      header, JSON: "what" was indexed and how, "samples", the data file's "size" and "mtime_ns", and
                     "arrays", a list of [name, dtype, shape, offset in bytes]
    bytes 4096 on    arrays, little-endian, at multiples of 64 bytes

An index holds for a data file of exactly the size and time that it names; any other is built anew. It comes with the
data, from anywhere, so its numbers are offsets to try and nothing more: who uses them checks what they lead to.
"""

import hashlib
import io
import json
import logging
import math
import mmap
import os
import secrets
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_unimm.errors import DataError

logger = logging.getLogger(__name__)

MAGIC = b"UNIMMIX1"
HEADER_BYTES = 4096
ALIGNMENT = 64
DTYPES = ("<i8", "|u1")

SLOW_BYTES = 1 << 30
"""Data files from this size on are announced, since reading through them takes a while."""


@dataclass(frozen=True)
class Stamp:
    """What tells one version of a data file from another."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change."""

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The stamp of a file.

        Raises:
            DataError: it is absent, or no regular file: a pipe would be waited for without end.
        """
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(str(path), f"cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(str(path), "is no regular file; take it out of the source")
        return cls(status.st_size, status.st_mtime_ns)


class IndexWriter:
    """Writes the arrays of an index, one after another, each in as many pieces as its maker likes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._arrays: list[list[Any]] = []
        self._position = HEADER_BYTES
        file.seek(HEADER_BYTES)

    def append(self, name: str, piece: np.ndarray) -> None:
        """Adds rows to the array of that name, which must be the last one written to or a new one."""
        if not self._arrays or self._arrays[-1][0] != name:
            padding = -self._position % ALIGNMENT
            self._file.write(bytes(padding))
            self._position += padding
            self._arrays.append([name, piece.dtype.str, [0, *piece.shape[1:]], self._position])
        array = self._arrays[-1]
        assert piece.dtype.str == array[1] in DTYPES
        assert list(piece.shape[1:]) == array[2][1:]
        array[2][0] += len(piece)
        self._file.write(np.ascontiguousarray(piece).data)
        self._position += piece.nbytes

    def finish(self, what: str, samples: int, stamp: Stamp) -> None:
        """Writes the header."""
        header = json.dumps(
            {"what": what, "samples": samples, "size": stamp.size, "mtime_ns": stamp.mtime_ns, "arrays": self._arrays}
        ).encode()
        assert len(header) <= HEADER_BYTES - 12, f"header of {len(header)} bytes"
        self._file.seek(0)
        self._file.write(MAGIC + struct.pack("<I", len(header)) + header)


@dataclass(frozen=True)
class StoredIndex:
    """An index on disk, or in memory where it could not be written."""

    samples: int
    """Number of samples of the data file."""
    path: Path
    """The data file."""
    _what: str
    _stamp: Stamp
    _place: Path | memoryview

    def load(self) -> dict[str, np.ndarray]:
        """The arrays, read-only and mapped: nothing is read before it is asked for.

        Raises:
            DataError: the index has gone or changed since it was found.
        """
        if isinstance(self._place, memoryview):
            header = _parse_header(bytes(self._place[:HEADER_BYTES]), len(self._place))
            assert header is not None
            return _arrays(self._place, header)
        try:
            with self._place.open("rb") as file:
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(str(self._place), f"has gone since it was opened ({error})") from error
        buffer.madvise(mmap.MADV_RANDOM)  # Samples are drawn at random: what lies around one is of no use.
        header = _parse_header(buffer[:HEADER_BYTES], len(buffer))
        if header is None or not _fits(header, self._what, self._stamp) or header["samples"] != self.samples:
            raise DataError(str(self._place), "has changed since it was opened; leave data alone while it is read")
        return _arrays(memoryview(buffer), header)


Build = Callable[[Path, IndexWriter], int]
"""Reads a data file, appends the arrays, and returns the number of samples."""


def open_index(path: Path, what: str, build: Build, cache: Path | None) -> StoredIndex:
    """The index of a data file; it is built if there is none that fits.

    Args:
        path: the data file.
        what: names the arrays and their meaning; another name makes an index void.
        build: makes the index.
        cache: folder for indices that cannot be written beside their file; without one they stay in memory.

    Raises:
        DataError: the file cannot be read, or changes while it is.
    """
    found = find_index(path, what, cache)
    if found is not None:
        return found
    stamp = Stamp.of(path)
    if stamp.size >= SLOW_BYTES:
        logger.info("data: indexing %s (%.1f GB)", path, stamp.size / 1e9)
    for place in _places(path, cache):
        samples = _write(place, path, what, build, stamp)
        if samples is not None:
            return StoredIndex(samples, path, what, stamp, place)
    if stamp.size >= SLOW_BYTES:
        logger.warning("data: the index of %s cannot be written beside it; set data.index_cache to a folder", path)
    return build_in_memory(path, what, build)


def find_index(path: Path, what: str, cache: Path | None) -> StoredIndex | None:
    """The index of a data file, if it is there and fits.

    Raises:
        DataError: the data file cannot be read.
    """
    stamp = Stamp.of(path)
    for place in _places(path, cache):
        try:
            with place.open("rb") as file:
                header = _parse_header(file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size)
        except OSError:
            continue  # Absent, or not ours to read: the same to us.
        if header is not None and _fits(header, what, stamp):
            return StoredIndex(header["samples"], path, what, stamp, place)
    return None


def build_in_memory(path: Path, what: str, build: Build) -> StoredIndex:
    """An index that is not kept."""
    stamp = Stamp.of(path)
    buffer = io.BytesIO()
    writer = IndexWriter(buffer)
    samples = build(path, writer)
    writer.finish(what, samples, stamp)
    return StoredIndex(samples, path, what, stamp, buffer.getbuffer())


def _places(path: Path, cache: Path | None) -> list[Path]:
    beside = path.with_name(f"{path.name}.index")
    if cache is None:
        return [beside]
    # Files of equal names in different folders share the cache.
    digest = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=8).hexdigest()
    return [beside, cache / f"{path.name}-{digest}.index"]


def _write(place: Path, path: Path, what: str, build: Build, stamp: Stamp) -> int | None:
    """Builds the index at a place and returns its samples, or None where nothing can be written.

    Raises:
        DataError: the data file changed meanwhile.
    """
    temporary = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        file = temporary.open("xb")
    except OSError:
        return None
    try:
        with file:
            writer = IndexWriter(file)
            samples = build(path, writer)
            if Stamp.of(path) != stamp:
                raise DataError(str(path), "changed while it was indexed; start again once it is complete")
            writer.finish(what, samples, stamp)
            file.flush()
            os.fsync(file.fileno())
        # Whoever comes second replaces an equal file: readers never see half of one.
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)
    return samples


def _parse_header(start: bytes, size: int) -> dict[str, Any] | None:
    """The header of an index of ``size`` bytes, or None if it is not a whole and sound one."""
    if len(start) < HEADER_BYTES or not start.startswith(MAGIC):
        return None
    (length,) = struct.unpack_from("<I", start, 8)
    try:
        header = json.loads(start[12 : 12 + length])
    except (ValueError, RecursionError):
        return None
    if (
        not isinstance(header, dict)
        or not _is_count(header.get("samples"))
        or not isinstance(header.get("arrays"), list)
    ):
        return None
    return header if all(_is_sound(array, size) for array in header["arrays"]) else None


def _is_sound(array: object, size: int) -> bool:
    """Whether an array's description stays inside the file."""
    if not isinstance(array, list) or len(array) != 4:
        return False
    name, dtype, shape, offset = array
    if not isinstance(name, str) or dtype not in DTYPES or not isinstance(shape, list) or not 1 <= len(shape) <= 2:
        return False
    if not _is_count(offset) or offset % ALIGNMENT or not all(_is_count(side) for side in shape):
        return False
    return offset + math.prod(shape) * np.dtype(dtype).itemsize <= size


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 62


def _fits(header: Mapping[str, Any], what: str, stamp: Stamp) -> bool:
    return (header.get("what"), header.get("size"), header.get("mtime_ns")) == (what, stamp.size, stamp.mtime_ns)


def _arrays(buffer: memoryview, header: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {}
    for name, dtype, shape, offset in header["arrays"]:
        array = np.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=offset).reshape(shape)
        array.flags.writeable = False
        arrays[name] = array
    return arrays
