"""Reads conversations in ORION's format (appendix A.2) from JSON and JSONL files, one sample at a time.

An item is ``{"id": 0, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
{"from": "gpt", "value": "A red circle."}]}``. ``image`` is one path, a list of paths, or absent; the k-th ``<image>``
of the conversation is the k-th path. An image of a gpt turn is one that the model is to generate.
"""

import json
import os
import weakref
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_unimm.config.data import SampleKind, SourceConfig
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.sample import Sample, Turn
from megatron_unimm.errors import ConfigError, DataError

IMAGE_MARK = "<image>"
ROLES: dict[str, Literal["system", "user", "assistant"]] = {"system": "system", "human": "user", "gpt": "assistant"}
UTF8_BOM = b"\xef\xbb\xbf"


class ConversationSource:
    """Random access to the conversations of one file.

    A JSONL file (one object per line) stays on disk: only the byte offset and the number of each line are kept, 16
    bytes a sample. A JSON file (one array of objects) is held whole. Reading is safe from several threads.

    Raises:
        DataError: the file or the image folder is absent, the file is empty, or it is neither JSONL nor a JSON array.
    """

    def __init__(self, source: SourceConfig, name: str) -> None:
        self.name = name
        self.kind: SampleKind = source.kind
        self.path = Path(source.path)
        if not self.path.is_file():
            raise DataError(str(self.path), f"no such file; correct data.sources.{name}.path")
        self._images = os.path.abspath(source.images or self.path.parent)
        if not os.path.isdir(self._images):
            raise DataError(self._images, f"no such folder; correct data.sources.{name}.images")
        self._items: _LineFile | _ArrayFile
        self._items = _ArrayFile(self.path) if _is_array(self.path) else _LineFile(self.path, source.max_samples)
        self._length = min(len(self._items), source.max_samples or len(self._items))
        if not self._length:
            raise DataError(str(self.path), "holds no samples")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """The sample at a place of the file.

        Raises:
            SampleError: the item is malformed, or its images are absent or do not match its marks.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"{self.path}: sample {index} of {self._length}")
        where = self.where(index)
        item = self._items.load(index, where)
        if not isinstance(item, dict):
            raise SampleError(
                where, f"expected an object with 'conversations', found {type(item).__name__}", "malformed conversation"
            )
        turns, num_marks = _parse_turns(item, where)
        images = _parse_images(item, where)
        if num_marks != len(images):
            raise SampleError(
                where, f"{num_marks} {IMAGE_MARK} marks but {len(images)} images; give one path per mark", "image count"
            )
        _check_kind(turns, self.kind, where)
        files = tuple(self._image(image, where) for image in images)
        return Sample(id=f"{self.name}/{item.get('id', index)}", kind=self.kind, turns=turns, images=files)

    def where(self, index: int) -> str:
        """The place of a sample for messages: ``file.jsonl:17`` (line, from 1), or ``file.json[16]`` (item of the
        array, from 0)."""
        return self._items.where(index)

    def _image(self, image: str, where: str) -> DiskImage:
        # Compared as text: a link inside the folder may lead elsewhere, that is how people mount large image sets.
        path = os.path.normpath(os.path.join(self._images, image))
        if not Path(path).is_relative_to(self._images):
            raise SampleError(
                where, f"image '{image}' lies outside the image folder {self._images}", "path outside the image folder"
            )
        if not os.path.isfile(path):
            raise SampleError(where, f"no image file {path}", "missing image")
        return DiskImage(Path(path))


def open_sources(sources: Mapping[str, SourceConfig]) -> dict[str, ConversationSource]:
    """Opens every source with a weight above 0, in the order of the recipe.

    Raises:
        ConfigError: no source has a weight above 0.
        DataError: a file cannot be opened.
    """
    drawn = {name: ConversationSource(source, name) for name, source in sources.items() if source.weight > 0}
    if not drawn:
        raise ConfigError(
            "data.sources", f"none of {len(sources)} sources has a weight above 0; name at least one to train on"
        )
    return drawn


class _LineFile:
    """A JSONL file by line."""

    def __init__(self, path: Path, max_lines: int | None) -> None:
        self._path = path
        self._offsets, self._lines = _index_lines(path, max_lines)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        return f"{self._path}:{self._lines[index]}"

    def load(self, index: int, where: str) -> object:
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        # pread leaves the file position alone, so that threads can share the file.
        line = os.pread(self._file, end - start, start)
        try:
            return json.loads(line.removeprefix(UTF8_BOM))
        except (ValueError, RecursionError) as error:
            raise SampleError(
                where, f"not valid JSON ({error}); write one object per line", "malformed conversation"
            ) from error


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

    def load(self, index: int, where: str) -> object:
        return self._items[index]


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(UTF8_BOM).lstrip()[:1] == b"["


def _index_lines(path: Path, max_lines: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Finds the lines that are not blank: int64 [n + 1] byte offsets (the last is an end) and int64 [n] line numbers
    from 1."""
    offsets, numbers, position = array("q"), array("q"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                if len(numbers) == max_lines:
                    break
                offsets.append(position)
                numbers.append(number)
            position += len(line)
    offsets.append(position)
    return np.array(offsets, dtype=np.int64), np.array(numbers, dtype=np.int64)


def _parse_turns(item: dict, where: str) -> tuple[tuple[Turn, ...], int]:
    """Returns the turns and the number of image marks in them."""
    entries = item.get("conversations")
    if not isinstance(entries, list) or not entries:
        raise SampleError(where, "'conversations' is absent or empty; give a list of turns", "malformed conversation")
    turns, num_images = [], 0
    for number, entry in enumerate(entries, start=1):
        turn, num_images = _parse_turn(entry, num_images, f"turn {number}", where)
        turns.append(turn)
    if all(turn.role != "assistant" for turn in turns):
        raise SampleError(where, "no turn is from gpt, so there is nothing to learn", "malformed conversation")
    return tuple(turns), num_images


def _parse_turn(entry: object, num_images: int, place: str, where: str) -> tuple[Turn, int]:
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
        raise SampleError(where, f"{place} is not an object with 'from' and a text 'value'", "malformed conversation")
    role = entry.get("from")
    if not isinstance(role, str) or role not in ROLES:
        raise SampleError(where, f"{place} is from {role!r}; known roles: {', '.join(ROLES)}", "malformed conversation")
    if not _is_unicode(entry["value"]):
        raise SampleError(where, f"{place} holds half a surrogate pair, which no text can", "malformed conversation")
    parts: list[str | int] = []
    for number, text in enumerate(entry["value"].split(IMAGE_MARK)):
        if number:
            parts.append(num_images)
            num_images += 1
        if text:
            parts.append(text)
    return Turn(role=ROLES[role], parts=tuple(parts)), num_images


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded; JSON's escapes can write one that cannot, and the tokenizer would stop the run."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_images(item: dict, where: str) -> list[str]:
    images = item.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise SampleError(where, "'image' is neither a path nor a list of paths", "malformed conversation")
    return images


def _check_kind(turns: tuple[Turn, ...], kind: SampleKind, where: str) -> None:
    has_target = any(turn.role == "assistant" and any(isinstance(part, int) for part in turn.parts) for turn in turns)
    if kind != "understanding" and not has_target:
        raise SampleError(
            where, f"a sample of kind {kind} needs an {IMAGE_MARK} in a gpt turn, found none", "image count"
        )
