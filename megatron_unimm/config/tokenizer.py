"""Sections of SPAR's tokenizer, which makes one compact grid of latents of what a vision encoder sees and of pixels
(arXiv 2606.23041, of which the abstract is known; every number here is ours)."""

from pydantic import Field, model_validator

from megatron_unimm.config.base import Section
from megatron_unimm.config.model import VisionEncoder


class StreamLayersConfig(Section):
    """Transformer layers over the cells of an image's grid: LayerNorm, full attention inside the image, 2-D rotary
    positions, a plain MLP."""

    num_layers: int = Field(default=2, gt=0)
    hidden_size: int = Field(default=512, gt=0)
    num_heads: int = Field(default=8, gt=0)
    mlp_size: int = Field(default=2048, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "StreamLayersConfig":
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} is no multiple of 4, which positions "
                "in two directions need"
            )
        return self


class SemanticStreamConfig(StreamLayersConfig):
    """The lightweight stream: a correction of the encoder's visual tokens that is zero at the start, so that it begins
    with all that they tell apart."""

    num_layers: int = Field(default=1, gt=0)


class PixelStreamConfig(StreamLayersConfig):
    """The stream of fine detail: the pixels under each cell, and what the encoder has of them at some of its layers."""

    num_layers: int = Field(default=6, gt=0)
    encoder_layers: list[int] = Field(default_factory=list)
    """Zero-based layers of the vision encoder whose outputs join the pixels."""


class PixelDecoderConfig(StreamLayersConfig):
    """From latents to pixels: layers over the grid, then convolutions over the whole picture at half its resolution,
    which see across the borders of cells."""

    num_layers: int = Field(default=6, gt=0)
    channels: int = Field(default=64, gt=0)
    """Of the convolutions."""
    num_blocks: int = Field(default=2, ge=0)
    """Residual blocks of two convolutions."""
    norm_groups: int = Field(default=8, gt=0)

    @model_validator(mode="after")
    def _check_groups(self) -> "PixelDecoderConfig":
        if self.channels % self.norm_groups:
            raise ValueError(f"channels {self.channels} is no multiple of norm_groups {self.norm_groups}")
        return self


class TokenizerConfig(Section):
    """The tokenizer behind a vision encoder: one cell of the grid is one visual token of the encoder."""

    latent_channels: int = Field(default=32, gt=0)
    """C of the grid [h, w, C] (UniLIP, arXiv 2507.23278, has 32)."""
    semantic: SemanticStreamConfig = SemanticStreamConfig()
    pixel: PixelStreamConfig | None = PixelStreamConfig()
    """None leaves the stream out, for that ablation."""
    decoder: PixelDecoderConfig = PixelDecoderConfig()
    statistics_cells: int = Field(default=1_000_000, gt=0)
    """The latents' mean and variance are those of about so many cells seen last."""

    def check(self, encoder: VisionEncoder) -> None:
        """Raises:
        ValueError: it does not fit the encoder.
        """
        if encoder.token_pixels % 2:
            raise ValueError(f"a visual token is {encoder.token_pixels} pixels wide; tokenizer needs an even number")
        taps = [] if self.pixel is None else self.pixel.encoder_layers
        wrong = [layer for layer in taps if not 0 <= layer < encoder.num_layers]
        if wrong or taps != sorted(set(taps)):
            raise ValueError(
                f"tokenizer.pixel.encoder_layers {taps} must ascend and lie in 0..{encoder.num_layers - 1}"
            )

    def tensor_sharded(self) -> dict[str, int]:
        """Sizes that tensor parallelism cuts, by name."""
        parts = {"semantic": self.semantic, "pixel": self.pixel, "decoder": self.decoder}
        return {
            f"tokenizer.{name}.{field}": vars(part)[field]
            for name, part in parts.items()
            if part is not None
            for field in ("num_heads", "mlp_size")
        }
