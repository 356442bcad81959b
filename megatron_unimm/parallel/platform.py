"""The one door to the device: NVIDIA GPUs with NCCL, or the CPU with gloo.

Everything else asks a :class:`Platform`; ``tests/test_imports.py`` lists the few files that may name a device.
"""

import os
from dataclasses import dataclass

import torch

from megatron_unimm.errors import ConfigError
from megatron_unimm.parallel import stand_ins


@dataclass(frozen=True)
class Platform:
    """Where tensors live and how ranks talk."""

    kind: str
    """``cuda`` or ``cpu``."""
    device: torch.device
    backend: str
    """torch.distributed backend."""

    @property
    def is_gpu(self) -> bool:
        return self.kind == "cuda"

    def synchronize(self) -> None:
        """Wait for the device; for timing and tests, never inside a step."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def memory_allocated(self) -> int:
        """Bytes now held by tensors on the device; on CPU the resident size of the process."""
        return torch.cuda.memory_allocated() if self.is_gpu else _resident_bytes()

    def max_memory_allocated(self) -> int:
        """Largest value so far of :meth:`memory_allocated` on a GPU; the peak resident size on CPU."""
        return torch.cuda.max_memory_allocated() if self.is_gpu else _peak_resident_bytes()

    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.is_gpu else f"CPU, {torch.get_num_threads()} threads"


def select_platform(kind: str = "auto", cpu_threads: int = 0) -> Platform:
    """Choose the device of this process, once, before any model is built.

    Args:
        kind: ``auto``, ``cuda`` or ``cpu``.
        cpu_threads: torch threads per rank on CPU; 0 divides the cores by the ranks of this node.

    Raises:
        ConfigError: a GPU was asked for and there is none, or the other way round.
    """
    has_gpu = torch.cuda.is_available()
    if kind == "cuda" and not has_gpu:
        raise ConfigError(
            "system.platform", "cuda was asked for, but torch sees no GPU; use system.platform=cpu or mend the driver"
        )
    if kind == "cpu" and has_gpu:
        # Megatron-Core names the GPU in many places; stand-ins that redirect them would lie beside a real one.
        raise ConfigError(
            "system.platform", "cpu was asked for on a machine with GPUs; hide them with CUDA_VISIBLE_DEVICES= (empty)"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if has_gpu:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return Platform("cuda", torch.device("cuda", torch.cuda.current_device()), "nccl")
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(cpu_threads or max(1, len(os.sched_getaffinity(0)) // local_world))
    return Platform("cpu", torch.device("cpu"), "gloo")


def device_memory() -> list[tuple[int, int]]:
    """(free, total) bytes of each GPU of this machine; empty without one. Wakes the GPUs up."""
    return [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _peak_resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


stand_ins.install_without_gpu()
