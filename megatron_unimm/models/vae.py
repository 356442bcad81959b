"""The frozen autoencoder between pictures and latents: diffusers' AutoencoderKL (arXiv 2112.10752) or AutoencoderDC
(DC-AE, arXiv 2410.10733), or one of our own (:class:`PictureCodec`).

Layouts: pictures ``(B, 3, H, W)`` in [-1, 1], latents ``(B, C, h, w)`` as the diffusion transformer sees them, patches
of latents ``[h w / side², C side²]``, each (channel, row, column), row by row.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from megatron_unimm.config.mmdit import DcAeConfig, DcAeStage, VaeConfig


class PictureCodec(torch.nn.Module, ABC):
    """An autoencoder that is not diffusers'."""

    @abstractmethod
    def latents_of(self, pictures_BCHW: Tensor) -> Tensor:
        """``(B, C, h, w)``, as the diffusion transformer sees them."""

    @abstractmethod
    def pictures_of(self, latents_BChw: Tensor) -> Tensor:
        """``(B, 3, H, W)``."""


Autoencoder = AutoencoderKL | AutoencoderDC | PictureCodec
TILE_OVERLAP = 1 / 8
"""Of DC-AE's tiles, as in diffusers."""


def build_vae(config: VaeConfig | DcAeConfig) -> AutoencoderKL | AutoencoderDC:
    """diffusers' network, with random weights. Pictures beyond ``sample_size`` are worked on in overlapping tiles, so
    that memory does not grow with them."""
    return _build_dc_ae(config) if isinstance(config, DcAeConfig) else _build_kl(config)


def _build_kl(config: VaeConfig) -> AutoencoderKL:
    stages = len(config.block_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=tuple(config.block_channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        sample_size=config.sample_size,
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor,
        use_quant_conv=config.quant_conv,
        use_post_quant_conv=config.quant_conv,
        mid_block_add_attention=config.mid_attention,
    )
    vae.enable_tiling()
    return vae


def _build_dc_ae(config: DcAeConfig) -> AutoencoderDC:
    side, stride = config.sample_size, round(config.sample_size * (1 - TILE_OVERLAP))
    vae = AutoencoderDC(**dc_ae_fields(config))
    vae.enable_tiling(side, side, stride, stride)
    return vae


def dc_ae_fields(config: DcAeConfig) -> dict[str, Any]:
    """What diffusers' class is made with: our numbers, and what all published ones for SANA have."""
    return {
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "attention_head_dim": config.attention_head_size,
        **_half_fields("encoder", config.encoder),
        **_half_fields("decoder", config.decoder),
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": config.scaling_factor,
    }


def _half_fields(half: str, stages: Sequence[DcAeStage]) -> dict[str, Any]:
    return {
        f"{half}_block_types": [stage.BLOCKS[stage.attention] for stage in stages],
        f"{half}_block_out_channels": [stage.channels for stage in stages],
        f"{half}_layers_per_block": [stage.layers for stage in stages],
        f"{half}_qkv_multiscales": [list(stage.scales) for stage in stages],
    }


def encode(vae: Autoencoder, pictures_BCHW: Tensor) -> Tensor:
    """Latents of pictures: where they have a distribution its mean, so that they are the same on every rank and in
    every epoch."""
    if isinstance(vae, PictureCodec):
        return vae.latents_of(pictures_BCHW)
    if isinstance(vae, AutoencoderDC):
        return vae.encode(pictures_BCHW).latent * vae.config["scaling_factor"]
    mean = vae.encode(pictures_BCHW).latent_dist.mode()
    return (mean - vae.config["shift_factor"]) * vae.config["scaling_factor"]


def decode(vae: Autoencoder, latents_BChw: Tensor) -> Tensor:
    """Pictures of latents."""
    if isinstance(vae, PictureCodec):
        return vae.pictures_of(latents_BChw)
    if isinstance(vae, AutoencoderDC):
        return vae.decode(latents_BChw / vae.config["scaling_factor"]).sample
    return vae.decode(latents_BChw / vae.config["scaling_factor"] + vae.config["shift_factor"]).sample


def to_pixels(picture: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(1, 3, H, W)`` of a picture uint8 (H, W, 3)."""
    return torch.tensor(picture, device=device, dtype=dtype).permute(2, 0, 1)[None] / 127.5 - 1


def to_pictures(pixels_BCHW: Tensor) -> list[np.ndarray]:
    """uint8 (H, W, 3) of each."""
    scaled = ((pixels_BCHW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return list(scaled.permute(0, 2, 3, 1).cpu().numpy())


def to_patches(grid_BChw: Tensor, side: int) -> Tensor:
    """Cut to patches of ``side`` x ``side``: ``[B, h w / side², C side²]``."""
    count, channels, height, width = grid_BChw.shape
    cut = grid_BChw.reshape(count, channels, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * side * side)


def from_patches(patches_BUF: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """The way back: ``(B, C, rows side, columns side)``."""
    count, _, width = patches_BUF.shape
    laid = patches_BUF.reshape(count, rows, columns, width // side**2, side, side)
    return laid.permute(0, 3, 1, 4, 2, 5).reshape(count, -1, rows * side, columns * side)


@torch.no_grad()
def picture_patches(
    vae: Autoencoder, pictures: Sequence[np.ndarray], side: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Patches of latents ``[U, width]`` of pictures (uint8 (H, W, 3)), one behind the other; none of none."""
    parts = [torch.zeros(0, width, dtype=dtype, device=device)]
    parts += [to_patches(encode(vae, to_pixels(picture, dtype, device)), side)[0] for picture in pictures]
    return torch.cat(parts)


@torch.no_grad()
def encode_patches(
    vae: Autoencoder, pixels: Tensor, grids: list[tuple[int, int]], pixel_side: int, latent_side: int
) -> Tensor:
    """Patches of latents of packed pictures, pictures of one size at a time.

    Args:
        pixels: ``[U, 3 pixel_side²]``: the pixels of each image token, pictures one behind the other.
        grids: rows and columns of image tokens of each picture.
        pixel_side, latent_side: side of an image token in pixels, and in latents.

    Returns:
        ``[U, C latent_side²]``.
    """
    parts = list(pixels.split([rows * columns for rows, columns in grids]))
    for rows, columns in dict.fromkeys(grids):
        same = [i for i, grid in enumerate(grids) if grid == (rows, columns)]
        pictures = from_patches(torch.stack([parts[i] for i in same]), rows, columns, pixel_side)
        for i, patches in zip(same, to_patches(encode(vae, pictures), latent_side), strict=True):
            parts[i] = patches
    return torch.cat(parts)
