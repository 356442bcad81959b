"""Images from files, and generated images to files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.images import decode
from megatron_unimm.generate.decode import GeneratedImage

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
