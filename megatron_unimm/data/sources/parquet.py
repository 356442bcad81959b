"""Reads Parquet tables row by row, as the hub hands out image data sets.

Parquet keeps rows in groups that can only be read as a whole. The last ones read are kept, but samples are drawn at
random: each draw reads a row group of its own. Tables with large row groups are better packed into shards first
(``unimm data pack``).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_unimm.config.data import ColumnsConfig, SampleKind, SourceConfig
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import BytesImage, ImageFile
from megatron_unimm.data.sample import Sample
from megatron_unimm.data.sources.conversations import ImageFolder
from megatron_unimm.data.sources.files import expand
from megatron_unimm.data.sources.index import IndexWriter, open_index
from megatron_unimm.data.sources.records import check_text_size, make_sample, parse_json
from megatron_unimm.data.sources.source import checked
from megatron_unimm.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

ROW_INDEX = "rows 1"
"""``groups`` int64 [g + 1]: rows before each row group, then all; ``bytes`` int64 [g]: of a row group, decompressed;
``damage`` uint8: what is wrong with a file that cannot be opened, which stands as one sample."""

USUAL_COLUMNS = {
    "image": ("image", "images"),
    "caption": ("caption", "text"),
    "conversations": ("conversations",),
    "id": ("id",),
}
KEPT_BYTES = 256 << 20
"""Row groups in memory, together, of each process; the last one is kept whatever its size."""

MAX_GROUP_BYTES = 4 << 30
LARGE_GROUP_BYTES = 32 << 20
"""Row groups from this size on slow down training."""

OPEN_FILES = 1024
ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError)
"""What pyarrow raises on damaged files."""


class ParquetSource:
    """Random access to the rows of tables.

    Raises:
        DataError: there are no such files, or they hold no rows.
        ConfigError: a configured column is absent.
    """

    def __init__(self, source: SourceConfig, name: str, index_cache: Path | None = None) -> None:
        self._opened_with = (source, name, index_cache)
        self.name = name
        self.kind: SampleKind = source.kind
        files = expand(source.path, ".parquet", f"data.sources.{name}.path")
        self._images = ImageFolder(source.images or files[0].parent, name)
        self._columns = source.columns
        self._files = [open_index(path, ROW_INDEX, _build_row_index, index_cache) for path in files]
        # int64 [files + 1]: rows before each file, then all.
        self._bounds = np.cumsum([0, *(file.samples for file in self._files)])
        self._length = min(int(self._bounds[-1]), source.max_samples or int(self._bounds[-1]))
        if not self._length:
            raise DataError(source.path, "holds no samples")
        self._load = lru_cache(OPEN_FILES)(self._load_file)
        self._groups = _RowGroups(KEPT_BYTES)
        self._check_columns()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._opened_with

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """The sample of a row, file after file.

        Raises:
            SampleError: the file is damaged, or the row malformed.
        """
        number, row = self._find(index)
        where = self.where(index)
        values = self._read_row(number, row, where)
        record = {key: values.get(key) for key in ("id", "caption", "conversations")}
        for text in (record["caption"], record["conversations"]):
            if isinstance(text, str):
                check_text_size(len(text), where)
        if isinstance(turns := record["conversations"], str):
            record["conversations"] = parse_json(turns.encode(), where, "give a list of turns")
        files = self._image_files(values.get("image"), where)
        return make_sample(record, files, name=self.name, kind=self.kind, default_id=str(index), where=where)

    def where(self, index: int) -> str:
        """``table.parquet[16]``: file and row, from 0."""
        number, row = self._find(index)
        return f"{self._files[number].path}[{row}]"

    def _find(self, index: int) -> tuple[int, int]:
        checked(index, self._length, self.name)
        number = int(np.searchsorted(self._bounds, index, side="right")) - 1
        return number, index - int(self._bounds[number])

    def _load_file(self, number: int) -> dict[str, np.ndarray]:
        return self._files[number].load()

    def _read_row(self, number: int, row: int, where: str) -> dict[str, Any]:
        """Values by what they are; those that the table lacks are absent."""
        index, path = self._load(number), self._files[number].path
        if len(index["damage"]):
            raise SampleError(where, index["damage"].tobytes().decode(errors="replace"), "damaged file")
        group = int(np.searchsorted(index["groups"], row, side="right")) - 1
        row -= int(index["groups"][group])
        if index["bytes"][group] > MAX_GROUP_BYTES:
            what = f"row group of {index['bytes'][group]} bytes; write row groups of at most {MAX_GROUP_BYTES}"
            raise SampleError(where, what, "damaged file")
        try:
            table = self._groups.get((number, group), lambda: _read_group(path, group, self._columns))
            # The names of the table's columns are those of USUAL_COLUMNS.
            return {key: table.column(key)[row].as_py() for key in table.column_names}
        except (*ARROW_ERRORS, IndexError) as error:
            raise SampleError(where, f"row group {group} cannot be read ({error})", "damaged file") from error

    def _image_files(self, value: object, where: str) -> list[ImageFile]:
        values = value if isinstance(value, list) else [] if value is None else [value]
        return [self._image_file(item, number, where) for number, item in enumerate(values)]

    def _image_file(self, value: object, number: int, where: str) -> ImageFile:
        path = value
        if isinstance(value, dict):
            path = value.get("path")
            value = value.get("bytes") if value.get("bytes") is not None else path
        if isinstance(value, bytes):
            name = Path(path).name if isinstance(path, str) and path else f"image {number}"
            return BytesImage(value, name, f"{where} ({name})")
        if isinstance(value, str):
            return self._images.find(value, where)
        what = f"image {number} is {type(value).__name__}; give bytes, a path, or a struct of these"
        raise SampleError(where, what, "missing image" if value is None else "malformed conversation")

    def _check_columns(self) -> None:
        """Refuses a configured column that the first sound file lacks, and warns of large row groups."""
        for file in self._files:
            index = file.load()
            if len(index["damage"]):
                continue
            with pq.ParquetFile(file.path) as table:
                names = table.schema_arrow.names
            for key, column in self._columns.model_dump().items():
                if column and column not in names:
                    what = f"{file.path} has no column {column!r}; it has {', '.join(names)}"
                    raise ConfigError(f"data.sources.{self.name}.columns.{key}", what)
            if len(index["bytes"]) and index["bytes"].mean() > LARGE_GROUP_BYTES:
                logger.warning(
                    "data: source %s: each draw reads a row group of %.0f MB; make shards of it with `unimm data pack`",
                    self.name,
                    index["bytes"].mean() / 1e6,
                )
            return


class _RowGroups:
    """The row groups that were read last; each is read by one thread, and others that want it wait."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = Lock()
        self._tables: OrderedDict[tuple[int, int], Future[pa.Table]] = OrderedDict()

    def get(self, key: tuple[int, int], read: Callable[[], pa.Table]) -> pa.Table:
        with self._lock:
            future = self._tables.get(key)
            is_first = future is None
            if future is None:
                future = self._tables[key] = Future()
            self._tables.move_to_end(key)
        if is_first:
            try:
                future.set_result(read())
            except BaseException as error:
                with self._lock:
                    del self._tables[key]
                future.set_exception(error)
            else:
                self._trim()
        return future.result()

    def _trim(self) -> None:
        with self._lock:
            done = [(key, future.result().nbytes) for key, future in self._tables.items() if future.done()]
            excess = sum(size for _, size in done) - self._capacity
            for key, size in done[:-1]:
                if excess <= 0:
                    return
                del self._tables[key]
                excess -= size


def _build_row_index(path: Path, writer: IndexWriter) -> int:
    try:
        metadata = pq.read_metadata(path)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        rows = np.array([group.num_rows for group in groups], dtype="<i8")
        sizes = np.array([group.total_byte_size for group in groups], dtype="<i8")
        damage = "" if (rows >= 0).all() else "a row group has less than no rows"
    except ARROW_ERRORS as error:
        rows, sizes, damage = np.array([1], dtype="<i8"), np.array([0], dtype="<i8"), f"no sound Parquet file ({error})"
    writer.append("groups", np.concatenate([[0], np.cumsum(rows)]).astype("<i8"))
    writer.append("bytes", sizes)
    writer.append("damage", np.frombuffer(" ".join(damage.split()).encode(), dtype="|u1"))
    return 1 if damage else int(rows.sum())


def _read_group(path: Path, group: int, configured: ColumnsConfig) -> pa.Table:
    """The columns that count, under the names of USUAL_COLUMNS."""
    with pq.ParquetFile(path) as file:
        columns = _columns(file.schema_arrow.names, configured)
        table = file.read_row_group(group, columns=list(columns), use_threads=False)
    return table.select(list(columns)).rename_columns(list(columns.values()))


def _columns(names: Sequence[str], configured: ColumnsConfig) -> dict[str, str]:
    """Column -> what it is."""
    columns = {}
    for key, given in configured.model_dump().items():
        found = given or next((usual for usual in USUAL_COLUMNS[key] if usual in names), None)
        if found is not None:
            columns[found] = key
    return columns
