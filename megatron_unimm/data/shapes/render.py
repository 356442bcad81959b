"""Draws scenes, anti-aliased, with Pillow: four times too large, then averaged down.

Images are RGB, (height, width, 3) uint8 as arrays.
"""

import numpy as np
from PIL import Image, ImageDraw

from megatron_unimm.data.shapes.scene import BACKGROUND, CANVAS, COLOURS, CROSS_ARM, Scene, ShapeObject

SUPERSAMPLING = 4


def _draw(draw: ImageDraw.ImageDraw, item: ShapeObject, side: int) -> None:
    """Draw one object on a canvas of `side` pixels. Pillow's boxes include their last pixel, hence the -1."""
    x, y, r = item.x * side, item.y * side, item.extent * side
    fill = COLOURS[item.colour]
    if item.shape == "circle":
        draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=fill)
    elif item.shape == "square":
        draw.rectangle((x - r, y - r, x + r - 1, y + r - 1), fill=fill)
    elif item.shape == "triangle":
        draw.polygon(((x - 0.5, y - r), (x - r, y + r - 1), (x + r - 1, y + r - 1)), fill=fill)
    else:
        arm = CROSS_ARM * r
        draw.rectangle((x - arm, y - r, x + arm - 1, y + r - 1), fill=fill)
        draw.rectangle((x - r, y - arm, x + r - 1, y + arm - 1), fill=fill)


def render(scene: Scene, canvas: int = CANVAS) -> Image.Image:
    """The picture of a scene, `canvas` x `canvas` pixels, RGB."""
    side = canvas * SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        _draw(draw, item, side)
    return image.reduce(SUPERSAMPLING)


def render_array(scene: Scene, canvas: int = CANVAS) -> np.ndarray:
    """The picture as uint8 [canvas, canvas, 3]."""
    return np.asarray(render(scene, canvas))
