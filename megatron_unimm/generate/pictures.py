"""Images from files, and generated images to files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.images import decode
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.decode import GeneratedImage
from megatron_unimm.generate.png import Setting, picture_grid, write_png
from megatron_unimm.generate.sampling import DecodeSettings

MAX_IMAGE_PIXELS = 1 << 26


def read_pictures(files: Sequence[Path]) -> list[np.ndarray]:
    """Images as uint8 (H, W, 3).

    Raises:
        DataError: a file is no image, damaged, or larger than 64 megapixels.
    """
    return [decode(DiskImage(file), MAX_IMAGE_PIXELS) for file in files]


def write_visual_tokens(pictures: Sequence[GeneratedImage], file: Path) -> Path:
    """Write generated images as ``image_0``, ``image_1``, … ``[V, H]``, their grids in the metadata; returns the
    file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"image_{number}": picture.visual_tokens.cpu().contiguous() for number, picture in enumerate(pictures)}
    grids = {f"grid_{number}": " ".join(map(str, picture.grid)) for number, picture in enumerate(pictures)}
    save_file(tensors, file, metadata=grids)
    return file


def write_pictures(
    pictures: Sequence[GeneratedImage],
    file: Path,
    captions: Sequence[str],
    numbers: Sequence[int],
    settings: DecodeSettings,
    generator: Generator,
) -> list[Path]:
    """Write generated images with how they were made in their metadata: one to ``file``; several each to a file of its
    own, named after it, and all to ``file`` as a grid; what was drawn at coarser scales, each to a file named after its
    size. Returns the files.

    Args:
        captions: what each was asked for. numbers: with the seed, fixes each one's noise.
        generator: what made them.
    """
    made_by = {"checkpoint": generator.origin, "decoder": generator.drawn_by}
    files = [file] if len(pictures) == 1 else [file.with_stem(f"{file.stem}_{i:03d}") for i in range(len(pictures))]
    shown, coarser = [], []
    for path, picture, caption, number in zip(files, pictures, captions, numbers, strict=True):
        assert picture.pixels is not None, "a generator that paints left an image without pixels"
        write_png(path, picture.pixels, _settings(caption, number, settings) | made_by)
        shown.append(picture.pixels)
        for pixels in picture.coarser:
            height, width = pixels.shape[:2]
            coarser.append(path.with_stem(f"{path.stem}_{width}x{height}"))
            write_png(coarser[-1], pixels, _settings(caption, number, settings) | made_by)
    if len(pictures) == 1:
        return [*files, *coarser]
    # Several pictures of several prompts: a row each.
    of_one = len(pictures) // len(set(captions))
    columns = of_one if 1 < of_one < len(pictures) else None
    write_png(file, picture_grid(shown, list(captions), columns), {"seed": settings.seed, **made_by})
    return [file, *files, *coarser]


def _settings(caption: str, number: int, settings: DecodeSettings) -> dict[str, Setting]:
    found: dict[str, Setting] = {"prompt": caption, "seed": settings.seed, "number": number}
    if settings.sampler is not None:
        sampler = settings.sampler
        for name in ("solver", "steps", "guidance_scale", "image_guidance_scale"):
            found[name] = vars(sampler)[name]
    return found
