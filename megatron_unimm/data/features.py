"""Features of images computed beforehand, for stages whose vision encoder is frozen: neither pixels are decoded nor the
tower is run again.

A folder holds ``meta.json`` (which model made them) and parts, each the work of one rank::

    part-00003.keys.npy      uint64 [n, 2], sorted        of each image
    part-00003.places.npy    int64 [n, 2]                 first row and number of rows
    part-00003.rows          [rows, width]                numbers in the machine's order: little-endian

Keys are hashes of an image's bytes and of how it is sized, so that an image that changes is not found. Files are
mapped; opening reads none of them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_unimm.data.decode.interface import ImageRequest
from megatron_unimm.errors import DataError

META = "meta.json"
FORMAT = 1
STORED = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<i2")}
"""numpy's stand-in for each dtype; bfloat16 travels as the bits that it is."""
Key = tuple[int, int]
"""128 bits, as two uint64."""


@dataclass(frozen=True)
class FeatureMeta:
    """What made the features of a folder."""

    encoder: dict[str, Any]
    """The config of what made them: a vision encoder's, a VAE's, a VLM's."""
    weights: str
    """sha256 of its weights."""
    dtype: str
    width: int
    """Numbers of a row: per visual token, patch of latents, word."""


def image_key(request: ImageRequest) -> Key:
    """128 bits that stand for an image at a size."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((request.width, request.height, request.crop, request.filter)).encode())
    with request.file.open() as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return key_of(digest)


def key_of(digest: "hashlib.blake2b") -> Key:
    """The 16 bytes of a digest."""
    found = digest.digest()
    return int.from_bytes(found[:8], "little"), int.from_bytes(found[8:], "little")


class FeatureStore:
    """Looks features up.

    Raises:
        DataError: the folder is no finished cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            content = json.loads((folder / META).read_text())
        except (OSError, ValueError) as error:
            what = f"is no finished cache of features ({error}); make one with unimm data cache"
            raise DataError(str(folder), what) from error
        if content.pop("format", None) != FORMAT:
            raise DataError(str(folder), "is a cache of another version; make it again with unimm data cache")
        self.meta = FeatureMeta(**content)
        self._parts = [_Part(path, self.meta) for path in sorted(folder.glob("part-*.rows"))]

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)

    def __len__(self) -> int:
        return sum(len(part.keys) for part in self._parts)

    def get(self, key: Key) -> np.ndarray | None:
        """Features ``[V, width]`` of an image, of the dtype of :data:`STORED`; None if they are not there."""
        for part in self._parts:
            found = part.get(key)
            if found is not None:
                return found
        return None


class _Part:
    def __init__(self, rows: Path, meta: FeatureMeta) -> None:
        stem = rows.name.removesuffix(".rows")
        self.keys: np.ndarray = np.load(rows.with_name(f"{stem}.keys.npy"), mmap_mode="r", allow_pickle=False)
        self.places: np.ndarray = np.load(rows.with_name(f"{stem}.places.npy"), mmap_mode="r", allow_pickle=False)
        has_rows = rows.stat().st_size > 0  # an empty file cannot be mapped; what it holds may have no rows at all
        kind = STORED[meta.dtype]
        flat = np.memmap(rows, kind, mode="r") if has_rows else np.empty(0, kind)
        self.rows = flat.reshape(-1, meta.width)

    def get(self, key: Key) -> np.ndarray | None:
        first = np.uint64(key[0])
        place = int(np.searchsorted(self.keys[:, 0], first))
        while place < len(self.keys) and self.keys[place, 0] == first:
            if self.keys[place, 1] == np.uint64(key[1]):
                start, count = (int(number) for number in self.places[place])
                return self.rows[start : start + count]
            place += 1
        return None


class FeatureWriter:
    """Writes one rank's part of a cache; it counts when :meth:`finish` has been called."""

    def __init__(self, folder: Path, rank: int, meta: FeatureMeta) -> None:
        self.folder, self.meta = folder, meta
        self._stem = f"part-{rank:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{self._stem}.rows.tmp").open("wb")
        self._places: dict[Key, tuple[int, int]] = {}
        self._rows = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def add(self, key: Key, rows: np.ndarray) -> None:
        """Features ``[V, width]`` of an image."""
        assert rows.dtype == STORED[self.meta.dtype], (rows.dtype, self.meta.dtype)
        assert rows.shape[1] == self.meta.width, (rows.shape, self.meta.width)
        self._file.write(np.ascontiguousarray(rows).data)
        self._places[key] = (self._rows, len(rows))
        self._rows += len(rows)

    def finish(self) -> int:
        """Write the part's keys and give its files their names; returns how many it has."""
        self._file.close()
        order = sorted(self._places)
        keys = np.array(order, dtype=np.uint64).reshape(-1, 2)
        places = np.array([self._places[key] for key in order], dtype=np.int64).reshape(-1, 2)
        np.save(self.folder / f"{self._stem}.keys.npy", keys, allow_pickle=False)
        np.save(self.folder / f"{self._stem}.places.npy", places, allow_pickle=False)
        # The rows last: a part is looked for by them.
        (self.folder / f"{self._stem}.rows.tmp").rename(self.folder / f"{self._stem}.rows")
        return len(order)


def finish_cache(folder: Path, meta: FeatureMeta) -> None:
    """Mark a cache as finished, once all ranks' parts are."""
    temporary = folder / f"{META}.tmp"
    temporary.write_text(json.dumps({"format": FORMAT, **asdict(meta)}, indent=2) + "\n")
    temporary.rename(folder / META)
