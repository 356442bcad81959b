"""``unimm data``: make the Shapes world, look into data."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from megatron_unimm.cli import options
from megatron_unimm.errors import DataError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from megatron_unimm.config.data import SampleKind
    from megatron_unimm.data.faults import SampleError
    from megatron_unimm.data.sample import Sample
    from megatron_unimm.data.sources.source import Source

KIND = click.Choice(["understanding", "text_to_image", "editing", "reconstruction", "interleaved"])


@click.group()
def data() -> None:
    """Make training data, and look into it."""


def _mix(context: click.Context, parameter: click.Parameter, text: str | None) -> dict[str, float] | None:
    """``understanding=0.4,editing=0.6`` by kind."""
    if text is None:
        return None
    mix: dict[str, float] = {}
    for entry in text.split(","):
        kind, _, share = entry.strip().partition("=")
        if kind in mix:
            raise click.BadParameter(f"gives {kind} twice; give each kind one share")
        try:
            mix[kind] = float(share)
        except ValueError:
            raise click.BadParameter(f"{entry!r} is no KIND=SHARE, as in interleaved=0.3,editing=0.7") from None
    return mix


@data.command(
    epilog="""\b
Example:
  unimm data shapes --to data/shapes --count 20000
  unimm data shapes --to data/shapes --count 20000 --mix text_to_image=0.4,editing=0.3,interleaved=0.3"""
)
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.")
@click.option("--count", required=True, type=click.IntRange(min=1), help="Training samples over all kinds.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same world.")
@click.option(
    "--mix",
    callback=_mix,
    metavar="KIND=SHARE,...",
    help="Share of each kind: understanding, text_to_image, editing, interleaved.  "
    "[default: understanding=0.4,text_to_image=0.35,editing=0.25]",
)
def shapes(to: Path, count: int, seed: int, mix: dict[str, float] | None) -> None:
    """Write the Shapes world: training data to DIR/train, evaluation lists to DIR/eval."""
    from megatron_unimm.data.shapes import DEFAULT_MIX, write_eval_sets, write_shapes

    written = write_shapes(to, count, seed, mix=mix or DEFAULT_MIX)
    for kind, number in written.counts.items():
        click.echo(f"{number:8d}  {kind:16s}{written.jsonl[kind]}")
    for name, path in write_eval_sets(to, seed).items():
        click.echo(f"{_count_lines(path):8d}  {name:16s}{path}")


@data.command(epilog="Example: unimm data inspect data/shapes/train --count 8 --sheet shapes.png")
@click.argument("path")
@click.option(
    "--count", default=3, show_default=True, type=click.IntRange(min=0), help="Samples to show of each source."
)
@click.option("--images", default="", metavar="DIR", help="Folder that image paths are relative to.")
@click.option("--kind", default="understanding", show_default=True, type=KIND, help="What captions are made into.")
@click.option("--check", is_flag=True, help="Read every sample and list those that cannot be used; exit code 1 if any.")
@click.option("--decode", is_flag=True, help="With --check: decode every image as well.")
@click.option(
    "--sheet", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the shown samples as a picture."
)
def inspect(
    path: str, count: int, images: str, kind: "SampleKind", check: bool, decode: bool, sheet: Path | None
) -> int:
    """Show samples as text. PATH is a file of conversations (JSON, JSONL), WebDataset shards (x-{0000..0099}.tar),
    Parquet files, a folder of one of these or of images with captions, or a folder of several such sources."""
    from megatron_unimm.config.data import SourceConfig
    from megatron_unimm.data.sources.opening import open_source

    shown: list[Sample | SampleError] = []
    faults = 0
    for file in _source_paths(path):
        # Images beside a file of conversations are found without --images.
        source = open_source(SourceConfig(path=file, kind=kind, images=images), Path(file).stem)
        faults += _show(source, file, count, check, _image_check(decode), shown)
    if sheet is not None and shown:
        from megatron_unimm.data.sources.sheet import contact_sheet

        contact_sheet(shown, _max_image_pixels()).save(sheet, "PNG")
        click.echo(f"{len(shown)} samples drawn to {sheet}")
    return 1 if check and faults else 0


@data.command(epilog="Example: unimm data pack --from captions.jsonl --images photos --to shards --kind text_to_image")
@click.option("--from", "path", required=True, metavar="PATH", help="Any source: see unimm data inspect.")
@click.option("--images", default="", metavar="DIR", help="Folder that image paths are relative to.")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to write; a new one.")
@click.option("--kind", default="understanding", show_default=True, type=KIND, help="What captions are made into.")
@click.option("--shard-megabytes", default=256, show_default=True, type=click.IntRange(min=1), help="Largest shard.")
@click.option("--decode", is_flag=True, help="Decode every image, not only its header: slower, finds those cut off.")
def pack(path: str, images: str, to: Path, kind: "SampleKind", shard_megabytes: int, decode: bool) -> None:
    """Write samples as WebDataset shards of equal size with their indices. Samples that cannot be used are left out."""
    from megatron_unimm.config.data import SourceConfig
    from megatron_unimm.data.sources.opening import open_source
    from megatron_unimm.data.sources.pack import pack as pack_source

    source = open_source(SourceConfig(path=path, kind=kind, images=images), "pack")
    reasons: Counter[str] = Counter()

    def report(fault: "SampleError") -> None:
        reasons[fault.fault] += 1
        click.echo(f"left out ({fault.fault}): {_one_line(str(fault))}", err=True)

    with _sample_progress(len(source)) as advance:
        check = _image_check(decode)
        packed = pack_source(source, to, shard_megabytes * 10**6, check=check, report=report, advance=advance)
    sizes = [shard.stat().st_size / 1e6 for shard in packed.shards]
    click.echo(f"{packed.num_samples} samples in {len(sizes)} shards of {min(sizes):.1f} to {max(sizes):.1f} MB: {to}")
    if reasons:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        click.echo(f"{packed.num_bad} of {len(source)} samples left out: {counts}")


def _source_paths(path: str) -> list[str]:
    """The sources of a path: itself, or what a folder of several holds."""
    folder = Path(path)
    if not folder.is_dir():
        return [path]
    # index.json is written by `data shapes` and holds no conversations; metadata files stand for their whole folder.
    inside = sorted(
        file for pattern in ("*.jsonl", "*.json") for file in folder.glob(pattern) if file.name != "index.json"
    )
    if not inside or any(file.name.startswith(("metadata.", "captions.")) for file in inside):
        return [path]
    return [*map(str, inside), *(str(shards) for shards in [folder / "shards"] if shards.is_dir())]


def _show(
    source: "Source",
    path: str,
    count: int,
    check: bool,
    check_images: "Callable[[Sample], None]",
    shown: "list[Sample | SampleError]",
) -> int:
    """Returns the number of samples that cannot be used, among those that were read; appends those that are shown."""
    click.echo(f"{path}: {len(source)} samples")
    faults = 0
    for index, sample in _samples(source, len(source) if check else min(count, len(source)), check_images):
        if isinstance(sample, DataError):
            click.echo(f"  {_one_line(f'{sample} ({sample.fault})')}")
            faults += 1
        elif index < count:
            click.echo(_as_text(sample))
        if index < count:
            shown.append(sample)
    if check:
        click.echo(f"  {faults} of {len(source)} cannot be used")
    return faults


def _samples(
    source: "Source", count: int, check_images: "Callable[[Sample], None]"
) -> "Iterator[tuple[int, Sample | SampleError]]":
    from megatron_unimm.data.faults import SampleError

    for index in range(count):
        try:
            sample = source[index]
            check_images(sample)
            yield index, sample
        except SampleError as error:
            where = source.where(index)
            yield index, error if error.where == where else SampleError(where, str(error), error.fault)


def _image_check(is_decoding: bool) -> "Callable[[Sample], None]":
    """Raises SampleError for a sample with an unusable image."""
    from megatron_unimm.data.images import decode, image_size

    limit = _max_image_pixels()

    def check(sample: "Sample") -> None:
        for file in sample.images:
            image_size(file, limit)
            if is_decoding:
                decode(file, limit)

    return check


def _max_image_pixels() -> int:
    from megatron_unimm.config.data import DataConfig

    return DataConfig().max_image_pixels


@contextmanager
def _sample_progress(num_samples: int) -> "Iterator[Callable[[str, int], None]]":
    """A bar for each activity on a terminal; nothing in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(activity: str, count: int) -> None:
            if activity not in tasks:
                tasks[activity] = bar.add_task(activity, total=num_samples)
            bar.advance(tasks[activity], count)

        yield advance


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _as_text(sample: "Sample") -> str:
    lines = [f"  {sample.id}"]
    for turn in sample.turns:
        parts = [part if isinstance(part, str) else f"<{sample.images[part].name}>" for part in turn.parts]
        lines.append(f"    {turn.role:9s} {_one_line(''.join(parts))}")
    return "\n".join(lines)


def _count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


@data.command(
    epilog="""\b
Example:
  unimm data cache configs/orion/shapes.yaml --stage warm_up --to runs/features
  unimm train configs/orion/shapes.yaml --stage warm_up stages.warm_up.data.feature_cache=runs/features
  unimm data cache configs/mmcore/shapes.yaml --stage diffusion --to runs/cache
  unimm train configs/mmcore/shapes.yaml --stage diffusion data.condition_cache=runs/cache/conditions"""
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--stage", help="Stage of the recipe; may be left out where it has only one.")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.")
@options.run_dir
def cache(recipe: Path, overrides: tuple[str, ...], stage: str | None, to: Path, run_dir: Path | None) -> None:
    """Compute once what a stage's frozen parts make of its samples.

    For a stage of the language model with a frozen vision encoder, its features, in DIR. For a stage that trains an
    image decoder, these in DIR/features, and the VAE's latents of the pictures in DIR/latents (data.feature_cache and
    data.latent_cache).

    For a stage of MMCORE's diffusion transformer, what the frozen VLM of the stage before says of each conversation, in
    DIR/conditions (data.condition_cache; also for later stages with the same VLM), and latents in DIR/latents.

    Under torchrun or srun each rank takes its share.
    """
    from megatron_unimm.config.load import load_recipe, select_stage

    loaded = load_recipe(recipe, overrides)
    chosen = select_stage(loaded, stage)

    from megatron_unimm.train.log import setup_logging

    setup_logging()  # before Megatron-Core is imported, which warns

    from megatron_unimm.train.feature_cache import make_cache

    for folder, count in make_cache(chosen, to, options.run_dir_of(loaded, run_dir)).items():
        click.echo(f"{count:8d}  {folder}")
