"""Every format delivers the same samples from the same content, in any order, from any thread or process."""

import io
import itertools
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_unimm.cli.main import run
from megatron_unimm.config.data import SourceConfig
from megatron_unimm.data.chat import layout_sample
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import ShardImage
from megatron_unimm.data.images import decode
from megatron_unimm.data.sample import Turn
from megatron_unimm.data.sources import index as index_module
from megatron_unimm.data.sources.captions import DESCRIBE_TEMPLATES, REPEAT_TEMPLATES
from megatron_unimm.data.sources.conversations import CHUNK_BYTES, _build_lines
from megatron_unimm.data.sources.files import expand
from megatron_unimm.data.sources.index import build_in_memory, open_index
from megatron_unimm.data.sources.opening import find_format, open_source
from megatron_unimm.data.sources.source import Source
from megatron_unimm.data.sources.webdataset import TAR_INDEX, WebDatasetSource, build_shard_index
from megatron_unimm.errors import ConfigError, DataError

COUNT = 23
LIMIT = 10**6


def open_path(path: Path | str, kind="text_to_image", cache: str = "", **fields) -> Source:
    return open_source(SourceConfig(path=str(path), kind=kind, **fields), "src", cache)


def content(source: Source) -> list:
    """All that a sample says: id, turns, and the bytes of its images."""
    return [content_of(source, index) for index in range(len(source))]


def content_of(source: Source, index: int) -> tuple:
    sample = source[index]
    images = []
    for file in sample.images:
        with file.open() as stream:
            images.append(stream.read())
    return sample.id, sample.kind, sample.turns, tuple(images)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_shards(folder: Path, samples: list[dict[str, bytes]], shard_size: int = 5, **options) -> Path:
    """``x-00.tar`` and so on; each sample gives its members by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(samples), shard_size)):
        with tarfile.open(folder / f"x-{number:02d}.tar", "w", **options) as tar:
            for members in samples[start : start + shard_size]:
                for name, data in members.items():
                    add(tar, name, data)
    return folder


@pytest.fixture
def photos(tmp_path: Path, write_image: Callable[..., Path]) -> list[tuple[str, str, Path]]:
    """Key, caption and file of each picture."""
    return [
        (
            f"{i:03d}",
            f"A circle, number {i} – 圆",
            write_image(tmp_path / "photos" / f"{i:03d}.png", 20 + i, 24, seed=i),
        )
        for i in range(COUNT)
    ]


@pytest.fixture
def reference(tmp_path: Path, photos, write_jsonl) -> Path:
    """The captions as JSON lines."""
    items = [{"id": key, "image": file.name, "caption": caption} for key, caption, file in photos]
    return write_jsonl(tmp_path / "reference.jsonl", items)


CAPTION_FORMATS = {}


def caption_format(write: Callable) -> Callable:
    CAPTION_FORMATS[write.__name__] = write
    return write


@caption_format
def json_array(folder: Path, photos) -> SourceConfig:
    items = [{"id": key, "images": [file.name], "text": caption} for key, caption, file in photos]
    (folder / "a.json").write_text(json.dumps(items))
    return SourceConfig(path=str(folder / "a.json"), images=str(photos[0][2].parent), kind="text_to_image")


@caption_format
def blip3o(folder: Path, photos) -> SourceConfig:
    samples = [{f"{k}.png": file.read_bytes(), f"{k}.txt": caption.encode()} for k, caption, file in photos]
    return SourceConfig(path=str(write_shards(folder / "shards", samples)), kind="text_to_image")


@caption_format
def pattern_of_shards_with_json(folder: Path, photos) -> SourceConfig:
    samples = [
        {f"./{k}.json": json.dumps({"caption": caption, "id": k}).encode(), f"./{k}.0.png": file.read_bytes()}
        for k, caption, file in photos
    ]
    write_shards(folder / "shards", samples, format=tarfile.PAX_FORMAT)
    return SourceConfig(path=f"{folder}/shards/x-{{00..{(COUNT - 1) // 5:02d}}}.tar", kind="text_to_image")


@caption_format
def energon(folder: Path, photos) -> SourceConfig:
    """Folders as members, `.nv-meta`, metadata that says nothing, and members that are nobody's."""
    samples = [
        {f"{k}.png": file.read_bytes(), f"{k}.json": b'{"width": 3}', f"{k}.txt": caption.encode(), f"{k}.cls": b"1"}
        for k, caption, file in photos
    ]
    write_shards(folder / "shards", [{"._x.jpg": b"", "README": b""}, *samples], 50, format=tarfile.GNU_FORMAT)
    (folder / "shards" / ".nv-meta").mkdir()
    (folder / "shards" / ".nv-meta" / "split.yaml").write_text("x")
    return SourceConfig(path=f"{folder}/shards/*.tar", kind="text_to_image")


@caption_format
def parquet_bytes(folder: Path, photos) -> SourceConfig:
    columns = {
        "id": [key for key, _, _ in photos],
        "image": [file.read_bytes() for _, _, file in photos],
        "text": [caption for _, caption, _ in photos],
    }
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=7)
    return SourceConfig(path=str(folder / "a.parquet"), kind="text_to_image")


@caption_format
def parquet_structs(folder: Path, photos) -> SourceConfig:
    """As the hub's image features: bytes or path; columns of other names, in several files."""
    (folder / "tables").mkdir()
    for number, start in enumerate(range(0, COUNT, 9)):
        some = photos[start : start + 9]
        columns = {
            "key": [key for key, _, _ in some],
            "picture": [
                {"bytes": file.read_bytes() if int(key) % 2 else None, "path": file.name} for key, _, file in some
            ],
            "words": [caption for _, caption, _ in some],
        }
        pq.write_table(pa.table(columns), folder / "tables" / f"{number}.parquet", row_group_size=2)
    names = {"image": "picture", "caption": "words", "id": "key"}
    images = str(photos[0][2].parent)
    return SourceConfig(path=str(folder / "tables"), columns=names, images=images, kind="text_to_image")


@caption_format
def folder_with_texts(folder: Path, photos) -> SourceConfig:
    for key, caption, file in photos:
        (folder / f"{key}.txt").write_text(caption)
        shutil.copy(file, folder)
    return SourceConfig(path=str(folder), kind="text_to_image")


@caption_format
def folder_with_metadata(folder: Path, photos) -> SourceConfig:
    items = [{"id": key, "file_name": file.name, "text": caption} for key, caption, file in photos]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, items)))
    for *_, file in photos:
        shutil.copy(file, folder)
    return SourceConfig(path=str(folder), kind="text_to_image")


@pytest.mark.parametrize("name", CAPTION_FORMATS)
def test_captions_are_the_same_in_every_format(tmp_path, photos, reference, name):
    (tmp_path / "made").mkdir()
    config = CAPTION_FORMATS[name](tmp_path / "made", photos)
    expected = content(open_path(reference, images=str(tmp_path / "photos")))
    source = open_source(config, "src")
    assert content(source) == expected
    assert len(expected) == COUNT
    # Backwards, by several threads, and after pickling.
    reopened = pickle.loads(pickle.dumps(source))
    for one in (source, reopened):
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda i, s=one: content_of(s, i), reversed(range(COUNT)))) == expected[::-1]
    assert len({source.where(index) for index in range(COUNT)}) == COUNT
    few = open_source(config.model_copy(update={"max_samples": 4}), "src")
    assert content(few) == expected[:4]
    with pytest.raises(IndexError, match="sample 4 of 4"):
        few[4]


def conversations(photos) -> list[tuple[str, list[Path], list[dict[str, str]]]]:
    """Documents with 0 to 12 images on both sides."""
    files = [file for *_, file in photos]
    made = []
    for number, images in enumerate(([], files[:1], files[1:3], files[3:15])):
        turns = [{"from": "human", "value": "Tell me" + "<image>" * (len(images) // 2)}]
        turns.append({"from": "gpt", "value": "So: " + "<image> and " * (len(images) - len(images) // 2)})
        made.append((f"doc{number}", images, turns))
    return made


def test_conversations_are_the_same_in_every_format(tmp_path, photos, write_jsonl):
    made = conversations(photos)
    items = [{"id": i, "image": [f.name for f in images], "conversations": turns} for i, images, turns in made]
    write_jsonl(tmp_path / "photos" / "a.jsonl", items)
    expected = content(open_path(tmp_path / "photos" / "a.jsonl", "interleaved"))
    assert [len(images) for *_, images in expected] == [0, 1, 2, 12]
    numbered, named = [], []
    for key, images, turns in made:
        record = {"id": key, "conversations": turns}
        reversed_images = reversed(list(enumerate(images)))
        numbered.append({f"{key}.json": json.dumps(record).encode()})
        numbered[-1] |= {f"{key}.{n}.png": file.read_bytes() for n, file in reversed_images}
        record["image"] = [f"some/where/{key}.view-{file.name}" for file in images]
        named.append({f"{key}.view-{file.name}": file.read_bytes() for file in reversed(images)})
        named[-1][f"{key}.json"] = json.dumps(record).encode()
    assert content(open_path(write_shards(tmp_path / "numbered", numbered, 3), "interleaved")) == expected
    assert content(open_path(write_shards(tmp_path / "named", named, 3), "interleaved")) == expected
    columns = {
        "id": [key for key, _, _ in made],
        "images": [[file.read_bytes() for file in images] for _, images, _ in made],
    }
    for name, turns in (("struct", [t for *_, t in made]), ("json", [json.dumps(t) for *_, t in made])):
        pq.write_table(pa.table({**columns, "conversations": turns}), tmp_path / f"{name}.parquet")
        assert content(open_path(tmp_path / f"{name}.parquet", "interleaved")) == expected


def test_shard_images_are_read_in_place(tmp_path, photos):
    samples = [{f"{k}.png": file.read_bytes(), f"{k}.txt": b"a"} for k, _, file in photos]
    source = open_path(write_shards(tmp_path / "s", samples))
    image = source[7].images[0]
    assert isinstance(image, ShardImage)
    assert str(image) == f"{tmp_path}/s/x-01.tar:007.png"
    assert source.where(7) == f"{tmp_path}/s/x-01.tar:007"
    np.testing.assert_array_equal(decode(image, LIMIT), np.asarray(Image.open(photos[7][2])))


def test_kinds_of_captions(tmp_path, photos, write_jsonl, make_chat):
    """What becomes of a caption, and that it can be laid out."""
    names = [file.name for *_, file in photos]
    one = [{"image": names[0], "caption": "<image>\nA red circle."}] * 30
    two = [{"image": names[:2], "caption": "make it blue"}]
    bare = [{"image": names[0]}]
    folder = tmp_path / "photos"
    for name, items in (("one", one), ("two", two), ("bare", bare)):
        write_jsonl(folder / f"{name}.jsonl", items)
    (asked, answer) = open_path(folder / "one.jsonl")[0].turns
    assert "a red circle" in asked.parts[0]
    assert answer == Turn("assistant", (0,))
    described = [open_path(folder / "one.jsonl", "understanding")[index].turns for index in range(30)]
    assert {answer for _, answer in described} == {Turn("assistant", ("A red circle.",))}
    assert {asked.parts for asked, _ in described} == {(0, f"\n{request}") for request in DESCRIBE_TEMPLATES}
    (asked, answer) = open_path(folder / "two.jsonl", "editing")[0].turns
    assert (asked.parts[0], "ake it blue" in str(asked.parts[1]), answer.parts) == (0, True, (1,))
    for name in ("one", "bare"):
        sample = open_path(folder / f"{name}.jsonl", "reconstruction")[0]
        (asked, answer) = sample.turns
        assert (asked.parts[0], asked.parts[1].strip() in REPEAT_TEMPLATES, answer.parts) == (0, True, (0,))
        assert layout_sample(sample, make_chat()).is_target.tolist() == [False, True]
    wrong = [
        ("two", "text_to_image", "2 images; a caption of kind text_to_image goes with exactly 1 image"),
        ("one", "editing", "1 images; a caption of kind editing goes with at least 2"),
        ("one", "interleaved", "need 'conversations'"),
        ("bare", "understanding", "'conversations' is absent"),
    ]
    for name, kind, what in wrong:
        with pytest.raises(SampleError, match=what):
            open_path(folder / f"{name}.jsonl", kind)[0]


def test_line_index_of_odd_files(tmp_path):
    """Lines longer than what is read at once, blank ones around them, no newline at the end."""
    long_line = b'"' + b"x" * (CHUNK_BYTES + 17) + b'"'
    texts = [b"", b"{}", b"  \t", long_line, b"\r", b"1", long_line, b"2"]
    for end in (b"", b"\n", b"\n\n \n"):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"\n".join(texts) + end)
        index = build_in_memory(path, "lines", _build_lines)
        rows = index.load()["rows"]
        whole = path.read_bytes()
        assert index.samples == 5
        assert rows[:-1, 1].tolist() == [2, 4, 6, 7, 8]
        lines = [whole[a:b].strip() for a, b in zip(rows[:-1, 0], rows[1:, 0], strict=True)]
        assert lines == [texts[number - 1].strip() for number in (2, 4, 6, 7, 8)]


def test_index_is_reused_and_renewed(tmp_path, reference, monkeypatch):
    """Kept beside the file, used again, and built anew when the file or the index is not what it was."""
    images = str(tmp_path / "photos")
    kept = Path(f"{reference}.index")
    expected = content(open_path(reference, images=images))
    inode = kept.stat().st_ino
    assert content(open_path(reference, images=images)) == expected
    assert content(open_path(reference, images=images, max_samples=3)) == expected[:3]
    assert kept.stat().st_ino == inode
    status = reference.stat()
    os.utime(reference, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert content(open_path(reference, images=images)) == expected
    assert kept.stat().st_ino != inode
    with reference.open("a") as file:
        file.write(reference.read_text().splitlines()[0] + "\n")
    assert len(open_path(reference, images=images)) == COUNT + 1
    whole = kept.read_bytes()
    for broken in (b"", whole[:100], whole[:-8], b"x" * len(whole), whole.replace(b"lines 1", b"lines 0")):
        kept.write_bytes(broken)
        assert len(open_path(reference, images=images)) == COUNT + 1
        assert kept.read_bytes() == whole
    assert [path.name for path in tmp_path.glob(".*")] == []
    # A file that changes while it is read through is not for use.
    kept.unlink()
    times = itertools.count()
    monkeypatch.setattr(index_module.Stamp, "of", classmethod(lambda cls, path: cls(1, next(times))))
    with pytest.raises(DataError, match="changed while it was indexed"):
        open_path(reference, images=images)


@pytest.mark.parametrize("name", ["blip3o", "parquet_structs", "folder_with_metadata"])
def test_every_index_is_reused_and_renewed(tmp_path, photos, name):
    (tmp_path / "made").mkdir()
    config = CAPTION_FORMATS[name](tmp_path / "made", photos)

    def indices() -> dict[Path, int]:
        return {path: path.stat().st_ino for path in (tmp_path / "made").rglob("*.index")}

    # Several processes start at once; each may build, all read the same.
    with ThreadPoolExecutor(4) as pool:
        expected, *others = pool.map(lambda _: content(open_source(config, "src")), range(4))
    assert others == [expected] * 3
    first = indices()
    assert content(open_source(config, "src")) == expected
    assert indices() == first
    (changed, _) = next(iter(first.items()))
    os.utime(changed.with_suffix(""), ns=(0, 0))
    assert content(open_source(config, "src")) == expected
    assert {path for path, inode in indices().items() if first[path] != inode} == {changed}


def test_index_goes_to_the_cache_where_the_data_cannot_be_written(tmp_path, reference, monkeypatch):
    images, cache = str(tmp_path / "photos"), tmp_path / "cache"
    cache.mkdir()
    open_ = Path.open

    def read_only(path: Path, mode: str = "r", **options):
        if "x" in mode and path.parent != cache:
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, mode, **options)

    monkeypatch.setattr(Path, "open", read_only)
    assert len(open_path(reference, images=images)) == COUNT
    assert not Path(f"{reference}.index").exists()
    for _ in range(2):
        source = open_path(reference, images=images, cache=str(cache))
        assert len(content(source)) == COUNT
    (kept,) = cache.iterdir()
    assert kept.name.startswith("reference.jsonl-")
    assert len(content(pickle.loads(pickle.dumps(source)))) == COUNT
    with pytest.raises(ConfigError, match=r"data\.index_cache: no such folder"):
        open_path(reference, images=images, cache=str(tmp_path / "absent"))


def test_forged_index_is_harmless(tmp_path, reference):
    """An index that came with the data and leads anywhere costs its samples, not the run."""
    images, kept = str(tmp_path / "photos"), Path(f"{reference}.index")
    open_path(reference, images=images)
    whole = bytearray(kept.read_bytes())
    whole[4096:] = np.random.default_rng(0).integers(0, 256, len(whole) - 4096, dtype=np.uint8).tobytes()
    kept.write_bytes(whole)
    source = open_path(reference, images=images)
    for index in range(COUNT):
        with pytest.raises(SampleError):
            source[index]


def test_large_members_and_names(tmp_path, photos):
    """Long names (GNU and pax), sizes in base 256, and ustar's split names."""
    picture = photos[0][2].read_bytes()
    long_key, split_key = "d" * 40 + "/" + "k" * 180, "e" * 90 + "/" + "n" * 60
    for name, fmt in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        samples = [{f"{k}.png": picture, f"{k}.txt": b"a"} for k in (long_key, split_key, "ä/ö")]
        source = open_path(write_shards(tmp_path / name, samples, format=fmt))
        assert [source[i].id for i in range(3)] == [f"src/{long_key}", f"src/{split_key}", "src/ä/ö"]
    source = open_path(write_shards(tmp_path / "ustar", samples[1:2], format=tarfile.USTAR_FORMAT))
    assert source[0].id == f"src/{split_key}"


def test_files_of_a_path(tmp_path):
    for name in ("x-08.tar", "x-09.tar", "x-10.tar", "y-10.tar", ".x-11.tar", "x-08.tar.index"):
        (tmp_path / name).touch()

    def names(path: str) -> list[str]:
        return [file.name for file in expand(path, ".tar", "data.sources.a.path")]

    assert names(str(tmp_path)) == ["x-08.tar", "x-09.tar", "x-10.tar", "y-10.tar"]
    assert names(f"{tmp_path}/x-{{08..10}}.tar") == ["x-08.tar", "x-09.tar", "x-10.tar"]
    assert names(f"{tmp_path}/{{y,x}}-1*.tar") == ["y-10.tar", "x-10.tar"]
    for path, what in (
        ("x-{08..12}.tar", r"x-11\.tar: no such file; correct data\.sources\.a\.path"),
        ("z*.tar", "no such files"),
        ("x-{9..1}.tar", "counts down"),
        ("x-{0..99999999}.tar", "beyond 1000000 files"),
    ):
        with pytest.raises(DataError, match=what):
            names(f"{tmp_path}/{path}")


def test_formats_are_found(tmp_path):
    def found(path: Path | str, **fields) -> str:
        return find_format(SourceConfig(path=str(path), kind="editing", **fields))

    for name in ("tars/a.tar", "tables/a.parquet", "photos/a.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert found(tmp_path / "tars") == found("a-{0..9}.tar") == "webdataset"
    assert found(tmp_path / "tables") == found("*.parquet") == "parquet"
    assert found(tmp_path / "photos") == "folder"
    assert found("a.json") == found("a.jsonl") == found("a.txt") == "conversations"
    assert found("a.bin", format="webdataset") == "webdataset"
    with pytest.raises(DataError, match="decompress it"):
        found("a.tar.gz")


def test_wrong_sources(tmp_path, photos):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match="is no regular file"):
        open_path(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match="holds no images"):
        open_path(tmp_path / "empty")
    with pytest.raises(DataError, match="no such file"):
        open_path(tmp_path / "absent.tar")
    pq.write_table(pa.table({"picture": [b"a"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"src\.columns\.image: .* has no column 'photo'; it has picture"):
        open_path(tmp_path / "a.parquet", columns={"image": "photo"})


def test_opening_many_shards_reads_headers_only(tmp_path, photos, monkeypatch):
    """With indices in place neither shards nor arrays are touched before a sample is asked for."""
    samples = [{f"{k}.png": file.read_bytes(), f"{k}.txt": b"a"} for k, _, file in photos]
    folder = write_shards(tmp_path / "s", samples)
    open_path(folder)
    monkeypatch.setattr(index_module.StoredIndex, "load", lambda self: pytest.fail("an index was read"))
    assert isinstance(source := open_path(folder), WebDatasetSource)
    assert len(source) == COUNT


def test_pack(tmp_path, photos, reference, capsys):
    """Shards of equal size with their indices; what cannot be used is left out and told."""
    images, to = tmp_path / "photos", tmp_path / "packed"
    (images / "003.png").write_bytes((images / "003.png").read_bytes()[:200])
    (images / "007.png").unlink()
    arguments = ["data", "pack", "--from", str(reference), "--images", str(images), "--to", str(to)]
    code = run([*arguments, "--decode", "--kind", "text_to_image"])
    out = capsys.readouterr()
    assert code == 0
    assert "left out (unreadable image)" in out.err
    assert f"left out (missing image): {reference}:8" in out.err
    assert "2 of 23 samples left out" in out.out
    assert sorted(path.name for path in to.iterdir()) == ["shard-000000.tar", "shard-000000.tar.index"]
    expected = [content_of(open_path(reference, images=str(images)), i) for i in range(COUNT) if i not in (3, 7)]
    assert content(open_path(to)) == expected
    with tarfile.open(to / "shard-000000.tar") as tar:
        assert tar.getnames()[:2] == ["000000000.json", "000000000.0.png"]
    assert run(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_pack_balances(tmp_path, write_image, write_jsonl):
    """Every kind of sample survives, shards differ by less than a sample, and indices are found, not built."""
    from megatron_unimm.data.sources.pack import pack

    sides = [10 + 7 * (i % 9) for i in range(40)]
    for i, side in enumerate(sides):
        write_image(tmp_path / f"{i}.png", side, side, seed=i)
    path = write_jsonl(tmp_path / "a.jsonl", [{"image": f"{i}.png", "id": i} for i in range(40)])
    source = open_path(path, "reconstruction")
    done = []
    packed = pack(
        source, tmp_path / "p", 60_000, check=lambda sample: None, report=pytest.fail, advance=lambda *a: done.append(a)
    )
    sizes = [shard.stat().st_size for shard in packed.shards]
    assert len(sizes) > 4
    assert max(sizes) - min(sizes) < max(sides) ** 2 * 3 + 10240 + 2000  # A tar ends on a multiple of 10240 bytes.
    assert done.count(("checking", 1)) == done.count(("writing", 1)) == 40
    again = open_path(tmp_path / "p", "reconstruction")
    assert [(s[0], s[3][0]) for s in content(again)] == [(s[0], s[3][0]) for s in content(source)]
    assert [[turn.parts for turn in again[i].turns][1] for i in (0, 39)] == [(1,), (1,)]
    for shard in packed.shards:
        open_index(shard, TAR_INDEX, lambda *_: pytest.fail("built again"), None)
        assert build_in_memory(shard, TAR_INDEX, build_shard_index).samples > 1


def test_failed_pack_leaves_nothing(tmp_path, reference):
    from megatron_unimm.data.sources.pack import pack

    def stop(activity: str, count: int) -> None:
        if activity == "writing":
            raise KeyboardInterrupt

    source = open_path(reference, images=str(tmp_path / "photos"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "p", 10**6, check=lambda sample: None, report=lambda fault: None, advance=stop)
    assert sorted(tmp_path.iterdir()) == before


def test_inspect_shows_every_format(tmp_path, photos, capsys):
    for name, write in CAPTION_FORMATS.items():
        (tmp_path / name).mkdir()
        config = write(tmp_path / name, photos)
        if config.columns.image:
            continue  # The command knows usual column names only.
        arguments = ["data", "inspect", config.path, "--images", config.images, "--kind", "text_to_image"]
        assert run([*arguments, "--check", "--decode", "--count", "2"]) == 0
        out = capsys.readouterr().out
        assert f"{config.path}: {COUNT} samples" in out
        assert "ircle, number 1 – 圆" in out
        assert f"0 of {COUNT} cannot be used" in out


def test_contact_sheet(tmp_path, photos, write_image, write_jsonl, capsys):
    write_image(photos[0][2], 900, 1)
    made = conversations(photos)
    items = [{"id": i, "image": [f.name for f in images], "conversations": turns} for i, images, turns in made]
    path = write_jsonl(tmp_path / "photos" / "a.jsonl", [*items, {"image": "x.png"}, *items])
    sheet = tmp_path / "sheet.png"
    photos[2][2].write_bytes(b"no image")
    assert run(["data", "inspect", str(path), "--count", "9", "--sheet", str(sheet)]) == 0
    assert "9 samples drawn" in capsys.readouterr().out
    with Image.open(sheet) as picture:
        assert picture.width == 4 * 304
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
