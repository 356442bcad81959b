"""Lengths of samples as in a real mix, to try packing without the data."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Category:
    """A kind of sample: its share, and medians of its visual tokens and its text; both are log-normal."""

    share: float
    visual: float
    text: float
    spread: float
    """Standard deviation of the logarithm."""


LLAVA_ONEVISION = (
    Category(0.361, visual=420, text=180, spread=0.5),  # general
    Category(0.206, visual=1250, text=220, spread=0.6),  # documents, charts, screens
    Category(0.201, visual=320, text=260, spread=0.6),  # mathematics and reasoning
    Category(0.089, visual=700, text=90, spread=0.6),  # text in images
    Category(0.143, visual=0, text=420, spread=0.9),  # language
)
"""Shares of the 3.2 M single-image samples of LLaVA-OneVision (arXiv 2408.03326, figure 4); lengths are ours, for
images at their own resolution as Qwen2.5-VL reads them (one visual token for 28 x 28 pixels)."""
SHORTEST, LONGEST = 24, 8192


def length_mix(rng: np.random.Generator, mix: tuple[Category, ...] = LLAVA_ONEVISION) -> Iterator[int]:
    """Tokens of one sample after another, without end."""
    shares = np.array([category.share for category in mix])
    while True:
        category = mix[rng.choice(len(mix), p=shares / shares.sum())]
        length = category.visual * rng.lognormal(0, category.spread) + category.text * rng.lognormal(0, category.spread)
        yield int(np.clip(length, SHORTEST, LONGEST))
