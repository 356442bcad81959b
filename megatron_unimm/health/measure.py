"""One node's measurements: its disks, its GPUs, and all-reduces inside it and with its neighbours.

Every node of a job runs :func:`measure_node` at about the same time. They meet in a store that the first node keeps, of
which one side of a link tells the other that it is there. Nothing waits without a limit.
"""

import contextlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_unimm.health.processes import Result, call_all, server
from megatron_unimm.health.report import BandwidthReport, DiskReport, NodeReport
from megatron_unimm.health.ring import partner, rounds

if TYPE_CHECKING:
    from torch.distributed import Store

MIB, GIB = 2**20, 2**30
WARM_UPS, REPEATS = 2, 5
START, TOTAL = 3, 8
"""In units of ``Plan.seconds``: until every node must have started, maybe from a cold file system; and for all."""


@dataclass(frozen=True)
class Plan:
    """Who measures what."""

    nodes: tuple[str, ...]
    """Names of all nodes in the order of their ranks."""
    node_rank: int
    """Which of them this is."""
    ranks: int
    """Processes per node that talk to each other: one for each GPU."""
    address: str
    """Where the first node can be reached."""
    port: int
    folders: tuple[Path, ...]
    """Disks to write to."""
    disk_mib: int
    all_reduce_mib: int
    seconds: float
    """Limit of one measurement."""

    @property
    def name(self) -> str:
        return self.nodes[self.node_rank]


def measure_node(plan: Plan) -> NodeReport:
    """All measurements of this node, within ``TOTAL * plan.seconds``."""
    began = time.monotonic()
    deadline = began + TOTAL * plan.seconds
    store = server().Process(target=keep_store, args=(plan,), daemon=True)
    if plan.node_rank == 0 and len(plan.nodes) > 1:
        store.start()
    (gpus,) = call_all(free_gpu_memory, [()], START * plan.seconds)
    if len(plan.nodes) > 1:
        call_all(sign, [(plan, "here")], plan.seconds)
    disks = call_all(write_speed, [(folder, plan.name, plan.disk_mib) for folder in plan.folders], plan.seconds)
    report = NodeReport(
        node=plan.name,
        free_gpu_memory=gpus.value or [],
        gpu_fault=gpus.fault,
        disks={
            str(folder): result.value or DiskReport(fault=result.fault)
            for folder, result in zip(plan.folders, disks, strict=True)
        },
        inside=_measure_inside(plan),
        to=_measure_links(plan, began),
    )
    if len(plan.nodes) > 1:
        call_all(sign, [(plan, "left")], plan.seconds)
    if store.pid is not None:
        store.join(max(0.0, deadline - time.monotonic()))
        store.kill()
    return report


def _measure_inside(plan: Plan) -> BandwidthReport | None:
    if plan.ranks == 1:
        return None
    with tempfile.TemporaryDirectory() as folder:
        calls = [(plan, Path(folder) / "store", rank) for rank in range(plan.ranks)]
        return _slowest(call_all(bandwidth_inside, calls, plan.seconds))


def _measure_links(plan: Plan, began: float) -> dict[str, BandwidthReport]:
    """With each neighbour, by its name; those for which no time is left are absent."""
    reports = {}
    for number, pairs in enumerate(rounds(len(plan.nodes))):
        other = partner(pairs, plan.node_rank)
        elapsed = time.monotonic() - began
        to_start = max(1.0, START * plan.seconds - elapsed)
        # The other side may have waited as long for its partner of the round before.
        to_come = min((2 * number + 1) * plan.seconds, (TOTAL - 2) * plan.seconds - elapsed)
        if other is not None and to_come > 0:
            calls = [(plan, other, rank, to_start, to_come) for rank in range(plan.ranks)]
            limit = to_start + to_come + plan.seconds
            reports[plan.nodes[other]] = _slowest(call_all(bandwidth_between, calls, limit))
    return reports


def _slowest(results: list[Result]) -> BandwidthReport:
    fault = next((result.fault for result in results if result.fault), "")
    return BandwidthReport(fault=fault) if fault else BandwidthReport(min(result.value for result in results))


# ------------------------------------------------------------------------------------ in processes of their own


def free_gpu_memory() -> list[float]:
    """Free share of each GPU's memory; empty without GPUs."""
    from megatron_unimm.parallel.platform import device_memory

    return [free / total for free, total in device_memory()]


def write_speed(folder: Path, name: str, mebibytes: int) -> DiskReport:
    """Writes a file of its own, waits until it is on disk, and removes it."""
    folder.mkdir(parents=True, exist_ok=True)
    free_gib = shutil.disk_usage(folder).free / GIB
    block = os.urandom(MIB)  # nothing that a file system could compress
    path = folder / f".health-{name}"
    started = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(mebibytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    finally:
        path.unlink(missing_ok=True)
    return DiskReport(write_mb_per_second=mebibytes * MIB / 1e6 / seconds, free_gib=free_gib)


def bandwidth_inside(plan: Plan, path: Path, rank: int) -> float:
    """All-reduce among the ranks of this node, in 10^9 bytes per second."""
    from torch.distributed import FileStore

    return _bandwidth(FileStore(str(path), plan.ranks), rank, plan.ranks, rank, plan)


def bandwidth_between(plan: Plan, other: int, local_rank: int, to_start: float, to_come: float) -> float:
    """All-reduce among the ranks of this node and another, in 10^9 bytes per second.

    Args:
        to_start, to_come: seconds that the other node has to be there at all, and to have time for this one.
    """
    from torch.distributed import DistStoreError, PrefixStore

    meeting = _join_store(plan)
    low, high = sorted((plan.node_rank, other))
    store = PrefixStore(f"link {low} {high}", meeting)
    size = 2 * plan.ranks
    rank = local_rank + (plan.ranks if plan.node_rank == high else 0)
    store.set(f"ready {rank}", "")
    try:
        meeting.wait([f"here {other}"], timedelta(seconds=to_start))
        store.wait([f"ready {each}" for each in range(size)], timedelta(seconds=to_come))
    except DistStoreError:
        raise TimeoutError(f"{plan.nodes[other]} did not come") from None
    return _bandwidth(store, rank, size, local_rank, plan)


def _bandwidth(store: "Store", rank: int, size: int, local_rank: int, plan: Plan) -> float:
    """Bus bandwidth: 2 (n - 1) / n of the bytes cross the slowest link in each direction, whatever the algorithm
    (NCCL's tests, doc/PERFORMANCE.md)."""
    import torch
    import torch.distributed as dist

    from megatron_unimm.parallel.platform import select_platform

    os.environ |= {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(plan.ranks)}
    platform = select_platform()
    limit = timedelta(seconds=plan.seconds)
    dist.init_process_group(platform.backend, store=store, rank=rank, world_size=size, timeout=limit)
    data = torch.ones(plan.all_reduce_mib * MIB // 4, device=platform.device)
    dist.all_reduce(data)
    if not bool((data == size).all()):
        raise ArithmeticError(f"the sum of ones over {size} ranks is not {size} everywhere")
    for _ in range(WARM_UPS):
        dist.all_reduce(data.zero_())
    platform.synchronize()
    started = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(data)
    platform.synchronize()
    seconds = (time.perf_counter() - started) / REPEATS
    # A process that ended now could take with it what another is still reading.
    store.set(f"done {rank}", "")
    store.wait([f"done {each}" for each in range(size)], limit)
    return 2 * (size - 1) / size * data.nbytes / seconds / 1e9


def keep_store(plan: Plan) -> None:
    """The meeting place, on the first node, until all nodes that came have left."""
    from torch.distributed import DistStoreError, TCPStore

    store = TCPStore(plan.address, plan.port, is_master=True, wait_for_workers=False)
    came = [f"here {rank}" for rank in range(len(plan.nodes))]
    with contextlib.suppress(DistStoreError):  # some did not
        store.wait(came, timedelta(seconds=START * plan.seconds))
    left = [f"left {rank}" for rank in range(len(plan.nodes)) if store.check([came[rank]])]
    store.wait(left, timedelta(seconds=TOTAL * plan.seconds))


def sign(plan: Plan, word: str) -> None:
    """Tell the others that this node is here, or that it has all its numbers and left."""
    _join_store(plan).set(f"{word} {plan.node_rank}", "")


def _join_store(plan: Plan) -> "Store":
    from torch.distributed import TCPStore

    limit = timedelta(seconds=plan.seconds)
    return TCPStore(plan.address, plan.port, is_master=False, wait_for_workers=False, timeout=limit)
