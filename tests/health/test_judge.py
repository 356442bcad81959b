"""Who is named for what: each limit by itself, and bad nodes told apart from their neighbours by the links between."""

import random
from dataclasses import replace

import pytest

from megatron_unimm.health.judge import Limits, judge
from megatron_unimm.health.report import BandwidthReport, DiskReport, NodeReport, read_report, read_reports
from megatron_unimm.health.ring import partner, rounds

LIMITS = Limits(gpus=8, inside_gb_per_second=200, between_gb_per_second=100)


def healthy(nodes: list[str]) -> dict[str, NodeReport]:
    """Reports of nodes that nothing is wrong with, on their ring."""
    reports = {
        name: NodeReport(
            node=name,
            free_gpu_memory=[0.99] * 8,
            disks={"/run": DiskReport(write_mb_per_second=500, free_gib=100)},
            inside=BandwidthReport(400),
        )
        for name in nodes
    }
    for pairs in rounds(len(nodes)):
        for a, b in pairs:
            reports[nodes[a]].to[nodes[b]] = reports[nodes[b]].to[nodes[a]] = BandwidthReport(300)
    return reports


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 64])
def test_healthy_nodes_are_not_named(count: int) -> None:
    assert judge(names(count), healthy(names(count)), LIMITS) == {}


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"free_gpu_memory": [0.99] * 7}, "7 GPUs, wanted 8"),
        ({"free_gpu_memory": [0.99] * 7 + [0.5]}, "GPU 7: 50% of its memory is free, wanted 90%"),
        ({"gpu_fault": "no answer within 60 s", "free_gpu_memory": []}, "GPUs: no answer within 60 s"),
        ({"disks": {"/tmp": DiskReport(fault="OSError: read-only")}}, "/tmp: OSError: read-only"),
        ({"disks": {"/tmp": DiskReport(500, 0.5)}}, "/tmp: 0.5 GiB free, wanted 1"),
        ({"disks": {"/tmp": DiskReport(5, 100)}}, "/tmp: writes 5.0 MB/s, wanted 20"),
        ({"inside": BandwidthReport(199)}, "all-reduce inside the node: 199.00 GB/s, wanted 200.00"),
        ({"inside": BandwidthReport(fault="RuntimeError: nvlink")}, "all-reduce inside the node: RuntimeError: nvlink"),
    ],
)
def test_each_fault_of_a_node_names_it_alone(broken: dict, words: str) -> None:
    reports = healthy(names(4))
    reports["n2"] = replace(reports["n2"], **broken)
    assert judge(names(4), reports, LIMITS) == {"n2": [words]}


def test_a_limit_of_zero_is_off() -> None:
    reports = {"a": NodeReport("a", free_gpu_memory=[], disks={"/": DiskReport(0.1, 0.1)}, inside=BandwidthReport(0.1))}
    assert judge(["a"], reports, Limits(disk_mb_per_second=0, disk_free_gib=0)) == {}


def test_slow_nodes_are_found_by_the_median_where_no_number_is_known() -> None:
    reports = healthy(names(8))
    reports["n5"] = replace(reports["n5"], inside=BandwidthReport(199))  # half of the others' 400 is 200
    assert list(judge(names(8), reports, Limits())) == ["n5"]
    reports["n5"] = replace(reports["n5"], inside=BandwidthReport(201))
    assert judge(names(8), reports, Limits()) == {}


@pytest.mark.parametrize("count", [3, 4, 7, 64])
@pytest.mark.parametrize("fault", [BandwidthReport(20), BandwidthReport(fault="TimeoutError: did not come")])
def test_a_node_with_a_bad_network_is_named_and_not_its_neighbours(count: int, fault: BandwidthReport) -> None:
    nodes = names(count)
    for bad in nodes:
        reports = healthy(nodes)
        # Seen from either end, at random.
        seed = random.Random(f"{count}{bad}")
        for other in list(reports[bad].to):
            end, far = seed.choice([(bad, other), (other, bad)])
            reports[end].to[far] = fault
        assert list(judge(nodes, reports, LIMITS)) == [bad]


def test_a_node_without_report_is_named_and_its_neighbours_are_not_blamed_for_the_silence() -> None:
    reports = healthy(names(6))
    for other in reports.pop("n3").to:
        reports[other].to["n3"] = BandwidthReport(fault="n3 did not come within 60 s")
    assert judge(names(6), reports, LIMITS) == {"n3": ["no report: the check did not start there, or hangs"]}


def test_two_bad_nodes_far_apart_are_both_named() -> None:
    reports = healthy(names(8))
    for bad in ("n1", "n5"):
        for other in reports[bad].to:
            reports[bad].to[other] = BandwidthReport(fault="dead")
    assert list(judge(names(8), reports, LIMITS)) == ["n1", "n5"]


def test_both_ends_of_a_single_bad_link_are_named_as_nothing_tells_them_apart() -> None:
    reports = healthy(names(6))
    reports["n2"].to["n3"] = BandwidthReport(10)
    assert judge(names(6), reports, LIMITS) == {
        "n2": ["all-reduce with n3: 10.00 GB/s, wanted 150.00"],  # half of the median 300 is more than 100
        "n3": ["all-reduce with n2: 10.00 GB/s, wanted 150.00"],
    }


@pytest.mark.parametrize("count", range(2, 20))
def test_the_rounds_meet_each_neighbour_once(count: int) -> None:
    everyone = rounds(count)
    for pairs in everyone:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
    ring = {frozenset((node, (node + 1) % count)) for node in range(count)}
    measured = [frozenset(pair) for pairs in everyone for pair in pairs]
    assert len(measured) == len(set(measured))
    assert set(measured) == ring
    for pairs in everyone:
        assert all(partner(pairs, a) == b and partner(pairs, b) == a for a, b in pairs)


def test_reports_survive_their_way_and_other_output_beside_them() -> None:
    report = healthy(names(3))["n1"]
    assert read_report(report.line()) == report
    lines = ["NCCL version 2.27", report.line(), "node-report {cut", replace(report, node="n2", inside=None).line()]
    assert set(read_reports(lines)) == {"n1", "n2"}
