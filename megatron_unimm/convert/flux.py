"""FLUX.1 of diffusers and our ImageGeneratorConfig, tensor by tensor."""

from typing import Any

from megatron_unimm.config.mmdit import FluxConfig, ImageGeneratorConfig, VaeConfig
from megatron_unimm.convert import autoencoder_kl, pipeline
from megatron_unimm.convert.mmdit import BLOCKS, MLP_RATIO, MMDIT, Part, attention_rows, ends_rows, joint_block_rows
from megatron_unimm.convert.pipeline import CONFIG, VAE, refuse_fields
from megatron_unimm.convert.qwen_vl import reading_config
from megatron_unimm.convert.table import LAYER, Family, Row
from megatron_unimm.errors import CheckpointError

CLASS = "FluxTransformer2DModel"
PATCH_SIZE = 2
"""Side of the squares of latents that FLUX's pipelines pack into channels; the transformer's own patches are 1."""
THETA = 10000.0
"""Base of the rotary frequencies in diffusers' class."""
FIELDS = (
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)
"""What :func:`to_config` reads."""


def rows(model: ImageGeneratorConfig, layout: str = "hub") -> list[Row]:
    """The table. Single-stream blocks are numbered on behind the others."""
    m = model.mmdit
    assert isinstance(m, FluxConfig)
    theirs = pipeline.prefix_of(model)
    h = m.hidden_size
    single = Part(f"{theirs}single_transformer_blocks.{LAYER}.", BLOCKS, range(m.num_single_layers), m.num_layers)
    table = [
        *Part(theirs, MMDIT).linear("x_embedder", "latent_embedder.linear", (h, m.patch_dim)),
        *ends_rows(theirs, m, m.guidance),
        *joint_block_rows(theirs, m, m.num_layers, qk_norm=True, text_ends=False),
        *single.linear("norm.linear", "modulation.linear", (3 * h, h)),
        *attention_rows(single, m, [f"attn.to_{x}" for x in "qkv"], "attention", [f"attn.norm_{x}" for x in "qk"]),
        *single.linear("proj_mlp", "linear_fc1", (MLP_RATIO * h, h)),
        *single.linear("proj_out", "linear_out", (h, (1 + MLP_RATIO) * h)),
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
    channels = transformer.get("in_channels", PATCH_SIZE**2)
    refuse_fields(transformer, where, {"patch_size": 1, "out_channels": channels}, FIELDS)
    if channels % PATCH_SIZE**2:
        raise CheckpointError(where, f"in_channels is {channels}; only packed latents, a multiple of 4, are built")
    vae = autoencoder_kl.to_vae_config(config[VAE]) if VAE in config else None
    mmdit = reading_config(
        lambda: FluxConfig(
            family="flux",
            num_layers=transformer["num_layers"],
            num_single_layers=transformer["num_single_layers"],
            num_heads=transformer["num_attention_heads"],
            head_size=transformer["attention_head_dim"],
            latent_channels=transformer["in_channels"] // PATCH_SIZE**2,
            patch_size=PATCH_SIZE,
            condition_size=transformer["joint_attention_dim"],
            pooled_size=transformer["pooled_projection_dim"],
            rotary_axes=list(transformer.get("axes_dims_rope", (16, 56, 56))),
            rotary_theta=THETA,
            guidance=transformer["guidance_embeds"],
        ),
        where,
    )
    return reading_config(lambda: ImageGeneratorConfig(mmdit=mmdit, vae=vae), where)


def to_hf_config(model: ImageGeneratorConfig) -> dict[str, Any]:
    """The config files of a model that was not imported.

    Raises:
        CheckpointError: it packs latents or turns positions in another way than diffusers' class.
    """
    m = model.mmdit
    assert isinstance(m, FluxConfig)
    assert model.vae is None or isinstance(model.vae, VaeConfig)
    for field, value in {"patch_size": PATCH_SIZE, "rotary_theta": THETA}.items():
        if m.__dict__[field] != value:
            raise CheckpointError(
                "generator.mmdit", f"{field} is {m.__dict__[field]}, but {CLASS} has {value}; it cannot be converted"
            )
    transformer = {
        "_class_name": CLASS,
        "patch_size": 1,
        "in_channels": m.patch_dim,
        "out_channels": None,
        "num_layers": m.num_layers,
        "num_single_layers": m.num_single_layers,
        "attention_head_dim": m.head_size,
        "num_attention_heads": m.num_heads,
        "joint_attention_dim": m.condition_size,
        "pooled_projection_dim": m.pooled_size,
        "guidance_embeds": m.guidance,
        "axes_dims_rope": m.rotary_axes,
    }
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        # As published with FLUX.1-dev, which has the guidance embedding, and -schnell, which has not.
        "shift": 3.0 if m.guidance else 1.0,
        "use_dynamic_shifting": m.guidance,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }
    return pipeline.pipeline_config(
        "FluxPipeline",
        transformer,
        None if model.vae is None else autoencoder_kl.to_hf_config(model.vae),
        scheduler,
        [f"{part}{number}" for part in ("tokenizer", "text_encoder") for number in ("", "_2")],
    )


FLUX = Family(
    name="flux",
    architectures=(CLASS,),
    config_class=ImageGeneratorConfig,
    to_config=to_config,
    to_hf_config=to_hf_config,
    rows=rows,
    library="diffusers",
    folders=pipeline.folders,
)
