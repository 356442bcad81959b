"""PNG files that say how they were made, and sheets of pictures with captions.

Pictures are uint8 (H, W, 3), RGB.
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from megatron_unimm.errors import DataError

Setting = str | int | float

SETTINGS_KEY = "unimm"
"""Text chunk with all settings as one JSON object."""
READABLE_KEY = "parameters"
"""Text chunk for people and picture viewers: the prompt, then ``name: value, …`` on the next line."""

ENLARGED_SIDE = 192
"""Pictures of a sheet are enlarged by the largest whole factor that keeps them within this side, in pixels."""
MARGIN, LINE, FONT_SIZE = 16, 16, 12
PAPER, INK, FRAME = (255, 255, 255), (50, 50, 50), (205, 205, 205)


# -- files -------------------------------------------------------------------------------------------------------------


def write_png(path: Path, pixels: np.ndarray, settings: Mapping[str, Setting]) -> Path:
    """Write a picture with its settings; the file is whole or not there at all. Returns the path.

    Args:
        settings: by name, e.g. prompt, seed, num_steps, guidance_scale, checkpoint; ``prompt`` comes first for people.
    """
    assert (pixels.dtype, pixels.ndim) == (np.uint8, 3), f"{pixels.dtype} {pixels.shape} is no uint8 (H, W, 3)"
    text = PngInfo()
    text.add_text(SETTINGS_KEY, json.dumps(dict(settings)))
    text.add_text(READABLE_KEY, _readable(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file, since only within one file system a rename is one step; and hidden, since folders of pictures are
    # read with globs.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        Image.fromarray(pixels).save(temporary, "PNG", pnginfo=text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_settings(path: Path) -> dict[str, Setting]:
    """The settings that :func:`write_png` stored. The pixels are not read.

    Raises:
        DataError: no such file, no PNG, or one without settings.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            stored = image.info.get(SETTINGS_KEY)
    except FileNotFoundError:
        raise DataError(str(path), "no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # Pillow's PNG reader raises all three
        raise DataError(str(path), f"is no PNG file, or a damaged one ({type(error).__name__})") from None
    if not isinstance(stored, str):
        raise DataError(str(path), f"has no settings (text {SETTINGS_KEY!r}); it was not written by unimm, or re-saved")
    return json.loads(stored)


def _readable(settings: Mapping[str, Setting]) -> str:
    rest = ", ".join(f"{name}: {value}" for name, value in settings.items() if name != "prompt")
    return "\n".join(part for part in (str(settings.get("prompt", "")), rest) if part)


# -- sheets ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """A picture at its size on the sheet, and the lines below it."""

    picture: Image.Image
    lines: list[str]


def picture_grid(
    pictures: Sequence[np.ndarray], captions: Sequence[str] | None = None, columns: int | None = None
) -> np.ndarray:
    """Pictures row by row on white paper, uint8 (H, W, 3), their captions wrapped below them.

    Args:
        pictures: of any sizes; all are enlarged by one whole factor, so that pixels stay square and sizes compare.
        captions: one for each; a line break in it is kept.
        columns: None makes the sheet about as wide as it is high.

    Raises:
        ValueError: no pictures, or another number of captions.
    """
    if not pictures or (captions is not None and len(captions) != len(pictures)):
        raise ValueError(f"{len(pictures)} pictures with {0 if captions is None else len(captions)} captions: no sheet")
    columns = min(columns or int(np.ceil(np.sqrt(len(pictures)))), len(pictures))
    factor = max(1, ENLARGED_SIDE // max(max(picture.shape[:2]) for picture in pictures))
    width, height = (factor * max(picture.shape[axis] for picture in pictures) for axis in (1, 0))
    font = ImageFont.load_default(FONT_SIZE)
    cells = [
        _Cell(_enlarged(picture, factor), list(_wrapped(caption, width, font)))
        for picture, caption in zip(pictures, captions or [""] * len(pictures), strict=True)
    ]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [height + LINE * max(len(cell.lines) for cell in row) + MARGIN for row in rows]
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, sum(heights) + MARGIN), PAPER)
    for number, row in enumerate(rows):
        top = MARGIN + sum(heights[:number])
        for column, cell in enumerate(row):
            _draw(sheet, cell, MARGIN + column * (width + MARGIN), top, width, height, font)
    return np.asarray(sheet)


def _draw(
    sheet: Image.Image,
    cell: _Cell,
    left: int,
    top: int,
    width: int,
    height: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """A cell's picture in the middle of its place, a thin line around it, the caption below."""
    draw = ImageDraw.Draw(sheet)
    x, y = left + (width - cell.picture.width) // 2, top + (height - cell.picture.height) // 2
    draw.rectangle((x - 1, y - 1, x + cell.picture.width, y + cell.picture.height), outline=FRAME)
    sheet.paste(cell.picture, (x, y))
    for number, line in enumerate(cell.lines):
        draw.text((left, top + height + 3 + number * LINE), line, fill=INK, font=font)


def _enlarged(picture: np.ndarray, factor: int) -> Image.Image:
    return Image.fromarray(np.repeat(np.repeat(picture, factor, axis=0), factor, axis=1))


def _wrapped(caption: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> Iterator[str]:
    """Lines no wider than ``width`` pixels, broken at spaces; a word that is wider alone is cut."""
    for paragraph in caption.splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                yield line
                line = ""
            line = f"{line} {word}".strip()
            while font.getlength(line) > width and len(line) > 1:
                fitting = max(n for n in range(1, len(line)) if n == 1 or font.getlength(line[:n]) <= width)
                yield line[:fitting]
                line = line[fitting:]
        yield line
