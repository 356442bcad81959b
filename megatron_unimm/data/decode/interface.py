"""What every decoder does: a batch of encoded images in, their pixels or patches out.

Layouts: pixels are uint8 (H, W, 3), RGB; patches are float32 [P, patch_dim].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from megatron_unimm.config.data import ImageSize, ResizeFilter
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import ImageFile
from megatron_unimm.data.images import PatchFormat, num_patches, patch_dim, patchify
from megatron_unimm.data.in_flight import InFlight

Finish = Callable[[int, np.ndarray], np.ndarray]
"""What becomes of the pixels of image i; called in several threads."""


@dataclass(frozen=True)
class ImageRequest:
    """An image, and the size that it is brought to."""

    file: ImageFile
    width: int
    """In pixels, as all sizes."""
    height: int
    crop: bool = False
    """Take the largest centred part of the target's aspect ratio, instead of stretching the image to it."""
    filter: ResizeFilter = "bicubic"

    @classmethod
    def of_grid(cls, file: ImageFile, grid: np.ndarray, form: PatchFormat, size: ImageSize) -> "ImageRequest":
        """What fills a planned grid (int64 [3], patches along time, height, width) by the rule of a config."""
        _, rows, columns = (int(count) for count in grid)
        return cls(file, columns * form.patch_size, rows * form.patch_size, size.crop, size.filter)


class Decoder(ABC):
    """Decodes batches of images. The larger the batch, the better its threads are used.

    An image that cannot be used is answered with a SampleError in its place; the others are not affected. Safe to call
    from several threads.
    """

    def __init__(self) -> None:
        self.in_flight = InFlight()
        """The files that are being read or decoded."""

    def load(self, requests: Sequence[ImageRequest], form: PatchFormat) -> list[np.ndarray | SampleError]:
        """Patches of each image: float32 [P_i, patch_dim].

        All are views of one array, which lives as long as any of them.
        """
        ends = np.cumsum([num_patches(request.width, request.height, form) for request in requests], dtype=np.int64)
        patches = np.empty((int(ends[-1]) if len(ends) else 0, patch_dim(form)), dtype=np.float32)
        parts = np.split(patches, ends[:-1])
        return self._run(requests, lambda index, pixels: patchify(pixels, form, parts[index])[0])

    def pixels(self, requests: Sequence[ImageRequest]) -> list[np.ndarray | SampleError]:
        """Pixels of each image at its target size: uint8 (H, W, 3)."""
        return self._run(requests, lambda _, pixels: pixels)

    @abstractmethod
    def _run(self, requests: Sequence[ImageRequest], finish: Finish) -> list[np.ndarray | SampleError]:
        """Decodes, crops and resizes each image, and hands its pixels to ``finish``; the answers in order."""

    @abstractmethod
    def close(self) -> None:
        """Ends the threads and frees the memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
