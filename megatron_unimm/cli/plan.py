"""``unimm plan``: what a recipe needs and how long its steps take on a cluster, and which layouts are best."""

from pathlib import Path

import click


@click.command(
    epilog="""\b
Examples:
  unimm plan configs/orion/qwen2_5_vl_7b.yaml --nodes 64 --gpus-per-node 8 --gpu h100
  unimm plan configs/orion/qwen3_vl_30b_a3b.yaml --stage sft --nodes 8 --gpus-per-node 8 --gpu h200 --to plan.json
  unimm plan configs/orion/qwen2_5_vl_7b.yaml --nodes 1 --gpus-per-node 8 --gpu h200 system.parallel.pipeline=2
\b
Exit codes: 0 the recipe's layout fits, 2 it does not (or another mistake): the message says what does."""
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--stage", help="Stage of the recipe.  [default: all, one after another]")
@click.option("--nodes", required=True, type=click.IntRange(min=1))
@click.option("--gpus-per-node", required=True, type=click.IntRange(min=1))
@click.option("--gpu", "gpu_name", required=True, metavar="NAME", help="h100, h200, h800, h20, b200, a100, a800 …")
@click.option("--top", "count", default=10, show_default=True, type=click.IntRange(min=1), help="Layouts to show.")
@click.option(
    "--row-length",
    "row_lengths",
    multiple=True,
    type=click.IntRange(min=1),
    help="Try data.sequence_length at this, too (may be given several times).",
)
@click.option("--to", "target", type=click.Path(path_type=Path, dir_okay=False), help="Write all numbers as JSON.")
def plan(
    recipe: Path,
    overrides: tuple[str, ...],
    stage: str | None,
    nodes: int,
    gpus_per_node: int,
    gpu_name: str,
    count: int,
    row_lengths: tuple[int, ...],
    target: Path | None,
) -> int:
    """Plan RECIPE on a cluster: memory of each pipeline stage, seconds of a step and where they go, and the fastest
    layouts that fit.

    Nothing is built and no GPU is needed. Memory is that of rows full of the samples that need most; how well GPUs and
    networks are used is assumed (megatron_unimm/plan/hardware.py).
    """
    from rich.console import Console

    from megatron_unimm.config.load import load_recipe, select_stage
    from megatron_unimm.train.log import setup_logging

    setup_logging()  # before Megatron-Core is imported, which warns
    from megatron_unimm.plan.command import plan_stages
    from megatron_unimm.plan.hardware import Cluster, gpu_of

    loaded = load_recipe(recipe, overrides)
    stages = [select_stage(loaded, stage)] if stage is not None else list(loaded.stages.values())
    cluster = Cluster(nodes, gpus_per_node, gpu_of(gpu_name))
    # A log has no width of its own.
    console = Console() if Console().is_terminal else Console(width=160)
    plan_stages(stages, cluster, console, count=count, row_lengths=row_lengths, target=target)
    return 0
