"""Files of one JSON value per line, which a run appends to and may be killed in the middle of."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TAIL_BYTES = 1 << 18


def append_line(path: Path, fields: Mapping[str, Any]) -> None:
    """Append one line in one write; one that was left unfinished before it is closed first. One writer per file."""
    text = json.dumps(fields) + "\n"
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else f"\n{text}"
        file.write(text.encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines, none where there is no file; an unfinished one is passed over."""
    return _parse(path.read_bytes()) if path.exists() else []


def last_lines(path: Path, max_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The lines in the last ``max_bytes`` of a file, however long it is; at least the last where it is whole."""
    if not path.exists():
        return []
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - max_bytes))
        tail = file.read()
    if size > max_bytes:  # begins in the middle of a line
        tail = tail.partition(b"\n")[2]
        if not tail.strip():
            return last_lines(path, 2 * max_bytes)
    return _parse(tail)


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the other lines of a file, if there is one; a reader sees it before or after."""
    if not path.exists():
        return
    kept = "".join(json.dumps(line) + "\n" for line in read_lines(path) if wanted(line))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(kept)
    os.replace(temporary, path)


def _parse(text: bytes) -> list[dict[str, Any]]:
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # not JSON, or cut in the middle of a character
            continue
    return lines
