"""Nodes that measure for real, as processes of this machine; one that does not come holds nobody up for ever."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_unimm.health.judge import Limits, judge
from megatron_unimm.health.report import NodeReport, read_reports

pytestmark = pytest.mark.slow


def measure(nodes: str, present: list[int], folder: Path, seconds: float, *options: str) -> dict[str, NodeReport]:
    """The reports of the nodes that are present, by name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "megatron_unimm.cli", "health", "measure", "--nodes", nodes]
    command += ["--port", str(port), "--disk-mib", "1", "--all-reduce-mib", "1", "--seconds", str(seconds), *options]
    started = [
        subprocess.Popen(
            [*command, "--node-rank", str(rank), "--folder", str(folder)], stdout=subprocess.PIPE, text=True
        )
        for rank in present
    ]
    return read_reports(line for process in started for line in process.communicate(timeout=300)[0].splitlines())


def test_two_nodes_of_two_ranks_measure_themselves_and_each_other(tmp_path: Path) -> None:
    reports = measure("a,b", [0, 1], tmp_path, 150, "--ranks", "2")
    for name, other in (("a", "b"), ("b", "a")):
        report = reports[name]
        assert report.inside is not None
        assert not report.inside.fault
        assert report.inside.gb_per_second > 0
        assert list(report.to) == [other]
        assert not report.to[other].fault
        assert report.to[other].gb_per_second > 0
        assert report.disks[str(tmp_path)].write_mb_per_second > 0
    assert list(tmp_path.iterdir()) == []
    assert judge(["a", "b"], reports, Limits(share_of_median=0, disk_mb_per_second=0)) == {}


def test_a_node_that_does_not_come_is_named_and_holds_nobody_up_for_ever(tmp_path: Path) -> None:
    reports = measure("a,b,c", [0, 1], tmp_path, 45)
    assert set(reports) == {"a", "b"}
    assert reports["a"].to["c"].fault == reports["b"].to["c"].fault == "TimeoutError: c did not come"
    limits = Limits(share_of_median=0, disk_mb_per_second=0)
    assert judge(["a", "b", "c"], reports, limits) == {"c": ["no report: the check did not start there, or hangs"]}


def test_a_folder_that_cannot_be_written_is_the_nodes_fault(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    reports = measure("a", [0], blocked / "inside", 60)
    assert judge(["a"], reports, Limits(disk_free_gib=0))["a"][0].startswith(
        f"{blocked / 'inside'}: NotADirectoryError"
    )
