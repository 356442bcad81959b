"""Under torchrun: ranks that die are started again and go on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from job import Job, differences, step_name

MAIN = """
import sys
from functools import partial
from pathlib import Path
import megatron_unimm.parallel
import injected
from megatron_unimm.cli.main import run
import os
rank, run_dir = int(os.environ["RANK"]), Path(sys.argv[1])
(run_dir / f"pid_{rank}").write_text(str(os.getpid()))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    injected.kill_at(rank, run_dir, point="computes", step=4, by=1, victims=(1,))
sys.exit(run(sys.argv[2:]))
"""
"""A rank of the command line; in the first attempt rank 1 is killed in its fifth step."""


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_again(job: Job, repo: Path, tmp_path: Path) -> None:
    """One command, one SIGKILL: it ends with 0, from where the last checkpoint was, and as if nothing had happened."""
    whole = job.of(tmp_path / "whole")
    whole.finish(2)
    job.run_dir.mkdir()
    script = tmp_path / "rank.py"
    script.write_text(MAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", str(script), str(job.run_dir), "train", str(job.recipe), "--stage", job.stage]
    here = Path(__file__).parent
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(repo), str(here)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--run-dir", str(job.run_dir), *job.settings, "train.checkpoint.asynchronous=false"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "resuming at step 4" in done.stderr
    assert [event.attempt.rsplit(".")[-1] for event in job.events("launch")] == ["0", "1"]
    assert [event.fields["step"] for event in job.events("resume")] == [4]
    assert not differences(whole.checkpoints / step_name(6), job.checkpoints / step_name(6))
