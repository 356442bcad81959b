"""Stable Diffusion 3 and 3.5 of diffusers (arXiv 2403.03206) and our ImageGeneratorConfig, tensor by tensor."""

from typing import Any

from megatron_unimm.config.mmdit import ImageGeneratorConfig, Sd3Config, VaeConfig
from megatron_unimm.convert import autoencoder_kl, pipeline
from megatron_unimm.convert.mmdit import MMDIT, Part, ends_rows, joint_block_rows
from megatron_unimm.convert.pipeline import CONFIG, VAE, refuse_fields
from megatron_unimm.convert.qwen_vl import reading_config
from megatron_unimm.convert.table import Family, Row
from megatron_unimm.convert.transforms import ChannelsFirstOutput, ConvToLinear, Copy, Squeeze

CLASS = "SD3Transformer2DModel"
QK_NORM = "rms_norm"
FIELDS = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "patch_size",
    "joint_attention_dim",
    "pooled_projection_dim",
    "pos_embed_max_size",
    "sample_size",
    "dual_attention_layers",
)
"""What :func:`to_config` reads."""


def rows(model: ImageGeneratorConfig, layout: str = "hub") -> list[Row]:
    """The table."""
    m = model.mmdit
    assert isinstance(m, Sd3Config)
    theirs = pipeline.prefix_of(model)
    h, kernel = m.hidden_size, (m.latent_channels, m.patch_size, m.patch_size)
    part = Part(theirs, MMDIT)
    table = [
        part.row(["pos_embed.proj.weight"], "latent_embedder.linear.weight", (h, *kernel), ConvToLinear(kernel)),
        part.row(["pos_embed.proj.bias"], "latent_embedder.linear.bias", (h,), Copy()),
        part.row(["pos_embed.pos_embed"], "latent_embedder.position_table", (1, m.position_grid**2, h), Squeeze()),
        *ends_rows(theirs, m, guidance=False, output=ChannelsFirstOutput(m.latent_channels)),
        *joint_block_rows(theirs, m, m.num_layers, qk_norm=m.qk_norm, text_ends=True, dual=m.dual_attention_layers),
    ]
    assert model.vae is None or isinstance(model.vae, VaeConfig)
    return table + ([] if model.vae is None else autoencoder_kl.rows(model.vae))


def to_config(config: dict[str, Any], added_tokens: dict[str, int] | None = None) -> ImageGeneratorConfig:
    """Read what :func:`pipeline.read_model` reads of a pipeline or of a transformer alone.

    Raises:
        CheckpointError: a value is missing, or describes a model that we do not build.
    """
    where = f"transformer/{CONFIG}" if VAE in config else CONFIG
    transformer = pipeline.transformer_config(config)
    built = {
        "out_channels": transformer.get("in_channels"),
        "caption_projection_dim": transformer.get("num_attention_heads", 0) * transformer.get("attention_head_dim", 0),
        "qk_norm": QK_NORM,
    }
    refuse_fields(transformer, where, built, FIELDS)
    vae = autoencoder_kl.to_vae_config(config[VAE]) if VAE in config else None
    mmdit = reading_config(
        lambda: Sd3Config(
            family="sd3",
            num_layers=transformer["num_layers"],
            num_heads=transformer["num_attention_heads"],
            head_size=transformer["attention_head_dim"],
            latent_channels=transformer["in_channels"],
            patch_size=transformer["patch_size"],
            condition_size=transformer["joint_attention_dim"],
            pooled_size=transformer["pooled_projection_dim"],
            position_grid=transformer["pos_embed_max_size"],
            base_grid=transformer["sample_size"] // transformer["patch_size"],
            qk_norm=transformer.get("qk_norm") is not None,
            dual_attention_layers=list(transformer.get("dual_attention_layers") or ()),
        ),
        where,
    )
    return reading_config(lambda: ImageGeneratorConfig(mmdit=mmdit, vae=vae), where)


def to_hf_config(model: ImageGeneratorConfig) -> dict[str, Any]:
    """The config files of a model that was not imported."""
    m = model.mmdit
    assert isinstance(m, Sd3Config)
    assert model.vae is None or isinstance(model.vae, VaeConfig)
    transformer = {
        "_class_name": CLASS,
        "sample_size": m.base_grid * m.patch_size,
        "patch_size": m.patch_size,
        "in_channels": m.latent_channels,
        "out_channels": m.latent_channels,
        "num_layers": m.num_layers,
        "attention_head_dim": m.head_size,
        "num_attention_heads": m.num_heads,
        "joint_attention_dim": m.condition_size,
        "caption_projection_dim": m.hidden_size,
        "pooled_projection_dim": m.pooled_size,
        "pos_embed_max_size": m.position_grid,
        "dual_attention_layers": m.dual_attention_layers,
        "qk_norm": QK_NORM if m.qk_norm else None,
    }
    return pipeline.pipeline_config(
        "StableDiffusion3Pipeline",
        transformer,
        None if model.vae is None else autoencoder_kl.to_hf_config(model.vae),
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
        [f"{part}{number}" for part in ("tokenizer", "text_encoder") for number in ("", "_2", "_3")],
    )


SD3 = Family(
    name="sd3",
    architectures=(CLASS,),
    config_class=ImageGeneratorConfig,
    to_config=to_config,
    to_hf_config=to_hf_config,
    rows=rows,
    library="diffusers",
    folders=pipeline.folders,
)
