"""Sections of the image generator: a diffusion transformer over the latents of a VAE. Most are multimodal (MMDiT),
which gave the section its name."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_unimm.config.base import Section


class DiffusionTransformerConfig(Section):
    """What all diffusion transformers share: tokens of an image and of its condition, modulated by the timestep."""

    vae_family: ClassVar[str] = "autoencoder_kl"
    """Of the VAE that its pipelines have in diffusers."""
    rows_per_vector: ClassVar[int] = 1
    """Rows of hidden states that a conditioning vector takes between pipeline stages."""
    along_context: ClassVar[bool] = True
    """Whether context-parallel ranks can share its rows."""
    looks_back: ClassVar[bool] = True
    """Whether a picture can see those before it (``models/mmdit/visibility.py``)."""
    num_heads: int = Field(gt=0)
    head_size: int = Field(gt=0)
    latent_channels: int = Field(default=16, gt=0)
    """Channels of the VAE's latents."""
    patch_size: int = Field(default=2, gt=0)
    """Side of a patch in latents."""
    condition_size: int = Field(gt=0)
    """Width of the condition's tokens (diffusers: joint_attention_dim)."""

    @property
    def hidden_size(self) -> int:
        """Width of both streams."""
        return self.num_heads * self.head_size

    @property
    def patch_dim(self) -> int:
        """Number of values in one patch of latents."""
        return self.latent_channels * self.patch_size**2


class MMDiTConfig(DiffusionTransformerConfig):
    """What the MMDiTs share: a text and an image stream that attend to each other, modulated by timestep and a pooled
    vector (arXiv 2403.03206, figure 2)."""

    mlp_ratio: ClassVar[int] = 4
    """Hidden width of the MLPs over that of the model."""
    pooled_size: int = Field(gt=0)
    """Width of the pooled condition (diffusers: pooled_projection_dim)."""

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLPs."""
        return self.mlp_ratio * self.hidden_size


class Sd3Config(MMDiTConfig):
    """Stable Diffusion 3 and 3.5: joint blocks, the last without an output for the text (arXiv 2403.03206)."""

    family: Literal["sd3"]
    guidance: ClassVar[bool] = False
    num_layers: int = Field(gt=0)
    position_grid: int = Field(default=192, gt=0)
    """Patches per side of the table of positions, from which the middle is cut (diffusers: pos_embed_max_size)."""
    base_grid: int = Field(default=64, gt=0)
    """Patches per side of a picture of the base size, which scales the table (diffusers: sample_size / patch_size)."""
    qk_norm: bool = False
    """RMSNorm of queries and keys (SD3.5)."""
    dual_attention_layers: list[int] = Field(default_factory=list)
    """Zero-based blocks with a second attention, of the image to itself (SD3.5 medium)."""

    @model_validator(mode="after")
    def _check(self) -> "Sd3Config":
        if self.hidden_size % 4:
            raise ValueError(
                f"num_heads x head_size is {self.hidden_size}; positions in two directions, sine and cosine, need a "
                "multiple of 4"
            )
        wrong = [layer for layer in self.dual_attention_layers if not 0 <= layer < self.num_layers]
        if wrong:
            raise ValueError(f"dual_attention_layers {wrong} do not lie in 0..{self.num_layers - 1}")
        return self

    @property
    def num_blocks(self) -> int:
        """Layers of all kinds."""
        return self.num_layers

    @property
    def attention_kinds(self) -> tuple[str, ...]:
        """Kinds of attention that its blocks have, see ``models/mmdit/visibility.py``."""
        return ("joint", "image") if self.dual_attention_layers else ("joint",)


class FluxConfig(MMDiTConfig):
    """FLUX.1: double-stream blocks, then single-stream blocks over both; rotary positions (technical report of Black
    Forest Labs, 2024)."""

    family: Literal["flux"]
    num_layers: int = Field(gt=0)
    """Double-stream blocks."""
    num_single_layers: int = Field(gt=0)
    """Single-stream blocks, after them."""
    rotary_axes: list[int] = Field(default=[16, 56, 56], min_length=1)
    """Part of a head that each axis of position rotates: picture, row, column; their sum is head_size."""
    rotary_theta: float = Field(default=10000.0, gt=0)
    guidance: bool = True
    """Whether a guidance scale is an input, as in the distilled FLUX.1-dev."""

    @model_validator(mode="after")
    def _check(self) -> "FluxConfig":
        if sum(self.rotary_axes) != self.head_size or any(size % 2 for size in self.rotary_axes):
            raise ValueError(
                f"rotary_axes {self.rotary_axes} sum to {sum(self.rotary_axes)}, head_size is {self.head_size}; make "
                "them equal, each axis even"
            )
        return self

    @property
    def num_blocks(self) -> int:
        """Layers of both kinds."""
        return self.num_layers + self.num_single_layers

    @property
    def attention_kinds(self) -> tuple[str, ...]:
        """As of SD3."""
        return ("joint",)


class SanaConfig(DiffusionTransformerConfig):
    """SANA: an image stream of linear attention, cross attention to the condition, and feed-forward layers with a
    depthwise convolution over the picture, which stand in for positions (arXiv 2410.10629, figure 5).

    Built is what the published 0.6B and 1.6B of 512 and 1024 pixels have: no positions (diffusers:
    ``interpolation_scale``), no norm of queries and keys, no guidance embedding.
    """

    family: Literal["sana"]
    guidance: ClassVar[bool] = False
    pooled_size: ClassVar[int] = 0
    vae_family: ClassVar[str] = "dc_ae"
    rows_per_vector: ClassVar[int] = 7
    """The timestep's vector and the six that modulate all blocks (PixArt's adaLN-single, arXiv 2310.00426)."""
    along_context: ClassVar[bool] = False
    looks_back: ClassVar[bool] = False
    attention_kinds: ClassVar[tuple[str, ...]] = ("image", "cross")
    num_layers: int = Field(gt=0)
    num_cross_heads: int = Field(gt=0)
    cross_head_size: int = Field(gt=0)
    mlp_ratio: float = Field(default=2.5, gt=0)
    """Hidden width of the feed-forward layers (of values and of gates each) over that of the model."""
    attention_bias: bool = False
    """Biases of the linear attention's queries, keys and values."""
    latent_channels: int = Field(default=32, gt=0)
    patch_size: int = Field(default=1, gt=0)

    @property
    def mlp_size(self) -> int:
        """Hidden width of the feed-forward layers: values, and as many gates."""
        return int(self.mlp_ratio * self.hidden_size)

    @property
    def cross_size(self) -> int:
        """Width of the cross attention."""
        return self.num_cross_heads * self.cross_head_size

    @property
    def num_blocks(self) -> int:
        """Layers."""
        return self.num_layers


MMDiT = Annotated[Sd3Config | FluxConfig | SanaConfig, Field(discriminator="family")]


class VaeConfig(Section):
    """diffusers' AutoencoderKL (arXiv 2112.10752)."""

    family: Literal["autoencoder_kl"] = Field(default="autoencoder_kl", exclude=True)
    """May be left out; it is never written, so that checkpoints and caches of before there were others stay valid."""
    latent_channels: int = Field(default=16, gt=0)
    block_channels: list[int] = Field(default=[128, 256, 512, 512], min_length=1)
    """Channels of each resolution; all but the last halve the picture."""
    layers_per_block: int = Field(default=2, gt=0)
    norm_groups: int = Field(default=32, gt=0)
    mid_attention: bool = True
    """Attention between encoder and decoder halves."""
    quant_conv: bool = False
    """1 x 1 convolutions around the latents (SD 1 and 2; not SD3 and FLUX)."""
    scaling_factor: float = Field(gt=0)
    shift_factor: float = 0.0
    """Latents as the MMDiT sees them are (z - shift_factor) * scaling_factor."""
    sample_size: int = Field(default=1024, gt=0)
    """Side in pixels above which pictures are worked on in tiles."""

    @property
    def pixels_per_latent(self) -> int:
        """Side in pixels of the square that one latent covers."""
        return 2 ** (len(self.block_channels) - 1)

    @model_validator(mode="after")
    def _check(self) -> "VaeConfig":
        wrong = [channels for channels in self.block_channels if channels % self.norm_groups]
        if wrong:
            raise ValueError(f"block_channels {wrong} are no multiples of norm_groups {self.norm_groups}")
        return self


class DcAeStage(Section):
    """One resolution of a half of DC-AE: residual blocks, or EfficientViT's (linear attention over several scales)."""

    BLOCKS: ClassVar[dict[bool, str]] = {False: "ResBlock", True: "EfficientViTBlock"}
    """diffusers' name of its blocks, by ``attention``."""
    channels: int = Field(gt=0)
    layers: int = Field(gt=0)
    attention: bool
    """EfficientViT's blocks in place of residual ones."""
    scales: list[int] = Field(default_factory=list)
    """Kernels by which its queries, keys and values are gathered from neighbours, beside themselves."""


class DcAeConfig(Section):
    """diffusers' AutoencoderDC, which makes a picture much smaller and draws nothing by chance (arXiv 2410.10733).

    Numbers and choices that all published ones for SANA share (RMSNorm, SiLU, strided convolutions down, interpolation
    up) are those of ``models/vae.py``.
    """

    family: Literal["dc_ae"]
    latent_channels: int = Field(default=32, gt=0)
    attention_head_size: int = Field(default=32, gt=0)
    encoder: list[DcAeStage] = Field(min_length=1)
    """Each resolution; all but the last halve the picture."""
    decoder: list[DcAeStage] = Field(min_length=1)
    """In the encoder's order."""
    scaling_factor: float = Field(gt=0)
    """Latents as the diffusion transformer sees them are z * scaling_factor."""
    sample_size: int = Field(default=2048, gt=0)
    """Side in pixels above which pictures are worked on in tiles; 2048 x 512 is the longest of SANA's 1024 x 1024."""

    @property
    def pixels_per_latent(self) -> int:
        """As of VaeConfig."""
        return 2 ** (len(self.encoder) - 1)

    @model_validator(mode="after")
    def _check(self) -> "DcAeConfig":
        if len(self.encoder) != len(self.decoder):
            raise ValueError(
                f"encoder has {len(self.encoder)} resolutions, decoder {len(self.decoder)}; give both as many"
            )
        for half in (self.encoder, self.decoder):
            for stage in half:
                if stage.channels % (self.attention_head_size if stage.attention else 1):
                    raise ValueError(
                        f"channels {stage.channels} are no multiple of attention_head_size {self.attention_head_size}"
                    )
            if half[-1].channels % self.latent_channels:
                raise ValueError(
                    f"channels {half[-1].channels} of the last resolution are no multiple of latent_channels "
                    f"{self.latent_channels}"
                )
        return self


class TokenizerSpaceConfig(Section):
    """The latents of the stage's own tokenizer (section ``tokenizer``): one for each visual token of its vision encoder
    (SPAR, arXiv 2606.23041)."""

    family: Literal["tokenizer"]
    latent_channels: int = Field(default=32, gt=0)
    """Those of ``tokenizer.latent_channels``."""
    pixels_per_latent: int = Field(gt=0)
    """Side in pixels of the square that one visual token covers."""


def _kl_by_default(value: Any) -> Any:
    """Recipes and checkpoints may leave the family of an AutoencoderKL out."""
    return {"family": "autoencoder_kl", **value} if isinstance(value, dict) else value


AnyVae = VaeConfig | DcAeConfig | TokenizerSpaceConfig
Vae = Annotated[Annotated[AnyVae, Field(discriminator="family")], BeforeValidator(_kl_by_default)]


class ImageGeneratorConfig(Section):
    """What draws: a diffusion transformer and the VAE whose latents it makes."""

    mmdit: MMDiT
    vae: Vae | None = None
    """None where a transformer was imported alone, which can be converted and not trained."""

    @model_validator(mode="after")
    def _check(self) -> "ImageGeneratorConfig":
        if self.vae is not None and self.vae.family not in (self.mmdit.vae_family, "tokenizer"):
            raise ValueError(
                f"mmdit.family {self.mmdit.family} draws latents of a VAE of family {self.mmdit.vae_family}, but "
                f"vae.family is {self.vae.family}"
            )
        if self.vae is not None and self.mmdit.latent_channels != self.vae.latent_channels:
            raise ValueError(
                f"mmdit.latent_channels {self.mmdit.latent_channels} differs from vae.latent_channels "
                f"{self.vae.latent_channels}; make them equal"
            )
        return self

    @property
    def token_pixels(self) -> int:
        """Side in pixels of the square that one image token covers."""
        assert self.vae is not None
        return self.mmdit.patch_size * self.vae.pixels_per_latent
