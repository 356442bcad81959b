"""Reads conversations in ORION's format (appendix A.2) from JSON and JSONL files, one sample at a time.

An item is ``{"id": 0, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
{"from": "gpt", "value": "A red circle."}]}``. ``image`` is one path, a list of paths, or absent; the k-th ``<image>``
of the conversation is the k-th path. An image of a gpt turn is one that the model is to generate. In the place of
``conversations`` there may be a ``caption`` or ``text`` (captions.py tells what becomes of it), in the place of
``image`` there may be ``images`` or ``file_name``.
"""

import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_unimm.config.data import SampleKind, SourceConfig
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.sample import Sample
from megatron_unimm.data.sources.index import IndexWriter, StoredIndex, build_in_memory, find_index, open_index
from megatron_unimm.data.sources.records import (
    UTF8_BOM,
    as_object,
    check_text_size,
    image_names,
    make_sample,
    parse_object,
)
from megatron_unimm.data.sources.source import checked
from megatron_unimm.errors import DataError

LINE_INDEX = "lines 1"
"""``rows`` int64 [n + 1, 2]: offset in bytes and number from 1 of each line that is not blank; the last is the end."""

CHUNK_BYTES = 4 << 20
NEWLINE = 10
IS_TEXT = np.array([chr(byte) not in " \t\n\r\v\f" for byte in range(256)])
"""By byte: whether a line that begins with it is more than blank."""


class ConversationSource:
    """Random access to the conversations of one file.

    A JSONL file (one object per line) stays on disk, and so does its index. A JSON file (one array of objects) is held
    whole. Reading is safe from several threads.

    Raises:
        DataError: the file or the image folder is absent, the file is empty, or it is neither JSONL nor a JSON array.
    """

    def __init__(self, source: SourceConfig, name: str, index_cache: Path | None = None) -> None:
        self._opened_with = (source, name, index_cache)
        self.name = name
        self.kind: SampleKind = source.kind
        self.path = Path(source.path)
        if not self.path.is_file():
            raise DataError(str(self.path), f"no such file; correct data.sources.{name}.path")
        self._images = ImageFolder(source.images or self.path.parent, name)
        self._items: _LineFile | _ArrayFile
        if _is_array(self.path):
            self._items = _ArrayFile(self.path)
        else:
            self._items = _LineFile(self.path, source.max_samples, index_cache)
        self._length = min(len(self._items), source.max_samples or len(self._items))
        if not self._length:
            raise DataError(str(self.path), "holds no samples")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._opened_with

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """The sample at a place of the file.

        Raises:
            SampleError: the item is malformed, or its images are absent or do not match its marks.
        """
        checked(index, self._length, str(self.path))
        where = self.where(index)
        record = self._items.load(index, where)
        files = [self._images.find(image, where) for image in image_names(record, where)]
        return make_sample(record, files, name=self.name, kind=self.kind, default_id=str(index), where=where)

    def where(self, index: int) -> str:
        """The place of a sample for messages: ``file.jsonl:17`` (line, from 1), or ``file.json[16]`` (item of the
        array, from 0)."""
        return self._items.where(index)


class ImageFolder:
    """The folder that the image paths of a source are relative to, and may not lead out of.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        self._folder = os.path.abspath(folder)
        if not os.path.isdir(self._folder):
            raise DataError(self._folder, f"no such folder; correct data.sources.{name}.images")

    def find(self, image: str, where: str) -> DiskImage:
        """The file of an image.

        Raises:
            SampleError: it is absent, no regular file, or outside the folder.
        """
        # Compared as text: a link inside the folder may lead elsewhere, that is how people mount large image sets.
        path = os.path.normpath(os.path.join(self._folder, image))
        if not Path(path).is_relative_to(self._folder):
            raise SampleError(
                where, f"image '{image}' lies outside the image folder {self._folder}", "path outside the image folder"
            )
        if not os.path.isfile(path):
            raise SampleError(where, f"no image file {path}", "missing image")
        return DiskImage(Path(path))


class _LineFile:
    """A JSONL file by line."""

    def __init__(self, path: Path, max_lines: int | None, index_cache: Path | None) -> None:
        self._path = path
        index = _line_index(path, max_lines, index_cache)
        self._length = index.samples
        self._rows = index.load()["rows"]
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        return f"{self._path}:{self._rows[index, 1]}"

    def load(self, index: int, where: str) -> dict[str, Any]:
        start = int(self._rows[index, 0])
        length = int(self._rows[index + 1, 0]) - start
        if start < 0 or length < 0:
            raise SampleError(where, "the index does not fit the file; delete the index", "damaged file")
        check_text_size(length, where)
        # pread leaves the file position alone, so that threads can share the file.
        line = os.pread(self._file, length, start)
        return parse_object(line, where, "write one object per line")


class _ArrayFile:
    """A JSON array, in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            items = json.loads(path.read_bytes().removeprefix(UTF8_BOM))
        except (ValueError, RecursionError) as error:
            raise DataError(str(path), f"not valid JSON ({error})") from error
        self._items: list[object] = items

    def __len__(self) -> int:
        return len(self._items)

    def where(self, index: int) -> str:
        return f"{self._path}[{index}]"

    def load(self, index: int, where: str) -> dict[str, Any]:
        return as_object(self._items[index], where)


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(UTF8_BOM).lstrip()[:1] == b"["


def _line_index(path: Path, max_lines: int | None, cache: Path | None) -> StoredIndex:
    """The index of a JSONL file; that of its first lines is not worth keeping."""
    if max_lines is None:
        return open_index(path, LINE_INDEX, _build_lines, cache)
    found = find_index(path, LINE_INDEX, cache)
    if found is not None:
        return found

    def build(path: Path, writer: IndexWriter) -> int:
        return _build_lines(path, writer, max_lines)

    return build_in_memory(path, LINE_INDEX, build)


def _build_lines(path: Path, writer: IndexWriter, max_lines: int | None = None) -> int:
    count = 0  # of rows, the last of which is the end
    with path.open("rb") as file:
        for rows in _line_rows(file):
            rows = rows if max_lines is None else rows[: max_lines + 1 - count]
            writer.append("rows", rows)
            count += len(rows)
            if max_lines is not None and count > max_lines:
                break
    return count - 1


def _line_rows(file: BinaryIO) -> Iterator[np.ndarray]:
    """Offset and number of the lines that are not blank, then the end: int64 [any, 2] a piece."""
    position, start, number, has_text = 0, 0, 1, False  # start, number, has_text: of the line that a piece begins in
    while piece := file.read(CHUNK_BYTES):
        data = np.frombuffer(piece, dtype=np.uint8)
        begins = np.concatenate([[0], np.flatnonzero(data == NEWLINE) + 1])  # The last line goes on in the next piece.
        if len(begins) > 1:
            is_kept = IS_TEXT[data[begins[:-1]]]
            for line in np.flatnonzero(~is_kept).tolist():  # Blank, or only indented.
                is_kept[line] = not piece[begins[line] : begins[line + 1]].isspace()
            is_kept[0] |= has_text
            starts = np.concatenate([[start], position + begins[1:-1]])
            numbers = np.arange(number, number + len(starts))
            yield np.stack([starts, numbers], axis=1)[is_kept].astype("<i8")
            start, number, has_text = position + int(begins[-1]), number + len(starts), False
        rest = piece[begins[-1] :]
        has_text |= bool(rest) and not rest.isspace()
        position += len(piece)
    if has_text:
        yield np.array([[start, number]], dtype="<i8")
    yield np.array([[position, 0]], dtype="<i8")
