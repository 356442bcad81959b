"""Every layout against one rank: the same tokens, the same visual tokens, on the first and on the last rank."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing_worker import results
from tiny_checkpoint import DEEPSTACK, make_checkpoints

from megatron_unimm.generate.api import Generator

TOLERANCE = 1e-4
"""Measured 4e-5: visual tokens are made one from the other."""
LEVELS_TOLERANCE = 5e-4
"""Measured 1.4e-4 under TP2: the norms of queries and keys amplify rounding a little more from token to token."""
RANKS = 2
TASKS: list[dict[str, Any]] = [
    {"name": "tp2", "tensor": 2, "pipeline": 1},
    {"name": "pp2", "tensor": 1, "pipeline": 2},
    {"name": "dp2", "tensor": 1, "pipeline": 1},
    {"name": "live_tp2_sp", "overrides": ["system.parallel.tensor=2", "system.parallel.sequence=true"]},
    {"name": "live_pp2_vpp2", "overrides": ["system.parallel.pipeline=2", "system.parallel.virtual_pipeline=2"]},
    {"name": "live_cp2", "overrides": ["system.parallel.context=2"]},
]


LEVELS_TASKS: list[dict[str, Any]] = [
    {"name": "tp2", "tensor": 2, "pipeline": 1},
    {"name": "pp2", "tensor": 1, "pipeline": 2},
    {
        "name": "live_pp2_vpp2",
        "overrides": [*DEEPSTACK, "system.parallel.pipeline=2", "system.parallel.virtual_pipeline=2"],
    },
]
"""With Qwen3-VL's deepstack, whose levels travel between stages."""


@pytest.fixture(scope="module")
def one_rank(tiny: Path) -> dict[str, Any]:
    with Generator.load(tiny / "run", with_targets=True) as generator:
        torch.set_num_threads(1)
        return results(generator)


@pytest.fixture(scope="module")
def folder(tiny: Path) -> Path:
    """Where every layout wrote down what it said."""
    run_worker(tiny, TASKS)
    return tiny


def run_worker(folder: Path, tasks: list[dict[str, Any]]) -> None:
    """One start serves all layouts, since importing takes longest."""
    worker = Path(__file__).with_name("drawing_worker.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [sys.executable, *launcher, str(worker), str(folder), json.dumps(tasks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("name", [task["name"] for task in TASKS])
@pytest.mark.parametrize("rank", ["", ".last"])
def test_layout_equals_one_rank(folder: Path, one_rank: dict[str, Any], name: str, rank: str) -> None:
    found = torch.load(folder / f"{name}{rank}.pt", weights_only=True)
    assert found["ids"] == one_rank["ids"]
    assert found["drawn"] == one_rank["drawn"]
    for kind in ("visual", "targets"):
        torch.testing.assert_close(found[kind], one_rank[kind], rtol=TOLERANCE, atol=TOLERANCE)


def test_deepstack_at_every_layout(tmp_path: Path) -> None:
    """Images that are read and images that are drawn, the latter without levels."""
    make_checkpoints(tmp_path, *DEEPSTACK)
    with Generator.load(tmp_path / "run", with_targets=True, base=tmp_path / "base") as generator:
        torch.set_num_threads(1)
        expected = results(generator)
    run_worker(tmp_path, LEVELS_TASKS)
    for task in LEVELS_TASKS:
        for rank in ("", ".last"):
            found = torch.load(tmp_path / f"{task['name']}{rank}.pt", weights_only=True)
            assert found["ids"] == expected["ids"], task["name"]
            for kind in ("visual", "targets"):
                torch.testing.assert_close(found[kind], expected[kind], rtol=LEVELS_TOLERANCE, atol=LEVELS_TOLERANCE)
