"""What a node measured, and how it travels: one line of JSON on stdout, behind a mark."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

MARK = "node-report "
"""Other programs (containers, MPI plugins) may write to stdout as well."""


@dataclass(frozen=True)
class DiskReport:
    """Writing to a folder."""

    write_mb_per_second: float = 0.0
    """10^6 bytes, fsync included."""
    free_gib: float = 0.0
    fault: str = ""
    """Why there are no numbers."""


@dataclass(frozen=True)
class BandwidthReport:
    """An all-reduce among some ranks."""

    gb_per_second: float = 0.0
    """10^9 bytes per second and direction through the slowest link (bus bandwidth)."""
    fault: str = ""
    """Why there is no number."""


@dataclass(frozen=True)
class NodeReport:
    """All that one node measured."""

    node: str
    """Its name, as the scheduler calls it."""
    free_gpu_memory: list[float] = field(default_factory=list)
    """Free share of each GPU's memory; empty without GPUs."""
    gpu_fault: str = ""
    """Why the GPUs could not be asked."""
    disks: dict[str, DiskReport] = field(default_factory=dict)
    """By folder."""
    inside: BandwidthReport | None = None
    """Among the ranks of the node; None for one rank."""
    to: dict[str, BandwidthReport] = field(default_factory=dict)
    """With each neighbour, by its name: among the ranks of both nodes."""

    def line(self) -> str:
        """The report as it is printed."""
        return MARK + json.dumps(asdict(self))


def read_report(line: str) -> NodeReport | None:
    """The report of a line; None if it is no report or was cut."""
    if not line.startswith(MARK):
        return None
    try:
        fields: dict[str, Any] = json.loads(line.removeprefix(MARK))
    except json.JSONDecodeError:
        return None
    fields["disks"] = {folder: DiskReport(**disk) for folder, disk in fields["disks"].items()}
    fields["to"] = {name: BandwidthReport(**link) for name, link in fields["to"].items()}
    fields["inside"] = None if fields["inside"] is None else BandwidthReport(**fields["inside"])
    return NodeReport(**fields)


def read_reports(lines: Iterable[str]) -> dict[str, NodeReport]:
    """All reports among the lines, by node."""
    reports = (read_report(line.strip()) for line in lines)
    return {report.node: report for report in reports if report is not None}
