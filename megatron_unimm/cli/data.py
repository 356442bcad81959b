"""``unimm data``: make the Shapes world, look into data."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from megatron_unimm.errors import DataError

if TYPE_CHECKING:
    from megatron_unimm.data.conversations import ConversationSource
    from megatron_unimm.data.sample import Sample


@click.group()
def data() -> None:
    """Make training data, and look into it."""


@data.command(epilog="Example: unimm data shapes --to data/shapes --count 20000")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.")
@click.option("--count", required=True, type=click.IntRange(min=1), help="Training samples over all kinds.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same world.")
def shapes(to: Path, count: int, seed: int) -> None:
    """Write the Shapes world: training data to DIR/train, evaluation lists to DIR/eval."""
    from megatron_unimm.data.shapes import write_eval_sets, write_shapes

    written = write_shapes(to, count, seed)
    for kind, number in written.counts.items():
        click.echo(f"{number:8d}  {kind:16s}{written.jsonl[kind]}")
    for name, path in write_eval_sets(to, seed).items():
        click.echo(f"{_count_lines(path):8d}  {name:16s}{path}")


@data.command(epilog="Example: unimm data inspect data/shapes/train --count 2")
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--count", default=3, show_default=True, type=click.IntRange(min=0), help="Samples to show of each file.")
@click.option("--check", is_flag=True, help="Read every sample and list those that cannot be used; exit code 1 if any.")
def inspect(path: Path, count: int, check: bool) -> int:
    """Show samples as text. PATH is a file of conversations (JSON, JSONL), a shard (tar), or a folder of these."""
    files = _data_files(path)
    if not files:
        raise DataError(str(path), "holds no *.jsonl, *.json or *.tar files")
    faults = 0
    for file in files:
        faults += _show_shard(file, count) if file.suffix == ".tar" else _show_conversations(file, count, check)
    return 1 if faults else 0


def _data_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    # index.json is written by `data shapes` and holds no conversations.
    return sorted(
        f for p in ("*.jsonl", "*.json", "*.tar", "shards/*.tar") for f in path.glob(p) if f.name != "index.json"
    )


def _show_conversations(file: Path, count: int, check: bool) -> int:
    """Returns the number of samples that cannot be used, among those that were read."""
    from megatron_unimm.config.data import SourceConfig
    from megatron_unimm.data.conversations import ConversationSource

    # Kind "understanding" takes any conversation; the others insist on an image to generate.
    source = ConversationSource(SourceConfig(path=str(file), kind="understanding"), file.stem)
    click.echo(f"{file}: {len(source)} samples")
    faults = 0
    for index, sample in _samples(source, len(source) if check else min(count, len(source))):
        if isinstance(sample, DataError):
            click.echo(f"  {sample}")
            faults += 1
        elif index < count:
            click.echo(_as_text(sample))
    if check:
        click.echo(f"  {faults} of {len(source)} cannot be used")
    return faults


def _samples(source: "ConversationSource", count: int) -> Iterator[tuple[int, "Sample | DataError"]]:
    for index in range(count):
        try:
            yield index, source[index]
        except DataError as error:
            yield index, error


def _as_text(sample: "Sample") -> str:
    lines = [f"  {sample.id}"]
    for turn in sample.turns:
        parts = [part if isinstance(part, str) else f"<{sample.images[part].name}>" for part in turn.parts]
        lines.append(f"    {turn.role:9s} {' '.join(''.join(parts).split())}")
    return "\n".join(lines)


def _show_shard(file: Path, count: int) -> int:
    """Shows the JSON members of a WebDataset shard as they are."""
    shown: list[str] = []
    num_samples = num_images = 0
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                if not member.name.endswith(".json"):
                    num_images += 1
                    continue
                num_samples += 1
                if len(shown) < count and (content := tar.extractfile(member)) is not None:
                    shown.append(f"  {member.name}  {json.dumps(json.load(content), ensure_ascii=False)}")
    except (tarfile.TarError, ValueError) as error:
        raise DataError(str(file), f"not a whole WebDataset shard: {error}") from error
    click.echo(f"{file}: {num_samples} samples, {num_images} images")
    for line in shown:
        click.echo(line)
    return 0


def _count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for _ in lines)
