"""``unimm convert``: between Hugging Face folders and Megatron checkpoints; also tools/convert_checkpoint.py."""

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True)


@click.group()
def convert() -> None:
    """Convert checkpoints. Needs no GPU and little memory."""


@convert.command(
    "import",
    epilog="Example: unimm convert import --from Qwen2.5-VL-7B-Instruct --to checkpoints/qwen2_5_vl_7b",
)
@click.option("--from", "source", required=True, type=EXISTING, metavar="HF_DIR", help="Hugging Face folder.")
@click.option("--to", "target", required=True, type=FOLDER, metavar="CKPT_DIR", help="Folder to write.")
def import_(source: Path, target: Path) -> None:
    """Turn a Hugging Face folder into a Megatron checkpoint."""
    from megatron_unimm.convert import import_checkpoint

    import_checkpoint(source, target)


@convert.command(epilog="Example: unimm convert export --from runs/orion --to exported")
@click.option(
    "--from",
    "source",
    required=True,
    type=EXISTING,
    metavar="CKPT_DIR",
    help="Megatron checkpoint; of a run's or a stage's folder the newest is taken.",
)
@click.option("--to", "target", required=True, type=FOLDER, metavar="HF_DIR", help="Folder to write.")
def export(source: Path, target: Path) -> None:
    """Turn a Megatron checkpoint into a Hugging Face folder."""
    from megatron_unimm.checkpoint.manifest import find_checkpoint
    from megatron_unimm.convert import export_checkpoint

    export_checkpoint(find_checkpoint(source), target)


@convert.command(epilog="Example: unimm convert inspect checkpoints/qwen2_5_vl_7b")
@click.argument("path", type=EXISTING)
def inspect(path: Path) -> None:
    """List what a folder of either kind holds."""
    from rich.console import Console

    from megatron_unimm.convert import inspect_path

    Console().print(inspect_path(path))


@convert.command(epilog="Example: unimm convert verify Qwen2.5-VL-7B-Instruct exported")
@click.argument("a", type=EXISTING)
@click.argument("b", type=EXISTING)
def verify(a: Path, b: Path) -> int:
    """Compare the weights of two folders, of either kind, bit by bit. Exit code 1 if they differ."""
    from megatron_unimm.convert import verify as compare

    report = compare(a, b)
    for line in report.differences:
        click.echo(line)
    verdict = "identical" if report.identical else f"{len(report.differences)} differ"
    click.echo(f"{report.tensors} tensors, {report.bytes / 2**20:.1f} MiB: {verdict}")
    return 0 if report.identical else 1
