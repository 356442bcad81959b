"""``slurm/`` on a real SLURM: the 64-node job, shrunk by sbatch's options alone, and what it survives.

    pytest -m slow tests/slurm -s      about five minutes on two cores

Nodes are n1 to n5; SLURM hands out the first that are free.
"""

import itertools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from slurm_site import JOB, OPTIONS, RECIPE, SMALL, Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STAGES = ("warm_up", "pretrain", "sft")
STEPS = 12


def wait_until(condition: Callable[[], bool], timeout: float) -> None:
    """Poll; a test that waits in vain fails here."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def chain(site: Site) -> dict[str, dict[str, str]]:
    """What SLURM says of the three jobs that submit_recipe.sh made, by stage."""
    output = site.cluster.run(
        "bash",
        "slurm/submit_recipe.sh",
        RECIPE,
        *SMALL,
        f"train.steps={STEPS}",
        "--",
        *OPTIONS,
        "--time=20",
        f"--output={site.folder}/%j.out",
        cwd=site.repo,
        environ=site.environ(STAGES=" ".join(STAGES)),
    )
    jobs = {stage: job_id for job_id, stage in (line.split() for line in output.splitlines())}
    assert tuple(jobs) == STAGES
    return {stage: site.finished(job_id) for stage, job_id in jobs.items()}


def test_submit_recipe_trains_the_stages_in_their_order(site: Site, chain: dict[str, dict[str, str]]) -> None:
    for stage in STAGES:
        assert chain[stage]["JobState"] == "COMPLETED"
        assert chain[stage]["NumNodes"] == "2"
        (end,) = site.events("shapes", stage, "end")
        assert (end["code"], end["step"]) == (0, STEPS)
    for before, after in itertools.pairwise(STAGES):
        assert chain[before]["EndTime"] <= chain[after]["StartTime"]  # ISO dates
        (start,) = site.events("shapes", after, "start")
        last = site.runs / "shapes" / before / "checkpoints" / f"step_{STEPS:08d}"
        assert (start["step"], start["origin"]) == (0, str(last))


def test_two_nodes_are_two_ranks_with_a_log_each(site: Site, chain: dict[str, dict[str, str]]) -> None:
    job_id = chain["warm_up"]["JobId"]
    (start,) = site.events("shapes", "warm_up", "start")
    assert start["world_size"] == 2
    assert start["attempt"] == f"slurm-{job_id}.0.0"
    folder = site.runs / "shapes" / "logs" / "warm_up" / job_id / "start.0.0"
    assert sorted(path.name for path in folder.iterdir()) == [
        "node_0.code",
        "node_1.code",
        "rank_00000.log",
        "rank_00001.log",
    ]
    assert f"step {STEPS}/{STEPS}" in (folder / "rank_00000.log").read_text()
    # The job's own log has what rank 0 says, the nodes that were checked, and a page on the run at its end.
    log = site.log(job_id)
    for line in (rf"step {STEPS}/{STEPS}", "^n1: ok .* to n2 ", "^n2: ok .* to n1 ", r"^warm_up +done"):
        assert re.search(line, log, re.MULTILINE), line


def test_export_makes_a_hugging_face_folder_of_the_last_stage(site: Site, chain: dict[str, dict[str, str]]) -> None:
    exported = site.folder / "exported"
    options = ("--cpus-per-task=1", "--mem=1G", f"--output={site.folder}/%j.out")
    arguments = ("slurm/export.sh", str(site.runs / "shapes" / "sft"), str(exported))
    command = ("sbatch", "--parsable", *options, *arguments)
    job_id = site.cluster.run(*command, cwd=site.repo, environ=site.environ())
    assert site.finished(job_id)["JobState"] == "COMPLETED"
    assert (exported / "model.safetensors").exists()
    assert json.loads((exported / "config.json").read_text())["model_type"] == "qwen2_5_vl"


def test_the_time_limit_saves_requeues_and_resumes(site: Site) -> None:
    """SLURM's own signal, a minute before a limit of two.

    No machine is so fast that it ends the stage before; when it has stopped, the stage is made short.
    """
    recipe = site.folder / "limit.yaml"

    def write(steps: int) -> None:
        base = site.repo / RECIPE
        recipe.write_text(f"base: {base}\nstages: {{warm_up: {{train: {{steps: {steps}}}}}}}\n")

    write(1_000_000)
    job_id = site.submit(
        *("--stage", "warm_up", "--run-dir", str(site.runs / "limit"), *SMALL, "train.checkpoint.every_steps=1000000"),
        recipe=str(recipe),
        options=("--time=2", "--signal=B:USR1@60"),
        HEALTH="0",
    )
    wait_until(lambda: bool(site.events("limit", "warm_up", "end")), 600)
    steps = site.events("limit", "warm_up", "end")[0]["step"] + 20
    write(steps)
    job = site.finished(job_id)
    assert job["JobState"] == "COMPLETED"
    starts, ends = site.events("limit", "warm_up", "start"), site.events("limit", "warm_up", "end")
    # One, or more where the machine needs a minute to start Python.
    requeues = int(job["Restarts"])
    assert requeues >= 1
    assert [end["code"] for end in ends] == [75] * requeues + [0]
    assert [start["attempt"] for start in starts] == [f"slurm-{job_id}.{n}.0" for n in range(requeues + 1)]
    # Each goes on where the one before has stopped: every step was taken once, and the last was the last.
    assert [start["step"] for start in starts] == [0, *(end["step"] for end in ends[:-1])]
    assert [record["step"] for record in site.metrics("limit", "warm_up")] == list(range(1, steps + 1))


def test_a_killed_node_is_survived(site: Site) -> None:
    """A node loses its power after the second checkpoint: SLURM notices, and the job goes on from there without it."""
    every, steps = 20, 200
    job_id = site.submit(
        *("--stage", "warm_up", "--run-dir", str(site.runs / "power")),
        *(*SMALL, f"train.steps={steps}", f"train.checkpoint.every_steps={every}"),
        options=("--time=20",),
        HEALTH="0",
    )
    wait_until(lambda: len(site.events("power", "warm_up", "saved")) >= 2, 600)
    assert site.cluster.hostnames(site.cluster.job(job_id)["NodeList"]) == ["n1", "n2"]
    site.cluster.kill_node("n2")
    try:
        job = site.finished(job_id)
    finally:
        site.cluster.start_node("n2")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert "n2" not in site.cluster.hostnames(job["NodeList"])
    first, second = site.events("power", "warm_up", "start")
    saved = [event["step"] for event in site.events("power", "warm_up", "saved") if event["time"] < second["time"]]
    assert (first["step"], second["step"]) == (0, saved[-1])
    assert saved[-1] >= 2 * every
    assert [end["step"] for end in site.events("power", "warm_up", "end") if end["code"] == 0] == [steps]


def test_a_bad_node_is_named_and_left_out_and_an_error_of_the_user_ends_the_job(site: Site) -> None:
    """The job's first start finds n1 bad; its second, on other nodes, a setting that does not exist."""
    check = site.folder / "check.sh"
    check.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" != n1 ]\n')
    check.chmod(0o755)
    job_id = site.submit(
        *("--stage", "warm_up", "--run-dir", str(site.runs / "bad_node"), *SMALL, "train.stepz=5"),
        options=("--time=20",),
        HEALTH_COMMAND=str(check),
    )
    job = site.finished(job_id)
    log = site.log(job_id)
    assert f"n1: BAD  {check} failed there" in log
    assert job["ExcNodeList"] == "n1"
    assert "n1" not in site.cluster.hostnames(job["NodeList"])
    assert "unknown key on the command line, did you mean steps?" in log
    # Code 2 is not for a machine to mend: no further requeue.
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "1")


def test_a_crash_loop_ends(site: Site) -> None:
    """Ranks that die at once: twice on the same nodes, twice after a requeue, then a person is told."""
    python = site.folder / "crash" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    job_id = site.submit(
        *("--stage", "warm_up", "--run-dir", str(site.runs / "loop")),
        options=("--time=20",),
        HEALTH="0",
        UNIMM_VENV=str(python.parent.parent),
    )
    job = site.finished(job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "1:0", "1")
    assert "4 starts from step 0 ended without a new checkpoint" in site.log(job_id)
    history = site.runs / "loop" / "logs" / "warm_up" / job_id / "history"
    assert history.read_text().splitlines() == ["start 0 0 0", "start 0 1 0", "start 1 0 0", "start 1 1 0"]


def test_slurm_accepts_the_job_at_full_size(slurm_cluster: ModuleType, repo: Path) -> None:
    """All lines of the header as they are, on 64 nodes of 8 GPUs and 96 cores; 63 nodes are refused."""
    with slurm_cluster.SlurmCluster(nodes=64, cpus=96, gpus=8) as large:
        accepted = large.try_run("sbatch", "--test-only", JOB, cwd=repo)
        assert accepted.returncode == 0, accepted.stderr
        assert re.search(r"using 6144 processors on nodes n\[1-64\]", accepted.stderr), accepted.stderr
        refused = large.try_run("sbatch", "--test-only", "--nodes=65", JOB, cwd=repo)
        assert refused.returncode != 0
