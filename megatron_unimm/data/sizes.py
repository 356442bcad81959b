"""To what size an image is brought, from its own size alone: one function for each processor's rule.

All sizes are width, height in pixels. ``factor`` is the side of a visual token (a patch, where none are merged), of
which every side but a fixed square's becomes a multiple.
"""

import math
from collections.abc import Sequence

from megatron_unimm.config.data import (
    BucketSizeConfig,
    ImageSize,
    ImageSizeConfig,
    PatchBudgetConfig,
    PixelSizeConfig,
    SquareSizeConfig,
)
from megatron_unimm.errors import ConfigError


def target_size(width: int, height: int, size: ImageSize, factor: int) -> tuple[int, int]:
    """Width and height that an image is brought to by the rule of a config."""
    if isinstance(size, ImageSizeConfig):
        return by_long_side(width, height, size.min_side, size.max_side, factor)
    if isinstance(size, PixelSizeConfig):
        return by_pixels(width, height, size.min_pixels, size.max_pixels, factor)
    if isinstance(size, PatchBudgetConfig):
        return by_patches(width, height, size.max_patches, factor)
    if isinstance(size, BucketSizeConfig):
        return nearest_bucket(width, height, size.sizes)
    return size.side, size.side


CANVAS = 1 << 14
"""Pixels per side of a square that any rule makes smaller."""


def new_size(like: tuple[int, int] | None, size: ImageSize, factor: int) -> tuple[int, int]:
    """Width and height of a picture that is to be made: of the shape of another (edits keep it), else the largest
    square that the rule allows."""
    return target_size(*(like or (CANVAS, CANVAS)), size, factor)


def smallest_area(size: ImageSize, factor: int) -> int:
    """Visual tokens (squares of side ``factor``) of the smallest image that a rule makes; a lower bound."""
    if isinstance(size, ImageSizeConfig):
        return max(1, round(size.min_side / factor))  # and one wide
    if isinstance(size, PixelSizeConfig):
        return max(1, size.min_pixels // factor**2)
    if isinstance(size, PatchBudgetConfig):
        return 1
    if isinstance(size, BucketSizeConfig):
        return min(width // factor * (height // factor) for width, height in size.sizes)
    return (size.side // factor) ** 2


def check_size(size: ImageSize, factor: int, where: str) -> None:
    """Raises ConfigError where a config asks for sides that are no whole number of visual tokens.

    Args:
        where: the config's key, for the message.
    """
    if isinstance(size, BucketSizeConfig):
        wrong = [f"{width}x{height}" for width, height in size.sizes if width % factor or height % factor]
        if wrong:
            what = f"{', '.join(wrong)}: sides must be multiples of {factor} pixels, the side of a visual token"
            raise ConfigError(f"{where}.sizes", what)
    if isinstance(size, SquareSizeConfig) and size.side % factor:
        what = f"{size.side} is no multiple of {factor} pixels, the side of a visual token"
        raise ConfigError(f"{where}.side", what)


def by_long_side(width: int, height: int, min_side: int, max_side: int, factor: int) -> tuple[int, int]:
    """The long side is clamped to [min_side, max_side] and the short side follows; then each is rounded to the nearest
    multiple of ``factor`` (halves to even, as the Qwen processors), at least one."""
    long_side = max(width, height)
    clamped = min(max(long_side, min_side), max_side)

    def fit(side: int) -> int:
        return max(1, round(side * clamped / (long_side * factor))) * factor

    return fit(width), fit(height)


def by_pixels(width: int, height: int, min_pixels: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """Both sides to the nearest multiple of ``factor`` (halves to even); where that leaves the area outside
    [min_pixels, max_pixels], both sides are scaled alike to its edge first, and rounded to the inside.

    A side is never below ``factor``, so a very long image may exceed ``max_pixels``. transformers refuses aspect
    ratios above 200; here the same formula goes on.
    """
    nearest = [round(side / factor) * factor for side in (width, height)]
    area = nearest[0] * nearest[1]
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        nearest = [max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height)]
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        nearest = [math.ceil(side * grow / factor) * factor for side in (width, height)]
    # Without a lower limit to lift it, a side can round to nothing.
    return max(factor, nearest[0]), max(factor, nearest[1])


def by_patches(width: int, height: int, max_patches: int, factor: int) -> tuple[int, int]:
    """The largest scale at which the image, each side rounded up to whole patches, has at most ``max_patches`` patches.

    The scale is bisected between 1e-6 and 100 down to a gap of 1e-5, as in the published processor, so that also the
    borderline cases agree.
    """

    def at(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(width * scale / factor)), max(1, math.ceil(height * scale / factor))

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        columns, rows = at(middle)
        if columns * rows <= max_patches:
            low = middle
        else:
            high = middle
    columns, rows = at(low)
    return columns * factor, rows * factor


def nearest_bucket(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect ratio is nearest by factor (2:1 is as far from 1:1 as 1:2); the first of equals."""
    ratio = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))


def crop_box(width: int, height: int, to_width: int, to_height: int) -> tuple[int, int, int, int]:
    """The largest centred part of an image that has the aspect ratio of the target, to the nearest pixel.

    Returns:
        left, top, right, bottom; right and bottom are outside.
    """
    cut_width = min(width, max(1, round(height * to_width / to_height)))
    cut_height = min(height, max(1, round(width * to_height / to_width)))
    left, top = (width - cut_width) // 2, (height - cut_height) // 2
    return left, top, left + cut_width, top + cut_height
