"""Qwen2.5's language models as a connector (HieraQuery, section 4.2): the layers of ``Qwen2ForCausalLM`` and our
LanguageConnectorConfig, tensor by tensor.

The connector reads no words. The embedding, and the output layer where it is another, are not built; a checkpoint
carries them, so that the way back loses nothing.
"""

from typing import Any

from megatron_unimm.config.hieraquery import LanguageConnectorConfig
from megatron_unimm.convert.qwen_vl import reading_config, refuse_unknown, rope_of, rows_of
from megatron_unimm.convert.table import Family, Row, Source
from megatron_unimm.convert.transforms import Copy, GateUp, QkvInterleave

ARCHITECTURE = "Qwen2ForCausalLM"
CARRIED = ("model.embed_tokens.weight", "lm_head.weight")


def rows(model: LanguageConnectorConfig, layout: str = "hub") -> list[Row]:
    """The whole table."""
    h, m = model.hidden_size, model.mlp_size
    layer = "model.layers.{layer}"
    row = rows_of("scale_connector.layers.{layer}", model.num_layers)
    qkv = QkvInterleave(model.num_heads, model.num_kv_heads, model.head_size)
    heads, groups = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    sizes = {"q_proj": heads, "k_proj": groups, "v_proj": groups}
    weights = ((f"{layer}.self_attn.{name}.weight", (size, h)) for name, size in sizes.items())
    biases = ((f"{layer}.self_attn.{name}.bias", (size,)) for name, size in sizes.items())
    gate_up = ((f"{layer}.mlp.{name}_proj.weight", (m, h)) for name in ("gate", "up"))
    return [
        row("self_attention.linear_qkv.layer_norm_weight", Copy(), (f"{layer}.input_layernorm.weight", (h,))),
        row("self_attention.linear_qkv.weight", qkv, *weights),
        row("self_attention.linear_qkv.bias", qkv, *biases),
        row("self_attention.linear_proj.weight", Copy(), (f"{layer}.self_attn.o_proj.weight", (h, heads))),
        row("mlp.linear_fc1.layer_norm_weight", Copy(), (f"{layer}.post_attention_layernorm.weight", (h,))),
        row("mlp.linear_fc1.weight", GateUp(), *gate_up),
        row("mlp.linear_fc2.weight", Copy(), (f"{layer}.mlp.down_proj.weight", (h, m))),
        Row((Source("model.norm.weight", (h,)),), "scale_connector.final_layernorm.weight", Copy()),
    ]


def to_connector_config(config: dict[str, Any], added_tokens: dict[str, int] | None = None) -> LanguageConnectorConfig:
    """Read ``config.json``.

    Raises:
        CheckpointError: a value is missing, or describes a model that is not Qwen2.5 as published.
    """
    refuse_unknown(config, config, {"hidden_act": (config.get("hidden_act", "silu"), "silu")}, ("default",))
    return reading_config(
        lambda: LanguageConnectorConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_size=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            mlp_size=config["intermediate_size"],
            rope_theta=rope_of(config).get("rope_theta", config.get("rope_theta", 1e6)),
            norm_epsilon=config["rms_norm_eps"],
        )
    )


def to_hf_config(model: LanguageConnectorConfig) -> dict[str, Any]:
    """``config.json`` of layers that were not imported; what concerns words is left to the reader."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.mlp_size,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_epsilon,
        "use_sliding_window": False,
    }


QWEN2 = Family(
    name="qwen2",
    architectures=(ARCHITECTURE,),
    config_class=LanguageConnectorConfig,
    to_config=to_connector_config,
    to_hf_config=to_hf_config,
    rows=rows,
    carried=lambda name: name in CARRIED,
)
