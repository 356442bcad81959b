"""The tool that compares the four methods: budgets, what is run, and what is read of the runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare_methods
import pytest
import torch
from compare_methods import METHODS, planned
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.load import load_recipe
from megatron_unimm.train.state import checkpoint_folder


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


@pytest.mark.parametrize("name", METHODS)
def test_budgets_are_equal(name: str) -> None:
    """To half a step of each stage; stages have the recipe's proportions."""
    recipe = load_recipe(METHODS[name])
    method = planned(name, recipe, 100_000)
    halves = [compare_methods.batch_of(stage) / 2 for stage in recipe.stages.values()]
    assert method.samples == pytest.approx(100_000, abs=sum(halves))
    ratios = [method.steps[stage.name] / stage.train.steps for stage in recipe.stages.values()]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.05)
    assert min(planned(name, recipe, 1).steps.values()) == 1


def test_table_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Core-minutes of two ranks, each tensor once, scores of the suites; and the page keeps what stands around it."""
    asked: list[list[str]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        assert (env["FULL"], env["SUITES"], env["DATA"]) == ("1", "shapes shapes_qa", "somewhere")
        run_dir = tmp_path / "hieraquery"
        for number, stage in enumerate(("text_to_image", "reconstruction", "editing"), start=1):
            records = [{"step": 10, "step_seconds": 3.0 * number}, {"step": 20, "step_seconds": 3.0}]
            (run_dir / stage).mkdir(parents=True)
            (run_dir / stage / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
            state = {"mmdit.a": torch.zeros(1000, 500), "optimizer.b": torch.zeros(9000), stage: torch.zeros(10_000)}
            sharded = {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in state.items()}
            save(sharded, checkpoint_folder(run_dir, stage) / "step_00000020", {"kind": "training"})
        scores = {"overall": 0.9, "editing": 0.25, "editing/success": 0.5, "editing/untouched": 0.75}
        (run_dir / "shapes.json").write_text(json.dumps({"scores": scores}))
        (run_dir / "shapes_qa.json").write_text(json.dumps({"scores": {"accuracy": 0.8}}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.setenv("DATA", "somewhere")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{compare_methods.BEGIN}old\n{compare_methods.END}\nafter\n")
    options = ["--samples", "56000", "--method", "HieraQuery", "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *options])
    compare_methods.main()
    (command,) = asked
    assert command[:3] == ["bash", "launchers/shapes.sh", METHODS["HieraQuery"]]
    assert [word.split("=")[0] for word in command[3:]] == [
        f"stages.{stage}.train.steps" for stage in ("text_to_image", "reconstruction", "editing")
    ]
    minutes = 2 * 10 * ((3 + 6 + 9) + 3 * 3) / 60
    line = f"| HieraQuery | 0.900 | 0.250 | 0.500 | 0.750 | 0.800 | 0.53 M | 56000 | {minutes:.0f} |"
    text = page.read_text()
    assert line in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "HieraQuery" in capsys.readouterr().out
