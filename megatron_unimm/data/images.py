"""Decodes images with Pillow, sizes them to whole visual tokens, and cuts them to patches as the Qwen2-VL processors
do.

Layouts: images are uint8 (H, W, 3), RGB; patches are float32 [P, patch_dim].
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache

import numpy as np
from PIL import Image

from megatron_unimm.config.data import ImageSizeConfig
from megatron_unimm.config.model import VisionEncoderConfig
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import ImageFile

# Data files come from anywhere, so only formats that Pillow decodes itself; EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")

EXIF_ORIENTATION = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_size(file: ImageFile, max_pixels: int) -> tuple[int, int]:
    """Width and height in pixels of an image as it will be decoded, from its header alone.

    Raises:
        SampleError: the file is no image of a known format, or has more than ``max_pixels`` pixels.
    """
    with _open(file, max_pixels) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def decode(file: ImageFile, max_pixels: int) -> np.ndarray:
    """Decodes the first frame to uint8 (H, W, 3).

    The EXIF orientation is applied, what is transparent becomes white, and 16-bit values keep their high byte.

    Raises:
        SampleError: the file is no image of a known format, is damaged, or has more than ``max_pixels`` pixels.
    """
    with _open(file, max_pixels) as image:
        orientation = _orientation(image)
        try:
            pixels = _to_rgb(image)
        except MemoryError:
            raise
        except (
            Exception
        ) as error:  # Pillow's decoders raise what they stumble over: OSError, SyntaxError, struct.error …
            what = f"cannot be decoded ({type(error).__name__}: {error})"
            raise SampleError(str(file), what, "unreadable image") from error
    if orientation in TRANSPOSE:
        pixels = pixels.transpose(TRANSPOSE[orientation])
    return np.asarray(pixels)


def target_size(width: int, height: int, size: ImageSizeConfig, factor: int) -> tuple[int, int]:
    """Width and height that an image is brought to.

    The long side is clamped to [min_side, max_side] and the short side follows; then each is rounded to the nearest
    multiple of ``factor`` (the side of a visual token; halves to even, as the Qwen2-VL processors), at least one.
    """
    long_side = max(width, height)
    clamped = min(max(long_side, size.min_side), size.max_side)

    def fit(side: int) -> int:
        return max(1, round(side * clamped / (long_side * factor))) * factor

    return fit(width), fit(height)


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bicubic with antialiasing, uint8 (H, W, 3) in and out."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def patchify(image: np.ndarray, encoder: VisionEncoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cuts an image into normalised patches in the order of the Qwen2-VL processors.

    The order walks merge blocks row by row, and the patches inside a block row by row, so that the patches of one
    visual token are neighbours. A patch is (channel, frame, row, column); a still image fills all frames with itself.

    Args:
        image: uint8 (H, W, 3), both sides multiples of ``encoder.token_pixels``.

    Returns:
        patches: float32 [P, patch_dim].
        grid: int64 [3], patches along time, height, width.
    """
    height, width, channels = image.shape
    assert channels == encoder.in_channels, f"{channels} channels, the encoder takes {encoder.in_channels}"
    assert height % encoder.token_pixels == 0, f"height {height} is not made of whole visual tokens"
    assert width % encoder.token_pixels == 0, f"width {width} is not made of whole visual tokens"
    patch, merge, frames = encoder.patch_size, encoder.spatial_merge_size, encoder.temporal_patch_size
    rows, columns = height // patch, width // patch
    tables = _normalised(tuple(encoder.image_mean), tuple(encoder.image_std))
    normalised = np.stack([table[image[..., channel]] for channel, table in enumerate(tables)])
    blocks = normalised.reshape(channels, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.transpose(1, 4, 2, 5, 0, 3, 6)[
        :, :, :, :, :, None
    ]  # [rows/m, columns/m, m, m, channel, 1, patch, patch]
    blocks = np.broadcast_to(blocks, (*blocks.shape[:5], frames, patch, patch))
    return blocks.reshape(rows * columns, encoder.patch_dim), np.array([1, rows, columns], dtype=np.int64)


@lru_cache
def _normalised(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """What each of a byte's values becomes, by channel: float32 ``[channels, 256]``."""
    return ((np.arange(256) / 255.0 - np.array(mean)[:, None]) / np.array(std)[:, None]).astype(np.float32)


def load_patches(file: ImageFile, grid: np.ndarray, encoder: VisionEncoderConfig, max_pixels: int) -> np.ndarray:
    """Decodes an image and brings it to the grid planned from its header: float32 [P, patch_dim].

    Raises:
        SampleError: as :func:`decode`.
    """
    height, width = int(grid[1]) * encoder.patch_size, int(grid[2]) * encoder.patch_size
    return patchify(resize(decode(file, max_pixels), width, height), encoder)[0]


@contextmanager
def _open(file: ImageFile, max_pixels: int) -> Iterator[Image.Image]:
    with ExitStack() as stack:
        try:
            image = stack.enter_context(Image.open(stack.enter_context(file.open()), formats=FORMATS))
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
            raise SampleError(str(file), f"is no readable image ({error})", "unreadable image") from error
        width, height = image.size
        if not 0 < width * height <= max_pixels:
            what = f"{width}x{height} is {width * height} pixels, data.max_image_pixels allows {max_pixels}"
            raise SampleError(str(file), what, "image too large")
        yield image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is left to apply, 1 (upright) where there is none."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, and its size is that of the turned image.
    try:
        # The method of the base class: the one of PNG decodes the whole image to look for EXIF data behind it.
        return int(Image.Image.getexif(image).get(EXIF_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return 1  # Damaged EXIF data is common on the web and says nothing about the pixels.


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()  # The palette and its transparency are known only now.
    if image.mode.startswith("I"):
        # 16-bit grey, which Pillow would clip instead of scale.
        high_bytes = np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8
        return Image.fromarray(high_bytes.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; convert to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
