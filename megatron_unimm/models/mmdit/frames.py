"""The pictures of an MMDiT row, as numbers on the host."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Frames:
    """The pictures of a row in the order of its streams, and what each is to its sample. A picture that is drawn and
    looked back at later is there twice (``models/mmdit/visibility.py``)."""

    sizes: np.ndarray
    """int64 ``[n, 2]``: rows and columns of patches."""
    num_condition: np.ndarray
    """int64 ``[n]``: tokens of its condition, in the text stream."""
    sample: np.ndarray
    """int64 ``[n]``."""
    number: np.ndarray
    """int64 ``[n]``: counts up inside a sample."""
    is_clean: np.ndarray
    """bool ``[n]``."""
    num_shared: np.ndarray | None = None
    """int64 ``[n]``: the last so many tokens of its condition are seen by later frames too; None for none."""

    @classmethod
    def single(cls, sizes: np.ndarray, num_condition: np.ndarray) -> "Frames":
        """One picture to be drawn per sample."""
        count = len(sizes)
        none = np.zeros(count, dtype=np.int64)
        return cls(sizes, num_condition, np.arange(count), none, none.astype(bool))

    def __len__(self) -> int:
        return len(self.sizes)

    def tiled(self, times: int) -> "Frames":
        """Copies one behind the other, whose samples have nothing to do with one another."""
        num_samples = int(self.sample.max(initial=-1)) + 1
        return Frames(
            sizes=np.tile(self.sizes, (times, 1)),
            num_condition=np.tile(self.num_condition, times),
            sample=np.concatenate([self.sample + num_samples * copy for copy in range(times)]),
            number=np.tile(self.number, times),
            is_clean=np.tile(self.is_clean, times),
            num_shared=None if self.num_shared is None else np.tile(self.num_shared, times),
        )

    @property
    def counts(self) -> np.ndarray:
        """int64 ``[n]``: image tokens."""
        return self.sizes.prod(axis=1)

    @property
    def is_last(self) -> np.ndarray:
        """bool ``[n]``: the last of its sample?"""
        last = np.zeros(int(self.sample.max(initial=-1)) + 1, dtype=np.int64)
        np.maximum.at(last, self.sample, self.number)
        return self.number == last[self.sample]

    def clean_places(self, frames: np.ndarray) -> np.ndarray:
        """Of each image token of some frames (int64, their places) that are there clean as well: its place among those
        of all clean frames, int64."""
        starts = np.cumsum(self.counts * self.is_clean) - self.counts
        clean = {
            (self.sample[place], self.number[place]): np.arange(starts[place], starts[place] + self.counts[place])
            for place in np.flatnonzero(self.is_clean)
        }
        nothing = np.zeros(0, dtype=np.int64)
        return np.concatenate([nothing, *(clean[self.sample[place], self.number[place]] for place in frames)])

    @property
    def look_back(self) -> bool:
        """Whether a frame sees others than itself."""
        return bool(self.is_clean.any())
