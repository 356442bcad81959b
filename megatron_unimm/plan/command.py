"""Planning the stages of a recipe: tables, JSON, and a refusal where one does not fit."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.plan.hardware import Cluster
from megatron_unimm.plan.memory import check_fits
from megatron_unimm.plan.report import as_json, show
from megatron_unimm.plan.search import Plan, advice, plan, search, with_overlap
from megatron_unimm.plan.workload import Workload


def plan_stages(
    stages: Sequence[StageConfig],
    cluster: Cluster,
    console: Console,
    *,
    count: int,
    row_lengths: Sequence[int] = (),
    target: Path | None = None,
) -> None:
    """Plan, print, and write.

    Args:
        count: layouts to show.
        target: JSON file.

    Raises:
        ConfigError: a stage's layout cannot run on the cluster, or does not fit; after everything has been shown.
    """
    found: list[tuple[Plan, list[Plan]]] = []
    for stage in stages:
        workload = Workload.of(stage)
        own, ranking = plan(stage, cluster, workload), search(stage, cluster, row_lengths)
        show(own, ranking, cluster, console, count, workload.typical.num_images)
        _hint(own, cluster, console)
        found.append((own, ranking))
    if target is not None:
        body = {
            "cluster": {"nodes": cluster.nodes, "gpus_per_node": cluster.gpus_per_node} | vars(cluster.gpu),
            "stages": {own.stage.name: as_json(own, ranking, count) for own, ranking in found},
        }
        target.write_text(json.dumps(body, indent=1))
    for own, ranking in found:
        check_fits(own.stage, own.memory, cluster.memory, advice(ranking, cluster))


def _hint(own: Plan, cluster: Cluster, console: Console) -> None:
    """What overlapping the exchange of gradients would bring."""
    overlapped = plan(with_overlap(own.stage), cluster)
    gain = own.step.seconds - overlapped.step.seconds
    if gain > 0.02 * own.step.seconds:
        what = "system.overlap.grad_reduce=true system.overlap.param_gather=true"
        console.print(f"\n{what} would save {gain:.3f} s of a step", highlight=False, soft_wrap=True)
    console.print()
