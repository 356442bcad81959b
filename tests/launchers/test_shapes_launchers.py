"""The launchers of the Shapes world with commands in place of trainings: what they run, in which order, and what they
summarise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = {
    # Trainings are noted; tools that read recipes, and one-liners, are real.
    "python": """all="$*"
        case "$all" in
        tools/shapes_plan.py*|-c*) exec {python} "$@" ;;
        tools/*) echo "$all" >>{folder}/calls ;;
        *torchrun*"cli data cache"*) echo "${{all##*megatron_unimm.cli }}" >>{folder}/calls ;;
        *torchrun*) echo "train ${{all##*megatron_unimm.cli train }}" >>{folder}/calls ;;
        esac""",
    "unimm": """echo "$*" >>{folder}/calls
        case "$1 $2" in
        "data shapes") mkdir -p "$4/eval" "$4/train"; touch "$4/eval/retrieval.jsonl"
            for kind in understanding text_to_image editing ${{8:+interleaved}}; do
                touch "$4/train/$kind.jsonl"
            done ;;
        "convert import") mkdir -p "$6"; touch "$6/COMMITTED" ;;
        esac""",
    "nvidia-smi": """seq "${{GPUS:-0}}" """,
}
MIX = "--mix understanding=0.25,text_to_image=0.25,editing=0.3,interleaved=0.2"


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A folder with these programs, where they note their calls."""
    for name, script in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/usr/bin/env bash\n" + script.format(python=sys.executable, folder=tmp_path) + "\n")
        program.chmod(0o755)
    return tmp_path


def launch(
    repo: Path, folder: Path, command: str, **environ: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What it printed, and what it called, with folders by their last names."""
    settings = {"UNIMM_ACTIVE_ENV": "1", "PATH": f"{folder}/bin:{os.environ['PATH']}", "RUNS": f"{folder}/runs"}
    settings |= {"DATA": f"{folder}/data"} | environ
    done = subprocess.run(
        ["bash", "-c", command], cwd=repo, env=os.environ | settings, capture_output=True, text=True, timeout=120
    )
    calls = folder / "calls"
    lines = calls.read_text().replace(f"{folder}/", "").splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return done, lines


def test_orions_quickstart(repo: Path, fakes: Path) -> None:
    """Two ranks in layouts of their own, short stages, scores, the export, the summary last."""
    done, calls = launch(repo, fakes, "launchers/quickstart.sh train.seed=3")
    assert done.returncode == 0, done.stderr
    run = "runs/quickstart"
    train = f"train configs/orion/shapes.yaml --run-dir {run} --stage"
    expected = [
        "data shapes --to data --count 12000",
        f"convert import --from tools/base_models/shapes_vlm --to {run}/base",
        f"convert import --from tools/base_models/shapes_mmdit --to {run}/generator_base",
        f"{train} warm_up train.steps=50 system.parallel.tensor=2 system.parallel.sequence=true train.seed=3",
        f"{train} pretrain train.steps=600 data.sequence_length=2304 train.seed=3",
        f"{train} sft train.steps=100 data.sequence_length=2304 train.seed=3",
        f"{train} decoder train.steps=350 train.seed=3",
        f"generate --model {run} --prompt=a red circle left of a blue square",
        f"evaluate --model {run} --suite shapes --data data/eval --to {run}/shapes.json",
        f"convert export --from {run}/sft --to {run}/exported",
        f"tools/compare_with_transformers.py {run} {run}/exported",
        f"tools/summarize_run.py {run}",
    ]
    drawing = expected.index(expected[7])
    assert calls[drawing].startswith(expected[drawing])
    assert calls[:drawing] + calls[drawing + 1 :] == expected[:drawing] + expected[drawing + 1 :]

    done, calls = launch(repo, fakes, "launchers/quickstart.sh", FULL="1", GPUS="1")
    assert done.returncode == 0, done.stderr
    # What is there stays, the recipe has its own lengths, and one GPU has one rank.
    assert calls[:4] == [f"{train} {stage}" for stage in ("warm_up", "pretrain", "sft", "decoder")]
    assert "Stage sft on 1 ranks" in done.stdout


def test_mmcore_in_the_shapes_world(repo: Path, fakes: Path) -> None:
    """All of the recipe's stages for a quarter of their steps, with conversations of several pictures."""
    command = "launchers/shapes.sh configs/mmcore/shapes.yaml --resume never stages.policy.train.steps=9"
    done, calls = launch(repo, fakes, command)
    assert done.returncode == 0, done.stderr
    run, own = "runs/mmcore", "--resume never stages.policy.train.steps=9"
    assert calls[:3] == [
        f"data shapes --to data --count 12000 {MIX}",
        f"convert import --from tools/base_models/shapes_vlm --to {run}/base",
        f"convert import --from tools/base_models/shapes_mmdit --to {run}/generator_base",
    ]
    cached = f"data.condition_cache={run}/cache/conditions data.latent_cache={run}/cache/latents "
    cache = f"data cache configs/mmcore/shapes.yaml stages.policy.train.steps=9 --stage diffusion --to {run}/cache"
    vlm, *drawing = [
        f"train configs/mmcore/shapes.yaml --run-dir {run} --stage {stage} {its}train.steps={steps} {own}"
        for stage, its, steps in (
            ("vlm", "", 625),
            ("diffusion", cached, 750),
            ("diffusion_sft", cached, 150),
            ("policy", "", 3),
        )
    ]
    # Nothing is written here, so that both stages ask for it.
    assert calls[3:9] == [vlm, f"{cache} --run-dir {run}", drawing[0], calls[6], *drawing[1:]]
    suites = ("shapes", "shapes_qa", "shapes_sessions")
    scored = [f"evaluate --model {run} --suite {each} --data data/eval --to {run}/{each}.json" for each in suites]
    assert calls[10:] == [*scored, f"tools/summarize_run.py {run}"]

    _, calls = launch(repo, fakes, "launchers/shapes.sh configs/mmcore/shapes.yaml", FULL="1", SUITES="shapes_qa")
    assert calls[0] == f"train configs/mmcore/shapes.yaml --run-dir {run} --stage vlm"
    assert calls[7:] == [scored[1], f"tools/summarize_run.py {run}"]


def test_what_cannot_be_trained_says_why(repo: Path, fakes: Path) -> None:
    for command, said in (
        ("launchers/shapes.sh", "error: recipe: none given"),
        ("launchers/shapes.sh configs/mmcore/shapes.yaml train.stepz=5", "did you mean steps?"),
        ("launchers/shapes.sh configs/orion/recipe.yaml", "error: "),
    ):
        done, calls = launch(repo, fakes, command)
        assert (done.returncode, calls) == (2, []), command
        assert said in done.stderr
    (fakes / "data/eval").mkdir(parents=True)
    (fakes / "data/eval/retrieval.jsonl").touch()
    done, calls = launch(repo, fakes, "launchers/shapes.sh configs/mmcore/shapes.yaml")
    assert (done.returncode, calls) == (2, [])
    assert "data: has no train/editing.jsonl, which configs/mmcore/shapes.yaml reads" in done.stderr


def test_summary_of_a_run(repo: Path, tmp_path: Path) -> None:
    """Stages in the order in which they began; losses, rewards, scores before and after, suites that are there."""

    def record(step: int, loss: float, extra: dict[str, float]) -> dict:
        speed = {"step_seconds": 2.0, "tokens_per_second": 100.0 * step}
        return {"step": step, "losses": {"flow": loss}, "skipped_steps": 0, "faults": {}, "extra": extra, **speed}

    def write(path: str, *lines: dict) -> None:
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    for number, stage in enumerate(("vlm", "policy")):
        extra = [{"reward/total": value} if stage == "policy" else {} for value in (0.25, 0.75)]
        write(f"{stage}/metrics.jsonl", record(1, 2.0, extra[0]), record(3, 0.5, extra[1]))
        write(f"{stage}/config.yaml", {})
        os.utime(tmp_path / stage / "config.yaml", (number, number))
    scored = [{"suite": "shapes_qa", "scores": {"accuracy": value}} for value in (0.5, 0.7)]
    write("vlm/evaluation.jsonl", *scored)
    write("shapes_sessions.json", {"scores": {"with_history": 0.4, "with_history/copied": 0.1}})
    command = [sys.executable, "tools/summarize_run.py", str(tmp_path)]
    shown = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True, timeout=120).stdout
    found = json.loads((tmp_path / "summary.json").read_text())
    assert list(found["stages"]) == ["vlm", "policy"]
    assert found["stages"]["policy"]["losses"] == {
        "flow": {"first": 2.0, "last": 0.5},
        "reward": {"first": 0.25, "last": 0.75},
    }
    assert found["stages"]["vlm"]["tokens_per_second"] == 200.0
    assert found["scores"] == {"question_answering": {"before": 0.5, "after": 0.7}}
    assert found["shapes_sessions"]["scores"]["with_history"] == 0.4
    assert "shapes" not in found
    for line in ("with history", "0.400", "question answering", "reward"):
        assert line in shown
    assert "copied" not in shown
