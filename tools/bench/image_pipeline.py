"""How fast images go from shards to patches: transformers' image processor in a DataLoader, beside ours, in one run.

    python tools/bench/image_pipeline.py                            400 images, 2 cores, 5 rounds; 2 minutes on 2 cores
    python tools/bench/image_pipeline.py --images 40 --rounds 1     to see that it runs

Shards of JPEGs are made first: shapes, textures and grain, 640x480 to 1600x1200 pixels, quality 90, 2.6 bits per
pixel as photographs on the web have. All then do the same: read a member of a tar file, decode it, resize it by the
rule of Qwen2.5-VL's processor, and cut it to patches in float32.

    transformers   Qwen2VLImageProcessorPil in a torch DataLoader with a worker process per core
    dali           DaliDecoder on the CPU with a thread per core: DALI decodes, torch resizes
    dali_graph     the same with DALI's own resize, as on a GPU
    pillow         PillowDecoder with a thread per core; transformers' values to the last digit but one

Rounds take turns, so that what else the machine does hits all alike. Of wall time the median is reported; of CPU time,
worker processes included, the least, as other work on the machine can only add to it. The overhead is the share of the
CPU time of dali that is spent on other things than its work on images in memory: finding members in the shards, reading
headers to plan sizes, and reading files.
"""

import argparse
import datetime
import io
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_unimm.config.data import PixelSizeConfig
from megatron_unimm.config.model import Qwen25VisionConfig
from megatron_unimm.data.decode.dali import DaliDecoder
from megatron_unimm.data.decode.interface import Decoder, ImageRequest
from megatron_unimm.data.decode.pillow import PillowDecoder, Threads
from megatron_unimm.data.image_files import BytesImage, ImageFile, ShardImage
from megatron_unimm.data.images import image_size
from megatron_unimm.data.sizes import target_size

RESULTS = Path(__file__).parent / "results" / "image_pipeline.json"
SIZES = [(640, 480), (480, 640), (640, 427), (800, 600), (1024, 768), (768, 1024), (1280, 720), (1600, 1200)]
"""Width and height in pixels; the first ones, which are the most common, come more often."""
SHARD_IMAGES = 100
BATCH = 32
"""Images that are asked for at a time."""
MAX_PIXELS = 64_000_000
SIZE = PixelSizeConfig(rule="pixels")
TOWER = Qwen25VisionConfig(family="qwen2_5", num_layers=1, hidden_size=8, num_heads=1, mlp_size=8, out_size=8)


def natural(width: int, height: int, seed: int) -> Image.Image:
    """Noise whose amplitude falls with its frequency, flat shapes with sharp edges, and the grain of a sensor."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), dtype=np.float32)
    for octave in range(1, 9):
        field = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        layer = np.asarray(field.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels += (layer - 128) * 0.9 * 1.5**-octave
    for _ in range(12):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        right, bottom = left + int(rng.integers(20, width // 3)), top + int(rng.integers(20, height // 3))
        pixels[top:bottom, left:right] = pixels[top:bottom, left:right] * 0.4 + rng.normal(0, 60, 3)
    pixels += rng.normal(0, 9, pixels.shape)
    return Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))


def make_shards(folder: Path, number: int) -> None:
    """Tar files of JPEGs in a folder."""
    for first in range(0, number, SHARD_IMAGES):
        with tarfile.open(folder / f"{first // SHARD_IMAGES:04d}.tar", "w") as shard:
            for index in range(first, min(first + SHARD_IMAGES, number)):
                width, height = SIZES[index % len(SIZES) if index % 3 else index % 4]
                stream = io.BytesIO()
                natural(width, height, index).save(stream, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{index:06d}.jpg")
                member.size = stream.tell()
                stream.seek(0)
                shard.addfile(member, stream)


def members(folder: Path) -> list[ShardImage]:
    """All images of all shards, from the headers of the tar files."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            found += [ShardImage(path, member.name, member.offset_data, member.size) for member in shard]
    return found


class ProcessedImages(Dataset):
    """The images as transformers' processor makes them."""

    def __init__(self, files: list[ShardImage]) -> None:
        self._files = files
        self._processor = Qwen2VLImageProcessorPil()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with self._files[index].open() as stream:
            image = Image.open(stream).convert("RGB")
        return self._processor(images=[image], return_tensors="pt")["pixel_values"]


def requests_of(files: list[Any], threads: Threads) -> list[ImageRequest]:
    """Target sizes from the images' headers."""

    def plan(file: ImageFile) -> ImageRequest:
        return ImageRequest(file, *target_size(*image_size(file, MAX_PIXELS), SIZE, TOWER.token_pixels))

    return threads.map(plan, files)


def batches(requests: list[ImageRequest]) -> Iterator[list[ImageRequest]]:
    for start in range(0, len(requests), BATCH):
        yield requests[start : start + BATCH]


def run_decoder(decoder: Decoder, requests: list[ImageRequest]) -> int:
    """Patches made."""
    total = 0
    for batch in batches(requests):
        total += sum(len(patches) for patches in decoder.load(batch, TOWER) if isinstance(patches, np.ndarray))
    return total


def from_shards(decoder: Decoder, folder: Path, threads: Threads) -> int:
    """The whole way: find the images, plan, decode."""
    return run_decoder(decoder, requests_of(members(folder), threads))


def differences(files: list[ShardImage], decoders: dict[str, Decoder]) -> dict[str, dict[str, float]]:
    """Against transformers, in units of 1/255 of a pixel's range, over a few images: mean and largest."""
    images = ProcessedImages(files)
    expected = [images[index].numpy() for index in range(len(files))]
    found = {}
    with_threads = Threads(0, "")
    for name, decoder in decoders.items():
        got = decoder.load(requests_of(files, with_threads), TOWER)
        apart = [
            np.abs(ours - theirs).reshape(len(theirs), 3, -1) * (np.array(TOWER.image_std)[:, None] * 255)
            for ours, theirs in zip(got, expected, strict=True)
        ]
        found[name] = {
            "mean": round(float(np.mean([image.mean() for image in apart])), 4),
            "largest": round(float(max(image.max() for image in apart)), 2),
        }
    return found


def cpu_seconds() -> float:
    """Of this process and its workers so far."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


def timed(work: Callable[[], int], expected: int) -> tuple[float, float]:
    """Wall and CPU seconds of some work, which answers how many patches it made."""
    start, cpu_start = time.perf_counter(), cpu_seconds()
    made = work()
    assert made == expected, f"{made} patches, expected {expected}"
    return time.perf_counter() - start, cpu_seconds() - cpu_start


def measure(folder: Path, cores: int, rounds: int) -> dict[str, Any]:
    """Images per second of each way, and how far their pixels are apart."""
    torch.set_num_threads(1)
    files, threads = members(folder), Threads(cores, "plan")
    requests = requests_of(files, threads)
    in_memory = [
        ImageRequest(BytesImage(r.file.open().read(), r.file.name, str(r.file)), r.width, r.height) for r in requests
    ]
    total = sum(request.width * request.height // TOWER.patch_size**2 for request in requests)
    # Batches of 8: with 32 float32 images in shared memory each, few machines have enough of it.
    loader = DataLoader(
        ProcessedImages(files), batch_size=8, num_workers=cores, collate_fn=torch.cat, persistent_workers=True
    )
    decoders: dict[str, Decoder] = {
        "dali": DaliDecoder(max_pixels=MAX_PIXELS, threads=cores),
        "dali_graph": DaliDecoder(max_pixels=MAX_PIXELS, threads=cores, resize_in_graph=True),
        "pillow": PillowDecoder(max_pixels=MAX_PIXELS, threads=cores),
    }
    ways: dict[str, Callable[[], int]] = {
        "transformers": lambda: sum(len(batch) for batch in loader),
        **{name: lambda made=made: from_shards(made, folder, threads) for name, made in decoders.items()},
        "dali, files in memory": lambda: run_decoder(decoders["dali"], in_memory),
    }
    apart = differences(files[:16], decoders)
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            taken, spent = timed(work, total)
            if number:  # The first round starts worker processes and fills caches.
                wall[name].append(taken)
                cpu[name].append(spent)
    for decoder in decoders.values():
        decoder.close()
    threads.close()
    speed = {name: len(files) / statistics.median(taken) for name, taken in wall.items()}
    cpu_each = {name: 1000 * min(spent) / len(files) for name, spent in cpu.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(wall["transformers"], wall[name], strict=True))
        for name in decoders
    }
    return {
        "images": len(files),
        "mean_kilobytes": round(statistics.mean(file.length for file in files) / 1000, 1),
        "bits_per_pixel": round(statistics.mean(8 * f.length / np.prod(image_size(f, MAX_PIXELS)) for f in files), 2),
        "mean_patches": round(total / len(files), 1),
        "cores": cores,
        "rounds": rounds,
        "images_per_second": {name: round(value, 1) for name, value in speed.items()},
        "times_transformers": {name: round(value, 2) for name, value in ratios.items()},
        "cpu_milliseconds_per_image": {name: round(value, 2) for name, value in cpu_each.items()},
        "times_transformers_by_cpu": {name: round(cpu_each["transformers"] / cpu_each[name], 2) for name in decoders},
        "overhead_beyond_decoding": round(1 - cpu_each["dali, files in memory"] / cpu_each["dali"], 3),
        "seconds": {name: [round(value, 3) for value in taken] for name, taken in wall.items()},
        "difference_from_transformers_in_255ths": apart,
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), arguments.images)
        measured = measure(Path(folder), arguments.cores, arguments.rounds)
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "load_at_the_end": round(os.getloadavg()[0], 2),
        "versions": {name: version_of(name) for name in ("torch", "transformers", "pillow", "nvidia-dali-cuda120")},
        **measured,
    }
    table = Table("", "images/s", "times transformers", "CPU ms", "mean difference / 255")
    for name, speed in measured["images_per_second"].items():
        ratio = measured["times_transformers"].get(name)
        apart = measured["difference_from_transformers_in_255ths"].get(name)
        spent = measured["cpu_milliseconds_per_image"][name]
        difference = f"{apart['mean']:.3f}" if apart else ""
        table.add_row(name, f"{speed:.1f}", f"{ratio:.2f}" if ratio else "", f"{spent:.1f}", difference)
    console = Console()
    console.print(table)
    console.print(f"overhead beyond decoding: {measured['overhead_beyond_decoding']:.1%}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def version_of(package: str) -> str:
    """Of an installed package, or why there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
