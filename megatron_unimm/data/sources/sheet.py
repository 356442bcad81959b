"""Draws a contact sheet: the images of samples, with what is said about them underneath."""

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.images import decode
from megatron_unimm.data.sample import Sample

CELL = 288
"""Pixels of a cell's width, and of the square above its text."""
MARGIN = 8
COLUMNS = 4
FONT_SIZE, LINE_HEIGHT = 12, 15
LINE_CHARACTERS, MAX_LINES = 46, 14
MAX_IMAGES = 16
"""Images of one sample that are shown."""


def contact_sheet(samples: Sequence[Sample | SampleError], max_pixels: int) -> Image.Image:
    """One picture of all samples. Those that cannot be used show why, and so do images that cannot be decoded.

    Args:
        samples: at least one.
        max_pixels: ``data.max_image_pixels``.
    """
    texts = [_lines(sample) for sample in samples]
    columns = min(COLUMNS, len(samples))
    rows = [texts[start : start + columns] for start in range(0, len(texts), columns)]
    heights = [CELL + LINE_HEIGHT * max(map(len, row)) + 3 * MARGIN for row in rows]
    sheet = Image.new("RGB", (columns * (CELL + 2 * MARGIN), sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, (sample, lines) in enumerate(zip(samples, texts, strict=True)):
        left = number % columns * (CELL + 2 * MARGIN) + MARGIN
        top = sum(heights[: number // columns]) + MARGIN
        if isinstance(sample, Sample):
            _paste_images(sheet, sample, left, top, max_pixels, draw, font)
        for line, text in enumerate(lines):
            draw.text((left, top + CELL + MARGIN + line * LINE_HEIGHT), text, fill="black", font=font)
    return sheet


def _paste_images(
    sheet: Image.Image,
    sample: Sample,
    left: int,
    top: int,
    max_pixels: int,
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    files = sample.images[:MAX_IMAGES]
    columns = math.ceil(math.sqrt(len(files)))
    for number, file in enumerate(files):
        side = CELL // columns
        x, y = left + number % columns * side, top + number // columns * side
        try:
            picture = Image.fromarray(decode(file, max_pixels))
        except SampleError as fault:
            message = "\n".join(textwrap.wrap(fault.fault, LINE_CHARACTERS // columns))
            draw.rectangle((x, y, x + side - 2, y + side - 2), outline="red")
            draw.text((x + 4, y + 4), message, fill="red", font=font)
            continue
        scale = (side - 2) / max(picture.size)
        width, height = (max(1, round(length * scale)) for length in picture.size)
        sheet.paste(picture.resize((width, height)), (x, y))


def _lines(sample: Sample | SampleError) -> list[str]:
    if isinstance(sample, SampleError):
        texts = [sample.where, f"{sample.fault}: {sample.what}"]
    else:
        texts = [sample.id]
        for turn in sample.turns:
            parts = [part if isinstance(part, str) else f" [image {part + 1}] " for part in turn.parts]
            texts.append(f"{turn.role}: {' '.join(''.join(parts).split())}")
    lines = [line for text in texts for line in textwrap.wrap(text, LINE_CHARACTERS)]
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "…"]
