"""diffusers' AutoencoderDC (DC-AE, arXiv 2410.10733) and our DcAeConfig. Both sides have the same tensors, those of
diffusers' own class."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from megatron_unimm.config.mmdit import DcAeConfig, DcAeStage
from megatron_unimm.convert.pipeline import CONFIG, VAE, refuse_fields
from megatron_unimm.convert.qwen_vl import reading_config
from megatron_unimm.convert.table import Row, Source
from megatron_unimm.convert.transforms import Copy, Shape

CLASS = "AutoencoderDC"
HALVES = ("encoder", "decoder")
FIELDS = (
    "latent_channels",
    "attention_head_dim",
    "scaling_factor",
    *(f"{half}_block_out_channels" for half in HALVES),
    *(f"{half}_layers_per_block" for half in HALVES),
    *(f"{half}_qkv_multiscales" for half in HALVES),
    *(f"{half}_block_types" for half in HALVES),
)
"""What :func:`to_vae_config` reads."""


def rows(vae: DcAeConfig) -> list[Row]:
    """The table of the VAE of a pipeline."""
    shapes = _shapes(vae.model_dump_json())
    return [Row((Source(f"{VAE}/{name}", shape),), f"{VAE}.{name}", Copy()) for name, shape in shapes.items()]


@lru_cache
def _shapes(vae: str) -> dict[str, Shape]:
    from megatron_unimm.models.vae import build_vae  # loads diffusers

    with torch.device("meta"):
        network = build_vae(DcAeConfig.model_validate_json(vae))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def to_vae_config(config: dict[str, Any]) -> DcAeConfig:
    """Read the VAE's ``config.json``.

    Raises:
        CheckpointError: a value is missing, or describes a VAE that we do not build.
    """
    where = f"{VAE}/{CONFIG}"
    built = {
        "_class_name": CLASS,
        "in_channels": 3,
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": _like(config.get("decoder_norm_types"), "rms_norm"),
        "decoder_act_fns": _like(config.get("decoder_act_fns"), "silu"),
        "decoder_conv_act_fn": "relu",
        "encoder_out_shortcut": True,
        "decoder_in_shortcut": True,
    }
    for half in HALVES:
        types, names = config.get(f"{half}_block_types", ()), list(DcAeStage.BLOCKS.values())
        if not set([types] if isinstance(types, str) else types) <= set(names):
            built[f"{half}_block_types"] = names
    refuse_fields(config, where, built, FIELDS)
    return reading_config(
        lambda: DcAeConfig(
            family="dc_ae",
            latent_channels=config["latent_channels"],
            attention_head_size=config["attention_head_dim"],
            encoder=_half(config, "encoder"),
            decoder=_half(config, "decoder"),
            scaling_factor=config["scaling_factor"],
        ),
        where,
    )


def _like(given: Any, value: str) -> str | list[str]:
    """A value as diffusers takes it: once for all resolutions, or for each."""
    return [value] * len(given) if isinstance(given, list | tuple) else value


def _half(config: dict[str, Any], half: str) -> list[DcAeStage]:
    channels: Sequence[int] = config[f"{half}_block_out_channels"]
    types = config[f"{half}_block_types"]
    parts = (
        channels,
        config[f"{half}_layers_per_block"],
        [types] * len(channels) if isinstance(types, str) else types,
        config[f"{half}_qkv_multiscales"],
    )
    return [
        DcAeStage(channels=width, layers=layers, attention=kind == DcAeStage.BLOCKS[True], scales=list(scales))
        for width, layers, kind, scales in zip(*parts, strict=True)
    ]


def to_hf_config(vae: DcAeConfig) -> dict[str, Any]:
    """``config.json`` of a VAE that was not imported."""
    from megatron_unimm.models.vae import dc_ae_fields  # loads diffusers

    return {"_class_name": CLASS, **dc_ae_fields(vae)}
