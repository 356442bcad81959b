"""From the nodes' reports: which nodes are bad, and why. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from megatron_unimm.health.report import BandwidthReport, NodeReport

Link = frozenset[str]
"""The names of two nodes that measured with each other."""


@dataclass(frozen=True)
class Limits:
    """What a node must reach. 0 switches a limit off."""

    gpus: int = 0
    """GPUs per node."""
    free_gpu_memory: float = 0.9
    """Share of each GPU's memory; less is left when a process of an earlier job still runs."""
    inside_gb_per_second: float = 0.0
    """All-reduce among the node's ranks."""
    between_gb_per_second: float = 0.0
    """All-reduce among the ranks of two nodes."""
    share_of_median: float = 0.5
    """Of the median of all nodes, for both bandwidths: finds the slow one whatever the hardware."""
    disk_mb_per_second: float = 20.0
    disk_free_gib: float = 1.0


def judge(nodes: Sequence[str], reports: Mapping[str, NodeReport], limits: Limits) -> dict[str, list[str]]:
    """The bad nodes with the reasons, in the order of ``nodes``.

    Args:
        nodes: those that should have reported.
    """
    reasons: dict[str, list[str]] = {node: [] for node in nodes}
    slowest_inside = max(
        limits.inside_gb_per_second,
        limits.share_of_median * _median([r.inside for r in reports.values() if r.inside is not None]),
    )
    for node in nodes:
        if node not in reports:
            reasons[node].append("no report: the check did not start there, or hangs")
            continue
        reasons[node] += _own_faults(reports[node], limits)
        inside = reports[node].inside
        if inside is not None and (fault := _fault(inside, slowest_inside)):
            reasons[node].append(f"all-reduce inside the node: {fault}")
    bad = {node for node, why in reasons.items() if why}
    for node, why in _bad_links(nodes, reports, bad, limits).items():
        reasons[node] += why
    return {node: why for node, why in reasons.items() if why}


def _own_faults(report: NodeReport, limits: Limits) -> list[str]:
    faults = [f"GPUs: {report.gpu_fault}"] if report.gpu_fault else []
    if not report.gpu_fault and len(report.free_gpu_memory) < limits.gpus:
        faults.append(f"{len(report.free_gpu_memory)} GPUs, wanted {limits.gpus}")
    faults += [
        f"GPU {index}: {free:.0%} of its memory is free, wanted {limits.free_gpu_memory:.0%}"
        for index, free in enumerate(report.free_gpu_memory)
        if free < limits.free_gpu_memory
    ]
    for folder, disk in report.disks.items():
        if disk.fault:
            faults.append(f"{folder}: {disk.fault}")
            continue
        if disk.free_gib < limits.disk_free_gib:
            faults.append(f"{folder}: {disk.free_gib:.1f} GiB free, wanted {limits.disk_free_gib:g}")
        if disk.write_mb_per_second < limits.disk_mb_per_second:
            faults.append(f"{folder}: writes {disk.write_mb_per_second:.1f} MB/s, wanted {limits.disk_mb_per_second:g}")
    return faults


def _bad_links(
    nodes: Sequence[str], reports: Mapping[str, NodeReport], bad: set[str], limits: Limits
) -> dict[str, list[str]]:
    """Which further nodes to blame for links that are slow or dead.

    A link says only that one of its two ends is bad. Whoever explains most of the bad links is blamed first, until all
    are explained; both ends where nothing tells them apart.
    """
    links = {
        frozenset(pair): [r for a, b in (pair, pair[::-1]) if a in reports and (r := reports[a].to.get(b)) is not None]
        for pair in combinations(nodes, 2)
        if not bad & set(pair)
    }
    measured = {link: both for link, both in links.items() if both}
    slowest = max(
        limits.between_gb_per_second,
        limits.share_of_median * _median([report for both in measured.values() for report in both]),
    )
    # Either end may have seen the fault.
    faults = {
        link: fault
        for link, both in measured.items()
        if (fault := next((f for report in both if (f := _fault(report, slowest))), ""))
    }
    blamed: dict[str, list[str]] = {}
    while faults:
        count = {node: sum(node in link for link in faults) for node in nodes}
        most = max(count.values())
        for node in [node for node in nodes if count[node] == most]:
            blamed[node] = [
                f"all-reduce with {next(iter(link - {node}))}: {fault}"
                for link, fault in faults.items()
                if node in link
            ]
        faults = {link: fault for link, fault in faults.items() if not link & blamed.keys()}
    return blamed


def _fault(report: BandwidthReport, slowest: float) -> str:
    if report.fault:
        return report.fault
    if report.gb_per_second < slowest:
        return f"{report.gb_per_second:.2f} GB/s, wanted {slowest:.2f}"
    return ""


def _median(reports: Sequence[BandwidthReport]) -> float:
    numbers = [report.gb_per_second for report in reports if not report.fault]
    return median(numbers) if numbers else 0.0
