"""From logits to tokens: greedy, or temperature and top-p, with random numbers that belong to the sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.errors import ConfigError


@dataclass(frozen=True)
class DecodeSettings:
    """How answers are decoded."""

    max_new_tokens: int = 256
    """Tokens of an answer, visual tokens included; an image that has begun is finished all the same."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the most likely tokens that make up this probability."""
    seed: int = 0
    images: bool = True
    """Whether the answer may hold images."""
    stop_after_image: bool = False
    """End an answer with its first image."""
    pixels: bool = True
    """Whether images get pixels, where there is an image decoder."""
    sampler: SamplerConfig | None = None
    """How an image decoder draws; None for its recipe's."""
    all_scales: bool = False
    """A model that draws at several scales draws each picture at all of them, not only at the finest."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError("max_new_tokens", f"{self.max_new_tokens} leaves no room for an answer; give at least 1")
        if self.temperature < 0:
            raise ConfigError("temperature", f"{self.temperature} is below 0; 0 is greedy, 1 draws as the model says")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", f"{self.top_p} is not in (0, 1]; 1 draws from all tokens")


class Sampler:
    """Chooses the next tokens of sequences.

    Args:
        numbers: of each sequence, its number: with the seed it fixes the sequence's random numbers.
    """

    def __init__(self, settings: DecodeSettings, numbers: Sequence[int]) -> None:
        self.settings = settings
        self._generators = [torch.Generator().manual_seed(_mixed(settings.seed, number)) for number in numbers]

    def choose(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Tokens int64 ``[n]`` from logits ``[n, vocab]`` of the sequences ``rows`` (places in ``numbers``)."""
        if self.settings.temperature == 0:
            return logits.argmax(dim=-1)
        # Drawn on the host, one number per token, so that every device draws the same.
        uniform = torch.cat([torch.rand(1, generator=self._generators[row]) for row in rows]).to(logits.device)
        probability, order = (logits.float() / self.settings.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        before = probability.cumsum(dim=-1) - probability
        probability = probability.masked_fill(before >= self.settings.top_p, 0.0)  # the first token always stays
        cumulative = probability.cumsum(dim=-1)
        place = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
        return order.gather(1, place.clamp(max=logits.shape[1] - 1))[:, 0]


def _mixed(seed: int, number: int) -> int:
    """One 63-bit seed of two numbers; neighbours share nothing (the odd constants are splitmix64's)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number + 1) * 0xBF58476D1CE4E5B9
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)
