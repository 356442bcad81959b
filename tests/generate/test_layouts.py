"""Every layout against one rank: the same tokens, the same visual tokens, on the first and on the last rank."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_worker import results

from megatron_unimm.generate.api import Generator

TOLERANCE = 1e-4
"""Measured 4e-5: visual tokens are made one from the other."""
RANKS = 2
TASKS: list[dict[str, Any]] = [
    {"name": "tp2", "tensor": 2, "pipeline": 1},
    {"name": "pp2", "tensor": 1, "pipeline": 2},
    {"name": "dp2", "tensor": 1, "pipeline": 1},
    {"name": "live_tp2_sp", "overrides": ["system.parallel.tensor=2", "system.parallel.sequence=true"]},
    {"name": "live_pp2_vpp2", "overrides": ["system.parallel.pipeline=2", "system.parallel.virtual_pipeline=2"]},
    {"name": "live_cp2", "overrides": ["system.parallel.context=2"]},
]


@pytest.fixture(scope="module")
def one_rank(tiny: Path) -> dict[str, Any]:
    with Generator.load(tiny / "run", with_targets=True) as generator:
        torch.set_num_threads(1)
        return results(generator)


@pytest.fixture(scope="module")
def folder(tiny: Path) -> Path:
    """Where every layout wrote down what it said; one start serves all, since importing takes longest."""
    worker = Path(__file__).with_name("layout_worker.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [sys.executable, *launcher, str(worker), str(tiny), json.dumps(TASKS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return tiny


@pytest.mark.parametrize("name", [task["name"] for task in TASKS])
@pytest.mark.parametrize("rank", ["", ".last"])
def test_layout_equals_one_rank(folder: Path, one_rank: dict[str, Any], name: str, rank: str) -> None:
    found = torch.load(folder / f"{name}{rank}.pt", weights_only=True)
    assert found["ids"] == one_rank["ids"]
    assert found["drawn"] == one_rank["drawn"]
    for kind in ("visual", "targets"):
        torch.testing.assert_close(found[kind], one_rank[kind], rtol=TOLERANCE, atol=TOLERANCE)
