"""Qwen2.5-VL: ``Qwen2_5_VLForConditionalGeneration`` and our ModelConfig, tensor by tensor."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from megatron_unimm.config.model import BackboneConfig, ModelConfig, Qwen25VisionConfig, TokenIds
from megatron_unimm.convert.table import Family, Row, Source, TiedTo
from megatron_unimm.convert.transforms import Conv3dToLinear, Copy, FusedQkv, GateUp, QkvInterleave
from megatron_unimm.errors import CheckpointError

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
NORM_EPSILON = 1e-6
"""RMSNorm epsilon of the vision tower, fixed in transformers' code."""


# ---------------------------------------------------------------------------------------------- tensors


def rows(model: ModelConfig) -> list[Row]:
    """The whole table."""
    return [*_vision_rows(model), *_backbone_rows(model)]


def _vision_rows(model: ModelConfig) -> list[Row]:
    v = model.vision_encoder
    h, m, merged = v.hidden_size, v.mlp_size, v.hidden_size * v.spatial_merge_size**2
    patch = (h, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    block, layer = "visual.blocks.{layer}", "vision_encoder.blocks.layers.{layer}"
    n = v.num_layers
    qkv = FusedQkv(v.num_heads)
    return [
        Row(
            (Source("visual.patch_embed.proj.weight", patch),),
            "vision_encoder.patch_embed.weight",
            Conv3dToLinear(v.in_channels, v.temporal_patch_size, v.patch_size),
        ),
        Row(
            (Source(f"{block}.norm1.weight", (h,)),), f"{layer}.self_attention.linear_qkv.layer_norm_weight", Copy(), n
        ),
        Row((Source(f"{block}.attn.qkv.weight", (3 * h, h)),), f"{layer}.self_attention.linear_qkv.weight", qkv, n),
        Row((Source(f"{block}.attn.qkv.bias", (3 * h,)),), f"{layer}.self_attention.linear_qkv.bias", qkv, n),
        Row((Source(f"{block}.attn.proj.weight", (h, h)),), f"{layer}.self_attention.linear_proj.weight", Copy(), n),
        Row((Source(f"{block}.attn.proj.bias", (h,)),), f"{layer}.self_attention.linear_proj.bias", Copy(), n),
        Row((Source(f"{block}.norm2.weight", (h,)),), f"{layer}.mlp.linear_fc1.layer_norm_weight", Copy(), n),
        Row(
            (Source(f"{block}.mlp.gate_proj.weight", (m, h)), Source(f"{block}.mlp.up_proj.weight", (m, h))),
            f"{layer}.mlp.linear_fc1.weight",
            GateUp(),
            n,
        ),
        Row(
            (Source(f"{block}.mlp.gate_proj.bias", (m,)), Source(f"{block}.mlp.up_proj.bias", (m,))),
            f"{layer}.mlp.linear_fc1.bias",
            GateUp(),
            n,
        ),
        Row((Source(f"{block}.mlp.down_proj.weight", (h, m)),), f"{layer}.mlp.linear_fc2.weight", Copy(), n),
        Row((Source(f"{block}.mlp.down_proj.bias", (h,)),), f"{layer}.mlp.linear_fc2.bias", Copy(), n),
        Row((Source("visual.merger.ln_q.weight", (h,)),), "vision_encoder.merger.norm.weight", Copy()),
        Row(
            (Source("visual.merger.mlp.0.weight", (merged, merged)),), "vision_encoder.merger.linear_fc1.weight", Copy()
        ),
        Row((Source("visual.merger.mlp.0.bias", (merged,)),), "vision_encoder.merger.linear_fc1.bias", Copy()),
        Row(
            (Source("visual.merger.mlp.2.weight", (v.out_size, merged)),),
            "vision_encoder.merger.linear_fc2.weight",
            Copy(),
        ),
        Row((Source("visual.merger.mlp.2.bias", (v.out_size,)),), "vision_encoder.merger.linear_fc2.bias", Copy()),
    ]


def _backbone_rows(model: ModelConfig) -> list[Row]:
    b = model.backbone
    h, m, q, kv = b.hidden_size, b.mlp_size, b.num_heads * b.head_size, b.num_kv_heads * b.head_size
    attention, mlp, layer = (
        "model.layers.{layer}.self_attn",
        "model.layers.{layer}.mlp",
        "backbone.decoder.layers.{layer}",
    )
    n = b.num_layers
    qkv = QkvInterleave(b.num_heads, b.num_kv_heads, b.head_size)

    def qkv_sources(kind: str, *rest: int) -> tuple[Source, ...]:
        sizes = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        return tuple(Source(f"{attention}.{name}.{kind}", (size, *rest)) for name, size in sizes.items())

    table = [
        Row(
            (Source("model.embed_tokens.weight", (b.vocab_size, h)),),
            "backbone.embedding.word_embeddings.weight",
            Copy(),
        ),
        Row(
            (Source("model.layers.{layer}.input_layernorm.weight", (h,)),),
            f"{layer}.self_attention.linear_qkv.layer_norm_weight",
            Copy(),
            n,
        ),
        Row(qkv_sources("weight", h), f"{layer}.self_attention.linear_qkv.weight", qkv, n),
        Row(qkv_sources("bias"), f"{layer}.self_attention.linear_qkv.bias", qkv, n),
        Row((Source(f"{attention}.o_proj.weight", (h, q)),), f"{layer}.self_attention.linear_proj.weight", Copy(), n),
        Row(
            (Source("model.layers.{layer}.post_attention_layernorm.weight", (h,)),),
            f"{layer}.mlp.linear_fc1.layer_norm_weight",
            Copy(),
            n,
        ),
        Row(
            (Source(f"{mlp}.gate_proj.weight", (m, h)), Source(f"{mlp}.up_proj.weight", (m, h))),
            f"{layer}.mlp.linear_fc1.weight",
            GateUp(),
            n,
        ),
        Row((Source(f"{mlp}.down_proj.weight", (h, m)),), f"{layer}.mlp.linear_fc2.weight", Copy(), n),
        Row((Source("model.norm.weight", (h,)),), "backbone.decoder.final_layernorm.weight", Copy()),
    ]
    if not b.tie_embeddings:
        table.append(Row((Source("lm_head.weight", (b.vocab_size, h)),), "backbone.output_layer.weight", Copy()))
    return table


def tied(model: ModelConfig) -> list[TiedTo]:
    """The output layer of a model that shares it with the embedding."""
    return [TiedTo("lm_head.weight", "model.embed_tokens.weight")] if model.backbone.tie_embeddings else []


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
    _refuse_unknown(config, text, vision)
    try:
        return ModelConfig(
            vision_encoder=_vision_config(vision),
            backbone=_backbone_config(config, text),
            token_ids=_token_ids(config, added_tokens or {}),
        )
    except KeyError as error:
        raise CheckpointError("config.json", f"has no {error.args[0]!r}; take the folder as published") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError("config.json", f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _vision_config(vision: dict[str, Any]) -> Qwen25VisionConfig:
    return Qwen25VisionConfig(
        kind="qwen2_5",
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
        out_size=vision["out_hidden_size"],
        norm_epsilon=NORM_EPSILON,
    )


def _backbone_config(config: dict[str, Any], text: dict[str, Any]) -> BackboneConfig:
    rope = _rope(text)
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


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """The rotary section: ``rope_parameters`` of transformers 5, ``rope_scaling`` of the hub."""
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def _token_ids(config: dict[str, Any], added_tokens: dict[str, int]) -> TokenIds:
    defaults = TokenIds()
    return TokenIds(
        pad=added_tokens.get("<|endoftext|>", defaults.pad),
        im_start=added_tokens.get("<|im_start|>", defaults.im_start),
        im_end=added_tokens.get("<|im_end|>", defaults.im_end),
        vision_start=config.get("vision_start_token_id", defaults.vision_start),
        vision_end=config.get("vision_end_token_id", defaults.vision_end),
        image_pad=config.get("image_token_id", defaults.image_pad),
    )


def _refuse_unknown(config: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> None:
    """Refuse what would convert to a model that computes something else."""
    if "quantization_config" in config:
        raise CheckpointError("config.json", "is of a quantized model; take the bf16 one")
    if text.get("use_sliding_window"):
        raise CheckpointError("config.json", "use_sliding_window is true; only full attention is built")
    for where, section in (("hidden_act", text), ("vision_config.hidden_act", vision)):
        if section.get("hidden_act", "silu") != "silu":
            raise CheckpointError("config.json", f"{where} is {section['hidden_act']!r}; only 'silu' is built")
    kind = _rope(text).get("rope_type", _rope(text).get("type", "default"))
    if kind not in ("default", "mrope"):
        raise CheckpointError("config.json", f"rope type {kind!r} is not built; only 'default' with mrope_section is")


def to_hf_config(model: ModelConfig) -> dict[str, Any]:
    """A ``config.json`` in the hub's form for a model that was not imported."""
    v, b, ids = model.vision_encoder, model.backbone, model.token_ids
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
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": v.num_layers,
            "hidden_act": "silu",
            "hidden_size": v.hidden_size,
            "intermediate_size": v.mlp_size,
            "num_heads": v.num_heads,
            "in_chans": v.in_channels,
            "in_channels": v.in_channels,
            "out_hidden_size": v.out_size,
            "patch_size": v.patch_size,
            "spatial_merge_size": v.spatial_merge_size,
            "spatial_patch_size": v.patch_size,
            "window_size": v.window_size,
            "fullatt_block_indexes": v.full_attention_layers,
            "tokens_per_second": 2,
            "temporal_patch_size": v.temporal_patch_size,
        },
    }


def _can_build(model: ModelConfig) -> Sequence[str]:
    """Why a model of ours has no place in this family; empty where it has."""
    b = model.backbone
    reasons = {
        "a mixture of experts": b.moe is not None,
        "qk_norm": b.qk_norm,
        "no qkv_bias": not b.qkv_bias,
        "interleaved mrope": b.mrope_interleaved,
        "head_size other than hidden_size / num_heads": b.head_size * b.num_heads != b.hidden_size,
    }
    return [reason for reason, applies in reasons.items() if applies]


def checked_rows(model: ModelConfig) -> list[Row]:
    """:func:`rows`, having made sure that transformers' class can hold the model.

    Raises:
        CheckpointError: the model has parts that Qwen2.5-VL has not.
    """
    reasons = _can_build(model)
    if reasons:
        raise CheckpointError(
            "backbone", f"has {', '.join(reasons)}, which {ARCHITECTURE} has not; it cannot be converted"
        )
    return rows(model)


QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    architecture=ARCHITECTURE,
    to_model_config=to_model_config,
    to_hf_config=to_hf_config,
    rows=checked_rows,
    tied=tied,
    hub_name=hub_name,
)
