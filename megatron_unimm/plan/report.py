"""Plans as tables and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_unimm.plan.hardware import GIB, Cluster
from megatron_unimm.plan.memory import PARTS
from megatron_unimm.plan.search import Plan
from megatron_unimm.plan.step import COMPUTE, GROUPS

TITLES = {"weights": "weights", "frozen": "frozen copies", "layers": "activations"}
"""Of columns, where a part's name is not enough."""


def memory_table(plan: Plan) -> Table:
    """GiB of a rank of each pipeline stage."""
    recompute = plan.stage.system.recompute.granularity
    table = Table(
        title=f"GiB per rank of {plan.capacity / GIB:.1f}; recompute: {recompute}", title_justify="left", box=None
    )
    table.add_column("pipeline stage", justify="right")
    shown = [part for part in PARTS if any(vars(memory)[part] >= 0.005 * GIB for memory in plan.memory)]
    for part in shown:
        table.add_column(TITLES.get(part, part), justify="right")
    table.add_column("total", justify="right")
    table.add_column("rows full of")
    for number, memory in enumerate(plan.memory):
        numbers = [f"{vars(memory)[part] / GIB:.2f}" for part in shown]
        total = f"{memory.total / GIB:.1f}" + ("" if memory.total <= plan.capacity else " (too much)")
        table.add_row(str(number), *numbers, total, memory.of)
    return table


def step_table(plan: Plan) -> Table:
    """Where the seconds of a step go, and what a rank sends."""
    step = plan.step
    table = Table(title=f"a step of {step.seconds:.3f} s, by its slowest rank", title_justify="left", box=None)
    for title in ("", "seconds", "share", "GiB sent"):
        table.add_column(title, justify="left" if not title else "right")
    # What the pipeline's slowest stage does, and what it waits for.
    seconds = dict(step.busy) | {f"{group} group": step.waits[group] for group in GROUPS}
    seconds["optimizer"] = step.optimizer
    seconds["pipeline bubble"] = max(0.0, step.seconds - sum(seconds.values()))
    for name, value in seconds.items():
        group = name.removesuffix(" group")
        sent = f"{step.sent[group] / GIB:.2f}" if group in GROUPS and name != group else ""
        if value >= 5e-4 or sent not in ("", "0.00"):
            label = "norms and activations" if name == "memory" else name
            table.add_row(label, f"{value:.3f}", f"{value / step.seconds:.0%}", sent)
    return table


def ranking_table(plans: Sequence[Plan], count: int) -> Table:
    """The fastest layouts that fit."""
    table = Table(title=f"{len(plans)} layouts fit; the fastest", title_justify="left", box=None)
    for title in ("", "layout", "s / step", "MFU", "samples/s", "bubble", "full rows", "GiB"):
        table.add_column(title, justify="left" if title == "layout" else "right", no_wrap=title == "layout")
    for number, plan in enumerate(plans[:count], 1):
        step = plan.step
        table.add_row(
            str(number),
            plan.summary,
            f"{step.seconds:.3f}",
            f"{step.mfu:.1%}",
            f"{step.samples_per_second:,.0f}",
            f"{step.bubble:.0%}",
            f"{step.filled:.0%}",
            f"{plan.largest / GIB:.1f}",
        )
    return table


def head_lines(plan: Plan, cluster: Cluster, images_per_row: int) -> list[str]:
    """What is planned, in words."""
    step, stage = plan.step, plan.stage
    tokens = stage.data.sequence_length
    image = f", {step.row_flops / images_per_row / 1e12:.2f} TFLOP per image" if images_per_row else ""
    return [
        f"stage {stage.name} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.device_name}: {plan.summary}, "
        f"data {step.data_size}",
        f"  {step.samples:,} samples a step in {step.rows:,} rows; {step.micro_batches} micro-batches per rank, of "
        f"which {step.filled:.0%} hold samples",
        f"  {step.row_flops / tokens / 1e9:.1f} GFLOP per token{image}; {step.seconds:.3f} s per step, "
        f"MFU {step.mfu:.1%}, {step.samples_per_second:,.0f} samples/s, bubble {step.bubble:.0%}",
    ]


def show(
    plan: Plan, ranking: Sequence[Plan], cluster: Cluster, console: Console, count: int, images_per_row: int
) -> None:
    """All of it."""
    for line in head_lines(plan, cluster, images_per_row):
        console.print(line, highlight=False, soft_wrap=True)
    for table in (memory_table(plan), step_table(plan), ranking_table(ranking, count)):
        console.print()
        console.print(table)


def as_json(plan: Plan, ranking: Sequence[Plan], count: int) -> dict[str, Any]:
    """The same for programs; bytes and seconds."""
    return _plan_json(plan) | {
        "ranking": [_plan_json(each) for each in ranking[:count]],
        "layouts_that_fit": len(ranking),
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    step = plan.step
    return {
        "layout": plan.overrides,
        "fits": plan.fits,
        "memory": [vars(memory) | {"total": memory.total} for memory in plan.memory],
        "capacity": plan.capacity,
        "step": {
            **{name: value for name, value in vars(step).items() if name not in ("busy", "sent", "waits")},
            "busy": {name: step.busy[name] for name in COMPUTE},
            "sent": {name: step.sent[name] for name in GROUPS},
            "waits": {name: step.waits[name] for name in GROUPS},
        },
    }
