"""From our small config sections to Megatron-Core's TransformerConfig. The only place that names its fields."""

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megatron_unimm.config.hieraquery import LanguageConnectorConfig
from megatron_unimm.config.mmdit import MMDiT
from megatron_unimm.config.model import BackboneConfig, Qwen25VisionConfig, SiglipConfig, VisionEncoder
from megatron_unimm.config.parallel import RecomputeConfig, SystemConfig
from megatron_unimm.config.queries import CONNECTOR_HEAD_SIZE, CONNECTOR_MLP_RATIO
from megatron_unimm.config.tokenizer import StreamLayersConfig
from megatron_unimm.parallel.platform import Platform

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def backbone_transformer_config(model: BackboneConfig, system: SystemConfig, platform: Platform) -> TransformerConfig:
    """The decoder's configuration, spread over the whole layout."""
    parallel = system.parallel
    fields: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.mlp_size,
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        cuda_graph_impl=system.cuda_graph,
        **_spread(system, platform),
    )
    if model.moe is not None:
        moe = model.moe
        fields |= dict(
            num_moe_experts=moe.num_experts,
            moe_router_topk=moe.top_k,
            moe_ffn_hidden_size=moe.expert_mlp_size,
            moe_shared_expert_intermediate_size=moe.shared_expert_size or None,
            moe_router_load_balancing_type="aux_loss" if moe.aux_loss_coeff else "none",
            moe_aux_loss_coeff=moe.aux_loss_coeff,
            moe_z_loss_coeff=moe.z_loss_coeff or None,
            moe_layer_freq=[int(moe.in_layer(number)) for number in range(model.num_layers)],
            moe_token_dispatcher_type="alltoall",
            moe_grouped_gemm=False,
            moe_router_dtype="fp32",
        )
    return TransformerConfig(**fields)


def mmdit_transformer_config(model: MMDiT, system: SystemConfig, platform: Platform) -> TransformerConfig:
    """The diffusion transformer's configuration, spread over the whole layout.

    Layer norms and modulations are our own (``models/mmdit/modulation.py``); ``normalization`` is that of queries and
    keys.
    """
    fields: dict[str, Any] = dict(
        num_layers=model.num_blocks,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.mlp_size,
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
        qk_layernorm=True,  # sums the norms' gradients over tensor-parallel ranks, whose heads share them
        **_spread(system, platform),
    )
    return TransformerConfig(**(fields | PLAIN_VIT | dict(normalization="RMSNorm")))


def vision_transformer_config(
    model: VisionEncoder | SiglipConfig, system: SystemConfig, platform: Platform
) -> TransformerConfig:
    """The vision tower's configuration: tensor parallel, whole on the first pipeline stage, the row's images on
    every context rank."""
    fields: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        ffn_hidden_size=model.mlp_size,
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=True,
        **_common(system, platform),
        **_recompute(system.recompute),
        # Never in FP8, whose products need a multiple of 8 rows (128 in blocks) and of 16 columns: an image has any
        # number of patches, and Qwen2.5-VL's MLP is 3420 wide.
    )
    if not isinstance(model, Qwen25VisionConfig):
        fields |= PLAIN_VIT
    return TransformerConfig(**fields)


def connector_transformer_config(
    hidden_size: int, num_layers: int, system: SystemConfig, platform: Platform
) -> TransformerConfig:
    """Layers over a picture's queries: tensor parallel, whole on the last pipeline stage (MetaQuery's connector,
    arXiv 2504.06256: heads of 64, an MLP of four times the width, and here the gated one of the language model)."""
    fields: dict[str, Any] = dict(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // CONNECTOR_HEAD_SIZE,
        kv_channels=CONNECTOR_HEAD_SIZE,
        ffn_hidden_size=CONNECTOR_MLP_RATIO * hidden_size,
        layernorm_epsilon=1e-6,
        add_bias_linear=False,
        **_common(system, platform),
        **_recompute(system.recompute),
        # Never in FP8: a row may hold any number of queries.
    )
    return TransformerConfig(**fields)


def language_connector_transformer_config(
    model: LanguageConnectorConfig, system: SystemConfig, platform: Platform
) -> TransformerConfig:
    """Layers of a language model over the queries of pictures: tensor parallel, whole on the first pipeline stage."""
    fields: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.mlp_size,
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=True,
        **_common(system, platform),
        **_recompute(system.recompute),
        # Never in FP8: a row may hold any number of queries.
    )
    return TransformerConfig(**fields)


def stream_transformer_config(model: StreamLayersConfig, system: SystemConfig, platform: Platform) -> TransformerConfig:
    """Layers over the cells of pictures: tensor and sequence parallel, whole on one pipeline stage."""
    fields: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        kv_channels=model.hidden_size // model.num_heads,
        ffn_hidden_size=model.mlp_size,
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
        sequence_parallel=system.parallel.sequence,
        **_common(system, platform),
        **_recompute(system.recompute),
        # Never in FP8: a row may hold any number of cells.
    )
    return TransformerConfig(**(fields | PLAIN_VIT))


PLAIN_VIT: dict[str, Any] = dict(
    normalization="LayerNorm",
    gated_linear_unit=False,
    activation_func=partial(F.gelu, approximate="tanh"),
    # Megatron-Core's fused bias and GELU knows its own GELU only.
    bias_activation_fusion=False,
)
"""Layers of a ViT that is no language model in disguise: LayerNorm and a plain GELU MLP."""


def whole_sequence(config: TransformerConfig) -> TransformerConfig:
    """The same configuration for an output layer or a head, which read positions already gathered; they stay out of
    FP8."""
    config = copy.copy(config)
    config.sequence_parallel = False
    config.tp_comm_overlap = False
    config.fp8 = None
    return config


def _spread(system: SystemConfig, platform: Platform) -> dict[str, Any]:
    """What a trunk has that is spread over the whole layout."""
    parallel = system.parallel
    fields: dict[str, Any] = dict(
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        cp_comm_type="p2p" if parallel.context > 1 else None,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=DTYPES[system.precision.dtype],
        tp_comm_overlap=system.overlap.tensor_parallel,
        **_common(system, platform),
        **_recompute(system.recompute),
        **_fp8(system),
    )
    if parallel.layers_per_stage is not None and parallel.pipeline > 1:
        fields["pipeline_model_parallel_layout"] = _layout(parallel.layers_per_stage)
    return fields


def _common(system: SystemConfig, platform: Platform) -> dict[str, Any]:
    dtype = DTYPES[system.precision.dtype]
    return dict(
        tensor_model_parallel_size=system.parallel.tensor,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Weights are drawn whole on the host and cut, so that a new module is the same at every layout.
        use_cpu_initialization=True,
        perform_initialization=True,
        calculate_per_token_loss=True,
        bias_activation_fusion=platform.is_gpu,
        bias_dropout_fusion=platform.is_gpu,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=platform.is_gpu,
    )


def _recompute(recompute: RecomputeConfig) -> dict[str, Any]:
    if recompute.granularity == "none":
        return {}
    if recompute.granularity == "selective":
        return dict(recompute_granularity="selective", recompute_modules=list(recompute.modules))
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=recompute.num_layers)


def _fp8(system: SystemConfig) -> dict[str, Any]:
    fp8 = system.precision.fp8
    if fp8 is None:
        return {}
    return dict(fp8=fp8.format, fp8_recipe=fp8.recipe, first_last_layers_bf16=fp8.first_last_layers_bf16)


def _layout(layers_per_stage: list[int]) -> list[list[str]]:
    """Megatron-Core's pipeline layout: what each stage holds, in order."""
    stages = [["decoder"] * count for count in layers_per_stage]
    stages[0] = ["embedding", *stages[0]]
    stages[-1] = [*stages[-1], "loss"]
    return stages
