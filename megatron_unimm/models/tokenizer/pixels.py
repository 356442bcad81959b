"""Between the patches that a vision encoder reads and the pixels under each of its visual tokens: a change of order and
of scale, so that one decoded image serves both, and gradients pass.

Legend  V visual tokens of all images, m merge size, P = V m² patches, p side of a patch, s = m p side of a token.
"""

import torch
from torch import Tensor

from megatron_unimm.config.model import VisionEncoderConfig


def pixels_of_patches(patches_PF: Tensor, encoder: VisionEncoderConfig) -> Tensor:
    """Pixels ``[V, 3 s²]`` in [-1, 1], each token's (channel, row, column), of normalised patches."""
    merge, side = encoder.spatial_merge_size, encoder.patch_size
    cut = patches_PF.view(-1, merge, merge, encoder.in_channels, encoder.temporal_patch_size, side, side)
    whole = cut[:, :, :, :, 0].permute(0, 3, 1, 4, 2, 5).flatten(2)  # [V, 3, s²]
    mean, std = _normalisation(encoder, whole)
    return ((whole * std + mean) * 2 - 1).flatten(1)


def patches_of_pixels(pixels_VF: Tensor, encoder: VisionEncoderConfig) -> Tensor:
    """The way back, ``[P, patch_dim]``: normalised, every frame of a patch the same."""
    merge, side, channels = encoder.spatial_merge_size, encoder.patch_size, encoder.in_channels
    whole = pixels_VF.view(len(pixels_VF), channels, -1)
    mean, std = _normalisation(encoder, whole)
    cut = (((whole + 1) / 2 - mean) / std).view(-1, channels, merge, side, merge, side)
    ordered = cut.permute(0, 2, 4, 1, 3, 5)[:, :, :, :, None]  # [V, m, m, 3, 1, p, p]
    frames = ordered.expand(-1, -1, -1, -1, encoder.temporal_patch_size, -1, -1)
    return frames.reshape(-1, encoder.patch_dim)


def _normalisation(encoder: VisionEncoderConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[3, 1]`` of the encoder's input."""
    mean, std = (torch.tensor(values, dtype=like.dtype) for values in (encoder.image_mean, encoder.image_std))
    return mean.to(like.device, non_blocking=True)[:, None], std.to(like.device, non_blocking=True)[:, None]
