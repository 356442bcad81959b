"""Megatron-Core's torch_dist checkpoint format, written and read without its forked writers and without unpickling.

    __{rank}_{n}.distcp   tensors one after the other, each written by torch.save, as torch.distributed.checkpoint does
    .metadata             torch.distributed.checkpoint's pickled index, for Megatron-Core's and torch's own loaders
    metadata.json         Megatron-Core's note of the format
    common.pt             values that are no tensors (torch.save, loaded with weights_only)
    index.json            our index: the same as .metadata plus where the raw numbers of each tensor begin

Megatron-Core 0.16.1 forks its writers under a live CUDA context and waits for them without a time limit, and the helper
threads of torch's own FileSystemWriter lose their exceptions; so the writing is done here. Reading goes through
index.json and a memory map, so that a rank touches only the rows it needs and no pickle is opened.

Words: a *piece* is a box of a global tensor that one rank holds, given by ``offset`` and ``shape`` in elements.
"""

import io
import json
import math
import mmap
import pickle
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_unimm.checkpoint.manifest import FileRecord, HashingFile, hashed_file, write_bytes
from megatron_unimm.errors import CheckpointError

INDEX = "index.json"
METADATA = ".metadata"
CONFIG = "metadata.json"
COMMON = "common.pt"
ALIGNMENT = 64
"""Every tensor begins at a multiple of this in its file, so that its numbers are aligned in memory too."""

MAX_FILE_BYTES = 1 << 30
"""Larger parts are split over files, so that ranks share the hashing of them and a small machine can map each."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor, and how to get its values (called once, while it is written)."""

    key: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Blob:
    """A Python object that is no tensor, already serialised with torch.save."""

    key: str
    data: bytes


@dataclass(frozen=True)
class Chunk:
    """Where a piece lies: ``length`` bytes from ``start``, of which the raw numbers begin at ``data_start``."""

    offset: Shape
    shape: Shape
    file: str
    start: int
    length: int
    data_start: int


@dataclass
class TensorEntry:
    """A global tensor of a checkpoint."""

    shape: Shape
    dtype: torch.dtype
    chunks: list[Chunk]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class BlobEntry:
    """Where a serialised object lies."""

    file: str
    start: int
    length: int


@dataclass
class Index:
    """Everything in a checkpoint, or what one rank wrote of it."""

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    blobs: dict[str, BlobEntry] = field(default_factory=dict)

    def add(self, other: "Index") -> None:
        """Take in what another rank wrote.

        Raises:
            ValueError: both wrote the same object, or tensors of one key disagree in shape or dtype.
        """
        for key, entry in other.tensors.items():
            mine = self.tensors.setdefault(key, TensorEntry(entry.shape, entry.dtype, []))
            if (mine.shape, mine.dtype) != (entry.shape, entry.dtype):
                raise ValueError(f"{key}: ranks disagree: {mine.shape} {mine.dtype} and {entry.shape} {entry.dtype}")
            mine.chunks.extend(entry.chunks)
        for key, blob in other.blobs.items():
            if key in self.blobs:
                raise ValueError(f"{key}: two ranks wrote this object as its main replica")
            self.blobs[key] = blob

    def check_coverage(self) -> None:
        """Raise ValueError where the pieces of a tensor leave a gap or overlap."""
        for key, entry in self.tensors.items():
            covered = sum(math.prod(chunk.shape) for chunk in entry.chunks)
            if covered != math.prod(entry.shape) or len({chunk.offset for chunk in entry.chunks}) != len(entry.chunks):
                raise ValueError(
                    f"{key}: its {len(entry.chunks)} pieces hold {covered} of {math.prod(entry.shape)} elements; "
                    "every element must have exactly one main replica"
                )


# ---------------------------------------------------------------------------------------------- writing


def write_pieces(
    folder: Path,
    rank: int,
    pieces: Sequence[Piece],
    blobs: Sequence[Blob] = (),
    *,
    threads: int = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[Index, dict[str, FileRecord]]:
    """Write one rank's part, ``threads`` files at a time, and return its index and the hashes of its files.

    One tensor per thread is in memory beyond what the pieces hold themselves. ``on_bytes`` hears the size of each piece
    written.
    """
    buckets = _split_by_size(pieces, threads)
    index, files = Index(), {}

    def write_bucket(number: int) -> tuple[str, Index, FileRecord]:
        name = f"__{rank}_{number}.distcp"
        with hashed_file(folder / name) as stream:
            part = _write_file(stream, name, buckets[number], blobs if number == 0 else (), on_bytes)
        return name, part, stream.record()

    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="checkpoint-file") as pool:
        for name, part, record in pool.map(write_bucket, range(len(buckets))):
            index.add(part)
            files[name] = record
    return index, files


def _split_by_size(pieces: Sequence[Piece], buckets: int) -> list[list[Piece]]:
    """Spread pieces over files of similar size, ``buckets`` or more; order is kept within a file."""
    wanted = max(buckets, math.ceil(sum(piece.nbytes for piece in pieces) / MAX_FILE_BYTES))
    count = max(1, min(wanted, len(pieces)))
    sizes, split = [0] * count, [[] for _ in range(count)]
    for position in sorted(range(len(pieces)), key=lambda i: -pieces[i].nbytes):
        smallest = sizes.index(min(sizes))
        sizes[smallest] += pieces[position].nbytes
        split[smallest].append(position)
    return [[pieces[position] for position in sorted(bucket)] for bucket in split]


def _write_file(
    stream: HashingFile,
    name: str,
    pieces: Sequence[Piece],
    blobs: Sequence[Blob],
    on_bytes: Callable[[int], None] | None,
) -> Index:
    index = Index()
    for blob in blobs:
        start = stream.bytes
        stream.write(blob.data)
        index.blobs[blob.key] = BlobEntry(file=name, start=start, length=len(blob.data))
    for piece in pieces:
        stream.write(b"\0" * (-stream.bytes % ALIGNMENT))
        chunk = _write_piece(stream, name, piece)
        entry = TensorEntry(piece.global_shape, piece.dtype, [chunk])
        index.add(Index(tensors={piece.key: entry}))
        if on_bytes is not None:
            on_bytes(piece.nbytes)
    return index


def _write_piece(stream: HashingFile, name: str, piece: Piece) -> Chunk:
    start = stream.bytes
    tensor = own_storage(piece.load().reshape(piece.shape))
    assert tensor.dtype == piece.dtype, (piece.key, tensor.dtype, piece.dtype)
    torch.save(tensor, stream)  # type: ignore[arg-type]
    stream.flush()
    length = stream.bytes - start
    data_start = start + _data_offset(stream.raw, start, length) if piece.nbytes else start
    return Chunk(offset=piece.offset, shape=piece.shape, file=name, start=start, length=length, data_start=data_start)


def own_storage(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, in a storage of its own; a copy only where it is not so already.

    torch.save writes the whole storage: of a view, that would be the tensor it looks into.
    """
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _data_offset(raw: IO[bytes], start: int, length: int) -> int:
    """Offset of the raw numbers in what torch.save wrote: a zip archive with the storage as an uncompressed member."""
    with zipfile.ZipFile(_Window(raw, start, length)) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    assert member.compress_type == zipfile.ZIP_STORED, member
    raw.seek(
        start + member.header_offset + 26
    )  # lengths of the name and the extra field, at the end of the 30-byte local header
    name_length, extra_length = int.from_bytes(raw.read(2), "little"), int.from_bytes(raw.read(2), "little")
    raw.seek(start + length)
    return member.header_offset + 30 + name_length + extra_length


class _Window(io.RawIOBase):
    """``length`` bytes of a file from ``start``, as a file that can be read and sought."""

    def __init__(self, raw: IO[bytes], start: int, length: int) -> None:
        self.raw, self.start, self.length, self.position = raw, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self.raw.seek(self.start + self.position)
        data = self.raw.read(max(0, min(len(view), self.length - self.position)))
        view[: len(data)] = data
        self.position += len(data)
        return len(data)


def write_index(folder: Path, index: Index, common: bytes) -> dict[str, FileRecord]:
    """Write the files that describe the pieces (one rank does), and return their hashes; ``common`` is serialised.

    Raises:
        ValueError: the pieces do not make whole tensors.
    """
    index.check_coverage()
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    return {
        INDEX: write_bytes(folder / INDEX, json.dumps(_index_to_json(index)).encode()),
        METADATA: write_bytes(folder / METADATA, pickle.dumps(_dcp_metadata(index))),
        COMMON: write_bytes(folder / COMMON, common),
        CONFIG: write_bytes(folder / CONFIG, json.dumps(config).encode()),
    }


def serialise(what: str, value: object) -> bytes:
    """torch.save to bytes, having made sure that :func:`deserialise` reads it.

    Raises:
        ValueError: it holds types that weights_only refuses: better now than at the resume.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    try:
        deserialise(buffer.getvalue())
    except pickle.UnpicklingError as error:
        raise ValueError(f"{what}: holds a type that could not be loaded again: {error}") from error
    return buffer.getvalue()


def deserialise(data: bytes) -> Any:
    """torch.load that builds tensors, plain Python values and BytesIO (Transformer Engine's FP8 state) only."""
    with torch.serialization.safe_globals([io.BytesIO]):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _index_to_json(index: Index) -> dict[str, Any]:
    return {
        "tensors": {
            key: {
                "shape": entry.shape,
                "dtype": _dtype_name(entry.dtype),
                "chunks": [asdict(chunk) for chunk in entry.chunks],
            }
            for key, entry in sorted(index.tensors.items())
        },
        "objects": {key: asdict(blob) for key, blob in sorted(index.blobs.items())},
    }


def _dcp_metadata(index: Index) -> Metadata:
    """The same index as torch.distributed.checkpoint knows it."""
    described: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for key, entry in index.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)) for chunk in entry.chunks]
        described[key] = TensorStorageMetadata(TensorProperties(dtype=entry.dtype), torch.Size(entry.shape), chunks)
        for number, chunk in enumerate(entry.chunks):
            stored[MetadataIndex(key, torch.Size(chunk.offset), number)] = _StorageInfo(
                chunk.file, chunk.start, chunk.length
            )
    for key, blob in index.blobs.items():
        described[key] = BytesStorageMetadata()
        stored[MetadataIndex(key)] = _StorageInfo(blob.file, blob.start, blob.length)
    return Metadata(state_dict_metadata=described, storage_data=stored)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of_name(name: str) -> torch.dtype:
    """``"bfloat16"`` to ``torch.bfloat16``."""
    dtype = torch.__dict__[name]
    assert isinstance(dtype, torch.dtype), name
    return dtype


# ---------------------------------------------------------------------------------------------- reading


class Reader(AbstractContextManager["Reader"]):
    """The tensors of a checkpoint folder, memory-mapped. Check the folder against its manifest before opening it."""

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX).is_file():
            raise CheckpointError(str(folder), f"has no {INDEX}; it was not written by this program")
        self.folder = folder
        content = json.loads((folder / INDEX).read_bytes())
        self.tensors = {
            key: TensorEntry(
                shape=tuple(entry["shape"]),
                dtype=dtype_of_name(entry["dtype"]),
                chunks=[
                    Chunk(**{**chunk, "offset": tuple(chunk["offset"]), "shape": tuple(chunk["shape"])})
                    for chunk in entry["chunks"]
                ],
            )
            for key, entry in content["tensors"].items()
        }
        self.blobs = {key: BlobEntry(**blob) for key, blob in content["objects"].items()}
        self._maps: dict[str, mmap.mmap] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Views on the maps may outlive the reader; a map goes when its last view does.
        self._maps.clear()

    def read(self, key: str) -> Tensor:
        """The whole tensor; a view on the file where it lies in one piece, so treat it as read-only."""
        entry = self.tensors[key]
        if len(entry.chunks) == 1:
            return self._view(entry, entry.chunks[0])
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(whole, key, (0,) * len(entry.shape))
        return whole

    def read_slice(self, key: str, number: int) -> Tensor:
        """One slice of the leading axis, ``[1, ...]``; a view where it lies in one piece, as :meth:`read`."""
        entry = self.tensors[key]
        offset, shape = (number, *(0,) * (len(entry.shape) - 1)), (1, *entry.shape[1:])
        for chunk in entry.chunks:
            if chunk.offset == offset and chunk.shape == shape:
                return self._view(entry, chunk)
        part = torch.empty(shape, dtype=entry.dtype)
        self.read_into(part, key, offset)
        return part

    def read_into(self, target: Tensor, key: str, offset: Shape) -> None:
        """Fill ``target`` (any device and dtype) with the box of the tensor that begins at ``offset``.

        What lies beyond the checkpoint's tensor is left as it is.
        """
        entry = self.tensors[key]
        assert target.dim() == len(entry.shape) == len(offset), (key, target.shape, entry.shape, offset)
        for chunk in entry.chunks:
            first = [max(o, c) for o, c in zip(offset, chunk.offset, strict=True)]
            last = [
                min(o + n, c + m) for o, n, c, m in zip(offset, target.shape, chunk.offset, chunk.shape, strict=True)
            ]
            if any(start >= end for start, end in zip(first, last, strict=True)):
                continue
            inside = tuple(slice(a - c, b - c) for a, b, c in zip(first, last, chunk.offset, strict=True))
            into = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, offset, strict=True))
            target[into].copy_(self._view(entry, chunk)[inside])

    def read_blob(self, key: str) -> Any:
        """A Python object (weights_only)."""
        blob = self.blobs[key]
        return deserialise(bytes(self._map(blob.file)[blob.start : blob.start + blob.length]))

    def read_common(self) -> dict[str, Any]:
        """The values beside the tensors (weights_only)."""
        return deserialise((self.folder / COMMON).read_bytes())

    def _view(self, entry: TensorEntry, chunk: Chunk) -> Tensor:
        count = math.prod(chunk.shape) * entry.dtype.itemsize
        if not count:
            return torch.empty(chunk.shape, dtype=entry.dtype)
        mapped = self._map(chunk.file)
        # Asked for at once: page by page, a file that is not in memory yet comes three times slower.
        page = chunk.data_start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, chunk.data_start + count - page)
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=count, offset=chunk.data_start)
        return raw.view(entry.dtype).view(chunk.shape)

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            with (self.folder / name).open("rb") as stream:
                # A private map, which torch takes for writable; nothing written to it would reach the file.
                self._maps[name] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[name]


def total_bytes(entries: Iterable[TensorEntry]) -> int:
    """Size of tensors in bytes."""
    return sum(entry.nbytes for entry in entries)
