"""Decodes images with Pillow, resizes them, and cuts them to patches: the reference, equal to transformers' processors.

Layouts: images are uint8 (H, W, 3), RGB; patches are float32 [P, patch_dim].
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from megatron_unimm.config.data import ImageSize, ResizeFilter
from megatron_unimm.config.model import SiglipConfig
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import ImageFile
from megatron_unimm.data.sizes import crop_box
from megatron_unimm.data.sizes import target_size as target_size  # asked for beside resize and patchify

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
"""What makes an image upright, by its EXIF orientation."""
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class PatchFormat(Protocol):
    """How pixels become the numbers that a vision tower reads; the config of a Qwen tower is one."""

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        ...

    @property
    def spatial_merge_size(self) -> int:
        """Patches per side of a visual token."""
        ...

    @property
    def temporal_patch_size(self) -> int:
        """Frames per patch."""
        ...

    @property
    def in_channels(self) -> int: ...

    @property
    def image_mean(self) -> Sequence[float]:
        """Of red, green and blue in [0, 1]."""
        ...

    @property
    def image_std(self) -> Sequence[float]: ...


@dataclass(frozen=True)
class SiglipFormat:
    """SigLIP's patches, row by row, as its tower reads them: (channel, row, column), values in [-1, 1].

    transformers hands SigLIP whole images, and SigLIP 2 NaFlex patches in the order (row, column, channel).
    """

    patch_size: int
    spatial_merge_size: int = 1
    temporal_patch_size: int = 1
    in_channels: int = 3
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def of(cls, tower: SiglipConfig) -> "SiglipFormat":
        """The format that a tower reads."""
        return cls(tower.patch_size)


def image_size(file: ImageFile, max_pixels: int) -> tuple[int, int]:
    """Width and height in pixels of an image as it will be decoded, from its header alone.

    Raises:
        SampleError: the file is no image of a known format, or has more than ``max_pixels`` pixels.
    """
    with open_image(file, max_pixels) as image:
        return upright_size(image.size, exif_orientation(image))


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height once the EXIF orientation is applied."""
    width, height = size
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def decode(file: ImageFile, max_pixels: int) -> np.ndarray:
    """Decodes the first frame to uint8 (H, W, 3).

    The EXIF orientation is applied, what is transparent becomes white, and 16-bit values keep their high byte.

    Raises:
        SampleError: the file is no image of a known format, is damaged, or has more than ``max_pixels`` pixels.
    """
    return np.asarray(decode_image(file, max_pixels))


def decode_image(file: ImageFile, max_pixels: int) -> Image.Image:
    """As :func:`decode`, as a Pillow image of mode RGB."""
    with open_image(file, max_pixels) as image:
        orientation = exif_orientation(image)
        try:
            pixels = _to_rgb(image)
        except MemoryError:
            raise
        except (
            Exception
        ) as error:  # Pillow's decoders raise what they stumble over: OSError, SyntaxError, struct.error …
            what = f"cannot be decoded ({type(error).__name__}: {error})"
            raise SampleError(str(file), what, "unreadable image") from error
    return pixels.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else pixels


def fit(
    image: Image.Image, width: int, height: int, *, crop: bool = False, filter: ResizeFilter = "bicubic"
) -> Image.Image:
    """Resizes with antialiasing, in Pillow's own 8-bit arithmetic, which the published processors use.

    Args:
        crop: take the largest centred part of the target's aspect ratio, instead of stretching the image to it.
    """
    if crop:
        box = crop_box(*image.size, width, height)
        image = image.crop(box) if box != (0, 0, *image.size) else image
    return image if image.size == (width, height) else image.resize((width, height), FILTERS[filter])


def resize(
    image: np.ndarray, width: int, height: int, *, crop: bool = False, filter: ResizeFilter = "bicubic"
) -> np.ndarray:
    """As :func:`fit`, uint8 (H, W, 3) in and out."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(fit(Image.fromarray(image), width, height, crop=crop, filter=filter))


def brought_to(image: np.ndarray, size: ImageSize, factor: int) -> np.ndarray:
    """Resized by the rule of a config, uint8 (H, W, 3) in and out; see ``data/sizes.py``."""
    width, height = target_size(image.shape[1], image.shape[0], size, factor)
    return resize(image, width, height, crop=size.crop, filter=size.filter)


def num_patches(width: int, height: int, form: PatchFormat) -> int:
    """Whole patches of an image."""
    return (height // form.patch_size) * (width // form.patch_size)


def patch_dim(form: PatchFormat) -> int:
    """Number of values in one flattened patch."""
    return form.in_channels * form.temporal_patch_size * form.patch_size**2


def patchify(image: np.ndarray, form: PatchFormat, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cuts an image into normalised patches in the order of the Qwen2-VL processors.

    The order walks merge blocks row by row, and the patches inside a block row by row, so that the patches of one
    visual token are neighbours. A patch is (channel, frame, row, column); a still image fills all frames with itself.

    Args:
        image: uint8 (H, W, 3), both sides multiples of the side of a visual token. Without merging, pixels at the right
            and bottom that fill no patch are left out, as SigLIP's convolution does.
        out: float32 [P, patch_dim], contiguous, to write the patches to.

    Returns:
        patches: float32 [P, patch_dim].
        grid: int64 [3], patches along time, height, width.
    """
    height, width, channels = image.shape
    patch, merge, frames = form.patch_size, form.spatial_merge_size, form.temporal_patch_size
    assert channels == form.in_channels, f"{channels} channels, the encoder takes {form.in_channels}"
    rows, columns = height // patch, width // patch
    if merge == 1:
        image = image[: rows * patch, : columns * patch]
    else:
        assert height % (patch * merge) == 0, f"height {height} is not made of whole visual tokens"
        assert width % (patch * merge) == 0, f"width {width} is not made of whole visual tokens"
    if out is None:
        out = np.empty((rows * columns, patch_dim(form)), dtype=np.float32)
    scale, shift = _scale_and_shift(tuple(form.image_mean), tuple(form.image_std))
    bands = image.reshape(rows // merge, merge, patch, columns // merge, merge, patch, channels)
    bands = bands.transpose(0, 3, 1, 4, 6, 2, 5)  # [rows/m, columns/m, m, m, channel, patch, patch]
    targets = out.reshape(rows // merge, merge * columns, channels, frames, patch**2)
    # One row of visual tokens at a time: it stays in the processor's cache until it is written, once.
    for band, target in zip(bands, targets, strict=True):
        # Converted as they lie, then put in order: the other way round, and pixel by pixel, both take longer.
        values = band.astype(np.float32).reshape(merge * columns, channels, 1, patch**2)
        values *= scale
        values += shift
        target[...] = values
    return out, np.array([1, rows, columns], dtype=np.int64)


@lru_cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Normalisation of bytes, by channel: ``byte * scale + shift``, each float32 ``[channels, 1, 1]``."""
    scale = 1 / (255.0 * np.array(std))
    shift = -np.array(mean) / np.array(std)
    return scale.astype(np.float32)[:, None, None], shift.astype(np.float32)[:, None, None]


@contextmanager
def open_image(file: ImageFile, max_pixels: int) -> Iterator[Image.Image]:
    """An image of which the header is read.

    Raises:
        SampleError: the file cannot be read, is no image of a known format, or has more than ``max_pixels`` pixels.
    """
    with ExitStack() as stack:
        try:
            image = stack.enter_context(Image.open(stack.enter_context(file.open()), formats=FORMATS))
        except UnidentifiedImageError as error:
            what = f"is no readable image (none of {', '.join(FORMATS)})"
            raise SampleError(str(file), what, "unreadable image") from error
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
            raise SampleError(str(file), f"is no readable image ({error})", "unreadable image") from error
        width, height = image.size
        if not 0 < width * height <= max_pixels:
            what = f"{width}x{height} is {width * height} pixels, data.max_image_pixels allows {max_pixels}"
            raise SampleError(str(file), what, "image too large")
        yield image


def exif_orientation(image: Image.Image) -> int:
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
