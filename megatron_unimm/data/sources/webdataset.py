"""Reads WebDataset shards in place: tar archives whose neighbouring members of one name make up a sample.

The name is what stands before the first dot behind the last slash; what follows says what the member is::

    000001.jpg  000001.txt                   an image and its caption (BLIP3-o)
    000001.jpg  000001.json                  the same; or a conversation, under "conversations" (LLaVA)
    000001.0.jpg  000001.1.png  000001.json  several images, in the order of their numbers

Where the JSON names its images (``image``, ``images`` or ``file_name``) by names that the members have, that order
holds instead. Other members are left alone, and so are hidden ones; Energon's ``.nv-meta`` lies beside the shards and
is not needed. A shard that is cut off gives the samples before the cut, and one sample that tells of the damage.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_unimm.config.data import SampleKind, SourceConfig
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import ShardImage
from megatron_unimm.data.sample import Sample
from megatron_unimm.data.sources.files import expand
from megatron_unimm.data.sources.index import IndexWriter, StoredIndex, open_index
from megatron_unimm.data.sources.records import check_text_size, image_names, make_sample, parse_object, parse_text
from megatron_unimm.data.sources.source import checked
from megatron_unimm.data.sources.tar import Problem, TarMember, read_members
from megatron_unimm.errors import DataError

TAR_INDEX = "tar 1"
"""``samples`` int64 [n + 1]: first member of each sample, then the end; ``members`` int64 [m, 5]: where its name begins
and ends in ``names``, offset and length in the shard, Problem; ``names`` uint8. Change the number whenever other
members are kept."""

IMAGE_SUFFIXES = (b"jpg", b"jpeg", b"png", b"webp", b"gif", b"bmp", b"ppm", b"tif", b"tiff")
TEXT_SUFFIX, JSON_SUFFIX = b"txt", b"json"
MAX_IMAGE_BYTES = 512 << 20
"""Bytes of one encoded image. It is read as a whole, so more would only fill the memory."""

OPEN_SHARDS = 1024
"""Indices that stay mapped."""

INDEX_THREADS = 16
"""Shards whose index is opened at the same time; they wait for the file system, not for each other."""


class WebDatasetSource:
    """Random access to the samples of shards.

    Raises:
        DataError: there are no such shards, or they hold no samples.
    """

    def __init__(self, source: SourceConfig, name: str, index_cache: Path | None = None) -> None:
        self._opened_with = (source, name, index_cache)
        self.name = name
        self.kind: SampleKind = source.kind
        shards = expand(source.path, ".tar", f"data.sources.{name}.path")
        with ThreadPoolExecutor(min(INDEX_THREADS, len(shards)), "data-index") as pool:
            self._shards = list(pool.map(partial(_open_shard, cache=index_cache), shards))
        # int64 [shards + 1]: samples before each shard, then all.
        self._bounds = np.cumsum([0, *(shard.samples for shard in self._shards)])
        self._length = min(int(self._bounds[-1]), source.max_samples or int(self._bounds[-1]))
        if not self._length:
            raise DataError(source.path, "holds no samples")
        self._load = lru_cache(OPEN_SHARDS)(self._load_shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._opened_with

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """The sample at a place, shard after shard.

        Raises:
            SampleError: a member is missing, malformed, damaged or unsafe.
        """
        shard, members = self._find(index)
        where = _where(shard.path, members)
        for member in members:
            _check_member(member, shard.path, where)
        record = _read_record(shard.path, members, where)
        files = [
            ShardImage(shard.path, _text(member.name), member.start, member.length)
            for member in _images_in_order(members, record, where)
        ]
        key = _text(_split(members[0].name)[0])
        return make_sample(record, files, name=self.name, kind=self.kind, default_id=key, where=where)

    def where(self, index: int) -> str:
        """``shard.tar:key`` of a sample."""
        shard, members = self._find(index)
        return _where(shard.path, members)

    def _find(self, index: int) -> tuple[StoredIndex, list[TarMember]]:
        checked(index, self._length, self.name)
        number = int(np.searchsorted(self._bounds, index, side="right")) - 1
        shard, place = self._shards[number], index - int(self._bounds[number])
        return shard, self._load(number).members_of(place, shard.path)

    def _load_shard(self, number: int) -> "_ShardIndex":
        return _ShardIndex(**self._shards[number].load())


@dataclass(frozen=True)
class _ShardIndex:
    samples: np.ndarray
    members: np.ndarray
    names: np.ndarray

    def members_of(self, place: int, path: Path) -> list[TarMember]:
        """The members of a sample.

        Raises:
            SampleError: the numbers lead outside of the index.
        """
        first, end = (int(bound) for bound in self.samples[place : place + 2])
        if not 0 <= first < end <= len(self.members):
            raise SampleError(f"{path}[{place}]", "the index is damaged; delete it", "damaged file")
        rows = self.members[first:end].tolist()
        return [TarMember(self.names[a:b].tobytes(), start, length, problem) for a, b, start, length, problem in rows]


def _open_shard(path: Path, cache: Path | None) -> StoredIndex:
    return open_index(path, TAR_INDEX, build_shard_index, cache)


def build_shard_index(path: Path, writer: IndexWriter) -> int:
    """Indexes one shard from its headers (see TAR_INDEX)."""
    firsts, rows, names = [0], [], bytearray()
    kept = (member for member in read_members(path) if _is_kept(member))
    for _, group in groupby(kept, key=lambda member: _split(member.name)[0]):
        for member in group:
            rows.append((len(names), len(names) + len(member.name), member.start, member.length, member.problem))
            names += member.name
        firsts.append(len(rows))
    writer.append("samples", np.array(firsts, dtype="<i8"))
    writer.append("members", np.array(rows, dtype="<i8").reshape(-1, 5))
    writer.append("names", np.frombuffer(bytes(names), dtype="|u1"))
    return len(firsts) - 1


def _is_kept(member: TarMember) -> bool:
    """Whether a member can be part of a sample, or has to be told of."""
    if member.problem is not Problem.NONE:
        return True
    suffix = _split(member.name)[1].rpartition(b".")[2].lower()
    is_hidden = member.name.rpartition(b"/")[2].startswith(b".")
    return not is_hidden and suffix in (*IMAGE_SUFFIXES, TEXT_SUFFIX, JSON_SUFFIX)


def _split(name: bytes) -> tuple[bytes, bytes]:
    """Key and ending: ``a/b.0.jpg`` gives ``a/b`` and ``0.jpg``."""
    folder, slash, base = name.rpartition(b"/")
    stem, _, ending = base.partition(b".")
    return folder + slash + stem, ending


def _text(name: bytes) -> str:
    return name.decode(errors="replace")


def _where(shard: Path, members: Sequence[TarMember]) -> str:
    key = _text(_split(members[0].name)[0])
    return f"{shard}:{key or f'byte {members[0].start}'}"


def _check_member(member: TarMember, shard: Path, where: str) -> None:
    name = _text(member.name)
    if member.problem == Problem.UNSAFE_NAME:
        raise SampleError(where, f"member {name!r} has a name that leads out of the shard", "unsafe member")
    if member.problem == Problem.NOT_REGULAR:
        raise SampleError(where, f"member {name!r} is a link, device or sparse file, no plain one", "unsafe member")
    if member.problem == Problem.CUT_OFF:
        raise SampleError(
            where, f"{shard} is cut off at {f'member {name}' if name else 'its end'}; fetch it again", "damaged file"
        )
    if member.problem != Problem.NONE:
        what = f"{shard} is no sound tar archive from byte {member.start} on; fetch it again"
        raise SampleError(where, f"{what}, or unpack it if it is compressed", "damaged file")


def _read_record(shard: Path, members: Sequence[TarMember], where: str) -> dict[str, Any]:
    """The fields of a sample: its JSON, with its text as caption where that has neither conversation nor caption."""
    texts = {suffix: _only(members, suffix, where) for suffix in (JSON_SUFFIX, TEXT_SUFFIX)}
    record: dict[str, Any] = {}
    if (member := texts[JSON_SUFFIX]) is not None:
        record = parse_object(_read(shard, member, where), where, "write one object per member")
    says_something = any(record.get(key) is not None for key in ("conversations", "caption", "text"))
    if (member := texts[TEXT_SUFFIX]) is not None and not says_something:
        record = {**record, "caption": parse_text(_read(shard, member, where), where)}
    return record


def _only(members: Sequence[TarMember], suffix: bytes, where: str) -> TarMember | None:
    found = [member for member in members if member.name.lower().endswith(b"." + suffix)]
    if len(found) > 1:
        what = f"{len(found)} members end in .{suffix.decode()}; samples of one name must not follow each other"
        raise SampleError(where, what, "malformed conversation")
    return found[0] if found else None


def _read(shard: Path, member: TarMember, where: str) -> bytes:
    check_text_size(member.length, where)
    if member.start < 0 or member.length < 0:
        raise SampleError(where, "the index does not fit the shard; delete the index", "damaged file")
    with shard.open("rb", buffering=0) as file:
        content = os.pread(file.fileno(), member.length, member.start)
    if len(content) != member.length:
        raise SampleError(where, f"{shard} ends inside member {_text(member.name)}; fetch it again", "damaged file")
    return content


def _images_in_order(members: Sequence[TarMember], record: Mapping[str, Any], where: str) -> list[TarMember]:
    images = [member for member in members if member.name.lower().rpartition(b".")[2] in IMAGE_SUFFIXES]
    by_base = defaultdict(list)
    for member in images:
        if not 0 <= member.length <= MAX_IMAGE_BYTES or member.start < 0:
            what = f"image {_text(member.name)} has {member.length} bytes; at most {MAX_IMAGE_BYTES} are read"
            raise SampleError(where, what, "image too large")
        by_base[member.name.rpartition(b"/")[2]].append(member)
    doubled = next((base for base, same in by_base.items() if len(same) > 1), None)
    if doubled is not None:
        raise SampleError(where, f"two members have the name {_text(doubled)}", "malformed conversation")
    named = [name.rpartition("/")[2].encode() for name in image_names(record, where)]
    if any(name in by_base for name in named):
        absent = next((name for name in named if name not in by_base), None)
        if absent is not None:
            raise SampleError(where, f"no image {absent.decode()} among the sample's members", "missing image")
        return [by_base[name][0] for name in named]
    return sorted(images, key=_image_number)


def _image_number(member: TarMember) -> int:
    """``key.jpg`` before ``key.0.jpg`` before ``key.10.jpg``; sorting keeps others in the order of the shard."""
    number = _split(member.name)[1].partition(b".")[0]
    return int(number) if number.isdigit() and len(number) < 10 else -1
