"""What the jobs of these tests run on and with."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL = (
    "train.global_batch_size=8",
    "data.sequence_length=512",
    "train.evaluation.suites=[]",
    "train.logging.every_steps=1",
    "train.logging.text_every_steps=1000000",
)
"""Settings with which a step of the Shapes recipe takes a tenth of a second."""
OPTIONS = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1")
"""What the 64 x 8 job is shrunk to: sbatch's options beat the script's lines."""
RECIPE = "configs/orion/shapes.yaml"
JOB = "slurm/pretrain_64node.sh"


@dataclass(frozen=True)
class Site:
    """A cluster, and a folder with data and base checkpoint."""

    cluster: Any
    repo: Path
    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def environ(self, **more: str) -> dict[str, str]:
        """Of the commands, and so of the jobs."""
        return {
            "RUNS": str(self.runs),
            "DATA": str(self.folder / "shapes"),
            # The environment of the tests, whatever others the repository's folder holds.
            "UNIMM_VENV": sys.prefix,
            "HEALTH_MEASURE": "--disk-mib 8 --all-reduce-mib 4",
            # Virtual GPUs have no driver, and cores that other nodes use as well give no steady numbers.
            "HEALTH_LIMITS": "--gpus 0 --min-disk 1 --min-of-median 0",
        } | more

    def submit(self, *arguments: str, recipe: str = RECIPE, options: tuple[str, ...] = (), **environ: str) -> str:
        """Submits the 64-node job, shrunk, from the repository's folder; returns its id."""
        output = f"--output={self.folder}/%j.out"
        command = ["sbatch", "--parsable", *OPTIONS, output, *options, JOB, recipe, *arguments]
        return self.cluster.run(*command, cwd=self.repo, environ=self.environ(**environ))

    def log(self, job_id: str) -> str:
        """What a job has written."""
        path = self.folder / f"{job_id}.out"
        return path.read_text(errors="replace") if path.exists() else "(no output)"

    def finished(self, job_id: str, timeout: float = 900) -> dict[str, str]:
        """What SLURM says of a job when it is over; the log is printed for those who read a failure."""
        try:
            return self.cluster.wait_for(job_id, timeout)
        finally:
            print(self.log(job_id))

    def events(self, run: str, stage: str, kind: str) -> list[dict[str, Any]]:
        """Events of one kind that rank 0 of a stage has written, in their order."""
        path = self.runs / run / stage / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for line in lines if (event := json.loads(line))["kind"] == kind]

    def metrics(self, run: str, stage: str) -> list[dict[str, Any]]:
        """The records of a stage, in the order in which they were written."""
        return [json.loads(line) for line in (self.runs / run / stage / "metrics.jsonl").read_text().splitlines()]
