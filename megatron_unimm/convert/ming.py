"""Ming-Lite-Omni (``BailingMMNativeForConditionalGeneration``) and our ModelConfig, tensor by tensor.

A BailingMoE language model with a gate for each modality, Qwen2.5-VL's vision tower, and a projector between them.
transformers has no such class: names and numbers are those of the published ``config.json`` and of the modules that its
makers show (https://github.com/inclusionAI/Ming). We read images and text. The audio encoders and the talker are not
built; an imported checkpoint carries their tensors, so that the way back loses nothing.

Positions by ``llm_config.rope_scaling``: null (1.0 as released) counts visual tokens as text; ``3D`` (the preview) is
Qwen2-VL's chunked multimodal rotary, with sections 16, 24, 24, which the code fixes for heads of 128. ``video_rope``
(1.5) lays frequencies and times out otherwise and is refused.
"""

from dataclasses import replace
from typing import Any, Literal

from megatron_unimm.config.model import BackboneConfig, ModelConfig, MoEConfig, ProjectorConfig, TokenIds
from megatron_unimm.config.model import Qwen25VisionConfig as VisionConfig
from megatron_unimm.convert.qwen2_5_vl import to_hf_vision_config, two_linears, vision_config, vision_rows
from megatron_unimm.convert.qwen_vl import reading_config, refuse_parts, refuse_unknown, rope_of, rows_of
from megatron_unimm.convert.table import LAYER, SLICE, Family, Row, Source
from megatron_unimm.convert.transforms import Copy, FusedQkv, GateUp, QkvInterleave
from megatron_unimm.errors import CheckpointError

ARCHITECTURE = "BailingMMNativeForConditionalGeneration"
TEXT = "model.model"
AUDIO = ("audio.", "linear_proj_audio.", "whisper_encoder.", "linear_proj_whisper.", "talker.")
GATES: list[Literal["image", "audio"]] = ["image", "audio"]
MROPE_SECTIONS = [16, 24, 24]
MLP_DEPTH = 2
"""Linears of the projector."""


# ---------------------------------------------------------------------------------------------- tensors


def rows(model: ModelConfig, layout: str = "hub") -> list[Row]:
    """The whole table.

    Raises:
        CheckpointError: the model has parts that Ming-Lite-Omni has not.
    """
    b, v = model.backbone, model.vision_encoder
    projector = v.projector if isinstance(v, VisionConfig) else None
    parts = {
        "no mixture of experts": b.moe is None,
        "dense layers between those with experts": b.moe is not None and b.moe.layer_frequency > 1,
        "some gates only": b.moe is not None and b.moe.gates not in ([], GATES),
        "qk_norm": b.qk_norm,
        "interleaved mrope": b.mrope_interleaved,
        "tied embeddings": b.tie_embeddings,
        "another vision tower": not isinstance(v, VisionConfig),
        "no projector that normalises": projector is None or not projector.normalize,
    }
    refuse_parts(model, ARCHITECTURE, parts)
    assert isinstance(v, VisionConfig)
    assert projector is not None
    sizes = (projector.in_size, v.out_size, v.out_size)
    return [
        *vision_rows(v, "vision"),
        *two_linears("linear_proj", "vision_encoder.projector", sizes),
        *_backbone_rows(b),
    ]


def _backbone_rows(b: BackboneConfig) -> list[Row]:
    h, q, kv = b.hidden_size, b.num_heads * b.head_size, b.num_kv_heads * b.head_size
    layer = f"{TEXT}.layers.{LAYER}"
    attention = f"{layer}.attention"
    qkv = FusedQkv(QkvInterleave(b.num_heads, b.num_kv_heads, b.head_size))
    row = rows_of("backbone.decoder.layers.{layer}", b.num_layers)
    table = [
        _one(f"{TEXT}.word_embeddings.weight", "embedding.word_embeddings.weight", (b.vocab_size, h)),
        row("self_attention.linear_qkv.layer_norm_weight", Copy(), (f"{layer}.input_layernorm.weight", (h,))),
        row("self_attention.linear_qkv.weight", qkv, (f"{attention}.query_key_value.weight", (q + 2 * kv, h))),
        row("self_attention.linear_proj.weight", Copy(), (f"{attention}.dense.weight", (h, q))),
        *_dense_rows(b),
        *_expert_rows(b),
        _one(f"{TEXT}.norm.weight", "decoder.final_layernorm.weight", (h,)),
        _one("model.lm_head.weight", "output_layer.weight", (b.vocab_size, h)),
    ]
    if b.qkv_bias:
        bias = (f"{attention}.query_key_value.bias", (q + 2 * kv,))
        table.append(row("self_attention.linear_qkv.bias", qkv, bias))
    return table


def _one(name: str, ours: str, shape: tuple[int, ...]) -> Row:
    return Row((Source(name, shape),), f"backbone.{ours}", Copy())


def _dense_rows(b: BackboneConfig) -> list[Row]:
    """Of the layers before those with experts."""
    assert b.moe is not None
    if not b.moe.first_layer:
        return []
    h, m, layer = b.hidden_size, b.mlp_size, f"{TEXT}.layers.{LAYER}"
    row = rows_of("backbone.decoder.layers.{layer}", b.moe.first_layer)
    gate_up = ((f"{layer}.mlp.{name}_proj.weight", (m, h)) for name in ("gate", "up"))
    return [
        row("mlp.linear_fc1.layer_norm_weight", Copy(), (f"{layer}.post_attention_layernorm.weight", (h,))),
        row("mlp.linear_fc1.weight", GateUp(), *gate_up),
        row("mlp.linear_fc2.weight", Copy(), (f"{layer}.mlp.down_proj.weight", (h, m))),
    ]


def _expert_rows(b: BackboneConfig) -> list[Row]:
    moe = b.moe
    assert moe is not None
    h, m, n, shared = b.hidden_size, moe.expert_mlp_size, moe.num_experts, moe.shared_expert_size
    layer = f"{TEXT}.layers.{LAYER}"
    row = rows_of("backbone.decoder.layers.{layer}", b.num_layers, moe.first_layer)
    expert, both = f"{layer}.mlp.experts.{SLICE}", f"{layer}.mlp.shared_experts"
    table = [
        row("pre_mlp_layernorm.weight", Copy(), (f"{layer}.post_attention_layernorm.weight", (h,))),
        row("mlp.router.weight", Copy(), (f"{layer}.mlp.gate.weight", (n, h))),
        *(row(f"mlp.router.{gate}_weight", Copy(), (f"{layer}.mlp.{gate}_gate.weight", (n, h))) for gate in moe.gates),
    ]
    up = row(
        "mlp.experts.experts.linear_fc1.weight",
        GateUp(),
        *((f"{expert}.{name}_proj.weight", (m, h)) for name in ("gate", "up")),
    )
    down = row("mlp.experts.experts.linear_fc2.weight", Copy(), (f"{expert}.down_proj.weight", (h, m)))
    table += [replace(each, num_slices=n) for each in (up, down)]
    if shared:
        gate_up = ((f"{both}.{name}_proj.weight", (shared, h)) for name in ("gate", "up"))
        table += [
            row("mlp.shared_experts.linear_fc1.weight", GateUp(), *gate_up),
            row("mlp.shared_experts.linear_fc2.weight", Copy(), (f"{both}.down_proj.weight", (h, shared))),
        ]
    return table


def carried(name: str) -> bool:
    """Audio encoders, their projections, and the talker."""
    return name.startswith(AUDIO)


# ---------------------------------------------------------------------------------------------- config.json


def to_model_config(config: dict[str, Any], added_tokens: dict[str, int] | None = None) -> ModelConfig:
    """Read ``config.json``, which knows all special tokens that we need.

    Raises:
        CheckpointError: a value is missing, or describes a model that is not Ming-Lite-Omni as published.
    """
    text, vision = config.get("llm_config", {}), config.get("vision_config", {})
    activations = {
        "llm_config.hidden_act": (text.get("hidden_act", "silu"), "silu"),
        "vision_config.hidden_act": (vision.get("hidden_act", "silu"), "silu"),
    }
    refuse_unknown(config, text, activations, rope_types=("default", "3D"))
    built = {"use_bias": False, "norm_softmax": False, "tie_word_embeddings": False, "norm_topk_prob": True}
    said: dict[str, tuple[Any, Any]] = {
        f"llm_config.{field}": (text.get(field, value), value) for field, value in built.items()
    }
    said["mlp_depth"] = (config.get("mlp_depth", MLP_DEPTH), MLP_DEPTH)
    for field, (value, only) in said.items():
        if value != only:
            raise CheckpointError("config.json", f"{field} is {value}; only {only}, as published, is built")
    return reading_config(
        lambda: ModelConfig(
            vision_encoder=vision_config(
                vision,
                out_size=text["hidden_size"],
                projector=ProjectorConfig(in_size=vision["out_hidden_size"]),
            ),
            backbone=_backbone_config(text),
            token_ids=_token_ids(text),
            chat_template="ming",
        )
    )


def _backbone_config(text: dict[str, Any]) -> BackboneConfig:
    head_size = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    multimodal = bool(rope_of(text))
    return BackboneConfig(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        head_size=head_size,
        mlp_size=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        max_position=text["max_position_embeddings"],
        normalize_output=text.get("norm_head", False),
        qkv_bias=text.get("use_qkv_bias", False),
        rope_theta=text["rope_theta"],
        mrope_sections=rope_of(text).get("mrope_section", MROPE_SECTIONS) if multimodal else [head_size // 2, 0, 0],
        positions="multimodal" if multimodal else "sequential",
        norm_epsilon=text["rms_norm_eps"],
        moe=MoEConfig(
            num_experts=text["num_experts"],
            top_k=text["num_experts_per_tok"],
            expert_mlp_size=text["moe_intermediate_size"],
            shared_expert_size=text["moe_intermediate_size"] * (text.get("num_shared_experts") or 0),
            first_layer=text.get("first_k_dense_replace", 0),
            gates=list(GATES) if text.get("multi_gate", False) else [],
        ),
    )


def _token_ids(text: dict[str, Any]) -> TokenIds:
    """The marks of an image are the two tokens behind that of its patches, as the published code has it."""
    patch, end = text["image_patch_token"], text["eos_token_id"]
    return TokenIds(
        pad=text.get("pad_token_id", end),
        im_start=end,
        im_end=end,
        vision_start=text.get("image_start_token", patch + 1),
        vision_end=patch + 2,
        image_pad=patch,
    )


def to_hf_config(model: ModelConfig) -> dict[str, Any]:
    """A ``config.json`` for a model that was not imported; it has no audio."""
    v, b, ids = model.vision_encoder, model.backbone, model.token_ids
    moe = b.moe
    assert isinstance(v, VisionConfig)
    assert moe is not None
    rope: dict[str, Any] | None = None
    if b.positions == "multimodal":
        rope = {"type": "3D", "factor": None}
        rope |= {} if b.mrope_sections == MROPE_SECTIONS else {"mrope_section": b.mrope_sections}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "bailingmm",
        "mlp_depth": MLP_DEPTH,
        "audio_config": None,
        "whisper_config": None,
        "talker_config": None,
        "llm_config": {
            "architectures": ["BailingMoeForCausalLM"],
            "model_type": "bailing_moe",
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
            "rope_scaling": rope,
            "use_qkv_bias": b.qkv_bias,
            "use_bias": False,
            "norm_head": b.normalize_output,
            "norm_softmax": False,
            "tie_word_embeddings": False,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert_mlp_size,
            "num_shared_experts": moe.shared_expert_size // moe.expert_mlp_size,
            "first_k_dense_replace": moe.first_layer,
            "norm_topk_prob": True,
            "multi_gate": bool(moe.gates),
            "image_patch_token": ids.image_pad,
            "image_start_token": ids.vision_start,
            "eos_token_id": ids.im_end,
            "pad_token_id": ids.pad,
        },
        "vision_config": to_hf_vision_config(v, "qwen2_5_vit"),
    }


MING_LITE_OMNI = Family(
    name="ming_lite_omni",
    architectures=(ARCHITECTURE,),
    config_class=ModelConfig,
    to_config=to_model_config,
    to_hf_config=to_hf_config,
    rows=rows,
    carried=carried,
)
