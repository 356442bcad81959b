"""Which files a path of the recipe means."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_unimm.errors import DataError

MAX_FILES = 1_000_000
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
GLOB = re.compile(r"[*?\[]")


def expand(path: str, suffix: str, where: str) -> list[Path]:
    """The files of a path, in order: a file, a folder's files with a suffix, or those that a pattern names.

    ``{0000..0099}`` counts, keeping leading zeros; ``{a,b}`` lists; ``*``, ``?``, ``[…]`` and ``**`` match what is
    there. Hidden files are left out.

    Args:
        path: file, folder or pattern.
        suffix: of a folder's files, ``.tar``.
        where: the field, for messages.

    Raises:
        DataError: nothing is found, or a file that the braces name is absent.
    """
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).iterdir() if file.suffix == suffix and not _is_hidden(file))
    elif Path(path).exists():
        files = [Path(path)]
    else:
        files = [file for name in _expand_braces(path, where) for file in _matches(name, where)]
    if not files:
        raise DataError(path, f"no such files; correct {where}")
    return files


def _matches(name: str, where: str) -> list[Path]:
    if GLOB.search(name) and not Path(name).exists():
        return sorted(Path(found) for found in glob.glob(name, recursive=True))
    if not Path(name).is_file():
        raise DataError(name, f"no such file; correct {where}")
    return [Path(name)]


def _expand_braces(pattern: str, where: str) -> list[str]:
    names = [pattern]
    while any(BRACES.search(name) for name in names):
        names = [longer for name in names for longer in _expand_first(name, where)]
        if len(names) > MAX_FILES:
            raise DataError(pattern, f"names more than {MAX_FILES} files; correct {where}")
    return names


def _expand_first(name: str, where: str) -> Iterator[str]:
    braces = BRACES.search(name)
    if braces is None:
        yield name
        return
    counted = RANGE.fullmatch(braces[1])
    if counted is None:
        choices = iter(braces[1].split(","))
    else:
        first, last, width = int(counted[1]), int(counted[2]), len(counted[1])
        if not 0 <= last - first < MAX_FILES:
            raise DataError(name, f"{{{braces[1]}}} counts down or beyond {MAX_FILES} files; correct {where}")
        choices = (f"{number:0{width}d}" for number in range(first, last + 1))
    for choice in choices:
        yield name[: braces.start()] + choice + name[braces.end() :]


def _is_hidden(file: Path) -> bool:
    return file.name.startswith(".")
