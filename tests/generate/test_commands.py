"""``unimm generate`` and ``unimm chat`` as people use them."""

import io
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from tiny_checkpoint import HIDDEN, V, picture

from megatron_unimm.cli import main


def generate(*arguments: str | Path) -> int:
    return main.run(["generate", "--max-new-tokens", "6", *map(str, arguments)])


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


@pytest.mark.parametrize("name", ["circle.safetensors", "circle.png"])
def test_an_image_is_kept_as_visual_tokens(
    tiny: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--model", tiny / "run", "--prompt", "Draw a red circle.", "--to", tmp_path / name) == 0
    with safe_open(tmp_path / "circle.safetensors", "pt") as file:
        assert file.get_tensor("image_0").shape == (V, HIDDEN)
        assert file.metadata()["grid_0"] == "1 8 8"
    assert "no diffusion decoder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["circle.safetensors"]


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
