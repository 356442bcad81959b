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

    @property
    def counts(self) -> np.ndarray:
        """int64 ``[n]``: image tokens."""
        return self.sizes.prod(axis=1)

    @property
    def look_back(self) -> bool:
        """Whether a frame sees others than itself."""
        return bool(self.is_clean.any())
