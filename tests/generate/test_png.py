"""PNG files with their settings, and sheets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont
from tiny_checkpoint import picture

from megatron_unimm.errors import DataError
from megatron_unimm.generate import png
from megatron_unimm.generate.png import picture_grid, read_settings, write_png

SETTINGS = {"prompt": "Zeichne ein rotes Dreieck, 请.", "seed": 3, "guidance_scale": 4.5, "checkpoint": "runs/a=b"}


def test_settings_and_pixels_come_back(tmp_path: Path) -> None:
    file = write_png(tmp_path / "new" / "a.png", picture(0), SETTINGS)
    read = read_settings(file)
    assert read == SETTINGS
    assert {name: type(value) for name, value in read.items()} == {n: type(v) for n, v in SETTINGS.items()}
    with Image.open(file) as image:
        assert np.array_equal(np.asarray(image), picture(0))
        readable = image.info["parameters"]
    assert readable == f"{SETTINGS['prompt']}\nseed: 3, guidance_scale: 4.5, checkpoint: runs/a=b"


def test_settings_are_read_without_the_pixels(tmp_path: Path) -> None:
    """They stand before the pixels, so a file cut after them still says what it was."""
    file = write_png(tmp_path / "a.png", picture(0), SETTINGS)
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index(b"IDAT") + 4])
    assert read_settings(file) == SETTINGS


def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_png(tmp_path / "a.png", picture(0), {"seed": 1})

    def full_disk(self: Image.Image, path: Path, *arguments: object, **words: object) -> None:
        path.write_bytes(b"\x89PNG half")
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_png(file, picture(1), {"seed": 2})
    assert read_settings(file) == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"], "nothing half-written stays"


def test_what_has_no_settings_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_settings(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match="no PNG"):
        read_settings(tmp_path / "text.png")
    Image.fromarray(picture(0)).save(tmp_path / "plain.png")
    with pytest.raises(DataError, match="has no settings"):
        read_settings(tmp_path / "plain.png")


def test_small_pictures_are_enlarged_by_a_whole_factor() -> None:
    """64 pixels three times make 192; every pixel becomes a square of three."""
    pictures = [picture(seed) for seed in range(5)]
    sheet = picture_grid(pictures, columns=3)
    step = 192 + png.MARGIN
    assert sheet.dtype == np.uint8
    assert sheet.shape == (2 * step + png.MARGIN, 3 * step + png.MARGIN, 3)
    for number, small in enumerate(pictures):
        top, left = (png.MARGIN + place * step for place in divmod(number, 3))
        cell = sheet[top : top + 192, left : left + 192]
        for y in range(3):
            for x in range(3):
                assert np.array_equal(cell[y::3, x::3], small)
    assert (sheet[png.MARGIN + step :, 2 * step + png.MARGIN :] == 255).all(), "the sixth place stays empty"


def test_large_pictures_keep_their_size_and_small_ones_their_proportion() -> None:
    sheet = picture_grid([np.zeros((300, 200, 3), np.uint8), np.zeros((100, 100, 3), np.uint8)], columns=2)
    assert sheet.shape[:2] == (300 + 2 * png.MARGIN, 2 * 200 + 3 * png.MARGIN)
    second = sheet[:, 200 + 2 * png.MARGIN - 4 :] == 0
    assert second.all(axis=2).sum() == 100 * 100


def test_captions_are_wrapped_below_their_own_picture() -> None:
    caption = "two\nwords that go on and on and on until they need several lines of a narrow column, withoutspaces" * 2
    blank = [np.full((64, 64, 3), 255, np.uint8)] * 2
    sheet = picture_grid(blank, [caption, ""], columns=2)
    font = ImageFont.load_default(png.FONT_SIZE)
    lines = list(png._wrapped(caption, 192, font))
    assert lines[0] == "two"
    assert all(font.getlength(line) <= 192 for line in lines)
    assert "".join(lines).replace(" ", "") == caption.replace(" ", "").replace("\n", "")
    assert sheet.shape[0] == 192 + 2 * png.MARGIN + png.LINE * len(lines)
    below = sheet[png.MARGIN + 192 + 1 :]
    assert (below[:, : png.MARGIN + 192] < 128).any(), "text"
    assert (below[:, 192 + png.MARGIN + 2 :] == 255).all(), "none below the second"


def test_a_sheet_needs_as_many_captions_as_pictures() -> None:
    with pytest.raises(ValueError, match="2 pictures with 1 captions"):
        picture_grid([picture(0), picture(1)], ["one"])
    with pytest.raises(ValueError, match="0 pictures"):
        picture_grid([])
