"""What a rollout hands to an update: pairs of a drawn sample and one of its steps, in rows.

A pair stands in a row k times, once per condition of the guided velocity (``generate/frame_painter.py``), each time
with the pictures before it and the state that the step began with.

Legend  i pairs of a row, all with u image tokens of F values; U image tokens of the row, V words, Q visual latents; n
        frames of the row.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_unimm.models.mmdit.frames import Frames


@dataclass(frozen=True)
class PolicyRow:
    """One micro-batch. Tensors are on the device; those of the condition are there on the first pipeline stage only."""

    num_text: int
    num_tokens: int
    frames: Frames
    timestep: np.ndarray
    """float64 ``[n]``."""
    state: Tensor
    """float32 ``[U, F]``: latents of the pictures before, and states before the steps."""
    words: Tensor | None
    """``[V, H]``."""
    latents: Tensor | None
    """``[Q, D]``."""
    condition_order: np.ndarray
    """int64 ``[V + Q]``."""
    text_kept: np.ndarray
    """bool ``[V]``."""
    visual_kept: np.ndarray
    """bool ``[Q]``."""
    places: np.ndarray
    """int64 ``[k, i u]``: where the pairs' own tokens lie in the image stream, condition by condition."""
    guided: np.ndarray
    """bool ``[i]``: steps at which guidance is on."""
    before: Tensor
    """float32 ``[i, u, F]``."""
    after: Tensor
    """float32 ``[i, u, F]``."""
    reference: Tensor | None
    """float32 ``[i, u, F]``: mean of the step under the model that training started from."""
    keep: np.ndarray
    """float64 ``[i]``: what a step's mean has of the state, of the velocity, its standard deviation, and that of the
    divergence; as the next three."""
    pull: np.ndarray
    std: np.ndarray
    kl_std: np.ndarray
    old_log_prob: Tensor
    """float32 ``[i]``."""
    advantage: np.ndarray
    """float64 ``[i]``."""

    @property
    def num_pairs(self) -> int:
        """i."""
        return len(self.advantage)
