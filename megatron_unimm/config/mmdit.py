"""Sections of the image generator: a multimodal diffusion transformer (MMDiT) over the latents of a VAE."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from megatron_unimm.config.base import Section


class MMDiTConfig(Section):
    """What the MMDiTs share: a text and an image stream that attend to each other, modulated by timestep and a pooled
    vector (arXiv 2403.03206, figure 2)."""

    num_heads: int = Field(gt=0)
    head_size: int = Field(gt=0)
    latent_channels: int = Field(default=16, gt=0)
    """Channels of the VAE's latents."""
    patch_size: int = Field(default=2, gt=0)
    """Side of a patch in latents."""
    condition_size: int = Field(gt=0)
    """Width of the condition's tokens (diffusers: joint_attention_dim)."""
    pooled_size: int = Field(gt=0)
    """Width of the pooled condition (diffusers: pooled_projection_dim)."""

    @property
    def hidden_size(self) -> int:
        """Width of both streams."""
        return self.num_heads * self.head_size

    @property
    def patch_dim(self) -> int:
        """Number of values in one patch of latents."""
        return self.latent_channels * self.patch_size**2


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


MMDiT = Annotated[Sd3Config | FluxConfig, Field(discriminator="family")]


class VaeConfig(Section):
    """diffusers' AutoencoderKL (arXiv 2112.10752)."""

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


class ImageGeneratorConfig(Section):
    """What draws: an MMDiT and the VAE whose latents it makes."""

    mmdit: MMDiT
    vae: VaeConfig | None = None
    """None where a transformer was imported alone, which can be converted and not trained."""

    @model_validator(mode="after")
    def _check(self) -> "ImageGeneratorConfig":
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
