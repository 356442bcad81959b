"""The tools that train the rows of an ablation: what they would run, that nothing is run twice, and what they say of
failures."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ablate_hieraquery
import ablate_mmcore
import ablate_orion
import ablate_spar
import ablation
import pytest
from ablate_mmcore import ABLATIONS, RECIPE, Budget
from ablation import Training, distinct
from PIL import Image

from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.load import load_recipe, select_stage
from megatron_unimm.config.methods import HieraQueryConfig, MMCoreDiffusionConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.convert import import_checkpoint
from megatron_unimm.data.shapes import write_shapes

BUDGET = Budget(vlm=12, diffusion=8, sft=3)


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def stages_of(training: Training) -> list[StageConfig]:
    recipe = load_recipe(training.recipe, training.overrides)
    return [select_stage(recipe, stage) for stage in training.stages]


def trainings_of(name: str) -> dict[str, Training]:
    """By label of the row."""
    return {row.label: row.training for row in ABLATIONS[name](BUDGET).rows}


# -- MMCORE's rows


@pytest.mark.parametrize("name", ABLATIONS)
def test_rows_are_recipes_of_one_budget(name: str) -> None:
    """Each stage starts from the one before, its VLM is built as that one's, and all rows have as many steps."""
    table = ABLATIONS[name](BUDGET)
    assert len({row.training for row in table.rows}) == len(table.rows)
    for row in table.rows:
        assert len(row.paper) == len(table.paper)
        chain = row.training.chain()
        stages = [stage for training in chain for stage in stages_of(training)]
        assert [stage.after for stage in stages] == [None, *(stage.name for stage in stages[:-1])]
        assert all(stage.queries == stages[-1].queries for stage in stages)
        steps = {"vlm": BUDGET.vlm, "vlm_sft": BUDGET.sft, "diffusion": BUDGET.diffusion}
        assert [stage.train.steps for stage in stages] == [steps[stage.name] for stage in stages]
        batches = {stage.name: stage.train.global_batch_size for stage in stages}
        assert batches["diffusion"] == 56
        assert ("batch x 5" in row.label) == (batches.get("vlm", 28) == 5 * 28)
        assert all(stage.system.cpu_threads == 1 for stage in stages)


def test_names_belong_to_one_run() -> None:
    """So that commands can share a folder of runs."""
    runs = distinct([row.training for build in ABLATIONS.values() for row in build(BUDGET).rows])
    assert len({run.name for run in runs}) == len(runs)
    assert len(runs) < sum(len(row.training.chain()) for build in ABLATIONS.values() for row in build(BUDGET).rows)


def test_what_trains_in_table_1() -> None:
    tables = {label: stages_of(run.chain()[0])[0] for label, run in trainings_of("table1").items()}
    trained = {label: {rule.pattern for rule in stage.train.trainable if rule.train} for label, stage in tables.items()}
    layers = {label: stage.queries.connector.num_layers for label, stage in tables.items() if stage.queries}
    new = {"query_tokens.*", "query_connector.*"}
    for label, number in (("frozen, connector of 2 layers", 2), ("frozen, 3 layers", 3), ("frozen, 6 layers", 6)):
        assert (trained[label], layers[label]) == (new, number)
    assert trained["LoRA"] == {*new, "backbone.*lora_*"}
    assert trained["full"] == trained["full, batch x 5"] == {"*"}


def test_settings_that_rows_differ_in() -> None:
    """Beside the row that is as the paper has it, one setting."""
    for name, label, changed in (
        ("earlier_latents", "visible", {"earlier_latents": True}),
        ("vit_features", "with ViT features", {"vit_features": True}),
        ("pathways", "words only", {"pathways": "text"}),
    ):
        runs = trainings_of(name)
        usual = next(run for run in runs.values() if run.name == "both")
        mine, theirs = stages_of(runs[label])[0], stages_of(usual)[0]
        assert mine == theirs.model_copy(update={"method": theirs.method.model_copy(update=changed)})
    constant, annealed = (stages_of(run)[0].method for run in trainings_of("dropout").values())
    assert isinstance(constant, MMCoreDiffusionConfig)
    assert isinstance(annealed, MMCoreDiffusionConfig)
    assert [constant.text_dropout.at(step) for step in (0, 3, 4, 100)] == [0.1] * 4
    assert [annealed.text_dropout.at(step) for step in (0, 4, 100)] == pytest.approx([0.4, 0.1, 0.1])


def test_without_alignment_queries_learn_from_the_diffusion_loss() -> None:
    off = trainings_of("alignment")["frozen VLM, diffusion loss only"]
    (stage,) = stages_of(off)
    rules = [(rule.pattern, rule.train) for rule in stage.train.trainable]
    assert rules[:3] == [("vlm.query_tokens.*", True), ("vlm.query_connector.*", True), ("vlm.*", False)]
    assert stage.after is None


def test_printed_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is run, nothing is made."""
    monkeypatch.setattr(sys, "argv", ["ablate_mmcore.py", "queries", "--print", "--run-dir", str(tmp_path / "runs")])
    ablate_mmcore.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["unimm", "train"]] * 8 + [["unimm", "evaluate"]] * 4
    assert not (tmp_path / "runs").exists()


# -- HieraQuery's and ORION's rows


@pytest.mark.parametrize("name", ablate_hieraquery.ABLATIONS)
def test_hieraquery_rows_differ_in_queries_and_alignment(name: str) -> None:
    """A sixteenth of the paper's queries, and beside the recipe nothing else."""
    table = ablate_hieraquery.ABLATIONS[name](8)
    assert len({row.training for row in table.rows}) == len(table.rows)
    usual = load_recipe("configs/hieraquery/shapes_ablations.yaml", ["train.steps=8"]).stages["text_to_image"]
    for row in table.rows:
        assert len(row.paper) == len(table.paper)
        (stage,) = stages_of(row.training)
        assert isinstance(stage.method, HieraQueryConfig)
        assert stage.hieraquery is not None
        total = stage.hieraquery.num_queries
        if "paper: queries" in table.paper:
            assert int(row.paper[table.paper.index("paper: queries")]) == 16 * total
        if name != "consistency":
            assert row.label == "and alignment" or str(total) in row.label
        shares = [float(share) for share in stage.scales.shares]
        assert shares[-1] == 1
        assert (len(shares) == 1) == row.label.startswith(("one scale", "1.0x"))
        assert (stage.method.alignment is not None) == (row.label == "and alignment")
        changed = {"hieraquery": usual.hieraquery, "method": usual.method}
        assert stage.model_copy(update=changed) == usual
    runs = distinct([row.training for build in ablate_hieraquery.ABLATIONS.values() for row in build(8).rows])
    assert len({run.name for run in runs}) == len(runs) == 12


def test_hieraquery_pictures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of two models, each prompt at all scales; nothing is run to print the commands."""
    asked = [
        "figure5a",
        "--prompt",
        "a cross",
        "--prompt",
        "two circles",
        "--print",
        "--run-dir",
        str(tmp_path / "runs"),
    ]
    monkeypatch.setattr(sys, "argv", ["ablate_hieraquery.py", *asked])
    ablate_hieraquery.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["unimm", "train"]] * 2 + [["unimm", "generate"]] * 4
    assert sum("--all-scales --prompt 'two circles'" in line for line in lines) == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ablate_spar.ABLATIONS)
def test_spar_rows_are_recipes_of_one_budget(name: str, tmp_path: Path) -> None:
    """What draws is built as the language model before it, in the space of a tokenizer that is trained before."""
    options = argparse.Namespace(
        run_dir=tmp_path, tokenizer_steps=5, alignment_steps=4, steps=3, every=2, curve_samples=1
    )
    table = ablate_spar.ABLATIONS[name](options)
    assert len({row.training for row in table.rows}) == len(table.rows)
    budget = {"tokenizer": 5, "alignment": 4, "joint": 3}
    for row in table.rows:
        chain = row.training.chain()
        stages = [stage for training in chain for stage in stages_of(training)]
        assert [stage.name for stage in stages] == list(budget)[: len(stages)]
        assert [stage.train.steps for stage in stages] == [budget[stage.name] for stage in stages]
        assert all(check_layout(stage, 1) == 1 for stage in stages)
        if len(stages) == 3:
            assert stages[1].routing == stages[2].routing
            assert Path(stages[2].tokenizer_checkpoint) == tmp_path / chain[0].name / "tokenizer"
    if name == "teacher":
        methods = [stages_of(row.training)[0].method for row in table.rows]
        assert [m.alignment.teacher if m.alignment else None for m in methods] == ["internal", "external", None]


def test_steps_to_a_score() -> None:
    """From where on it stays there."""
    points = [(10, 0.1), (20, 0.6), (30, 0.4), (40, 0.5), (50, 0.8)]
    assert ablate_spar.steps_to(points, 0.5) == 40
    assert ablate_spar.steps_to(points, 0.05) == 10
    assert ablate_spar.steps_to(points, 0.9) is None


def test_orion_rows_are_recipes() -> None:
    arguments = type("Arguments", (), {"warm_up_steps": 8, "steps": 5, "base": "somewhere"})()
    for variant in ablate_orion.VARIANTS:
        training = ablate_orion.training_of(variant, arguments)
        stages = stages_of(training)
        assert [stage.train.steps for stage in stages[:-1]] == ([8 * variant.warm_up_share] if len(stages) > 1 else [])
        assert stages[-1].train.steps == 5
        assert stages[-1].after == (None if len(stages) == 1 else "warm_up")
        assert stages[-1].method.vision_head.kind == variant.head
        assert (stages[-1].method.loss_weights.kl > 0) == variant.kl


# -- runs


class Unimm:
    """In the place of ``unimm``: notes what is asked for, and writes what training and evaluation would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.fails = False
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        assert settings["env"]["OMP_NUM_THREADS"] == "1"
        options = {name: value for name, value in pairwise(command) if name.startswith("--")}
        if command[3] == "train":
            folder = Path(options["--run-dir"]) / options["--stage"]
            self.asked.append((Path(options["--run-dir"]).name, options["--stage"]))
            if folder.name == "diffusion" and "stages.diffusion.after=null" not in command:
                after = next(word for word in command if word.startswith("stages.diffusion.after=")).split("=")[1]
                assert (folder.parent / after / "metrics.jsonl").exists(), "its VLM is not there"
            folder.mkdir()
            losses = {"vis": 0.5, "flow": 0.25, "llm": 1.0}
            (folder / "metrics.jsonl").write_text(json.dumps({"losses": losses}) + "\n")
        else:
            self.asked.append((Path(options["--model"]).parent.name, options["--suite"]))
            Path(options["--to"]).write_text(json.dumps({"scores": {"overall": 0.5}}))
        return subprocess.CompletedProcess(command, 2 if self.fails else 0)


@pytest.fixture
def unimm(monkeypatch: pytest.MonkeyPatch) -> Unimm:
    return Unimm(monkeypatch)


def test_rows_share_a_vlm_and_nothing_is_done_twice(
    unimm: Unimm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ablate_mmcore.py", "table1", "--run-dir", str(tmp_path), "--jobs", "3"])
    ablate_mmcore.main()
    assert len(unimm.asked) == len(set(unimm.asked)) == 7 + 7 + 7
    assert ("vlm_large_sft", "vlm_sft") in unimm.asked
    table = capsys.readouterr().out
    assert "0.8585" in table
    assert "0.500" in table
    before = len(unimm.asked)
    ablate_mmcore.main()
    assert len(unimm.asked) == before
    report = json.loads((tmp_path / "table1.json").read_text())
    assert report["rows"]["LoRA"] == {"run": "latents_lora", "flow": 0.25, "vis": 0.5, "shapes/overall": 0.5}
    monkeypatch.setattr(sys, "argv", ["ablate_mmcore.py", "alignment", "--run-dir", str(tmp_path)])
    ablate_mmcore.main()
    assert unimm.asked[before:] == [("latents_unaligned", "diffusion"), ("latents_unaligned", "shapes")]


def test_other_settings_are_not_taken_for_the_same(unimm: Unimm, tmp_path: Path) -> None:
    training = Training("one", RECIPE, ("vlm",), ("train.steps=2",))
    ablation.train_all([training], tmp_path, jobs=1)
    with pytest.raises(SystemExit, match=r"one/training.json: was trained with other settings"):
        ablation.train_all([replace(training, overrides=("train.steps=3",))], tmp_path, jobs=1)


def test_a_failure_says_where_to_look(unimm: Unimm, tmp_path: Path) -> None:
    """A run that failed is done again."""
    training = Training("one", RECIPE, ("vlm",), ())
    unimm.fails = True
    with pytest.raises(SystemExit, match=r"one/train.log: a command ended with exit code 2"):
        ablation.train_all([replace(training, name="two", after=training)], tmp_path, jobs=2)
    assert unimm.asked == [("one", "vlm")]
    (tmp_path / "one" / "vlm" / "metrics.jsonl").unlink()
    (tmp_path / "one" / "vlm").rmdir()
    unimm.fails = False
    ablation.train_all([training], tmp_path, jobs=1)
    assert unimm.asked == [("one", "vlm")] * 2


# -- for real


@pytest.mark.slow
def test_ablations_from_base_models_to_tables(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step of each stage, and a few pictures. Of MMCORE features of the vision encoder are trained, saved, loaded,
    drawn with; of HieraQuery scales are compared, and their pictures laid on a sheet."""
    kinds = ("understanding", "text_to_image", "editing", "interleaved")
    write_shapes(tmp_path / "data", count=400, seed=1, mix=dict.fromkeys(kinds, 0.25))
    for method in ("mmcore", "hieraquery"):
        for model, name in (("shapes_vlm", "base"), ("shapes_mmdit", "generator_base")):
            import_checkpoint(repo / "tools/base_models" / model, tmp_path / "runs" / method / name)
    for name, value in (("DATA", "data"), ("RUNS", "runs"), ("PYTHONPATH", "")):
        monkeypatch.setenv(name, str(tmp_path / value) if value else str(repo))
    budget = ["--vlm-steps", "1", "--diffusion-steps", "1", "--num-samples", "1"]
    monkeypatch.setattr(sys, "argv", ["ablate_mmcore.py", "vit_features", *budget])
    ablate_mmcore.main()
    table = capsys.readouterr().out
    assert "VAE latents alone" in table
    assert "30.62" in table
    runs = tmp_path / "runs" / "mmcore" / "ablations"
    rows = json.loads((runs / "vit_features.json").read_text())["rows"]
    assert {row["run"] for row in rows.values()} == {"both", "vit_features"}
    assert all(0 < row["flow"] < 2 for row in rows.values())
    assert all(0 <= row["shapes/overall"] <= 1 for row in rows.values())
    for name in ("consistency", "figure5a"):
        monkeypatch.setattr(sys, "argv", ["ablate_hieraquery.py", name, "--steps", "1", "--num-samples", "1"])
        ablate_hieraquery.main()
    assert "notably" in capsys.readouterr().out  # the cell is narrow
    runs = tmp_path / "runs" / "hieraquery" / "ablations"
    rows = json.loads((runs / "consistency.json").read_text())["rows"]
    assert {row["run"] for row in rows.values()} == {"scales_1_2_4", "aligned"}
    assert all(-1 <= row["shapes_scales/agreement"] <= 1 for row in rows.values())
    # Two rows of pictures of 16, 32 and 64 pixels.
    files = {path.name: Image.open(path).size for path in (runs / "aligned").glob("prompt_0*.png")}
    assert files == {"prompt_0.png": (64, 64), "prompt_0_16x16.png": (16, 16), "prompt_0_32x32.png": (32, 32)}
    assert (runs / "figure5a.png").exists()
