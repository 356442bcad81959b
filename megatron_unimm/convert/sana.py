"""SANA of diffusers (arXiv 2410.10629) and our ImageGeneratorConfig, tensor by tensor."""

from typing import Any

from megatron_unimm.config.mmdit import DcAeConfig, ImageGeneratorConfig, SanaConfig
from megatron_unimm.convert import autoencoder_dc, pipeline
from megatron_unimm.convert.mmdit import BLOCKS, FREQUENCIES, MMDIT, Part, attention_rows
from megatron_unimm.convert.pipeline import CONFIG, VAE, refuse_fields
from megatron_unimm.convert.qwen_vl import reading_config
from megatron_unimm.convert.table import LAYER, Family, Row
from megatron_unimm.convert.transforms import (
    Chain,
    ChannelsFirstOutput,
    ConvToLinear,
    Copy,
    KvInterleave,
    ValueGatePairs,
)

CLASS = "SanaTransformer2DModel"
FIELDS = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "num_cross_attention_heads",
    "cross_attention_head_dim",
    "in_channels",
    "patch_size",
    "caption_channels",
    "mlp_ratio",
    "attention_bias",
    "sample_size",  # only of positions, which are not there
    "guidance_embeds_scale",  # only of a guidance embedding, which is not there
)
"""What :func:`to_config` reads, or may leave."""


def rows(model: ImageGeneratorConfig, layout: str = "hub") -> list[Row]:
    """The table."""
    m = model.mmdit
    assert isinstance(m, SanaConfig)
    theirs = pipeline.prefix_of(model)
    h, kernel = m.hidden_size, (m.latent_channels, m.patch_size, m.patch_size)
    part = Part(theirs, MMDIT)
    table = [
        part.row(["patch_embed.proj.weight"], "latent_embedder.linear.weight", (h, *kernel), ConvToLinear(kernel)),
        part.row(["patch_embed.proj.bias"], "latent_embedder.linear.bias", (h,), Copy()),
        *part.linear("caption_projection.linear_1", "condition_embedder.linear_1", (h, m.condition_size)),
        *part.linear("caption_projection.linear_2", "condition_embedder.linear_2", (h, h)),
        part.row(["caption_norm.weight"], "condition_embedder.norm.weight", (h,), Copy()),
        *_timestep_rows(part, h),
        *_block_rows(Part(f"{theirs}transformer_blocks.{LAYER}.", BLOCKS, range(m.num_layers)), m),
        part.row(["scale_shift_table"], "final_table", (2, h), Copy()),
        *part.linear("proj_out", "final_linear", (m.patch_dim, h), ChannelsFirstOutput(m.latent_channels)),
    ]
    if model.vae is None:
        return table
    assert isinstance(model.vae, DcAeConfig)
    return table + autoencoder_dc.rows(model.vae)


def _timestep_rows(part: Part, h: int) -> list[Row]:
    theirs, ours = "time_embed.emb.timestep_embedder", "timestep_modulation.timestep_embedder"
    return [
        *part.linear(f"{theirs}.linear_1", f"{ours}.linear_1", (h, FREQUENCIES)),
        *part.linear(f"{theirs}.linear_2", f"{ours}.linear_2", (h, h)),
        *part.linear("time_embed.linear", "timestep_modulation.linear", (6 * h, h)),
    ]


def _block_rows(part: Part, m: SanaConfig) -> list[Row]:
    h, c, width = m.hidden_size, m.cross_size, m.mlp_size
    wide, grid, narrow = (h, 1, 1), (1, 3, 3), (width, 1, 1)  # kernels of the feed-forward layer's convolutions
    pairs, ff = ValueGatePairs(), "feed_forward"
    return [
        part.row(["scale_shift_table"], "modulation_table", (6, h), Copy()),
        *attention_rows(
            part,
            m,
            [f"attn1.to_{x}" for x in "qkv"],
            "attention",
            output="attn1.to_out.0",
            qkv_bias=m.attention_bias,
        ),
        *part.linear("attn2.to_q", "cross_attention.linear_q", (c, h)),
        *part.linear(
            ["attn2.to_k", "attn2.to_v"], "cross_attention.linear_kv", (c, h), KvInterleave(m.num_cross_heads)
        ),
        *part.linear("attn2.to_out.0", "cross_attention.linear_proj", (h, c)),
        part.row(
            ["ff.conv_inverted.weight"],
            f"{ff}.linear_fc1.weight",
            (2 * width, *wide),
            Chain((pairs, ConvToLinear(wide))),
        ),
        part.row(["ff.conv_inverted.bias"], f"{ff}.linear_fc1.bias", (2 * width,), pairs),
        part.row(
            ["ff.conv_depth.weight"], f"{ff}.depthwise.weight", (2 * width, *grid), Chain((pairs, ConvToLinear(grid)))
        ),
        part.row(["ff.conv_depth.bias"], f"{ff}.depthwise.bias", (2 * width,), pairs),
        part.row(["ff.conv_point.weight"], f"{ff}.linear_fc2.weight", (h, *narrow), ConvToLinear(narrow)),
    ]


def to_config(config: dict[str, Any], added_tokens: dict[str, int] | None = None) -> ImageGeneratorConfig:
    """Read what :func:`pipeline.read_model` reads of a pipeline or of a transformer alone.

    Raises:
        CheckpointError: a value is missing, or describes a model that we do not build.
    """
    where = f"transformer/{CONFIG}" if VAE in config else CONFIG
    transformer = pipeline.transformer_config(config)
    built = {
        "out_channels": transformer.get("in_channels"),
        "cross_attention_dim": transformer.get("num_attention_heads", 0) * transformer.get("attention_head_dim", 0),
        "dropout": 0.0,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": None,
        "guidance_embeds": False,
        "qk_norm": None,
        "timestep_scale": 1.0,
    }
    refuse_fields(transformer, where, built, FIELDS)
    vae = autoencoder_dc.to_vae_config(config[VAE]) if VAE in config else None
    mmdit = reading_config(
        lambda: SanaConfig(
            family="sana",
            num_layers=transformer["num_layers"],
            num_heads=transformer["num_attention_heads"],
            head_size=transformer["attention_head_dim"],
            num_cross_heads=transformer["num_cross_attention_heads"],
            cross_head_size=transformer["cross_attention_head_dim"],
            mlp_ratio=transformer["mlp_ratio"],
            attention_bias=transformer.get("attention_bias", False),
            latent_channels=transformer["in_channels"],
            patch_size=transformer["patch_size"],
            condition_size=transformer["caption_channels"],
        ),
        where,
    )
    return reading_config(lambda: ImageGeneratorConfig(mmdit=mmdit, vae=vae), where)


def to_hf_config(model: ImageGeneratorConfig) -> dict[str, Any]:
    """The config files of a model that was not imported."""
    m = model.mmdit
    assert isinstance(m, SanaConfig)
    assert model.vae is None or isinstance(model.vae, DcAeConfig)
    transformer = {
        "_class_name": CLASS,
        "in_channels": m.latent_channels,
        "out_channels": m.latent_channels,
        "patch_size": m.patch_size,
        "num_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "attention_head_dim": m.head_size,
        "num_cross_attention_heads": m.num_cross_heads,
        "cross_attention_head_dim": m.cross_head_size,
        "cross_attention_dim": m.hidden_size,
        "caption_channels": m.condition_size,
        "mlp_ratio": m.mlp_ratio,
        "attention_bias": m.attention_bias,
        "interpolation_scale": None,
    }
    # As published: v is dx/dt with t = 1 at noise, timesteps are 1000 t, and steps are shifted.
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    }
    return pipeline.pipeline_config(
        "SanaPipeline",
        transformer,
        None if model.vae is None else autoencoder_dc.to_hf_config(model.vae),
        scheduler,
        ["tokenizer", "text_encoder"],
    )


SANA = Family(
    name="sana",
    architectures=(CLASS,),
    config_class=ImageGeneratorConfig,
    to_config=to_config,
    to_hf_config=to_hf_config,
    rows=rows,
    library="diffusers",
    folders=pipeline.folders,
)
