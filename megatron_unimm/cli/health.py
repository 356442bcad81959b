"""``unimm health``: is a node fit for a job? ``slurm/pretrain_64node.sh`` asks before every start."""

import os
import socket
from pathlib import Path

import click


@click.group()
def health() -> None:
    """Measure the nodes of a job before it starts, and name those that would slow or break it."""


@health.command(
    epilog="""\b
Examples:
  unimm health measure --ranks 8 --folder runs > reports                  # this machine alone
  srun unimm health measure --nodes "$SLURM_JOB_NODELIST" > reports       # see slurm/pretrain_64node.sh"""
)
@click.option(
    "--nodes",
    default="",
    metavar="A,B,...",
    help="Names of all nodes in the order of their ranks.  [default: this one]",
)
@click.option("--node-rank", type=int, envvar="SLURM_NODEID", default=0, show_default="$SLURM_NODEID, or 0")
@click.option("--address", default="127.0.0.1", show_default=True, help="Where the first node can be reached.")
@click.option("--port", default=29400, show_default=True, help="A free port of the first node.")
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(min=1), help="Ranks per node: its GPUs.")
@click.option(
    "--folder",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Disk to write to; may be given several times.",
)
@click.option("--disk-mib", default=256, show_default=True, type=click.IntRange(min=1), help="Written to each.")
@click.option(
    "--all-reduce-mib", default=256, show_default=True, type=click.IntRange(min=1), help="Size of the tensor."
)
@click.option("--seconds", default=60.0, show_default=True, help="Limit of one measurement.")
def measure(
    nodes: str,
    node_rank: int,
    address: str,
    port: int,
    ranks: int,
    folders: tuple[Path, ...],
    disk_mib: int,
    all_reduce_mib: int,
    seconds: float,
) -> None:
    """Measure this node and its way to its neighbours; prints one line for `unimm health judge`.

    GPUs and their free memory, writing to disk, and all-reduce bandwidth among the node's ranks and with two other
    nodes. Ends within eight times --seconds, whatever hangs.
    """
    from megatron_unimm.errors import UserError
    from megatron_unimm.health.measure import Plan, measure_node

    names = tuple(nodes.split(",")) if nodes else (os.environ.get("SLURMD_NODENAME") or socket.gethostname(),)
    if not 0 <= node_rank < len(names):
        raise UserError("--node-rank", f"is {node_rank}, but --nodes names {len(names)}: {', '.join(names)}")
    plan = Plan(names, node_rank, ranks, address, port, folders, disk_mib, all_reduce_mib, seconds)
    click.echo(measure_node(plan).line())


@health.command(
    epilog="""\b
Example:
  unimm health judge reports --nodes n1,n2 --gpus 8 --min-between 40

Prints the names of the bad nodes to stdout, and why to stderr. Exit code 0 if there are none, 1 if there are."""
)
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--nodes", default="", metavar="A,B,...", help="Who should have reported.  [default: those in FILE]")
@click.option("--gpus", default=0, show_default=True, help="Wanted on each node.")
@click.option("--min-free-gpu", default=0.9, show_default=True, help="Free share of each GPU's memory.")
@click.option("--min-inside", default=0.0, show_default=True, help="GB/s of all-reduce among the ranks of a node.")
@click.option("--min-between", default=0.0, show_default=True, help="GB/s of all-reduce among the ranks of two nodes.")
@click.option("--min-of-median", default=0.5, show_default=True, help="Share of the nodes' median, for both.")
@click.option("--min-disk", default=20.0, show_default=True, help="MB/s written to each disk.")
@click.option("--min-disk-free", default=1.0, show_default=True, help="GiB free on each disk.")
def judge(
    file: Path,
    nodes: str,
    gpus: int,
    min_free_gpu: float,
    min_inside: float,
    min_between: float,
    min_of_median: float,
    min_disk: float,
    min_disk_free: float,
) -> int:
    """Name the bad nodes among those whose reports are in FILE. A limit of 0 is off."""
    from megatron_unimm.health.judge import Limits
    from megatron_unimm.health.judge import judge as judge_reports
    from megatron_unimm.health.report import read_reports

    reports = read_reports(file.read_text(errors="replace").splitlines())
    names = nodes.split(",") if nodes else sorted(reports)
    limits = Limits(
        gpus=gpus,
        free_gpu_memory=min_free_gpu,
        inside_gb_per_second=min_inside,
        between_gb_per_second=min_between,
        share_of_median=min_of_median,
        disk_mb_per_second=min_disk,
        disk_free_gib=min_disk_free,
    )
    bad = judge_reports(names, reports, limits)
    for line in _table(names, reports, bad):
        click.echo(line, err=True)
    for name in bad:
        click.echo(name)
    return 1 if bad else 0


def _table(names: list[str], reports: dict, bad: dict[str, list[str]]) -> list[str]:
    """One line for each node, and its faults below it."""
    from megatron_unimm.health.report import NodeReport

    lines = []
    for name in names:
        report: NodeReport | None = reports.get(name)
        facts = [] if report is None else [f"{len(report.free_gpu_memory)} GPUs"]
        if report is not None:
            facts += [f"{folder} {disk.write_mb_per_second:.0f} MB/s" for folder, disk in report.disks.items()]
            facts += [] if report.inside is None else [f"inside {report.inside.gb_per_second:.1f} GB/s"]
            facts += [f"to {other} {link.gb_per_second:.1f} GB/s" for other, link in report.to.items()]
        lines.append(f"{name}: {'BAD' if name in bad else 'ok'}  {', '.join(facts)}".rstrip())
        lines += [f"    {why}" for why in bad.get(name, [])]
    return lines
