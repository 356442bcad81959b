"""A real SLURM of virtual nodes on this machine, and what the jobs train on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from slurm_site import Site


@pytest.fixture(scope="session")
def slurm_cluster(repo: Path) -> ModuleType:
    """tools/slurm_cluster.py, with SLURM installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo / "tools"))
        import slurm_cluster  # pyright: ignore[reportMissingImports]
    if reason := slurm_cluster.why_not():
        pytest.skip(f"no SLURM here: {reason}")
    slurm_cluster.install()
    return slurm_cluster


@pytest.fixture(scope="session")
def cluster(slurm_cluster: ModuleType) -> Iterator[Any]:
    """Five nodes of one GPU each; jobs take two."""
    with slurm_cluster.SlurmCluster(nodes=5, cpus=8, gpus=1) as started:
        yield started


@pytest.fixture(scope="session")
def site(cluster: Any, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """With the Shapes world and the imported base model."""
    made = Site(cluster, repo, tmp_path_factory.mktemp("site"))
    base = str(made.runs / "quickstart" / "base")
    for command in (
        ["data", "shapes", "--to", str(made.folder / "shapes"), "--count", "400"],
        ["convert", "import", "--from", str(repo / "tools" / "base_models" / "shapes_vlm"), "--to", base],
    ):
        subprocess.run(
            [sys.executable, "-m", "megatron_unimm.cli", *command],
            cwd=repo,
            env=os.environ | made.environ(),
            check=True,
            capture_output=True,
            timeout=300,
        )
    return made
