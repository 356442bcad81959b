"""``unimm status``: where a run is, from its files."""

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from megatron_unimm.train.status import RunStatus, StageStatus, Trouble

COLOURS = {"done": "green", "running": "green", "starting": "yellow", "stopped": "yellow", "not begun": "dim"}

LONGEST = 200
"""Characters of a trouble, so that all fit on a page; --json has them whole."""


@click.command(
    epilog="""\b
Examples:
  unimm status runs/orion
  unimm status runs/orion --stage sft --json"""
)
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--stage", help="Only this stage.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--troubles", "num_troubles", default=8, show_default=True, help="How many of the last ones to show.")
def status(run_dir: Path, stage: str | None, as_json: bool, num_troubles: int) -> None:
    """Tell where a run is: step, rate, time left, checkpoints, goodput, and what went wrong last.

    RUN_DIR is what training got as --run-dir. It is only read; the run may be going on, on other machines.
    """
    from megatron_unimm.train.status import read_status

    found = read_status(run_dir, stage, num_troubles)
    if as_json:
        from dataclasses import asdict

        click.echo(json.dumps(_in_json(asdict(found)), indent=2))
    elif sys.stdout.isatty():
        _show_table(found)
    else:
        click.echo("\n".join(plain_lines(found)))


def _in_json(value: Any) -> Any:
    """A value without what JSON lacks: null for a loss that is not a number."""
    if isinstance(value, dict):
        return {key: _in_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_in_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_lines(found: "RunStatus") -> list[str]:
    """The page for a log file."""
    width = max(len(stage.name) for stage in found.stages)
    lines = [f"run {found.run}"]
    for stage in found.stages:
        lines.append("  ".join([f"{stage.name:<{width}}", f"{stage.state:<9}", *described(stage)]).rstrip())
    lines += [f"{stage.name} {stage.state}: {stage.reason}" for stage in found.stages if stage.reason]
    if found.troubles:
        lines.append("last troubles, newest first")
    return lines + [f"  {'  '.join(cells(trouble))}" for trouble in found.troubles]


def described(stage: "StageStatus") -> list[str]:
    """What there is to say of a stage, in pieces."""
    return [piece for piece in (place(stage), speed(stage), health(stage), kept(stage)) if piece]


def place(stage: "StageStatus") -> str:
    """Steps done, time left, loss."""
    from megatron_unimm.train.wording import clock

    if stage.total_steps is None:
        return ""
    parts = [f"{stage.step or 0}/{stage.total_steps} steps"]
    parts += [f"eta {clock(stage.eta_seconds)}"] if stage.eta_seconds is not None else []
    return "  ".join(parts + ([f"loss {stage.loss:.4g}"] if stage.loss is not None else []))


def speed(stage: "StageStatus") -> str:
    """Steps and tokens per second, and who holds them up."""
    from megatron_unimm.train.wording import compact

    if stage.steps_per_second is None or stage.tokens_per_second is None:
        return ""
    text = f"{stage.steps_per_second:.3g} steps/s  {compact(stage.tokens_per_second)} tok/s"
    return text + (f"  slowest {stage.slowest}" if stage.slowest and stage.state == "running" else "")


def health(stage: "StageStatus") -> str:
    """Goodput, and what it lacks."""
    from megatron_unimm.train.wording import clock

    if stage.goodput is None or stage.wall_seconds is None:
        return ""
    parts = [f"goodput {stage.goodput:.1%} of {clock(stage.wall_seconds)}"]
    counts = ((stage.restarts, "restart"), (stage.lost_steps, "lost step"), (stage.skipped_steps, "skipped step"))
    return "  ".join(parts + [f"{count} {name}{'s' * (count > 1)}" for count, name in counts if count])


def kept(stage: "StageStatus") -> str:
    """The last checkpoint."""
    from megatron_unimm.train.wording import clock

    if stage.checkpoint is None:
        return "no checkpoint" if stage.state != "not begun" else ""
    text = f"checkpoint {stage.checkpoint.step} committed {clock(stage.checkpoint.age_seconds)} ago"
    newer = stage.checkpoint.newer_unusable
    return text + (f" ({newer} is unfinished or damaged)" if newer is not None else "")


def cells(trouble: "Trouble") -> tuple[str, str, str]:
    """When, where, what."""
    when = time.strftime("%m-%d %H:%M:%S", time.localtime(trouble.time)) if trouble.time is not None else " " * 14
    where = trouble.stage + (f" step {trouble.step}" if trouble.step is not None else "")
    what = trouble.what if len(trouble.what) <= LONGEST else f"{trouble.what[: LONGEST - 1]}…"
    return when, where, what


def _show_table(found: "RunStatus") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "stage", "state", "where", "rate", "time", "checkpoint", title=f"run {found.run}", title_justify="left"
    )
    for stage in found.stages:
        colour = COLOURS.get(stage.state, "red")
        columns = (place(stage), speed(stage), health(stage), kept(stage))
        table.add_row(
            stage.name, f"[{colour}]{stage.state}[/]", *(escape(text).replace("  ", "\n") for text in columns)
        )
    console = Console()
    console.print(table)
    for stage in found.stages:
        if stage.reason:
            console.print(f"{stage.name} {stage.state}: {stage.reason}", markup=False, highlight=False)
    if found.troubles:
        troubles = Table("when", "where", "what", title="last troubles", title_justify="left")
        for trouble in found.troubles:
            troubles.add_row(*(escape(cell) for cell in cells(trouble)))
        console.print(troubles)
