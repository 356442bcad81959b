"""SigLIP and SigLIP 2 (NaFlex): their vision towers and our SiglipConfig, tensor by tensor.

Folders of the whole model hold a text tower and the contrastive loss's scale besides. We do not build these; a
checkpoint carries them, so that the way back loses nothing.
"""

import math
from typing import Any

from megatron_unimm.config.model import SiglipConfig
from megatron_unimm.convert.qwen_vl import reading_config, rows_of
from megatron_unimm.convert.table import Family, Row, Source
from megatron_unimm.convert.transforms import ChannelsFirst, ConvToLinear, Copy, QkvInterleave, Transform
from megatron_unimm.errors import CheckpointError

ACTIVATION = "gelu_pytorch_tanh"
BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 224,
    "num_patches": 256,
}
"""Values of the base models, which published config.json files leave out (transformers' defaults)."""


def rows(model: SiglipConfig, layout: str = "vision_model") -> list[Row]:
    """The vision tower's table; ``layout`` is the prefix of its tensors, ``bare`` for none (transformers 5 writes a
    vision tower alone so)."""
    theirs = "" if layout == "bare" else f"{layout}."
    h, m = model.hidden_size, model.mlp_size
    layer = f"{theirs}encoder.layers.{{layer}}"
    row = rows_of("blocks.layers.{layer}", model.num_layers)
    qkv = QkvInterleave(model.num_heads, model.num_heads, h // model.num_heads)
    patch, transform = _patch_embed(model)

    def one(name: str, megatron: str, shape: tuple[int, ...]) -> Row:
        return Row((Source(f"{theirs}{name}", shape),), megatron, Copy())

    table = [
        Row((Source(f"{theirs}embeddings.patch_embedding.weight", patch),), "patch_embed.weight", transform),
        one("embeddings.patch_embedding.bias", "patch_embed.bias", (h,)),
        one("embeddings.position_embedding.weight", "position_embed.weight", (model.num_position_embeddings, h)),
    ]
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {"weight": ((h, h), (m, h), (h, m)), "bias": ((h,), (m,), (h,))}
    for kind, (square, up, down) in shapes.items():
        parts = ((f"{layer}.self_attn.{name}_proj.{kind}", square) for name in "qkv")
        table += [
            row(f"self_attention.linear_qkv.layer_norm_{kind}", Copy(), (f"{layer}.layer_norm1.{kind}", (h,))),
            row(f"self_attention.linear_qkv.{kind}", qkv, *parts),
            row(f"self_attention.linear_proj.{kind}", Copy(), (f"{layer}.self_attn.out_proj.{kind}", square)),
            row(f"mlp.linear_fc1.layer_norm_{kind}", Copy(), (f"{layer}.layer_norm2.{kind}", (h,))),
            row(f"mlp.linear_fc1.{kind}", Copy(), (f"{layer}.mlp.fc1.{kind}", up)),
            row(f"mlp.linear_fc2.{kind}", Copy(), (f"{layer}.mlp.fc2.{kind}", down)),
            one(f"post_layernorm.{kind}", f"blocks.final_layernorm.{kind}", (h,)),
        ]
        if model.pooling_head:
            stacked = (3 * h, *square[1:])
            table += [
                one(f"head.attention.in_proj_{kind}", f"pooling_head.attention.in_proj_{kind}", stacked),
                one(f"head.attention.out_proj.{kind}", f"pooling_head.attention.out_proj.{kind}", square),
                one(f"head.layernorm.{kind}", f"pooling_head.norm.{kind}", (h,)),
                one(f"head.mlp.fc1.{kind}", f"pooling_head.linear_fc1.{kind}", up),
                one(f"head.mlp.fc2.{kind}", f"pooling_head.linear_fc2.{kind}", down),
            ]
    if model.pooling_head:
        table.append(one("head.probe", "pooling_head.probe", (1, 1, h)))
    return table


def _patch_embed(model: SiglipConfig) -> tuple[tuple[int, ...], Transform]:
    """Shape on the hub, and how it becomes our linear layer over patches of (channel, row, column)."""
    if model.family == "siglip2":
        return (model.hidden_size, model.patch_dim), ChannelsFirst(model.in_channels)
    kernel = (model.in_channels, model.patch_size, model.patch_size)
    return (model.hidden_size, *kernel), ConvToLinear(kernel)


def carried(name: str) -> bool:
    """The text tower, and the scale and bias of the contrastive loss."""
    return name.startswith("text_model.") or name in ("logit_scale", "logit_bias")


def to_siglip_config(config: dict[str, Any], added_tokens: dict[str, int] | None = None) -> SiglipConfig:
    """Read ``config.json`` of the whole model or of the vision tower alone.

    Raises:
        CheckpointError: a value is impossible, or describes a tower that we do not build.
    """
    vision = {**BASE, **config.get("vision_config", config)}
    activation = vision.get("hidden_act", ACTIVATION)
    if activation != ACTIVATION:
        raise CheckpointError("config.json", f"hidden_act is {activation!r}; only {ACTIVATION!r} is built")
    family = "siglip2" if str(config.get("model_type", "")).startswith("siglip2") else "siglip"
    positions = vision["num_patches"] if family == "siglip2" else (vision["image_size"] // vision["patch_size"]) ** 2
    return reading_config(
        lambda: SiglipConfig(
            family=family,
            num_layers=vision["num_hidden_layers"],
            hidden_size=vision["hidden_size"],
            num_heads=vision["num_attention_heads"],
            mlp_size=vision["intermediate_size"],
            patch_size=vision["patch_size"],
            num_position_embeddings=positions,
            in_channels=vision.get("num_channels", 3),
            norm_epsilon=vision.get("layer_norm_eps", 1e-6),
            pooling_head=vision.get("vision_use_head", True),
        )
    )


def to_hf_config(model: SiglipConfig) -> dict[str, Any]:
    """``config.json`` of a vision tower that was not imported."""
    name = "Siglip2VisionModel" if model.family == "siglip2" else "SiglipVisionModel"
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": f"{model.family}_vision_model",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_channels": model.in_channels,
        "patch_size": model.patch_size,
        "hidden_act": ACTIVATION,
        "layer_norm_eps": model.norm_epsilon,
        "vision_use_head": model.pooling_head,
    }
    if model.family == "siglip2":
        return config | {"num_patches": model.num_position_embeddings}
    # SigLIP 400M of patch 14 has 27 × 27 patches of 384 pixels, which leaves 6 pixels over; 378 give the same model.
    return config | {"image_size": math.isqrt(model.num_position_embeddings) * model.patch_size}


def _family(name: str, model: str, vision: str) -> Family:
    return Family(
        name=name,
        architectures=(model, vision),
        config_class=SiglipConfig,
        to_config=to_siglip_config,
        to_hf_config=to_hf_config,
        rows=rows,
        layouts=("vision_model", "bare"),
        carried=carried,
    )


SIGLIP = _family("siglip", "SiglipModel", "SiglipVisionModel")
SIGLIP2 = _family("siglip2", "Siglip2Model", "Siglip2VisionModel")
