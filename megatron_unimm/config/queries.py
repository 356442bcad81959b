"""Sections of a VLM that predicts visual latents with query tokens (MMCORE, arXiv 2604.19902, section 3.1)."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from megatron_unimm.config.base import Section
from megatron_unimm.config.data import ImageSize, SquareSizeConfig
from megatron_unimm.config.lora import LoraConfig
from megatron_unimm.config.model import ModelConfig, SiglipConfig


@dataclass(frozen=True)
class PictureScales:
    """How often a picture is drawn, and from what: once from all its queries (MMCORE), or at several sizes, each from a
    group of its own (HieraQuery), coarse to fine."""

    queries: tuple[int, ...]
    """Of each scale."""
    shares: tuple[Fraction, ...] = (Fraction(1),)
    """Side of the picture at each scale, in that of the finest."""

    @property
    def multiple(self) -> int:
        """Sides of the finest picture, in image tokens, are multiples of it, so that the others have whole ones."""
        return math.lcm(*(share.denominator for share in self.shares))


class VisionEncoderTeacher(Section):
    """The base VLM's own vision encoder, frozen: visual tokens after its merger, of pictures at
    ``data.generation_size``."""

    family: Literal["vision_encoder"] = "vision_encoder"


class SiglipTeacher(Section):
    """A frozen SigLIP tower: features of its patches."""

    family: Literal["siglip"]
    encoder: SiglipConfig
    checkpoint: str
    """Folder that ``unimm convert import`` wrote."""
    size: ImageSize = SquareSizeConfig(rule="square", side=384)
    """Of pictures that it looks at."""


Teacher = Annotated[VisionEncoderTeacher | SiglipTeacher, Field(discriminator="family")]
"""Whose features the queries are aligned to (section 3.1.1, ii)."""


class QueryConnectorConfig(Section):
    """From the hidden states at the queries to visual latents, of the teacher's width."""

    num_layers: int = Field(default=0, ge=0)
    """Transformer layers over a picture's queries, which see one another in both directions. The paper has 2, 3 and 6
    for a frozen VLM (Table 1), and none where the VLM itself is fine-tuned (section 1)."""
    projection: Literal["linear", "mlp"] = "mlp"
    """The paper does not say how hidden states get the teacher's width: ``mlp`` is MetaMorph's (arXiv 2412.14164),
    Linear, GELU, Linear, with the hidden width between."""


class QueryVlmConfig(Section):
    """What makes a VLM one that predicts visual latents."""

    num_queries: int = Field(default=64, ge=1, le=1024)
    """N learnable tokens per picture (the paper's sweep goes from 1 to 128, its choice is 64 = 8 x 8)."""
    connector: QueryConnectorConfig = QueryConnectorConfig()
    teacher: Teacher = VisionEncoderTeacher()
    lora: LoraConfig | None = None
    """Low-rank adapters in the backbone, in place of fine-tuning all of it (Table 1's LoRA)."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns that the teacher's features are pooled to: N = K² is K x K, other numbers are as square as
        they go."""
        rows = next(rows for rows in range(math.isqrt(self.num_queries), 0, -1) if self.num_queries % rows == 0)
        return rows, self.num_queries // rows

    @property
    def scales(self) -> PictureScales:
        """One."""
        return PictureScales((self.num_queries,))

    def tensor_sharded(self, hidden_size: int) -> dict[str, int]:
        """Sizes of the connector that tensor parallelism cuts, by name."""
        if not self.connector.num_layers:
            return {}
        heads = f"the heads of queries.connector, hidden_size / {CONNECTOR_HEAD_SIZE} ="
        return {heads: hidden_size // CONNECTOR_HEAD_SIZE}

    def latent_size(self, model: ModelConfig) -> int:
        """Width of a visual latent."""
        if isinstance(self.teacher, SiglipTeacher):
            return self.teacher.encoder.hidden_size
        return model.vision_encoder.out_size


CONNECTOR_HEAD_SIZE = 64
"""Of the connector's attention (MetaQuery, arXiv 2504.06256: heads of 64)."""
CONNECTOR_MLP_RATIO = 4
