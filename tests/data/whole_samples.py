"""A sample in one go, text and images: what the loader does in two steps and in batches is held to this."""

from dataclasses import replace

import numpy as np

from megatron_unimm.config.model import VisionEncoderConfig
from megatron_unimm.data.chat import ChatFormat, concat_patches, image_order, layout_sample
from megatron_unimm.data.image_files import ImageFile
from megatron_unimm.data.images import decode, patchify, resize
from megatron_unimm.data.sample import Sample, TokenizedSample


def load_patches(file: ImageFile, grid: np.ndarray, encoder: VisionEncoderConfig, max_pixels: int) -> np.ndarray:
    """An image brought to a grid: float32 [P, patch_dim]."""
    height, width = int(grid[1]) * encoder.patch_size, int(grid[2]) * encoder.patch_size
    return patchify(resize(decode(file, max_pixels), width, height), encoder)[0]


def tokenize_sample(sample: Sample, chat: ChatFormat) -> TokenizedSample:
    """A sample with its patches."""
    layout, limit = layout_sample(sample, chat), chat.data.max_image_pixels
    pairs = zip(image_order(sample.turns), layout.grids, strict=True)
    patches = [load_patches(sample.images[i], grid, chat.encoder, limit) for i, grid in pairs]
    return replace(layout, patches=concat_patches(patches, chat.encoder))
