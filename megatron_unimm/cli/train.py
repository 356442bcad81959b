"""``unimm train``: one stage of a recipe, on one rank or on all ranks of torchrun or srun."""

from pathlib import Path

import click

from megatron_unimm.cli import options


@click.command(
    epilog="""\b
Examples:
  unimm train configs/orion/shapes.yaml --stage warm_up train.steps=20
  unimm train configs/orion/qwen2_5_vl_7b.yaml --stage sft --dry-run --world-size 512 --all-stages
  torchrun --nproc-per-node 2 -m megatron_unimm.cli train configs/orion/shapes.yaml --stage sft system.parallel.tensor=2
\b
Exit codes: 0 done, 2 wrong config or input, 70 ended by the watchdog and 75 stopped by a signal after saving (start it
again)."""
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--stage", help="Stage of the recipe; may be left out where it has only one.")
@options.run_dir
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|DIR",
    help="auto: from the run's last good checkpoint, if there is one. DIR: from that checkpoint.",
)
@click.option(
    "--dry-run", is_flag=True, help="Check all that can be checked without data, GPUs and other ranks; train nothing."
)
@click.option(
    "--world-size",
    type=click.IntRange(min=1),
    help="Ranks of the job that a dry run is of.  [default: WORLD_SIZE, or one replica of the model]",
)
@click.option("--rank", type=click.IntRange(min=0), help="The rank that a dry run plays.  [default: 0]")
@click.option("--all-stages", is_flag=True, help="A dry run plays one rank of each pipeline stage.")
@click.option("--list-stages", is_flag=True, help="Print each stage and the one it builds on, in their order; no more.")
def train(
    recipe: Path,
    overrides: tuple[str, ...],
    stage: str | None,
    run_dir: Path | None,
    resume: str,
    dry_run: bool,
    world_size: int | None,
    rank: int | None,
    all_stages: bool,
    list_stages: bool,
) -> int:
    """Train one stage of RECIPE.

    KEY=VALUE changes a setting: train.steps=5 in all stages, stages.sft.train.steps=5 in one.
    """
    from megatron_unimm.config.load import load_recipe, select_stage

    loaded = load_recipe(recipe, overrides)
    if list_stages:
        for each in loaded.stages.values():
            click.echo(f"{each.name} {each.after or ''}".rstrip())
        return 0
    chosen = select_stage(loaded, stage)

    from megatron_unimm.train.log import setup_logging

    setup_logging()  # before Megatron-Core is imported, which warns

    if dry_run:
        from megatron_unimm.train.dry_run import dry_run_stage

        dry_run_stage(chosen, world_size, rank or 0, all_stages)
        return 0
    if world_size is not None or rank is not None or all_stages:
        raise click.UsageError("--world-size, --rank and --all-stages go with --dry-run.")

    from megatron_unimm.train.run import train_stage

    return train_stage(loaded, chosen, run_dir=options.run_dir_of(loaded, run_dir), resume=resume)
