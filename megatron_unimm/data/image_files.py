"""Where an encoded image lies: a file of its own, a stretch of a shard, or bytes that were read already.

``str()`` of each says where, for messages.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol


class ImageFile(Protocol):
    """An encoded image (JPEG, PNG, …) that can be opened any number of times, from any thread or process."""

    @property
    def name(self) -> str:
        """Its file name, without folders."""
        ...

    def open(self) -> BinaryIO:
        """Its bytes as a file that can be read and sought."""
        ...


@dataclass(frozen=True)
class DiskImage:
    """A file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def open(self) -> BinaryIO:
        return self.path.open("rb")


@dataclass(frozen=True)
class ShardImage:
    """A member of a tar shard, of which only its own bytes are read."""

    shard: Path
    name: str
    start: int
    """Offset of its first byte in the shard."""
    length: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    def open(self) -> BinaryIO:
        with self.shard.open("rb") as file:
            return io.BytesIO(os.pread(file.fileno(), self.length, self.start))


@dataclass(frozen=True)
class BytesImage:
    """Bytes in memory, as a table holds them."""

    data: bytes
    name: str
    where: str

    def __str__(self) -> str:
        return self.where

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)
