"""The typed sample, before and after tokenisation, and the packed row that the model reads.

Layouts: L tokens of one sample, T tokens of a packed row, P patches, N images, V visual tokens (after the merger).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_unimm.config.data import SampleKind
from megatron_unimm.data.image_files import ImageFile

IGNORED_LABEL = -100
"""Label of a position without cross entropy."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. ``parts`` mixes text and indices into ``Sample.images``."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | int, ...]


@dataclass(frozen=True)
class Sample:
    """One conversation with its images."""

    id: str
    kind: SampleKind
    turns: tuple[Turn, ...]
    images: tuple[ImageFile, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else its record holds: what scorers of drawings go by."""


@dataclass(frozen=True)
class TokenizedSample:
    """A sample as the model sees it, alone.

    An image stands as ``vision_start, V_i x image_pad, vision_end``. An image of an assistant turn is a target: the
    hidden states at vision_start and at its visual tokens but the last predict its visual tokens 1..V_i.
    """

    id: str
    kind: SampleKind
    input_ids: np.ndarray
    """int64 [L]."""
    labels: np.ndarray
    """int64 [L]: the token that position t predicts (already shifted), or IGNORED_LABEL."""
    position_ids: np.ndarray
    """int64 [3, L]: time, height, width, starting at 0."""
    patches: np.ndarray
    """float32 [P, patch_dim]: flattened patches of all images in order, normalised, in the Qwen processors' order."""
    grids: np.ndarray
    """int64 [N, 3]: patches along time, height, width of each image."""
    is_target: np.ndarray
    """bool [N]: whether the image is to be generated."""
    visual_index: np.ndarray
    """int64 [V]: positions of the image_pad tokens, in the order of the merged features of all images."""
    predict_index: np.ndarray
    """int64 [V_target]: positions whose hidden state predicts a visual token (visual_index - 1, target images only)."""
    target_index: np.ndarray
    """int64 [V_target]: rows of the merged features (0..V-1) that predict_index predicts."""
    features: np.ndarray | None = None
    """[V, F] of all images, computed beforehand in place of patches; float32, or bfloat16 as its bits in int16."""
    noise_seed: int = 0
    """What is random about this draw of the sample: image i has noise_seed + i."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class PackedRow:
    """Samples one after another in a row of fixed length; one micro-batch.

    The fields of TokenizedSample, concatenated and shifted. The tail that no sample fills is a segment of its own
    (pad tokens, no labels, positions counting up from 0), so that nothing attends across segments.
    """

    input_ids: np.ndarray
    """int64 [T]."""
    labels: np.ndarray
    """int64 [T]."""
    position_ids: np.ndarray
    """int64 [3, T]."""
    segment_bounds: tuple[int, ...]
    """0 = first, T = last: sample i is [bounds[i], bounds[i + 1]); padding tail included as last segment if any."""
    patches: np.ndarray
    grids: np.ndarray
    is_target: np.ndarray
    visual_index: np.ndarray
    predict_index: np.ndarray
    target_index: np.ndarray
    sample_ids: tuple[str, ...]
    kinds: tuple[SampleKind, ...]
    num_padding: int
    """Tokens of the row that belong to no sample (padding inside segments included)."""
    noise_seeds: np.ndarray
    """int64 [N]: of each image, for noise on its visual tokens."""
    features: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def conversation(self) -> "PackedRow":
        """Every row of conversations has one: its tokens."""
        return self

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.grids)
