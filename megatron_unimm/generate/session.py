"""A conversation with a model, turn by turn."""

from collections.abc import Sequence

import numpy as np

from megatron_unimm.data.sample import Turn
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.decode import Answer, GeneratedImage
from megatron_unimm.generate.sampling import DecodeSettings


class Session:
    """Remembers what was said and shown. The model sees the images that it generated as the visual tokens that it made.

    Every turn reads the conversation anew, which costs one forward pass over it and keeps nothing on the device between
    turns.
    """

    def __init__(self, generator: Generator, settings: DecodeSettings) -> None:
        self.generator = generator
        self.settings = settings
        self.turns: list[Turn] = []
        self.pictures: list[np.ndarray | GeneratedImage] = []

    def say(self, text: str, pictures: Sequence[np.ndarray] = ()) -> Answer:
        """The model's answer to a text with images before it; called on every rank.

        Raises:
            ConfigError: the conversation has become longer than the model's positions allow; it is left as it was.
        """
        first = len(self.pictures)
        shown = range(first, first + len(pictures))
        turns = [*self.turns, Turn("user", (*shown, text))]
        seen = [*self.pictures, *pictures]
        answer = self.generator.answer([self.generator.prompt(turns, seen, number=len(turns))], self.settings)[0]
        parts = tuple(part if isinstance(part, str) else len(seen) + part for part in answer.parts)
        self.turns = [*turns, Turn("assistant", parts)]
        self.pictures = [*seen, *answer.images]
        return answer

    def reset(self) -> None:
        """Forget everything."""
        self.turns, self.pictures = [], []
