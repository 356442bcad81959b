"""Pictures alone, for what learns to draw them again: all images of a sample, whoever shows them, at the size of
``data.generation_size``.

Legend  V visual tokens (cells of the pictures' grids), P patches, N images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_unimm.config.data import DataConfig, SampleKind
from megatron_unimm.config.model import VisionEncoderConfig
from megatron_unimm.data import images
from megatron_unimm.data.decode.interface import Decoder, ImageRequest
from megatron_unimm.data.drawing import joined
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.fetch import fetch_images
from megatron_unimm.data.mix import Draw
from megatron_unimm.data.plan import BadSample, Laid
from megatron_unimm.data.sample import Sample
from megatron_unimm.data.sources.source import Source
from megatron_unimm.data.workers import laid_out


@dataclass(frozen=True)
class PictureSample:
    """The images of one sample."""

    id: str
    kind: SampleKind
    grids: np.ndarray
    """int64 [N, 3]: patches along time, height, width."""
    num_cells: int
    """V."""
    learned: bool = True
    """False where an image is broken."""
    patches: np.ndarray | None = None
    """float32 [P, patch_dim]."""

    def __len__(self) -> int:
        return self.num_cells


@dataclass(frozen=True)
class PictureRow:
    """Pictures one behind the other, one micro-batch. There is no padding: a row is as long as its pictures."""

    num_cells: int
    """V."""
    grids: np.ndarray
    """int64 [N, 3]."""
    learned: np.ndarray
    """bool [N]."""
    patches: np.ndarray
    """float32 [P, patch_dim]; empty on ranks that read no pictures."""
    sample_ids: tuple[str, ...]
    kinds: tuple[SampleKind, ...]
    num_padding: int = 0

    @property
    def num_tokens(self) -> int:
        """V."""
        return self.num_cells

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.grids)

    def cells(self, merge: int) -> np.ndarray:
        """int64 [N, 2]: rows and columns of visual tokens of each picture."""
        return self.grids[:, 1:] // merge


@dataclass(frozen=True)
class PictureWork:
    """Samples to pictures; see ``data/workers.py``."""

    encoder: VisionEncoderConfig
    data: DataConfig
    sources: Mapping[str, Source]

    @property
    def room(self) -> int:
        return self.data.sequence_length

    def lay_out(self, draw: Draw) -> Laid | BadSample:
        """Read the headers of a sample's images."""
        return laid_out(self.sources, draw, self._layout)

    def _layout(self, sample: Sample) -> PictureSample:
        if not sample.images:
            raise SampleError(sample.id, "has no image, nothing to draw again", "nothing to draw")
        grids = np.array([self._grid(image) for image in sample.images], dtype=np.int64)
        num_cells = int(grids.prod(axis=1).sum()) // self.encoder.spatial_merge_size**2
        if num_cells > self.room:
            what = f"{num_cells} visual tokens, but data.sequence_length is {self.room}"
            raise SampleError(sample.id, f"{what}; raise it or lower data.generation_size", "too long")
        return PictureSample(sample.id, sample.kind, grids, num_cells)

    def _grid(self, image: images.ImageFile) -> tuple[int, int, int]:
        size = images.image_size(image, self.data.max_image_pixels)
        width, height = images.target_size(*size, self.data.generation_size, self.encoder.token_pixels)
        return 1, height // self.encoder.patch_size, width // self.encoder.patch_size

    def load(self, laid: Sequence[Laid], decoder: Decoder) -> list[tuple[PictureSample, list[BadSample]]]:
        """Decode images; nothing is learned from a sample with a broken one."""
        size = self.data.generation_size
        requests = [
            [
                ImageRequest.of_grid(image, grid, self.encoder, size)
                for image, grid in zip(each.sample.images, each.layout.grids, strict=True)
            ]
            for each in laid
        ]
        fetched = fetch_images(requests, laid, None, decoder, self.encoder)
        return [
            (replace(each.layout, learned=not found.broken, patches=found.values), found.broken)
            for each, found in zip(laid, fetched, strict=True)
        ]

    def row(self, samples: Sequence[PictureSample], step: int = 0) -> PictureRow:
        """One behind the other."""
        return PictureRow(
            num_cells=sum(sample.num_cells for sample in samples),
            grids=np.concatenate([np.zeros((0, 3), dtype=np.int64), *(sample.grids for sample in samples)]),
            learned=np.array([sample.learned for sample in samples for _ in sample.grids], dtype=bool),
            patches=joined([sample.patches for sample in samples], self.encoder.patch_dim),
            sample_ids=tuple(sample.id for sample in samples),
            kinds=tuple(sample.kind for sample in samples),
        )
