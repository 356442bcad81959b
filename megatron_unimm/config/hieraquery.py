"""Sections of HieraQuery (papers: section 3.1): query tokens at several scales, and what follows them."""

from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from megatron_unimm.config.base import Section
from megatron_unimm.config.queries import PictureScales

MAX_DENOMINATOR = 64
"""Shares are whole parts of the finest picture; 1/64 is finer than any picture has tokens."""


class LanguageConnectorConfig(Section):
    """A language model of the architecture of Qwen2.5 (arXiv 2412.15115), read in both directions and without its
    words. The defaults are those of Qwen2.5-0.5B (section 4.2: "we adopt Qwen2.5-0.5B as our connector")."""

    num_layers: int = Field(default=24, gt=0)
    hidden_size: int = Field(default=896, gt=0)
    num_heads: int = Field(default=14, gt=0)
    num_kv_heads: int = Field(default=2, gt=0)
    head_size: int = Field(default=64, gt=0, multiple_of=2)
    mlp_size: int = Field(default=4864, gt=0)
    rope_theta: float = Field(default=1.0e6, gt=0)
    norm_epsilon: float = Field(default=1.0e-6, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "LanguageConnectorConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        return self


class MultiScaleConfig(Section):
    """What makes of a language model one that says what to draw, coarse to fine."""

    scales: list[int | tuple[int, int]] = Field(default=[4, 8, 16], min_length=1)
    """Grid of query tokens of each scale, coarse to fine: a side, or rows and columns (section 3.1, eq. 1)."""
    shares: list[float] | None = None
    """Side of the picture that each scale draws, in that of the finest, which is 1. null goes by the rows of the grids:
    0.25, 0.5 and 1 for 4, 8, 16 (section 6.3)."""
    mode: Literal["learned", "reuse"] = "learned"
    """``learned`` is the paper's eq. 2 and 3: each scale has a START and an END token of its own, and its queries a
    positional encoding of their grid. ``reuse`` is what Ming-Lite-Omni's published weights were trained with: the marks
    that stand around any image, queries of length 1 at the start, and no encoding."""
    connector: LanguageConnectorConfig = LanguageConnectorConfig()
    connector_checkpoint: str = ""
    """Imported language model (``unimm convert import``) whose layers the connector starts with; empty for fresh
    ones."""

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of each scale."""
        return [(each, each) if isinstance(each, int) else each for each in self.scales]

    @property
    def picture_scales(self) -> PictureScales:
        """Queries, and side of the picture, of each scale."""
        finest = self.grids[-1][0]
        shares = [Fraction(rows, finest) for rows, _ in self.grids]
        if self.shares is not None:
            shares = [Fraction(share).limit_denominator(MAX_DENOMINATOR) for share in self.shares]
        return PictureScales(tuple(rows * columns for rows, columns in self.grids), tuple(shares))

    @property
    def num_queries(self) -> int:
        """Of all scales."""
        return sum(self.picture_scales.queries)

    @property
    def tensor_sharded(self) -> dict[str, int]:
        """Sizes of the connector that tensor parallelism cuts, by name."""
        connector = self.connector
        return {
            "hieraquery.connector.num_kv_heads": connector.num_kv_heads,
            "hieraquery.connector.num_heads": connector.num_heads,
            "hieraquery.connector.mlp_size": connector.mlp_size,
        }

    @model_validator(mode="after")
    def _check(self) -> "MultiScaleConfig":
        wrong = [f"{rows} x {columns}" for rows, columns in self.grids if rows < 1 or columns < 1]
        if wrong:
            raise ValueError(f"scales has {wrong[0]}, which is no grid; give rows and columns above 0")
        if self.shares is not None and len(self.shares) != len(self.scales):
            raise ValueError(f"shares has {len(self.shares)} numbers, but there are {len(self.scales)} scales")
        shares = self.picture_scales.shares
        if shares[-1] != 1 or min(shares) <= 0 or sorted(shares) != list(shares):
            found = ", ".join(f"{float(share):g}" for share in shares)
            raise ValueError(f"the scales' pictures have sides {found}; give shares that go up to 1, none of them 0")
        return self
