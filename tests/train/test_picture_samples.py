"""Pictures in TensorBoard: drawn while a decoder trains, and through a decoder while a language model trains."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[1] / "generate"))

from tiny_checkpoint import stage_config
from tiny_decoder import SQUARE, decoder_stage, make_all

from megatron_unimm.checkpoint.manifest import find_checkpoint
from megatron_unimm.config.data import SourceConfig
from megatron_unimm.config.recipe import Recipe, StageConfig
from megatron_unimm.data.images import decode
from megatron_unimm.data.sample import Turn
from megatron_unimm.data.shapes import write_shapes
from megatron_unimm.data.sources.opening import open_sources
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.paint import Painter, PaintRequest
from megatron_unimm.generate.png import picture_grid
from megatron_unimm.generate.sampling import DecodeSettings
from megatron_unimm.train import run
from megatron_unimm.train.callbacks.picture_samples import PictureSamples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of tests/generate, and data."""
    made = tmp_path_factory.mktemp("pictures")
    write_shapes(made / "data", count=60, seed=3)
    make_all(made)
    return made


def settings(folder: Path, stage: str, *logging: str) -> list[str]:
    kinds = ("understanding", "text_to_image", "editing")
    return [
        *(f"data.sources.{kind}.path={folder}/data/train/{kind}.jsonl" for kind in kinds),
        f"stages.{stage}.train.steps=3",
        "train.evaluation.suites=[]",
        "train.logging.every_steps=1",
        *(f"stages.{stage}.train.logging.{setting}" for setting in logging),
    ]


def images(folder: Path) -> dict[int, np.ndarray]:
    """What TensorBoard shows as ``pictures``, by step."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    if "pictures" not in events.Tags()["images"]:
        return {}
    return {e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in events.Images("pictures")}


def train(stage: StageConfig, to: Path) -> list[list[float]]:
    """The losses of three steps."""
    stage.after = None
    assert run.train_stage(Recipe(name="test", stages={stage.name: stage}), stage, to, "never") == 0
    lines = (to / stage.name / "metrics.jsonl").read_text().splitlines()
    return [list(json.loads(line)["losses"].values()) for line in lines]


def small_decoder(folder: Path, *logging: str) -> StageConfig:
    batch = "stages.decoder.train.global_batch_rows=1"
    return decoder_stage(
        folder, *settings(folder, "decoder", *logging), "stages.decoder.data.sequence_length=256", batch
    )


def test_a_decoder_draws_pictures_of_its_sources_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second step and at the end, true pictures beside drawn ones; training goes on as without it."""
    asked: list[list[PaintRequest]] = []
    paint = Painter.paint

    def noted(self: Painter, requests: list[PaintRequest]) -> list[np.ndarray]:
        asked.append(requests)
        return paint(self, requests)

    monkeypatch.setattr(Painter, "paint", noted)
    with_ = train(small_decoder(folder, "pictures_every_steps=2", "num_pictures=3"), tmp_path / "with")
    without = train(small_decoder(folder, "pictures_every_steps=null"), tmp_path / "without")
    assert with_ == without
    assert images(tmp_path / "without/decoder") == {}
    shown = images(tmp_path / "with/decoder")
    assert list(shown) == [2, 3]
    blank = picture_grid([np.zeros((64, 64, 3), np.uint8)] * 6, ["true", "drawn"] * 3, columns=8)
    assert all(grid.shape == blank.shape for grid in shown.values())
    assert not np.array_equal(shown[2], shown[3]), "the model has moved on, the true pictures have not"
    assert np.array_equal(shown[2][:, : blank.shape[1] // 6], shown[3][:, : blank.shape[1] // 6])
    # Of the two sources in turn; an edit's condition has the image that is edited.
    assert len(asked) == 2
    assert all(one is other for one, other in zip(*asked, strict=True))
    assert [len(request.sources) for request in asked[0]] == [0, 1, 0]
    assert [request.number for request in asked[0]] == [0, 1, 2]
    assert all(request.visual_tokens.shape == (16, 64) for request in asked[0])
    assert all(np.array_equal(request.grid, SQUARE) for request in asked[0])


def test_what_is_drawn_again_is_what_generate_would_draw(folder: Path, tmp_path: Path) -> None:
    """After the last step, with the weights themselves: their average is not asked for while they train."""
    stage = small_decoder(folder, "pictures_every_steps=3", "num_pictures=2")
    stage.train.ema_decay = None
    train(stage, tmp_path)
    grid = images(tmp_path / "decoder")[3]
    data = folder / "data/train"
    with Generator.load(folder / "run/sft", decoder=tmp_path / "decoder", with_targets=True) as generator:
        torch.set_num_threads(1)
        first = first_picture(data)
        again = generator.reconstruct([first])[0]
    expected = picture_grid([first, again] * 2, ["true", "drawn"] * 2, columns=8)
    half = expected.shape[1] // 2
    assert grid.shape == expected.shape
    assert np.abs(grid[:, : half - 8].astype(int) - expected[:, : half - 8]).max() <= 1


def first_picture(data: Path) -> np.ndarray:
    """Of the source text_to_image, decoded by Pillow."""
    config = SourceConfig(path=str(data / "text_to_image.jsonl"), kind="text_to_image")
    sample = open_sources({"text_to_image": config}, None)["text_to_image"][0]
    return decode(sample.images[-1], 1 << 20)


PROMPTS = ["a red circle", "two blue squares"]


def test_a_language_model_draws_its_prompts(folder: Path, tmp_path: Path) -> None:
    """As generate does from the checkpoint of the same step, with the average of the decoder's weights."""
    drawing = ["pictures_every_steps=2", f"picture_prompts={PROMPTS}", f"decoder={folder}/run/decoder"]
    logging = settings(folder, "sft", *drawing)
    common = ["stages.sft.train.global_batch_size=4", "stages.sft.data.sequence_length=1024"]
    train(stage_config(folder / "base", *logging, *common), tmp_path)
    shown = images(tmp_path / "sft")
    assert list(shown) == [2, 3]
    with Generator.load(find_checkpoint(tmp_path / "sft"), decoder=folder / "run/decoder") as generator:
        torch.set_num_threads(1)
        asked = [
            generator.prompt([Turn("user", (prompt,))], open_image=True, number=number)
            for number, prompt in enumerate(PROMPTS)
        ]
        answers = generator.answer(asked, DecodeSettings(stop_after_image=True))
    expected = picture_grid([answer.images[0].pixels for answer in answers], PROMPTS, columns=8)
    assert shown[3].shape == expected.shape
    assert np.abs(shown[3].astype(int) - expected).max() <= 1
    assert not np.array_equal(shown[2], shown[3])


@pytest.mark.parametrize("missing", ["pictures_every_steps", "picture_prompts", "decoder"])
def test_nothing_is_drawn_unless_all_is_given(folder: Path, missing: str) -> None:
    given = {"pictures_every_steps": "1", "picture_prompts": "[a]", "decoder": "somewhere"}
    stage = stage_config(folder / "base", *(f"train.logging.{k}={v}" for k, v in given.items() if k != missing))

    class Due:
        step, total_steps = 1, 1

    assert not PictureSamples(stage).is_due(Due())  # type: ignore[arg-type]
    stage = stage_config(folder / "base", *(f"train.logging.{k}={v}" for k, v in given.items()))
    assert PictureSamples(stage).is_due(Due())  # type: ignore[arg-type]
