"""Scoring checkpoints from the command line, and a model that trains."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import V, picture, stage_config

from megatron_unimm.cli import main
from megatron_unimm.cli.evaluate import evaluate as command
from megatron_unimm.config.recipe import Recipe
from megatron_unimm.data.shapes import write_shapes
from megatron_unimm.errors import ConfigError
from megatron_unimm.evaluate.api import evaluate
from megatron_unimm.evaluate.suite import SHEET_COLUMNS
from megatron_unimm.evaluate.suites import SUITES, suite_of
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.paint import Painter, PaintRequest
from megatron_unimm.generate.png import ENLARGED_SIDE, read_settings
from megatron_unimm.train.callbacks.evaluator import Evaluator

WITHOUT_PIXELS = ("shapes_qa", "shapes_retrieval")
"""Suites that need no diffusion decoder."""


def test_help_names_the_suites() -> None:
    listed = command.epilog.split("Suites:")[1].split("\n")
    assert [line.split() for line in listed if line] == [[s.name, *s.about.split()] for s in SUITES.values()]


def test_an_unknown_suite_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean shapes_qa"):
        suite_of("shape_qa", "suite")


@pytest.mark.parametrize("suite", WITHOUT_PIXELS)
def test_scores_a_checkpoint(tiny: Path, tmp_path: Path, suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "out" / "result.json"
    arguments = ["evaluate", "--model", str(tiny / "run"), "--suite", suite, "--to", str(to), "--num-samples", "6"]
    assert main.run(arguments) == 0
    result = json.loads(to.read_text())
    assert result["suite"] == suite
    assert result["step"] == 1
    assert result["checkpoint"].endswith("step_00000001")
    assert 0 <= result["scores"]["accuracy"] <= 0.2
    assert result["seconds"] > 0
    assert "accuracy" in capsys.readouterr().out


def test_scores_pictures(drawing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Suite shapes from end to end: drawn, reconstructed and edited pictures, answers, a sheet of pictures. Weights are
    random, so only the scorer itself is right."""
    to = tmp_path / "shapes.json"
    words = ["evaluate", "--suite", "shapes", "--num-samples", "1", "--to", str(to)]
    assert main.run([*words, "--model", str(drawing / "run")]) == 0
    result = json.loads(to.read_text())
    scores = result["scores"]
    assert next(iter(scores)) == "overall"
    assert result["checkpoint"] == str(drawing / "run/sft/checkpoints/step_00000001")
    assert scores["overall_scorer"] == 1
    assert max(scores["overall"], scores["overall_decoder"], scores["editing"]) <= 0.2
    assert 3 < scores["reconstruction_psnr"] < 15
    assert (result["counts"]["prompts"], result["counts"]["edits"]) == (6, 5)
    assert "overall_scorer" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "shapes.png"))
    # Four rows of six pictures, and two of edits in pairs.
    assert sheet.shape[0] > 6 * ENLARGED_SIDE
    assert sheet.shape[1] > SHEET_COLUMNS * ENLARGED_SIDE
    assert read_settings(tmp_path / "shapes.png")["suite"] == "shapes"


def test_a_decoder_that_is_given(drawing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It makes pictures of what another run's model generates; the folder of images remembers whose they are."""
    metadata = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    (tmp_path / "list.jsonl").write_text(json.dumps(metadata))
    files = ["--data", str(tmp_path / "list.jsonl"), "--to", str(tmp_path / "out.json"), "--num-samples", "2"]
    words = ["evaluate", "--suite", "geneval_images", "--model", str(drawing / "run/sft"), *files]
    assert main.run(words) == 2
    assert "give its checkpoint as --decoder" in capsys.readouterr().err
    assert main.run([*words, "--decoder", str(drawing / "run/decoder")]) == 0
    image = tmp_path / "out/00000/samples/0001.png"
    settings = read_settings(image)
    assert settings["checkpoint"] == str(drawing / "run/sft/checkpoints/step_00000001")
    assert settings["decoder"] == str(drawing / "run/decoder/checkpoints/step_00000001")
    copied = shutil.copytree(drawing / "run/decoder/checkpoints/step_00000001", tmp_path / "other")
    capsys.readouterr()
    assert main.run([*words, "--decoder", str(copied)]) == 2
    assert f"was made by decoder {settings['decoder']}, not by {copied}" in capsys.readouterr().err


def test_a_suite_of_visual_tokens_has_nothing_painted(
    drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PaintRequest] = []
    monkeypatch.setattr(Painter, "paint", lambda self, requests, *_: asked.extend(requests) or [])
    for suite in WITHOUT_PIXELS:
        words = ["--model", str(drawing / "run"), "--suite", suite, "--to", str(tmp_path / "x.json")]
        assert main.run(["evaluate", *words, "--num-samples", "6"]) == 0
    assert not asked


def test_boxes_are_scored_as_the_language_model_s(drawing: Path, tmp_path: Path) -> None:
    """Not as those of the newest checkpoint of the run, which is the decoder's."""
    metadata = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    (tmp_path / "list.jsonl").write_text(json.dumps(metadata))
    box = {"class": "bench", "score": 0.9, "box": [1, 2, 30, 40]}
    (tmp_path / "boxes.json").write_text(json.dumps({"00000/samples/0000.png": [box]}))
    report = evaluate(
        drawing / "run",
        "geneval_images",
        tmp_path / "list.jsonl",
        tmp_path / "out.json",
        1,
        detections=tmp_path / "boxes.json",
    )
    assert report["checkpoint"] == str(drawing / "run/sft/checkpoints/step_00000001")
    assert report["scores"]["overall"] == 1


def test_targets_are_the_base_model_s(tiny: Path, generator: Generator) -> None:
    """The trained model and its base have other weights; the base's encoder made the targets."""
    mine = generator.target_features([picture(0)])[0]
    assert mine.shape == (V, generator.stage.model.backbone.hidden_size)
    generator.__exit__(None, None, None)
    sizes = generator.stage.data.generation_size
    with Generator.load(tiny / "base") as base:
        base.stage.data.generation_size = sizes  # an imported model has no recipe
        torch.testing.assert_close(base.target_features([picture(0)])[0], mine)
    with Generator.load(tiny / "run") as student:
        assert not torch.allclose(student.target_features([picture(0)])[0], mine)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "BASE", "--suite", "shapes_retrieval"], "without a vision head"),
        (["--model", "BASE", "--suite", "nothing"], "no suite nothing"),
        (["--model", "RUN", "--suite", "shapes_retrieval", "--base", "nowhere"], "give its folder with --base"),
        (["--model", "EMPTY", "--suite", "shapes_qa"], "not a finished checkpoint"),
    ],
)
def test_errors_are_one_line(
    tiny: Path, tmp_path: Path, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"BASE": str(tiny / "base"), "RUN": str(tiny / "run"), "EMPTY": str(tmp_path)}
    words = [names.get(word, word) for word in arguments]
    assert main.run(["evaluate", *words, "--to", str(tmp_path / "x.json")]) == 2
    assert line in capsys.readouterr().err


def test_an_evaluation_of_nothing_known_is_refused_at_the_start(tiny: Path, tmp_path: Path) -> None:
    stage = stage_config(tiny / "base", "train.evaluation.suites=[shapes_qu]")
    with pytest.raises(ConfigError, match=r"train\.evaluation\.suites"):
        Evaluator(stage, tmp_path)


def test_scores_while_training(tiny: Path, tmp_path: Path) -> None:
    """Every 2 steps at the logging interval, and after the last step; training goes on as without it."""
    from megatron_unimm.train import run

    write_shapes(tmp_path / "data", count=60, seed=3)
    sources = [
        f"data.sources.{k}.path={tmp_path}/data/train/{k}.jsonl" for k in ("understanding", "text_to_image", "editing")
    ]
    common = [
        "train.steps=5",
        "stages.sft.train.global_batch_size=4",
        "train.logging.every_steps=1",
        "train.logging.tensorboard=false",
    ]
    suites = [
        "train.evaluation.suites=[shapes_qa, shapes_retrieval]",
        "train.evaluation.every_steps=2",
        "train.evaluation.num_samples=6",
        "train.evaluation.data=''",
    ]
    losses = {}
    for name, evaluation in (("with", suites), ("without", ["train.evaluation.suites=[]"])):
        stage = stage_config(tiny / "base", *sources, *common, *evaluation)
        stage.after = None
        folder = tmp_path / name / "sft"
        assert run.train_stage(Recipe(name="test", stages={stage.name: stage}), stage, tmp_path / name) == 0
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [record["losses"] for record in records]
        if name == "with":
            lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
            assert [(line["step"], line["suite"]) for line in lines] == [
                (s, n) for s in (2, 4, 5) for n in WITHOUT_PIXELS
            ]
            assert [r["step"] for r in records if "evaluation/shapes_qa/accuracy" in r["extra"]] == [2, 4]
    assert losses["with"] == losses["without"]
