"""Where samples come from, how they are mixed, and how images are sized."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_unimm.config.base import Section

SampleKind = Literal["understanding", "text_to_image", "editing"]


class SourceConfig(Section):
    """One source of samples."""

    path: str
    """JSON or JSONL file of conversations (ORION, appendix A.2)."""
    images: str = ""
    """Folder that image paths are relative to; empty for the folder of the file."""
    kind: SampleKind
    weight: float = Field(default=1.0, ge=0)
    """Share of the samples drawn, relative to the other sources."""
    max_samples: int | None = Field(default=None, gt=0)
    """Take only the first this many."""


class ImageSizeConfig(Section):
    """Side lengths in pixels that an image is brought to, before rounding to whole visual tokens."""

    min_side: int = Field(gt=0)
    max_side: int = Field(gt=0)

    @model_validator(mode="after")
    def _check(self) -> "ImageSizeConfig":
        if self.min_side > self.max_side:
            raise ValueError(f"min_side {self.min_side} is larger than max_side {self.max_side}")
        return self


class DataConfig(Section):
    """The data of a stage."""

    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """By name. A stage, or the command line, leaves out an inherited source by setting it to null."""
    tokenizer: str = ""
    """Folder with the Hugging Face tokenizer; empty for the one saved with the checkpoint."""
    system_prompt: str = "You are a helpful assistant."
    generation_size: ImageSizeConfig = ImageSizeConfig(min_side=252, max_side=252)
    """Long side of images to be generated (Table 1, Gen resolution)."""
    understanding_size: ImageSizeConfig = ImageSizeConfig(min_side=56, max_side=1024)
    """Long side of images that are read (Table 1, Und resolution)."""
    sequence_length: int = Field(default=4096, gt=0)
    """Tokens of one packed row, which is one micro-batch."""
    packing: bool = True
    """False puts one sample in a row."""
    max_image_pixels: int = Field(default=64_000_000, gt=0)
    """Larger images are refused before decoding."""
    prefetch_workers: int = Field(default=2, ge=0)
    """Threads that read and decode ahead of the step."""

    @field_validator("sources", mode="before")
    @classmethod
    def _leave_out_nulls(cls, sources: Any) -> Any:
        if isinstance(sources, dict):
            return {name: source for name, source in sources.items() if source is not None}
        return sources
