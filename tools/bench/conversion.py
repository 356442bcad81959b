"""How fast `unimm convert` is, and how much memory it takes, beside `cp` of the same folder in the same run.

    python tools/bench/conversion.py                                        Qwen2.5-VL-7B, 16.6 GB; needs 51 GB of disk
    python tools/bench/conversion.py --model configs/models/qwen2_5_vl_3b.yaml --keep

A synthetic folder of the published size (random bf16 numbers in files of 5 GB, as on the hub) is copied, imported,
exported and verified, each in a process of its own. Then it is deleted. Between the steps the page cache is left as it
is: all of them start with the source written just before.

Memory is the peak of RssAnon, what the process itself holds; mapped files are the page cache's. MB are 10^6 bytes.
"""

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from megatron_unimm.config.model import ModelConfig
from megatron_unimm.convert.families import FAMILIES
from megatron_unimm.convert.table import Family

FILE_BYTES = 5_000_000_000
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measured:
    """One step."""

    what: str
    seconds: float
    megabytes_per_second: float
    anonymous_megabytes: float
    """Peak."""


def family_of(model: ModelConfig) -> Family:
    """The family that a model file's tower and decoder make."""
    if model.vision_encoder.family == "qwen2_5":
        name = "qwen2_5_vl"
    else:
        name = "qwen3_vl" if model.backbone.moe is None else "qwen3_vl_moe"
    return next(family for family in FAMILIES if family.name == name)


def write_synthetic(folder: Path, model: ModelConfig) -> int:
    """A Hugging Face folder of a model with random numbers; returns its size in bytes."""
    family = family_of(model)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(family.to_hf_config(model), indent=2))
    generator = torch.Generator().manual_seed(0)
    # Every tensor is a window of one pool: making ten billion random numbers would take longer than all the rest.
    pool = torch.randn(1 << 28, generator=generator).to(torch.bfloat16)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    room = FILE_BYTES
    for mapping in family.mappings(model, family.layouts[0]):
        for name, shape in zip(mapping.names, mapping.shapes, strict=True):
            size = 2 * torch.Size(shape).numel()
            if size > room and files[-1]:
                files.append({})
                room = FILE_BYTES
            files[-1][name] = shape
            room -= size
    total, weight_map, place = 0, {}, 0
    for number, shapes in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            count = torch.Size(shape).numel()
            place = (place * 31 + 104729) % max(len(pool) - count, 1)
            whole = pool[place : place + count] if count <= len(pool) else pool.repeat(-(-count // len(pool)))[:count]
            tensors[name] = whole.clone().view(shape)
            weight_map[name] = file
            total += 2 * count
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def measure(what: str, command: list[str], nbytes: int) -> Measured:
    """Run a command to its end, watching its memory.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    peak, stop = 0.0, threading.Event()
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")

        def watch() -> None:
            nonlocal peak
            while not stop.wait(0.05) and status.exists():
                lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
                peak = max(peak, *(int(line.split()[1]) * 1024 / 1e6 for line in lines), 0.0)

        watcher = threading.Thread(target=watch)
        watcher.start()
        output, _ = process.communicate()
        stop.set()
        watcher.join()
    seconds = time.monotonic() - start
    if process.returncode:
        raise RuntimeError(f"{what} failed:\n{output[-2000:]}")
    return Measured(what, seconds, nbytes / 1e6 / seconds, peak)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("configs/models/qwen2_5_vl_7b.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_conversion"), help="where to work")
    parser.add_argument("--keep", action="store_true", help="leave the folders there")
    options = parser.parse_args()
    model = ModelConfig.model_validate(yaml.safe_load(options.model.read_text())["model"])
    if options.folder.exists():
        shutil.rmtree(options.folder)
    source, copy, checkpoint, back = (options.folder / name for name in ("hf", "copy", "checkpoint", "back"))
    nbytes = write_synthetic(source, model)
    print(f"{options.model.stem}: {nbytes / 1e9:.2f} GB", flush=True)
    convert = [sys.executable, str(Path(__file__).parents[1] / "convert_checkpoint.py")]
    steps: list[Measured] = []

    def step(what: str, command: list[str]) -> None:
        steps.append(measure(what, command, nbytes))
        print(f"  {what}: {steps[-1].seconds:.1f} s", flush=True)

    # cp does not wait for the disk, a conversion does; so cp is given the same to do.
    step("cp + sync", ["sh", "-c", f"cp -r '{source}' '{copy}' && sync"])
    shutil.rmtree(copy)
    step("import", [*convert, "import", "--from", str(source), "--to", str(checkpoint)])
    step("export", [*convert, "export", "--from", str(checkpoint), "--to", str(back)])
    step("verify", [*convert, "verify", str(source), str(back)])
    show(steps)
    save(options.model.stem, nbytes, steps)
    if not options.keep:
        shutil.rmtree(options.folder)
    return 0


def show(steps: list[Measured]) -> None:
    table = Table("", "seconds", "MB/s", "of cp", "peak anonymous MB")
    for each in steps:
        ratio = each.megabytes_per_second / steps[0].megabytes_per_second
        table.add_row(
            each.what,
            f"{each.seconds:.1f}",
            f"{each.megabytes_per_second:.0f}",
            f"{ratio:.2f}",
            f"{each.anonymous_megabytes:.0f}",
        )
    Console().print(table)


def save(name: str, nbytes: int, steps: list[Measured]) -> None:
    """One JSON per model, with the machine and the date."""
    RESULTS.mkdir(exist_ok=True)
    content: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "model": name,
        "bytes": nbytes,
        "steps": [asdict(each) for each in steps],
    }
    (RESULTS / f"conversion_{name}.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
