"""diffusers' AutoencoderKL (arXiv 2112.10752) and our VaeConfig. Both sides have the same tensors."""

from collections.abc import Iterator
from typing import Any

from megatron_unimm.config.mmdit import VaeConfig
from megatron_unimm.convert.pipeline import CONFIG, VAE, refuse_fields
from megatron_unimm.convert.qwen_vl import reading_config
from megatron_unimm.convert.table import Row, Source
from megatron_unimm.convert.transforms import Copy, Shape
from megatron_unimm.errors import CheckpointError

CLASS = "AutoencoderKL"
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
FIELDS = (
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "mid_block_add_attention",
    "use_quant_conv",
    "use_post_quant_conv",
    "scaling_factor",
    "shift_factor",
    "sample_size",
    "down_block_types",
    "up_block_types",
    "force_upcast",  # of pipelines that run the VAE in fp16
)
"""What :func:`to_vae_config` reads, or may leave."""


def rows(vae: VaeConfig) -> list[Row]:
    """The table of the VAE of a pipeline."""
    return [Row((Source(f"{VAE}/{name}", shape),), f"{VAE}.{name}", Copy()) for name, shape in _tensors(vae)]


def _tensors(vae: VaeConfig) -> Iterator[tuple[str, Shape]]:
    channels, latents = vae.block_channels, vae.latent_channels
    for part, pixels in (("encoder.conv_in", (channels[0], 3)), ("decoder.conv_out", (3, channels[0]))):
        yield from _convolution(part, *pixels, 3)
    yield from _convolution("encoder.conv_out", 2 * latents, channels[-1], 3)  # means and log variances
    yield from _convolution("decoder.conv_in", channels[-1], latents, 3)
    yield from _stages("encoder.down_blocks", "downsamplers", channels, channels[0], vae.layers_per_block)
    yield from _stages("decoder.up_blocks", "upsamplers", channels[::-1], channels[-1], vae.layers_per_block + 1)
    for part, last in (("encoder", channels[-1]), ("decoder", channels[0])):
        yield from _vectors(f"{part}.conv_norm_out", last)
        yield from _middle(f"{part}.mid_block", channels[-1], vae.mid_attention)
    if vae.quant_conv:
        yield from _convolution("quant_conv", 2 * latents, 2 * latents, 1)
        yield from _convolution("post_quant_conv", latents, latents, 1)


def _stages(name: str, resampler: str, channels: list[int], first: int, layers: int) -> Iterator[tuple[str, Shape]]:
    """One stage per resolution; all but the last change it at their end."""
    before = first
    for number, width in enumerate(channels):
        for layer in range(layers):
            yield from _resnet(f"{name}.{number}.resnets.{layer}", before, width)
            before = width
        if number < len(channels) - 1:
            yield from _convolution(f"{name}.{number}.{resampler}.0.conv", width, width, 3)


def _middle(name: str, width: int, with_attention: bool) -> Iterator[tuple[str, Shape]]:
    for number in range(2):
        yield from _resnet(f"{name}.resnets.{number}", width, width)
    if with_attention:
        yield from _vectors(f"{name}.attentions.0.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            yield f"{name}.attentions.0.{part}.weight", (width, width)
            yield f"{name}.attentions.0.{part}.bias", (width,)


def _resnet(name: str, before: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _vectors(f"{name}.norm1", before)
    yield from _convolution(f"{name}.conv1", width, before, 3)
    yield from _vectors(f"{name}.norm2", width)
    yield from _convolution(f"{name}.conv2", width, width, 3)
    if before != width:
        yield from _convolution(f"{name}.conv_shortcut", width, before, 1)


def _convolution(name: str, out: int, into: int, kernel: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into, kernel, kernel)
    yield f"{name}.bias", (out,)


def _vectors(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def to_vae_config(config: dict[str, Any]) -> VaeConfig:
    """Read the VAE's ``config.json``.

    Raises:
        CheckpointError: a value is missing, or describes a VAE that we do not build.
    """
    where = f"{VAE}/{CONFIG}"
    stages = len(config.get("block_out_channels", ()))
    built = {
        "_class_name": CLASS,
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "down_block_types": [DOWN] * stages,
        "up_block_types": [UP] * stages,
        "latents_mean": None,
        "latents_std": None,
    }
    refuse_fields(config, where, built, FIELDS)
    quant = [config.get(field, True) for field in ("use_quant_conv", "use_post_quant_conv")]
    if quant[0] != quant[1]:
        raise CheckpointError(
            where, f"use_quant_conv is {quant[0]}, use_post_quant_conv is {quant[1]}; only both or neither are built"
        )
    return reading_config(
        lambda: VaeConfig(
            latent_channels=config["latent_channels"],
            block_channels=config["block_out_channels"],
            layers_per_block=config["layers_per_block"],
            norm_groups=config.get("norm_num_groups", 32),
            mid_attention=config.get("mid_block_add_attention", True),
            quant_conv=quant[0],
            scaling_factor=config["scaling_factor"],
            shift_factor=config.get("shift_factor") or 0.0,
            sample_size=config["sample_size"],
        ),
        where,
    )


def to_hf_config(vae: VaeConfig) -> dict[str, Any]:
    """``config.json`` of a VAE that was not imported."""
    stages = len(vae.block_channels)
    return {
        "_class_name": CLASS,
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "down_block_types": [DOWN] * stages,
        "up_block_types": [UP] * stages,
        "block_out_channels": vae.block_channels,
        "layers_per_block": vae.layers_per_block,
        "latent_channels": vae.latent_channels,
        "norm_num_groups": vae.norm_groups,
        "mid_block_add_attention": vae.mid_attention,
        "use_quant_conv": vae.quant_conv,
        "use_post_quant_conv": vae.quant_conv,
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor,
        "sample_size": vae.sample_size,
    }
