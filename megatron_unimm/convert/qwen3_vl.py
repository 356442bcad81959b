"""Qwen3-VL, dense and mixture of experts, and our ModelConfig, tensor by tensor.

Experts are one tensor per layer. The hub stores their products input first, transformers 5 (which reads both) writes
them output first, as Megatron has them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_unimm.config.model import BackboneConfig, ModelConfig, MoEConfig, Qwen3VisionConfig
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
from megatron_unimm.convert.table import LAYER, Family, Row, Source, TiedTo
from megatron_unimm.convert.transforms import ConvToLinear, Copy, FusedQkv, QkvInterleave, Transpose
from megatron_unimm.errors import CheckpointError

DENSE = "Qwen3VLForConditionalGeneration"
MOE = "Qwen3VLMoeForConditionalGeneration"
NORM_EPSILON = 1e-6
"""LayerNorm epsilon of the vision tower, fixed in transformers' code."""
TEXT = "model.language_model"
VISION_ACTIVATION = "gelu_pytorch_tanh"


# ---------------------------------------------------------------------------------------------- tensors


def dense_rows(model: ModelConfig, layout: str = "hub") -> list[Row]:
    """The whole table of a dense model.

    Raises:
        CheckpointError: the model has parts that Qwen3-VL has not.
    """
    _refuse(model, DENSE, {"a mixture of experts": model.backbone.moe is not None})
    return [*_vision_rows(model), *backbone_rows(model.backbone, TEXT)]


def moe_rows(model: ModelConfig, layout: str = "hub") -> list[Row]:
    """The whole table of a mixture of experts; ``layout`` says how folders store the experts.

    Raises:
        CheckpointError: the model has parts that Qwen3-VL-MoE has not.
    """
    moe = model.backbone.moe
    parts = {
        "no mixture of experts": moe is None,
        "a shared expert": moe is not None and moe.shared_expert_size > 0,
        "dense layers between those with experts": moe is not None and moe.layer_frequency > 1,
    }
    _refuse(model, MOE, parts)
    assert moe is not None
    return [*_vision_rows(model), *backbone_rows(model.backbone, TEXT, _expert_rows(model.backbone, moe, layout))]


def _refuse(model: ModelConfig, architecture: str, parts: dict[str, bool]) -> None:
    b = model.backbone
    common = {
        "qkv_bias": b.qkv_bias,
        "no qk_norm": not b.qk_norm,
        "chunked mrope": not b.mrope_interleaved,
        "another vision tower": not isinstance(model.vision_encoder, Qwen3VisionConfig),
    }
    refuse_parts(model, architecture, common | parts_of_others(b) | parts)


def _expert_rows(b: BackboneConfig, moe: MoEConfig, layout: str) -> tuple[Row, ...]:
    h, m, n = b.hidden_size, moe.expert_mlp_size, moe.num_experts
    layer = f"{TEXT}.layers.{LAYER}"
    row = rows_of("backbone.decoder.layers.{layer}", b.num_layers)
    input_first = layout == "hub"
    transform = Transpose() if input_first else Copy()
    gate_up = (n, h, 2 * m) if input_first else (n, 2 * m, h)
    down = (n, m, h) if input_first else (n, h, m)
    experts = f"{layer}.mlp.experts"
    return (
        row("pre_mlp_layernorm.weight", Copy(), (f"{layer}.post_attention_layernorm.weight", (h,))),
        row("mlp.router.weight", Copy(), (f"{layer}.mlp.gate.weight", (n, h))),
        replace(
            row("mlp.experts.experts.linear_fc1.weight", transform, (f"{experts}.gate_up_proj", gate_up)), num_slices=n
        ),
        replace(row("mlp.experts.experts.linear_fc2.weight", transform, (f"{experts}.down_proj", down)), num_slices=n),
    )


def _vision_rows(model: ModelConfig) -> list[Row]:
    v = model.vision_encoder
    assert isinstance(v, Qwen3VisionConfig)
    h, m = v.hidden_size, v.mlp_size
    kernel = (v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    block, here = "model.visual.blocks.{layer}", "vision_encoder"
    row = rows_of("vision_encoder.blocks.layers.{layer}", v.num_layers)
    qkv = FusedQkv(QkvInterleave(v.num_heads, v.num_heads, h // v.num_heads))
    attention, mlp = "self_attention.linear", "mlp.linear"
    table = [
        Row(
            (Source("model.visual.patch_embed.proj.weight", (h, *kernel)),),
            f"{here}.patch_embed.weight",
            ConvToLinear(kernel),
        ),
        Row((Source("model.visual.patch_embed.proj.bias", (h,)),), f"{here}.patch_embed.bias", Copy()),
        Row(
            (Source("model.visual.pos_embed.weight", (v.num_position_embeddings, h)),),
            f"{here}.position_embed.weight",
            Copy(),
        ),
        row(f"{attention}_qkv.weight", qkv, (f"{block}.attn.qkv.weight", (3 * h, h))),
        row(f"{attention}_qkv.bias", qkv, (f"{block}.attn.qkv.bias", (3 * h,))),
        row(f"{attention}_proj.weight", Copy(), (f"{block}.attn.proj.weight", (h, h))),
        row(f"{attention}_proj.bias", Copy(), (f"{block}.attn.proj.bias", (h,))),
        row(f"{mlp}_fc1.weight", Copy(), (f"{block}.mlp.linear_fc1.weight", (m, h))),
        row(f"{mlp}_fc1.bias", Copy(), (f"{block}.mlp.linear_fc1.bias", (m,))),
        row(f"{mlp}_fc2.weight", Copy(), (f"{block}.mlp.linear_fc2.weight", (h, m))),
        row(f"{mlp}_fc2.bias", Copy(), (f"{block}.mlp.linear_fc2.bias", (h,))),
    ]
    for kind in ("weight", "bias"):
        table += [
            row(f"{attention}_qkv.layer_norm_{kind}", Copy(), (f"{block}.norm1.{kind}", (h,))),
            row(f"{mlp}_fc1.layer_norm_{kind}", Copy(), (f"{block}.norm2.{kind}", (h,))),
        ]
    table += _merger_rows("model.visual.merger", f"{here}.merger", v, h, None)
    if v.deepstack_layers:
        merged = h * v.spatial_merge_size**2
        names = "model.visual.deepstack_merger_list.{layer}", f"{here}.deepstack_mergers.{{layer}}"
        table += _merger_rows(*names, v, merged, len(v.deepstack_layers))
    return table


def _merger_rows(theirs: str, ours: str, v: Qwen3VisionConfig, norm: int, count: int | None) -> list[Row]:
    merged = v.hidden_size * v.spatial_merge_size**2
    shapes = {
        "norm.weight": (norm,),
        "norm.bias": (norm,),
        "linear_fc1.weight": (merged, merged),
        "linear_fc1.bias": (merged,),
        "linear_fc2.weight": (v.out_size, merged),
        "linear_fc2.bias": (v.out_size,),
    }
    layers = None if count is None else range(count)
    return [
        Row((Source(f"{theirs}.{name}", shape),), f"{ours}.{name}", Copy(), layers) for name, shape in shapes.items()
    ]


def tied(model: ModelConfig) -> Sequence[TiedTo]:
    """The output layer of a model that shares it with the embedding."""
    return tied_to(model, f"{TEXT}.embed_tokens.weight")


# ---------------------------------------------------------------------------------------------- config.json


def to_model_config(config: dict[str, Any], added_tokens: dict[str, int] | None = None) -> ModelConfig:
    """Read ``config.json``. ``added_tokens`` are the tokenizer's special tokens, of which it knows only some.

    Raises:
        CheckpointError: a value is missing, or describes a model that is not Qwen3-VL as published.
    """
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    activations = {
        "text_config.hidden_act": (text.get("hidden_act", "silu"), "silu"),
        "vision_config.hidden_act": (vision.get("hidden_act", VISION_ACTIVATION), VISION_ACTIVATION),
    }
    refuse_unknown(config, text, activations)
    if text.get("attention_bias"):
        raise CheckpointError("config.json", "text_config.attention_bias is true; published models have none")
    return reading_config(
        lambda: ModelConfig(
            vision_encoder=_vision_config(vision),
            backbone=_backbone_config(config, text),
            token_ids=token_ids(config, added_tokens or {}),
        )
    )


def _vision_config(vision: dict[str, Any]) -> Qwen3VisionConfig:
    return Qwen3VisionConfig(
        family="qwen3",
        num_layers=vision["depth"],
        hidden_size=vision["hidden_size"],
        num_heads=vision["num_heads"],
        mlp_size=vision["intermediate_size"],
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        spatial_merge_size=vision["spatial_merge_size"],
        in_channels=vision.get("in_channels", 3),
        out_size=vision["out_hidden_size"],
        norm_epsilon=NORM_EPSILON,
        num_position_embeddings=vision["num_position_embeddings"],
        deepstack_layers=list(vision["deepstack_visual_indexes"]),
    )


def _backbone_config(config: dict[str, Any], text: dict[str, Any]) -> BackboneConfig:
    rope = rope_of(text)
    return BackboneConfig(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        head_size=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        mlp_size=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        max_position=text["max_position_embeddings"],
        # transformers before 5 put it inside text_config, the hub at the top.
        tie_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        qkv_bias=False,
        qk_norm=True,
        rope_theta=rope.get("rope_theta", text.get("rope_theta", 5e6)),
        mrope_sections=rope["mrope_section"],
        mrope_interleaved=True,
        norm_epsilon=text["rms_norm_eps"],
        moe=_moe_config(text) if "num_experts_per_tok" in text else None,
    )


def _moe_config(text: dict[str, Any]) -> MoEConfig:
    if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
        raise CheckpointError(
            "config.json", "mlp_only_layers or decoder_sparse_step make some layers dense; published models have none"
        )
    if not text.get("norm_topk_prob", True):
        raise CheckpointError("config.json", "norm_topk_prob is false; weights of the chosen experts must sum to 1")
    return MoEConfig(
        # The hub calls them num_experts, transformers 5 num_local_experts.
        num_experts=text.get("num_local_experts") or text["num_experts"],
        top_k=text["num_experts_per_tok"],
        expert_mlp_size=text["moe_intermediate_size"],
    )


def to_hf_config(model: ModelConfig) -> dict[str, Any]:
    """A ``config.json`` in the hub's form for a model that was not imported."""
    v, b, ids = model.vision_encoder, model.backbone, model.token_ids
    assert isinstance(v, Qwen3VisionConfig)
    kind = "qwen3_vl" if b.moe is None else "qwen3_vl_moe"
    text: dict[str, Any] = {
        "model_type": f"{kind}_text",
        "attention_bias": False,
        "hidden_act": "silu",
        "head_dim": b.head_size,
        "hidden_size": b.hidden_size,
        "intermediate_size": b.mlp_size,
        "num_hidden_layers": b.num_layers,
        "num_attention_heads": b.num_heads,
        "num_key_value_heads": b.num_kv_heads,
        "vocab_size": b.vocab_size,
        "max_position_embeddings": b.max_position,
        "rms_norm_eps": b.norm_epsilon,
        "rope_theta": b.rope_theta,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": b.mrope_sections},
        "eos_token_id": ids.im_end,
    }
    if b.moe is not None:
        text |= {
            "num_experts": b.moe.num_experts,
            "num_experts_per_tok": b.moe.top_k,
            "moe_intermediate_size": b.moe.expert_mlp_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return {
        "architectures": [DENSE if b.moe is None else MOE],
        "model_type": kind,
        "tie_word_embeddings": b.tie_embeddings,
        "vision_start_token_id": ids.vision_start,
        "vision_end_token_id": ids.vision_end,
        "image_token_id": ids.image_pad,
        "video_token_id": ids.image_pad + 1,
        "text_config": text,
        "vision_config": {
            "model_type": kind,
            "depth": v.num_layers,
            "hidden_act": VISION_ACTIVATION,
            "hidden_size": v.hidden_size,
            "intermediate_size": v.mlp_size,
            "num_heads": v.num_heads,
            "in_channels": v.in_channels,
            "out_hidden_size": v.out_size,
            "patch_size": v.patch_size,
            "spatial_merge_size": v.spatial_merge_size,
            "temporal_patch_size": v.temporal_patch_size,
            "num_position_embeddings": v.num_position_embeddings,
            "deepstack_visual_indexes": v.deepstack_layers,
        },
    }


QWEN3_VL = Family(
    name="qwen3_vl",
    architectures=(DENSE,),
    config_class=ModelConfig,
    to_config=to_model_config,
    to_hf_config=to_hf_config,
    rows=dense_rows,
    tied=tied,
)
QWEN3_VL_MOE = Family(
    name="qwen3_vl_moe",
    architectures=(MOE,),
    config_class=ModelConfig,
    to_config=to_model_config,
    to_hf_config=to_hf_config,
    rows=moe_rows,
    tied=tied,
    # Where both fit (expert_mlp_size half of hidden_size) transformers takes what it finds for its own.
    layouts=("transformers", "hub"),
)
