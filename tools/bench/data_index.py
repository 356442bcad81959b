"""How long opening a source of 100 million samples takes, and how much memory: with its index in place.

    python tools/bench/data_index.py                       needs 2 GB of disk for a few minutes
    python tools/bench/data_index.py --samples 1000000

Two synthetic sources are made: one JSONL file, and 10,000 WebDataset shards. Their files are sparse, their indices
whole; the shards are one file under many names. Each source is opened and read at random places in a process of its
own. Seconds count from the start of the process (with the imports) and for opening alone. Memory at opening is the peak
of the resident set; after reading, what the process itself holds and the pages of indices that it has mapped, which are
the page cache's and shared by all processes. The page cache is as it is after writing.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_unimm.config.data import SourceConfig
from megatron_unimm.data.sources.conversations import LINE_INDEX
from megatron_unimm.data.sources.index import IndexWriter, Stamp
from megatron_unimm.data.sources.opening import open_source
from megatron_unimm.data.sources.webdataset import TAR_INDEX

READS = 2000
LINE = {"conversations": [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A red circle."}]}
LINE_BYTES = 200
"""From one line to the next."""
SHARDS = 10_000
IMAGE_BYTES = 100_000
PIECE = 1 << 20


def make_lines(folder: Path, samples: int) -> Path:
    """A sparse JSONL file of which only the lines that will be read are written, and its index."""
    path = folder / "lines.jsonl"
    line = json.dumps(LINE).encode().ljust(LINE_BYTES - 1) + b"\n"
    with path.open("wb") as file:
        file.truncate(samples * LINE_BYTES)
        for index in places(samples):
            os.pwrite(file.fileno(), line, index * LINE_BYTES)
    with Path(f"{path}.index").open("wb") as file:
        writer = IndexWriter(file)
        for start in range(0, samples + 1, PIECE):
            numbers = np.arange(start, min(start + PIECE, samples + 1), dtype="<i8")
            writer.append("rows", np.stack([numbers * LINE_BYTES, numbers + 1], axis=1))
        writer.finish(LINE_INDEX, samples, Stamp.of(path))
    return path


def make_shards(folder: Path, samples: int) -> Path:
    """Shards whose captions are written and whose images are holes. All are links of one file, and so are the indices.

    Headers are left out: with the index in place nobody looks at them.
    """
    folder = folder / "shards"
    folder.mkdir()
    each = samples // SHARDS
    number = np.arange(each, dtype=np.int64)
    texts, images = number * (IMAGE_BYTES + 2048) + 512, number * (IMAGE_BYTES + 2048) + 1536
    names = np.frombuffer(b"".join(f"{i:08d}.txt{i:08d}.jpg".encode() for i in range(each)), dtype="|u1")
    rows = np.zeros((each, 2, 5), dtype="<i8")
    rows[:, 0] = np.stack([number * 24, number * 24 + 12, texts, np.full(each, 12), number * 0], axis=1)
    rows[:, 1] = np.stack([number * 24 + 12, number * 24 + 24, images, np.full(each, IMAGE_BYTES), number * 0], axis=1)
    first = folder / "x-00000.tar"
    with first.open("wb") as file:
        file.truncate(each * (IMAGE_BYTES + 2048) + 1024)
        for start in texts.tolist():
            os.pwrite(file.fileno(), b"a red circle", start)
    index = folder / f"{first.name}.index"
    with index.open("wb") as file:
        writer = IndexWriter(file)
        writer.append("samples", np.arange(0, 2 * each + 1, 2, dtype="<i8"))
        writer.append("members", rows.reshape(-1, 5))
        writer.append("names", names)
        writer.finish(TAR_INDEX, each, Stamp.of(first))
    for shard in range(1, SHARDS):
        os.link(first, folder / f"x-{shard:05d}.tar")
        os.link(index, folder / f"x-{shard:05d}.tar.index")
    return folder


def places(samples: int) -> Iterator[int]:
    """The samples that are read."""
    rng = random.Random(0)
    return (rng.randrange(samples) for _ in range(READS))


def measure(path: Path) -> None:
    """Opens a source and reads from it; run in a process of its own. Prints a record."""
    start = time.perf_counter()
    source = open_source(SourceConfig(path=str(path), kind="understanding"), "bench")
    opened = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in places(len(source)):
        source[index]
    read = time.perf_counter()
    record = {
        "samples": len(source),
        "open_seconds": opened - start,
        "open_mebibytes": peak / 1024,
        "read_microseconds": (read - opened) / READS * 1e6,
        "own_mebibytes": resident("RssAnon"),
        "mapped_mebibytes": resident("RssFile"),
    }
    print(json.dumps(record))


def resident(kind: str) -> float:
    """Resident memory of this process in MiB: RssAnon or RssFile."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


def run(path: Path) -> dict[str, float]:
    """Measures in a fresh process; adds the seconds of the whole process up to its end, less the reading."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--open", str(path)]
    record = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    record["process_seconds"] = time.perf_counter() - start - record["read_microseconds"] * READS / 1e6
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open is not None:
        measure(arguments.open)
        return
    table = Table("source", "samples", "process s", "open s", "MiB", "µs a sample", "own MiB", "mapped MiB")
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="data-index-") as folder:
        for name, make in (("JSONL", make_lines), (f"{SHARDS} shards", make_shards)):
            record = run(make(Path(folder), arguments.samples))
            table.add_row(
                name,
                f"{record['samples']:,}",
                f"{record['process_seconds']:.2f}",
                f"{record['open_seconds']:.3f}",
                f"{record['open_mebibytes']:.0f}",
                f"{record['read_microseconds']:.0f}",
                f"{record['own_mebibytes']:.0f}",
                f"{record['mapped_mebibytes']:.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
