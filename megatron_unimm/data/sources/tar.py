"""Reads the headers of a tar archive and nothing else: which members it has, and where their bytes lie.

The archive comes from anywhere. Nothing is ever unpacked; names are only compared, lengths only believed as far as the
file reaches. Understands ustar, GNU (long names) and pax (path, size); compressed archives have no places to read from.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

BLOCK = 512
MAX_EXTRA_BYTES = 1 << 20
"""Bytes of one pax header or long name."""

REGULAR_TYPES = (b"0", b"\0", b"7")
DIRECTORY, LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"5", b"L", b"K", b"x", b"g"
CHECKSUM = slice(148, 156)


class Problem(IntEnum):
    """What is wrong with a member. The numbers are stored in indices."""

    NONE = 0
    UNSAFE_NAME = 1
    NOT_REGULAR = 2
    CUT_OFF = 3
    """The archive ends inside the member, or without its end mark."""
    DAMAGED = 4
    """What should be a header is none; nothing behind it can be found."""


@dataclass(frozen=True)
class TarMember:
    """A member's place."""

    name: bytes
    """As stored; empty where the archive breaks off between members."""
    start: int
    """Offset of its first byte."""
    length: int
    """Bytes."""
    problem: Problem = Problem.NONE


class _DamagedError(Exception):
    """A header that is none."""


def read_members(path: Path) -> Iterator[TarMember]:
    """The members of an archive in order, without folders.

    An archive that is cut off or damaged gives the members before, then one with that problem.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        yield from _Scan(descriptor, os.fstat(descriptor).st_size).members()


class _Scan:
    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._position = 0
        self._long_name: bytes | None = None
        self._long_size: int | None = None
        self._is_sparse = False

    def members(self) -> Iterator[TarMember]:
        while True:
            header = os.pread(self._descriptor, BLOCK, self._position)
            if len(header) < BLOCK:
                yield TarMember(b"", self._position, 0, Problem.CUT_OFF)
                return
            if not any(header):
                return  # A block of zeros marks the end.
            try:
                member = self._next(header)
            except _DamagedError:
                yield TarMember(b"", self._position, 0, Problem.DAMAGED)
                return
            if member is not None:
                yield member
                if member.problem is Problem.CUT_OFF:
                    return

    def _next(self, header: bytes) -> TarMember | None:
        """Moves behind the member of a header, and returns it if it is one that counts."""
        if not _has_checksum(header):
            raise _DamagedError
        kind, length, start = header[156:157], _number(header[124:136]), self._position + BLOCK
        if kind in (LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL):
            self._read_extra(kind, start, length)
            self._position = start + length + -length % BLOCK
            return None
        name = _name(header) if self._long_name is None else self._long_name
        length = length if self._long_size is None else self._long_size
        is_sparse, self._is_sparse = self._is_sparse, False
        self._long_name = self._long_size = None
        # A link's size field, where it is set at all, is that of its target.
        length = length if kind in REGULAR_TYPES or not kind.isdigit() else 0
        self._position = start + length + -length % BLOCK
        if kind == DIRECTORY or (kind in REGULAR_TYPES and name.endswith(b"/")):
            return None
        if name.startswith(b"/") or b".." in name.split(b"/") or b"\0" in name:
            return TarMember(name, start, length, Problem.UNSAFE_NAME)
        if kind not in REGULAR_TYPES or is_sparse:
            return TarMember(name, start, length, Problem.NOT_REGULAR)
        return TarMember(name, start, length, Problem.CUT_OFF if start + length > self._size else Problem.NONE)

    def _read_extra(self, kind: bytes, start: int, length: int) -> None:
        """Takes note of what a header in front of a header says about the next member."""
        if length > MAX_EXTRA_BYTES:
            raise _DamagedError
        content = os.pread(self._descriptor, length, start)
        if kind == LONG_NAME:
            self._long_name = content.split(b"\0")[0]
        elif kind == PAX:
            for key, value in _pax_records(content):
                if key == b"path":
                    self._long_name = value
                elif key == b"size":
                    self._long_size = _decimal(value)
                elif key.startswith(b"GNU.sparse"):
                    self._is_sparse = True


def _has_checksum(header: bytes) -> bool:
    """Whether the header's checksum is right: the sum of its bytes, with blanks for the checksum itself."""
    try:
        return _number(header[CHECKSUM]) == sum(header) - sum(header[CHECKSUM]) + 8 * ord(" ")
    except _DamagedError:
        return False


def _number(field: bytes) -> int:
    """Octal digits, or, with the highest bit set, a binary number."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise _DamagedError
    return int(digits or b"0", 8)


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > 20:
        raise _DamagedError
    return int(value)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0")[0]
    # Only ustar splits names; GNU has other things there.
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """``length key=value\\n``, one after another; the length counts itself."""
    while content.strip(b"\0"):
        length = _decimal(content[:20].split(b" ")[0])
        record = content[:length]
        if not length or len(record) != length or not record.endswith(b"\n"):
            raise _DamagedError
        key, equals, value = record[:-1].partition(b" ")[2].partition(b"=")
        if not equals:
            raise _DamagedError
        yield key, value
        content = content[length:]
