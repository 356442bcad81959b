"""``unimm generate`` and ``unimm chat`` as people use them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_checkpoint import HIDDEN, V, picture

from megatron_unimm.cli import main
from megatron_unimm.data.sample import Turn
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.decode import Prompt
from megatron_unimm.generate.paint import Painter, PaintRequest
from megatron_unimm.generate.png import read_settings
from megatron_unimm.generate.sampling import DecodeSettings


def generate(*arguments: str | Path) -> int:
    return main.run(["generate", "--max-new-tokens", "6", *map(str, arguments)])


@pytest.fixture
def draws_when_told(monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    """Answers to "Draw …" and "Make …" begin with an image, which a random model would not hit upon; the prompts."""
    asked: list[Prompt] = []
    prompt = Generator.prompt

    def opened(self: Generator, turns: Sequence[Turn], pictures: Sequence[Any] = (), **settings: Any) -> Prompt:
        last = turns[-1].parts[-1]
        told = isinstance(last, str) and last.startswith(("Draw", "Make"))
        asked.append(prompt(self, turns, pictures, **(settings | {"open_image": told})))
        return asked[-1]

    monkeypatch.setattr(Generator, "prompt", opened)
    return asked


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> list[PaintRequest]:
    """What the painter was asked for."""
    found: list[PaintRequest] = []
    paint = Painter.paint

    def noted(self: Painter, requests: Sequence[PaintRequest], *settings: Any) -> list[np.ndarray]:
        found.extend(requests)
        return paint(self, requests, *settings)

    monkeypatch.setattr(Painter, "paint", noted)
    return found


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_text_goes_to_the_terminal_or_a_file(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    asked = ("--model", tiny / "base", "--prompt", "What is this?", "--image", tmp_path / "a.png")
    assert generate(*asked) == 0
    shown = capsys.readouterr()
    assert len(shown.out.strip()) > 3
    assert "cut at --max-new-tokens" in shown.err
    assert generate(*asked, "--to", tmp_path / "out/answer.txt") == 0
    assert (tmp_path / "out/answer.txt").read_text() == shown.out
    assert capsys.readouterr().out == ""


def test_an_image_is_kept_as_visual_tokens(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "circle.safetensors"
    assert generate("--model", tiny / "run", "--prompt", "Draw a red circle.", "--to", to) == 0
    with safe_open(to, "pt") as file:
        assert file.get_tensor("image_0").shape == (V, HIDDEN)
        assert file.metadata()["grid_0"] == "1 8 8"
    assert "circle.safetensors: visual tokens" in capsys.readouterr().err


def test_a_model_without_a_decoder_says_that_it_has_none(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--model", tiny / "run", "--prompt", "Draw.", "--to", tmp_path / "x.png") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has no image decoder beside it" in error
    assert "--decoder" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("draws_when_told")
def test_images_of_an_answer_in_words(tiny: Path, drawing: Path, tmp_path: Path) -> None:
    """They are kept beside the text: as pictures, or as visual tokens without a decoder."""
    for model, suffix in ((tiny, ".safetensors"), (drawing, ".png")):
        to = tmp_path / suffix[1:] / "answer.txt"
        assert generate("--model", model / "run", "--prompt", "Draw a circle.", "--to", to) == 0
        assert {file.name for file in to.parent.iterdir()} == {"answer.txt", f"answer{suffix}"}


def test_a_base_model_says_that_it_cannot_draw(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--model", tiny / "base", "--prompt", "Draw.", "--to", "x.png") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot generate images" in error


def test_chat(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two turns with an image, mistakes on the way, a fresh start that says the same as the first time."""
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    look = f"/image {tmp_path}/a.png\nWhat is this?\n"
    lines = f"{look}And why?\n/image nowhere.png\n/wrong\n\n/reset\n{look}"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main.run(["chat", "--model", str(tiny / "base"), "--max-new-tokens", "5"]) == 0
    said = capsys.readouterr().out
    assert "answers in text only" in said.split("\n")[0]
    assert "error: nowhere.png" in said
    assert said.count("/image FILE attaches") == 2
    answers = said.split("\n", 1)[1]
    first = answers[: answers.index("error: nowhere.png")]
    again = answers.split("ends it.\n")[1]
    assert first.startswith(again)
    assert len(first) > len(again)


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_picture_says_how_it_was_made(drawing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And is the one that the generator draws with these settings."""
    to = tmp_path / "out/circle.png"
    chosen = ("--steps", 2, "--guidance-scale", 3, "--solver", "heun", "--seed", 4)
    assert generate("--model", drawing / "run", "--prompt", "a red circle", "--to", to, *chosen) == 0
    assert capsys.readouterr().err.strip().endswith("circle.png")
    settings = read_settings(to)
    assert settings.pop("checkpoint") == str(drawing / "run/sft/checkpoints/step_00000001")
    assert settings.pop("decoder") == str(drawing / "run/decoder/checkpoints/step_00000001")
    assert settings == {
        "prompt": "a red circle",
        "seed": 4,
        "number": 0,
        "solver": "heun",
        "steps": 2,
        "guidance_scale": 3.0,
        "image_guidance_scale": 1.0,
    }
    with Generator.load(drawing / "run") as generator:
        torch.set_num_threads(1)
        assert generator.painter is not None
        sampler = generator.painter.config.sampler.model_copy(
            update={"solver": "heun", "steps": 2, "guidance_scale": 3.0}
        )
        asked = generator.prompt([Turn("user", ("a red circle",))], open_image=True)
        answer = generator.answer([asked], DecodeSettings(max_new_tokens=6, seed=4, sampler=sampler))[0]
    assert answer.images[0].pixels is not None
    assert np.array_equal(pixels(to), answer.images[0].pixels)


def test_several_pictures(drawing: Path, tmp_path: Path) -> None:
    """A grid, and each by itself; what a picture looks like goes by its prompt, its number and the seed."""
    common = ("--model", drawing / "run", "--steps", 2, "--count", 3)
    assert generate(*common, "--prompt", "a red circle", "--prompt", "two squares", "--to", tmp_path / "a/all.png") == 0
    names = [f"all_{number:03d}.png" for number in range(6)]
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["all.png", *names]
    shown = [pixels(tmp_path / "a" / name) for name in names]
    assert all(picture.shape == (64, 64, 3) for picture in shown)
    assert all(not np.array_equal(shown[i], shown[j]) for i in range(6) for j in range(i))
    assert pixels(tmp_path / "a/all.png").shape[0] > 2 * 64
    settings = [read_settings(tmp_path / "a" / name) for name in names]
    assert [each["number"] for each in settings] == [0, 1, 2, 0, 1, 2]
    assert [each["prompt"] for each in settings] == 3 * ["a red circle"] + 3 * ["two squares"]
    for seed, same in ((0, True), (1, False)):
        to = tmp_path / f"seed_{seed}" / "all.png"
        assert generate(*common, "--prompt", "two squares", "--seed", seed, "--to", to) == 0
        again = [pixels(to.with_name(name)) for name in names[:3]]
        distance = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(again, shown[3:], strict=True))
        assert (distance <= 1) == same


def test_an_edit_is_drawn_with_the_image_that_it_edits(
    drawing: Path, tmp_path: Path, painted: list[PaintRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    """As the base model sees it; where that has gone, the error says what to do."""
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    edit = ("--model", drawing / "run", "--prompt", "Make it blue.", "--image", tmp_path / "a.png", "--steps", 1)
    assert generate(*edit, "--to", tmp_path / "b.png") == 0
    ((source,),) = [request.sources for request in painted]
    with Generator.load(drawing / "run", with_targets=True) as generator:
        torch.testing.assert_close(source, generator.target_features([picture(0)])[0])
    capsys.readouterr()
    assert generate(*edit, "--to", tmp_path / "c.png", "--base", tmp_path / "nowhere") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "give it with --base" in error
    assert generate(*edit, "--to", tmp_path / "c.png", "--base", drawing / "base") == 0
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "c.png"))


def test_chat_sees_and_edits_what_it_has_drawn(
    drawing: Path,
    tmp_path: Path,
    draws_when_told: list[Prompt],
    painted: list[PaintRequest],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Drawing, asking, editing: in every later turn stand the visual tokens as they were made."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Draw a circle.\nWhat colour is it?\nMake it blue.\n/quit\nno more\n"))
    words = [
        "chat",
        "--model",
        str(drawing / "run"),
        "--max-new-tokens",
        "5",
        "--steps",
        "2",
        "--to",
        str(tmp_path / "x"),
    ]
    assert main.run(words) == 0
    said = capsys.readouterr().out
    assert said.count("[image 1]") == 2
    assert f"({tmp_path}/x/turn_001.png)" in said
    assert sorted(file.name for file in (tmp_path / "x").iterdir()) == ["turn_001.png", "turn_003.png"]
    assert len(draws_when_told) == 3
    drawn, edited = painted
    for later in draws_when_told[1:]:
        assert torch.equal(later.given[0], drawn.visual_tokens)
    assert drawn.sources == ()
    assert len(edited.sources) == 1
    assert torch.equal(edited.sources[0], drawn.visual_tokens)
    settings = [read_settings(tmp_path / "x" / f"turn_00{turn}.png") for turn in (1, 3)]
    assert [each["prompt"] for each in settings] == ["Draw a circle.", "Make it blue."]
    assert [each["number"] for each in settings] == [drawn.number, edited.number]
    assert not np.array_equal(*(pixels(tmp_path / "x" / f"turn_00{turn}.png") for turn in (1, 3)))
