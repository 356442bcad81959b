"""Makes a folder of malformed data: every kind of damage that a reader has to tell of and pass over.

    python tools/make_bad_data.py bad_data

Each kind stands between samples that are good. The tables IMAGES, LINES, SHARDS, TABLES and CAPTIONS say what the kinds
are and which fault is expected; ``expected.json`` says it for every sample of every source.
"""

import argparse
import gzip
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from megatron_unimm.data.faults import Fault
from megatron_unimm.data.sources.records import MAX_TEXT_BYTES

SIDE = 48


@dataclass(frozen=True)
class BadSource:
    """A source with bad samples in it."""

    path: str
    """Relative to the folder."""
    names: list[str]
    """Kind of damage of each sample; ``good`` for none."""
    faults: list[Fault | None]
    """What is to be reported; None where the sample is to be delivered."""
    kind: str = "text_to_image"


def picture(suffix: str = "PNG", seed: int = 0, **options: Any) -> bytes:
    """A good image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, suffix, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of 8-bit RGB with the given chunks behind its header."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def huge_gif() -> bytes:
    return b"GIF89a" + b"\xff" * 4 + bytes(3) + b"," + bytes(4) + b"\xff" * 4 + b"\0\x08"


def huge_jpeg() -> bytes:
    data = bytearray(picture("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


def huge_bmp() -> bytes:
    data = bytearray(picture("BMP"))
    data[18:26] = struct.pack("<ii", 100_000, 100_000)
    return bytes(data)


def huge_tiff() -> bytes:
    """The width's entry is a short of 48; make it a long of 2^30."""
    data = picture("TIFF")
    entry = data.index(struct.pack("<HHI", 256, 4, 1)) if struct.pack("<HHI", 256, 4, 1) in data else None
    start = entry if entry is not None else data.index(struct.pack("<HHI", 256, 3, 1))
    return data[:start] + struct.pack("<HHII", 256, 4, 1, 1 << 30) + data[start + 12 :]


def float_tiff() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


def with_broken_header() -> bytes:
    data = bytearray(picture())
    data[29] ^= 0xFF
    return bytes(data)


def half(suffix: str) -> bytes:
    data = picture(suffix)
    return data[: len(data) // 2]


UNREADABLE: Fault = "unreadable image"
MALFORMED: Fault = "malformed conversation"
LARGE: Fault = "image too large"
UNSAFE: Fault = "unsafe member"
DAMAGED: Fault = "damaged file"

IMAGES: dict[str, tuple[Fault, Callable[[], bytes]]] = {
    "empty file": (UNREADABLE, lambda: b""),
    "text": (UNREADABLE, lambda: b"this is no image\n"),
    "web page of an error": (UNREADABLE, lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "random bytes": (UNREADABLE, lambda: np.random.default_rng(1).bytes(5000)),
    "zeros": (UNREADABLE, lambda: bytes(5000)),
    "PNG cut off in its signature": (UNREADABLE, lambda: picture()[:8]),
    "PNG cut off in its pixels": (UNREADABLE, lambda: half("PNG")),
    "JPEG cut off in its pixels": (UNREADABLE, lambda: half("JPEG")),
    "JPEG of its first marker": (UNREADABLE, lambda: b"\xff\xd8\xff"),
    "GIF cut off": (UNREADABLE, lambda: half("GIF")),
    "WebP cut off": (UNREADABLE, lambda: half("WEBP")),
    "BMP cut off": (UNREADABLE, lambda: half("BMP")),
    "TIFF cut off": (UNREADABLE, lambda: picture("TIFF")[:100]),
    "PNG with a wrong checksum": (UNREADABLE, with_broken_header),
    "PNG of pixels that do not inflate": (UNREADABLE, lambda: png(8, 8, png_chunk(b"IDAT", b"no zlib stream"))),
    "PNG without pixels": (UNREADABLE, lambda: png(8, 8)),
    "PNG with a bomb of text": (
        UNREADABLE,
        lambda: png(8, 8, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20), 9))),
    ),
    "TIFF of floating-point numbers": (UNREADABLE, float_tiff),
    "SVG": (UNREADABLE, lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'),
    "EPS": (UNREADABLE, lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
    "PDF": (UNREADABLE, lambda: b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n"),
    "ICO": (UNREADABLE, lambda: picture("ICO")),
    "compressed once more": (UNREADABLE, lambda: gzip.compress(picture())),
    "PNG of 100 million pixels": (LARGE, lambda: png(10_000, 10_000, png_chunk(b"IDAT", zlib.compress(bytes(99))))),
    "PNG of 3.6 billion pixels": (LARGE, lambda: png(60_000, 60_000, png_chunk(b"IDAT", zlib.compress(bytes(99))))),
    "GIF of 4.3 billion pixels": (
        LARGE,
        lambda: b"GIF89a" + b"\xff" * 4 + bytes(3) + b"," + bytes(4) + b"\xff" * 4 + b"\0\x08",
    ),
    "JPEG of 4.3 billion pixels": (LARGE, huge_jpeg),
    "BMP of 10 billion pixels": (LARGE, huge_bmp),
    "TIFF of a billion pixels a line": (LARGE, huge_tiff),
}
"""Files that are named as images."""

NO_FILES: dict[str, Callable[[Path], None]] = {
    "absent": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
"""What can stand in the place of an image: all of these are a missing image."""


def turns(*values: Any) -> list[dict[str, Any]]:
    """Turns of human and gpt by turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


GOOD_TURNS = turns("Draw it.", "<image>")

LINES: dict[str, tuple[Fault, dict[str, Any] | bytes]] = {
    "no JSON": (MALFORMED, b"{not json"),
    "JSON cut off": (MALFORMED, b'{"id": 1, "conversations": [{"from": "hum'),
    "two objects": (MALFORMED, b"{} {}"),
    "list": (MALFORMED, b"[1, 2]"),
    "number": (MALFORMED, b"17"),
    "null": (MALFORMED, b"null"),
    "empty object": (MALFORMED, {}),
    "not UTF-8": (MALFORMED, b'{"caption": "\xff\xfe\xfa"}'),
    "zero bytes": (MALFORMED, bytes(100)),
    "nested 100,000 deep": (MALFORMED, b"[" * 100_000),
    "number of 10,000 digits": (MALFORMED, b'{"id": ' + b"9" * 10_000 + b"}"),
    "no turns": (MALFORMED, {"conversations": []}),
    "turns that are no list": (MALFORMED, {"conversations": "Hello"}),
    "turn that is no object": (MALFORMED, {"conversations": ["Hello"]}),
    "turn without text": (MALFORMED, {"conversations": [{"from": "gpt"}]}),
    "turn of a number": (MALFORMED, {"conversations": turns("Draw it.", 3)}),
    "unknown speaker": (MALFORMED, {"conversations": [{"from": "robot", "value": "beep"}]}),
    "nobody answers": (MALFORMED, {"conversations": turns("Draw it.")}),
    "half a surrogate pair": (MALFORMED, {"conversations": turns("\ud800", "<image>"), "image": "good.png"}),
    "image that is a number": (MALFORMED, {"conversations": GOOD_TURNS, "image": 5}),
    "images that are no texts": (MALFORMED, {"conversations": GOOD_TURNS, "image": [{"path": "good.png"}]}),
    "caption that is a list": (MALFORMED, {"caption": ["a", "b"], "image": "good.png"}),
    "empty caption": (MALFORMED, {"caption": " ", "image": "good.png"}),
    "more marks than images": ("image count", {"conversations": turns("<image>", "<image>"), "image": "good.png"}),
    "fewer marks than images": ("image count", {"conversations": GOOD_TURNS, "image": ["good.png"] * 2}),
    "nothing to draw": ("image count", {"conversations": turns("<image>", "No."), "image": "good.png"}),
    "caption of two images": ("image count", {"caption": "a dog", "image": ["good.png"] * 2}),
    "path that leads out": ("path outside the image folder", {"conversations": GOOD_TURNS, "image": "../out.png"}),
    "absolute path": ("path outside the image folder", {"conversations": GOOD_TURNS, "image": "/etc/passwd"}),
    "path with a zero byte": ("missing image", {"conversations": GOOD_TURNS, "image": "good.png\0.jpg"}),
    "path of 10,000 characters": ("missing image", {"conversations": GOOD_TURNS, "image": "a" * 10_000}),
    "17 MiB of text": ("text too large", b'{"caption": "' + b"a" * (MAX_TEXT_BYTES + (1 << 20)) + b'"}'),
}
"""Lines of a file of conversations."""

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"", **fields: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def sample(key: str, seed: int = 0) -> list[Member]:
    """A good sample."""
    return [member(f"{key}.png", picture(seed=seed)), member(f"{key}.txt", b"a red circle")]


def captioned(name: str, content: bytes) -> list[Member]:
    return [member("b.png", picture()), member(name, content)]


def link(kind: bytes) -> list[Member]:
    return [member("b.png", type=kind, linkname="/etc/passwd"), member("b.txt", b"a")]


def oversized(size: int) -> bytes:
    """A header that promises more than there is, its size in binary as GNU writes large ones."""
    info, _ = member("b.png")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax_named(path: str) -> list[Member]:
    """A member whose pax header gives it another name."""
    return [member("b.png", picture(), pax_headers={"path": path}), member("b.txt", b"a red circle")]


SHARDS: dict[str, tuple[Fault, list[Member]]] = {
    "JSON that is none": (MALFORMED, captioned("b.json", b"{")),
    "JSON that is a list": (MALFORMED, captioned("b.json", b"[]")),
    "no text": (MALFORMED, [member("b.png", picture())]),
    "empty text": (MALFORMED, captioned("b.txt", b" \n")),
    "text that is not UTF-8": (MALFORMED, captioned("b.txt", b"\xff\xfe\xfa")),
    "two texts": (MALFORMED, [*captioned("b.txt", b"a"), member("b.0.txt", b"b")]),
    "two images of one name": (MALFORMED, [*captioned("b.txt", b"a"), member("b.png", picture())]),
    "17 MiB of text": ("text too large", captioned("b.txt", bytes(MAX_TEXT_BYTES + (1 << 20)))),
    "17 MiB of JSON": ("text too large", captioned("b.json", bytes(MAX_TEXT_BYTES + (1 << 20)))),
    "no image": ("image count", [member("b.txt", b"a red circle")]),
    "image that the JSON misses": (
        "missing image",
        captioned("b.json", json.dumps({"caption": "a", "image": ["b.png", "b.1.png"]}).encode()),
    ),
    "image that is text": (UNREADABLE, [member("b.png", b"no image"), member("b.txt", b"a")]),
    "image that is a bomb": (LARGE, [member("b.png", png(60_000, 60_000)), member("b.txt", b"a")]),
    "name that leads out": (UNSAFE, [member("../../b.png", picture())]),
    "name that leads out in the middle": (UNSAFE, [member("b/../../../b.png", picture())]),
    "absolute name": (UNSAFE, [member("/etc/b.png", picture())]),
    "symbolic link": (UNSAFE, link(tarfile.SYMTYPE)),
    "hard link": (UNSAFE, link(tarfile.LNKTYPE)),
    "device": (UNSAFE, link(tarfile.CHRTYPE)),
    "block device": (UNSAFE, link(tarfile.BLKTYPE)),
    "pipe": (UNSAFE, link(tarfile.FIFOTYPE)),
}
"""Members of a shard, between two good samples."""


def archive(members: list[Member], end: bool = True) -> bytes:
    content = b"".join(info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512) for info, data in members)
    return content + bytes(1024) * end


def broken_archives() -> dict[str, tuple[bytes, list[Fault | None]]]:
    """Whole shards that are damaged: their bytes, and what is expected of each of their samples."""
    first, last = archive(sample("a"), end=False), archive(sample("c"), end=False)
    both = first + last + bytes(1024)
    no_header = bytearray(both)
    no_header[len(first) : len(first) + 512] = np.random.default_rng(2).bytes(512)
    no_checksum = bytearray(both)
    no_checksum[len(first)] ^= 1
    large_pax, _ = member("x", type=tarfile.XHDTYPE, size=1 << 40)
    bad_pax = member("x", b"99 path=../b.png\n", type=tarfile.XHDTYPE)
    return {
        "cut off in an image": (first + archive(sample("b"), end=False)[:2000], [None, DAMAGED]),
        "cut off in a header": (first + last[:300], [None, DAMAGED]),
        "cut off between samples": (first + last, [None, None, DAMAGED]),
        "cut off between members": (first + archive(sample("b")[:1], end=False), [None, MALFORMED, DAMAGED]),
        "empty": (b"", [DAMAGED]),
        "text": (b"404 Not Found\n" * 100, [DAMAGED]),
        "compressed": (gzip.compress(both), [DAMAGED]),
        "random bytes in the place of a header": (bytes(no_header), [None, DAMAGED]),
        "wrong checksum": (bytes(no_checksum), [None, DAMAGED]),
        "member of 2^60 bytes": (first + oversized(1 << 60) + last, [None, DAMAGED]),
        "pax header of a terabyte": (first + large_pax.tobuf(tarfile.GNU_FORMAT) + last, [None, DAMAGED]),
        "pax header that lies about its length": (first + archive([bad_pax]) + last, [None, DAMAGED]),
        "pax header with a name that leads out": (
            first + archive(pax_named("../b.png"), end=False) + last + bytes(1024),
            [None, UNSAFE, "image count", None],
        ),
    }


GOOD_ROW: dict[str, Any] = {"image": {"bytes": picture(), "path": "a.png"}, "caption": "a dog", "conversations": None}

TABLES: dict[str, tuple[Fault, dict[str, Any]]] = {
    "no image": ("image count", {"image": None, "caption": "a dog"}),
    "neither bytes nor path": ("missing image", {"image": {"bytes": None, "path": None}, "caption": "a dog"}),
    "path to nothing": ("missing image", {"image": {"bytes": None, "path": "absent.png"}, "caption": "a dog"}),
    "path that leads out": (
        "path outside the image folder",
        {"image": {"bytes": None, "path": "../../out.png"}, "caption": "a dog"},
    ),
    "bytes that are no image": (UNREADABLE, {"image": {"bytes": b"no image", "path": "a.png"}, "caption": "a dog"}),
    "no text": (MALFORMED, {"image": GOOD_ROW["image"], "caption": None}),
    "conversations that are no JSON": (MALFORMED, {"image": GOOD_ROW["image"], "conversations": "[{"}),
    "conversations without turns": (MALFORMED, {"image": GOOD_ROW["image"], "conversations": "[]"}),
    "17 MiB of text": ("text too large", {"image": GOOD_ROW["image"], "caption": "a" * (MAX_TEXT_BYTES + (1 << 20))}),
}
"""Rows of a table."""


def broken_tables() -> dict[str, tuple[bytes, list[Fault | None]]]:
    """Whole tables that are damaged."""
    buffer = io.BytesIO()
    rows = [{**GOOD_ROW, "image": {"bytes": picture(seed=i), "path": "a.png"}} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=2, use_dictionary=False)
    whole = buffer.getvalue()
    second = pq.ParquetFile(buffer).metadata.row_group(1).column(0).data_page_offset
    no_pages = whole[:second] + b"\xff" * 2000 + whole[second + 2000 :]
    no_footer = whole[:-200] + b"\xff" * 150 + whole[-50:]
    numbers = io.BytesIO()
    pq.write_table(pa.table({"image": [1, 2], "caption": ["a", "b"]}), numbers)
    return {
        "empty": (b"", [DAMAGED]),
        "text": (b"404 Not Found\n" * 100, [DAMAGED]),
        "cut off": (whole[: len(whole) // 2], [DAMAGED]),
        "footer overwritten": (no_footer, [DAMAGED]),
        "row group overwritten": (no_pages, [None, None, DAMAGED, DAMAGED]),
        "images that are numbers": (numbers.getvalue(), [MALFORMED, MALFORMED]),
    }


CAPTIONS: dict[str, tuple[Fault, Callable[[Path], object]]] = {
    "absent": (MALFORMED, lambda path: None),
    "empty": (MALFORMED, lambda path: path.write_bytes(b"\n")),
    "not UTF-8": (MALFORMED, lambda path: path.write_bytes(b"\xff\xfe\xfa")),
    "a pipe": (MALFORMED, lambda path: os.mkfifo(path)),
    "a folder": (MALFORMED, lambda path: path.mkdir()),
    "17 MiB": ("text too large", lambda path: path.write_bytes(bytes(MAX_TEXT_BYTES + (1 << 20)))),
}
"""Captions beside images."""


def make_bad_data(to: Path) -> list[BadSource]:
    """Writes everything to a new folder."""
    to.mkdir(parents=True)
    (to / "out.png").write_bytes(picture())
    return [*_images(to), *_lines(to), *_shards(to), *_tables(to), *_folder(to)]


def _between(bad: dict[str, Fault]) -> tuple[list[str], list[Fault | None]]:
    """Good, bad, good, bad, …, good."""
    names, faults = ["good"], [None]
    for name, fault in bad.items():
        names += [name, "good"]
        faults += [fault, None]
    return names, faults


def _images(to: Path) -> list[BadSource]:
    folder = to / "images"
    folder.mkdir()
    names, faults = _between({n: f for n, (f, _) in IMAGES.items()} | dict.fromkeys(NO_FILES, "missing image"))
    lines = []
    for number, name in enumerate(names):
        path = folder / f"{number:03d}.png"
        if name in NO_FILES:
            NO_FILES[name](path)
        else:
            path.write_bytes(picture(seed=number) if name == "good" else IMAGES[name][1]())
        lines.append(json.dumps({"id": number, "image": path.name, "conversations": GOOD_TURNS}))
    (folder / "images.jsonl").write_text("\n".join(lines))
    return [BadSource("images/images.jsonl", names, faults)]


def _lines(to: Path) -> list[BadSource]:
    folder = to / "lines"
    folder.mkdir()
    (folder / "good.png").write_bytes(picture())
    good = json.dumps({"image": "good.png", "conversations": GOOD_TURNS}).encode()
    names, faults = _between({name: fault for name, (fault, _) in LINES.items()})
    lines = [good if name == "good" else LINES[name][1] for name in names]
    content = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    (folder / "lines.jsonl").write_bytes(content)
    return [BadSource("lines/lines.jsonl", names, faults)]


def _shards(to: Path) -> list[BadSource]:
    folder = to / "shards"
    folder.mkdir()
    sources = []
    for number, (name, (fault, members)) in enumerate(SHARDS.items()):
        path = folder / f"member-{number:02d}.tar"
        path.write_bytes(archive([*sample("a", 1), *members, *sample("c", 2)]))
        sources.append(BadSource(f"shards/{path.name}", ["good", name, "good"], [None, fault, None]))
    for number, (name, (content, faults)) in enumerate(broken_archives().items()):
        path = folder / f"archive-{number:02d}.tar"
        path.write_bytes(content)
        names = ["good" if fault is None else name for fault in faults]
        sources.append(BadSource(f"shards/{path.name}", names, faults))
    return [*sources, _together("shards", sources)]


def _tables(to: Path) -> list[BadSource]:
    folder = to / "tables"
    folder.mkdir()
    names, faults = _between({name: fault for name, (fault, _) in TABLES.items()})
    rows = [
        GOOD_ROW if name == "good" else {"caption": None, "conversations": None} | TABLES[name][1] for name in names
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=3)
    sources = []
    for number, (name, (content, expected)) in enumerate(broken_tables().items()):
        path = folder / f"file-{number:02d}.parquet"
        path.write_bytes(content)
        names_of = ["good" if fault is None else name for fault in expected]
        sources.append(BadSource(f"tables/{path.name}", names_of, expected))
    sources.append(BadSource("tables/rows.parquet", names, faults))
    return [*sources, _together("tables", sources)]


def _folder(to: Path) -> list[BadSource]:
    folder = to / "captions"
    folder.mkdir()
    names, faults = _between({name: fault for name, (fault, _) in CAPTIONS.items()})
    for number, name in enumerate(names):
        (folder / f"{number:03d}.png").write_bytes(picture(seed=number))
        caption = folder / f"{number:03d}.txt"
        caption.write_text("a dog") if name == "good" else CAPTIONS[name][1](caption)
    return [BadSource("captions", names, faults)]


def _together(path: str, sources: list[BadSource]) -> BadSource:
    """A folder's files as one source."""
    files = sorted(sources, key=lambda source: source.path)
    return BadSource(path, [n for file in files for n in file.names], [f for file in files for f in file.faults])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("to", type=Path, help="folder to write; a new one")
    to = parser.parse_args().to
    sources = make_bad_data(to)
    (to / "expected.json").write_text(json.dumps([asdict(source) for source in sources], indent=2))
    kinds = {(source.path.split("/")[0], name) for source in sources for name in source.names} - {"good"}
    print(f"{len(kinds)} kinds of damage in {len(sources)} sources: {to}")


if __name__ == "__main__":
    main()
