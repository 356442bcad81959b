"""Where samples come from, how they are mixed, and how images are sized."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megatron_unimm.config.base import Section

SampleKind = Literal["understanding", "text_to_image", "editing", "reconstruction", "interleaved"]
"""What a sample teaches: to talk about images, to draw from words, to change an image, to draw an image again as it is,
or to go on with a document of many images, in turns of either side. Whatever the assistant says or draws is learned."""

SourceFormat = Literal["auto", "conversations", "webdataset", "parquet", "folder"]


class ColumnsConfig(Section):
    """Names of a Parquet table's columns. Empty takes the usual ones that the table has."""

    image: str = ""
    """Bytes, a struct of bytes and path, a path, or a list of these; usually ``image`` or ``images``."""
    caption: str = ""
    """Text; usually ``caption`` or ``text``."""
    conversations: str = ""
    """Turns as JSON or as a list of structs ``from``, ``value``; usually ``conversations``."""
    id: str = ""
    """Text or number; usually ``id``. The row's number where there is none."""


class SourceConfig(Section):
    """One source of samples."""

    path: str
    """A file of conversations (JSON, JSONL; ORION, appendix A.2), WebDataset shards (``.tar``), Parquet files, or a
    folder of any of these or of images with captions. ``x-{0000..0099}.tar`` and ``x-*.tar`` name several files."""
    format: SourceFormat = "auto"
    """``auto`` goes by the ending: ``.tar`` is webdataset, ``.parquet`` is parquet, any other file is conversations; a
    folder is what it directly holds, looked for in this order, else a folder of images."""
    images: str = ""
    """Folder that image paths are relative to; empty for the folder of the file."""
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig)
    """Of Parquet tables."""
    kind: SampleKind
    weight: float = Field(default=1.0, ge=0)
    """Share of the samples drawn, relative to the other sources."""
    max_samples: int | None = Field(default=None, gt=0)
    """Take only the first this many."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Passes over the source after which it is drawn no more; the draws go to the other sources. null for no limit."""


ResizeFilter = Literal["bicubic", "bilinear"]
DecoderKind = Literal["auto", "pillow", "dali"]


class ImageSizeConfig(Section):
    """Side lengths in pixels that an image is brought to, before rounding to whole visual tokens."""

    rule: Literal["long_side"] = "long_side"
    crop: ClassVar[bool] = False
    filter: ClassVar[ResizeFilter] = "bicubic"
    min_side: int = Field(gt=0)
    max_side: int = Field(gt=0)

    @model_validator(mode="after")
    def _check(self) -> "ImageSizeConfig":
        if self.min_side > self.max_side:
            raise ValueError(f"min_side {self.min_side} is larger than max_side {self.max_side}")
        return self


class PixelSizeConfig(Section):
    """Any aspect ratio, with the area in pixels kept within limits: what the Qwen processors call smart resize.

    Qwen2.5-VL's checkpoints come with 3136 and 12845056 pixels, Qwen3-VL's with 65536 and 16777216.
    """

    rule: Literal["pixels"]
    crop: ClassVar[bool] = False
    min_pixels: int = Field(default=56 * 56, gt=0)
    max_pixels: int = Field(default=1280 * 28 * 28, gt=0)
    filter: ResizeFilter = "bicubic"

    @model_validator(mode="after")
    def _check(self) -> "PixelSizeConfig":
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")
        return self


class SquareSizeConfig(Section):
    """Every image becomes a square of one size, whatever its aspect ratio: SigLIP's processor."""

    rule: Literal["square"]
    crop: ClassVar[bool] = False
    side: int = Field(gt=0)
    """In pixels."""
    filter: ResizeFilter = "bicubic"
    """SigLIP's checkpoints have bicubic, SigLIP 2's of one resolution bilinear."""


class PatchBudgetConfig(Section):
    """The aspect ratio is kept as well as whole patches allow, and at most so many of them are filled: SigLIP 2 NaFlex
    (arXiv 2502.14786, section 2.4.2)."""

    rule: Literal["max_patches"]
    crop: ClassVar[bool] = False
    max_patches: int = Field(default=256, gt=0)
    filter: ResizeFilter = "bilinear"


class BucketSizeConfig(Section):
    """One of a few sizes of about equal area, the one of the nearest aspect ratio; what stands over is cropped from
    both ends. For images to be generated."""

    rule: Literal["buckets"]
    crop: ClassVar[bool] = True
    sizes: list[tuple[int, int]] = Field(min_length=1)
    """Width and height in pixels, each a whole number of visual tokens."""
    filter: ResizeFilter = "bicubic"

    @model_validator(mode="after")
    def _check(self) -> "BucketSizeConfig":
        wrong = [f"{width}x{height}" for width, height in self.sizes if width < 1 or height < 1]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} has no pixels")
        return self


def _long_side_by_default(value: Any) -> Any:
    """Recipes may write a long side without its rule."""
    return {"rule": "long_side", **value} if isinstance(value, dict) else value


ImageSize = Annotated[
    Annotated[
        ImageSizeConfig | PixelSizeConfig | SquareSizeConfig | PatchBudgetConfig | BucketSizeConfig,
        Field(discriminator="rule"),
    ],
    BeforeValidator(_long_side_by_default),
]
"""How images are sized."""


class DataConfig(Section):
    """The data of a stage."""

    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """By name. A stage, or the command line, leaves out an inherited source by setting it to null."""
    index_cache: str = ""
    """Folder for indices of data files, used where they cannot be written beside the file. Empty builds them anew at
    each start, in memory."""
    tokenizer: str = ""
    """Folder with the Hugging Face tokenizer; empty for the one saved with the checkpoint."""
    system_prompt: str = "You are a helpful assistant."
    generation_size: ImageSize = ImageSizeConfig(min_side=252, max_side=252)
    """Of images to be generated (ORION, Table 1, Gen resolution: their long side)."""
    understanding_size: ImageSize = ImageSizeConfig(min_side=56, max_side=1024)
    """Of images that are read (ORION, Table 1, Und resolution: their long side)."""
    drawing_size: ImageSize | None = None
    """Of pictures that an image generator draws, in stages that train one."""
    sequence_length: int = Field(default=4096, gt=0)
    """Tokens of one packed row, which is one micro-batch."""
    packing: bool = True
    """False puts one sample in a row."""
    max_image_pixels: int = Field(default=64_000_000, gt=0)
    """Larger images are refused before decoding."""
    prefetch_workers: int = Field(default=2, ge=0)
    """Workers that read and decode ahead of the step; 0 does it in between."""
    workers: Literal["thread", "process"] = "thread"
    """Threads start at once and share what is read; processes are not slowed by one another's Python."""
    max_bad_share: float = Field(default=0.5, ge=0, le=1)
    """The run stops when more of a step's samples than this cannot be used."""
    feature_cache: str = ""
    """Folder of features that ``unimm data cache`` computed; images are then neither decoded nor run through the tower.
    Only for stages whose vision encoder is frozen. Empty for none."""
    latent_cache: str = ""
    """The same for latents of the pictures to be drawn; the VAE is then not run."""
    condition_cache: str = ""
    """The same for what a frozen VLM says to a diffusion transformer (MMCORE); the VLM is then not run, nor are its
    images decoded. Not with ``method.vit_features``."""
    decoder: DecoderKind = "auto"
    """What decodes and resizes images. ``pillow`` gives transformers' pixels exactly; ``dali`` is faster, and differs
    by less than 1/255; ``auto`` takes DALI where it is installed."""

    @field_validator("sources", mode="before")
    @classmethod
    def _leave_out_nulls(cls, sources: Any) -> Any:
        if isinstance(sources, dict):
            return {name: source for name, source in sources.items() if source is not None}
        return sources
