"""Qwen2.5-VL: ``Qwen2_5_VLForConditionalGeneration`` and our ModelConfig, tensor by tensor."""

import re
from collections.abc import Sequence
from typing import Any

from megatron_unimm.config.model import BackboneConfig, ModelConfig, Qwen25VisionConfig
from megatron_unimm.convert.qwen_vl import (
    backbone_rows,
    parts_of_others,
    reading_config,
    refuse_parts,
    refuse_unknown,
    rope_of,
    rows_of,
    tied_to,
    token_ids,
)
from megatron_unimm.convert.table import Family, Row, Source, TiedTo
from megatron_unimm.convert.transforms import ConvToLinear, Copy, FusedQkv, GateUp, QkvInterleave

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
NORM_EPSILON = 1e-6
"""RMSNorm epsilon of the vision tower, fixed in transformers' code."""


# ---------------------------------------------------------------------------------------------- tensors


def rows(model: ModelConfig, layout: str = "hub") -> list[Row]:
    """The whole table.

    Raises:
        CheckpointError: the model has parts that Qwen2.5-VL has not.
    """
    b = model.backbone
    parts = {
        "a mixture of experts": b.moe is not None,
        "qk_norm": b.qk_norm,
        "no qkv_bias": not b.qkv_bias,
        "interleaved mrope": b.mrope_interleaved,
        "head_size other than hidden_size / num_heads": b.head_size * b.num_heads != b.hidden_size,
        **parts_of_others(b),
        "another vision tower": not isinstance(model.vision_encoder, Qwen25VisionConfig),
        "a projector": isinstance(model.vision_encoder, Qwen25VisionConfig)
        and model.vision_encoder.projector is not None,
    }
    refuse_parts(model, ARCHITECTURE, parts)
    assert isinstance(model.vision_encoder, Qwen25VisionConfig)
    return [*vision_rows(model.vision_encoder, "visual"), *backbone_rows(b, "model")]


def vision_rows(v: Qwen25VisionConfig, theirs: str) -> list[Row]:
    """The tower's table; ``theirs`` is the prefix of its tensors."""
    h, m, merged = v.hidden_size, v.mlp_size, v.hidden_size * v.spatial_merge_size**2
    kernel = (v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    block, merger = f"{theirs}.blocks.{{layer}}", "vision_encoder.merger"
    row = rows_of("vision_encoder.blocks.layers.{layer}", v.num_layers)
    qkv = FusedQkv(QkvInterleave(v.num_heads, v.num_heads, h // v.num_heads))
    gate_up = (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")
    table = [
        Row(
            (Source(f"{theirs}.patch_embed.proj.weight", (h, *kernel)),),
            "vision_encoder.patch_embed.weight",
            ConvToLinear(kernel),
        ),
        row("self_attention.linear_qkv.layer_norm_weight", Copy(), (f"{block}.norm1.weight", (h,))),
        row("self_attention.linear_qkv.weight", qkv, (f"{block}.attn.qkv.weight", (3 * h, h))),
        row("self_attention.linear_qkv.bias", qkv, (f"{block}.attn.qkv.bias", (3 * h,))),
        row("self_attention.linear_proj.weight", Copy(), (f"{block}.attn.proj.weight", (h, h))),
        row("self_attention.linear_proj.bias", Copy(), (f"{block}.attn.proj.bias", (h,))),
        row("mlp.linear_fc1.layer_norm_weight", Copy(), (f"{block}.norm2.weight", (h,))),
        row("mlp.linear_fc1.weight", GateUp(), *((f"{name}.weight", (m, h)) for name in gate_up)),
        row("mlp.linear_fc1.bias", GateUp(), *((f"{name}.bias", (m,)) for name in gate_up)),
        row("mlp.linear_fc2.weight", Copy(), (f"{block}.mlp.down_proj.weight", (h, m))),
        row("mlp.linear_fc2.bias", Copy(), (f"{block}.mlp.down_proj.bias", (h,))),
        Row((Source(f"{theirs}.merger.ln_q.weight", (h,)),), f"{merger}.norm.weight", Copy()),
    ]
    return table + two_linears(f"{theirs}.merger.mlp", merger, (merged, merged, v.merged_size))


def two_linears(theirs: str, ours: str, sizes: tuple[int, int, int]) -> list[Row]:
    """A sequence of linear, activation and linear, from ``sizes[0]`` over ``sizes[1]`` to ``sizes[2]``."""
    shapes = {"0": ("linear_fc1", sizes[1], sizes[0]), "2": ("linear_fc2", sizes[2], sizes[1])}
    return [
        Row((Source(f"{theirs}.{number}.{kind}", shape),), f"{ours}.{name}.{kind}", Copy())
        for number, (name, rows, columns) in shapes.items()
        for kind, shape in (("weight", (rows, columns)), ("bias", (rows,)))
    ]


def tied(model: ModelConfig) -> Sequence[TiedTo]:
    """The output layer of a model that shares it with the embedding."""
    return tied_to(model, "model.embed_tokens.weight")


def hub_name(name: str) -> str:
    """The hub's name of a tensor: transformers' modules call it ``model.visual.…`` and ``model.language_model.…``."""
    return re.sub(r"^model\.(?:(visual)|language_model)\.", lambda match: "visual." if match[1] else "model.", name)


# ---------------------------------------------------------------------------------------------- config.json


def to_model_config(config: dict[str, Any], added_tokens: dict[str, int] | None = None) -> ModelConfig:
    """Read ``config.json``, as on the hub (text values at the top) or as transformers 5 saves it (``text_config``).

    ``added_tokens`` are the tokenizer's special tokens, of which ``config.json`` knows only some.

    Raises:
        CheckpointError: a value is missing, or describes a model that is not Qwen2.5-VL as published.
    """
    text, vision = {**config, **config.get("text_config", {})}, config.get("vision_config", {})
    activations = {
        "hidden_act": (text.get("hidden_act", "silu"), "silu"),
        "vision_config.hidden_act": (vision.get("hidden_act", "silu"), "silu"),
    }
    refuse_unknown(config, text, activations)
    return reading_config(
        lambda: ModelConfig(
            vision_encoder=vision_config(vision),
            backbone=_backbone_config(config, text),
            token_ids=token_ids(config, added_tokens or {}),
        )
    )


def vision_config(vision: dict[str, Any], **projected: Any) -> Qwen25VisionConfig:
    """The section ``vision_config``; ``projected``: fields about what follows the merger."""
    return Qwen25VisionConfig(
        family="qwen2_5",
        num_layers=vision["depth"],
        hidden_size=vision["hidden_size"],
        num_heads=vision["num_heads"],
        mlp_size=vision["intermediate_size"],
        patch_size=vision["patch_size"],
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        spatial_merge_size=vision["spatial_merge_size"],
        window_size=vision["window_size"],
        full_attention_layers=list(vision["fullatt_block_indexes"]),
        in_channels=vision.get(
            "in_channels", vision.get("in_chans", 3)
        ),  # The hub says in_chans, transformers in_channels.
        norm_epsilon=NORM_EPSILON,
        **{"out_size": vision["out_hidden_size"], **projected},
    )


def _backbone_config(config: dict[str, Any], text: dict[str, Any]) -> BackboneConfig:
    rope = rope_of(text)
    heads = text["num_attention_heads"]
    return BackboneConfig(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_size=text.get("head_dim") or text["hidden_size"] // heads,
        mlp_size=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        max_position=text["max_position_embeddings"],
        # transformers before 5 put it inside text_config, the hub at the top.
        tie_embeddings=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        qkv_bias=True,
        rope_theta=rope.get("rope_theta", text.get("rope_theta", 1e6)),
        mrope_sections=rope["mrope_section"],
        norm_epsilon=text["rms_norm_eps"],
    )


def to_hf_config(model: ModelConfig) -> dict[str, Any]:
    """A ``config.json`` in the hub's form for a model that was not imported."""
    v, b, ids = model.vision_encoder, model.backbone, model.token_ids
    assert isinstance(v, Qwen25VisionConfig)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "hidden_size": b.hidden_size,
        "intermediate_size": b.mlp_size,
        "num_hidden_layers": b.num_layers,
        "num_attention_heads": b.num_heads,
        "num_key_value_heads": b.num_kv_heads,
        "vocab_size": b.vocab_size,
        "max_position_embeddings": b.max_position,
        "rms_norm_eps": b.norm_epsilon,
        "rope_theta": b.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": b.mrope_sections},
        "use_sliding_window": False,
        "tie_word_embeddings": b.tie_embeddings,
        "eos_token_id": ids.im_end,
        "vision_start_token_id": ids.vision_start,
        "vision_end_token_id": ids.vision_end,
        "image_token_id": ids.image_pad,
        "video_token_id": ids.image_pad + 1,
        "vision_config": to_hf_vision_config(v, "qwen2_5_vl"),
    }


def to_hf_vision_config(v: Qwen25VisionConfig, model_type: str) -> dict[str, Any]:
    """The section ``vision_config``."""
    return {
        "model_type": model_type,
        "depth": v.num_layers,
        "hidden_act": "silu",
        "hidden_size": v.hidden_size,
        "intermediate_size": v.mlp_size,
        "num_heads": v.num_heads,
        "in_chans": v.in_channels,
        "in_channels": v.in_channels,
        "out_hidden_size": v.merged_size,
        "patch_size": v.patch_size,
        "spatial_merge_size": v.spatial_merge_size,
        "spatial_patch_size": v.patch_size,
        "window_size": v.window_size,
        "fullatt_block_indexes": v.full_attention_layers,
        "tokens_per_second": 2,
        "temporal_patch_size": v.temporal_patch_size,
    }


QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    architectures=(ARCHITECTURE,),
    config_class=ModelConfig,
    to_config=to_model_config,
    to_hf_config=to_hf_config,
    rows=rows,
    tied=tied,
    hub_name=hub_name,
)
