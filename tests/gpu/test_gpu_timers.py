"""On a GPU: the split of a step's time, by events in its stream.

NOT YET RUN ON A GPU. Run it with tools/gpu_checks.sh.
"""

import time

import pytest
import torch

from megatron_unimm.train.timers import StepClock

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def work(matrix: torch.Tensor, times: int) -> None:
    for _ in range(times):
        torch.mm(matrix, matrix)


def test_the_time_of_the_device_is_split() -> None:
    """Data that is late lets the device stand still; data that is waited for while the device works costs nothing."""
    device = torch.device("cuda", torch.cuda.current_device())
    matrix = torch.randn(4096, 4096, device=device)
    work(matrix, 3)
    torch.cuda.synchronize()
    began = time.perf_counter()
    work(matrix, 20)
    torch.cuda.synchronize()
    times = int(20 * 0.4 / (time.perf_counter() - began))  # 0.4 s of work

    clock = StepClock.of(device)
    clock.reset()
    began = time.perf_counter()
    clock.begin("data")
    time.sleep(0.2)
    clock.begin("forward_backward")
    work(matrix, times)
    clock.begin("data")
    time.sleep(0.1)  # while the device works
    clock.begin("optimizer")
    work(matrix, times)
    handed_over = time.perf_counter() - began
    found = clock.read()
    seconds = time.perf_counter() - began
    assert handed_over < 0.7 * seconds, "marks do not wait for the device"
    assert sum(found.values()) == pytest.approx(seconds, rel=0.05)
    assert found["data"] == pytest.approx(0.2, abs=0.03)
    assert found["forward_backward"] == pytest.approx(found["optimizer"], rel=0.1)
