"""Alignment of a diffusion transformer's hidden states to what a frozen teacher has of the picture that it draws: REPA
(arXiv 2410.06940), HieraQuery's section 3.2, SPAR's self-alignment.

    hidden states after layer L ─ projector ─► cosine ◄─ interpolated to image tokens ─ features ◄─ teacher ─ picture

Legend  t image tokens of this context rank, n of them that something is learned of, V features of all pictures, F their
        width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from megatron_unimm.config.methods import RepresentationAlignmentConfig
from megatron_unimm.config.model import VisionEncoder
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow
from megatron_unimm.methods.alignment import cosine_loss
from megatron_unimm.methods.drawing.frames import travelling_rows
from megatron_unimm.methods.drawing.method import stored
from megatron_unimm.models.mmdit.canvas import Place, grids_of
from megatron_unimm.models.scales import at_grids
from megatron_unimm.models.vision import VisionInput

ALIGNMENT = "alignment"
"""Name of the loss, behind those of flow matching."""


@dataclass(frozen=True)
class Targets:
    """What the stage that has the layer aligns hidden states to."""

    images: VisionInput | None
    """Pictures to be drawn; None where features were computed beforehand, or without any."""
    features: Tensor | None
    """``[V, F]``."""
    feature_grids: list[tuple[int, int]]
    """Rows and columns of the features of each."""
    number_of: list[int]
    """Of each frame that is drawn, which picture it is."""
    grids: list[tuple[int, int]]
    """Rows and columns of image tokens of each."""
    chosen: Tensor
    """int64 ``[n]``: image tokens of this context rank that something is learned of."""
    rows: Tensor
    """int64 ``[n]``: which of the tokens of all frames that are drawn each of these is."""

    @classmethod
    def of(cls, row: FrameRow, encoder: VisionEncoder, place: Place) -> "Targets":
        """Those of a row."""
        assert row.target_grids is not None
        assert row.target_of_frame is not None
        frames, images, features = row.frames, None, None
        if row.target_features is not None:
            features = stored(row.target_features, place)
        elif len(row.target_grids):
            assert row.target_patches is not None
            images = VisionInput.build(row.target_patches, row.target_grids, encoder, place.device, place.dtype)
        noisy = ~frames.is_clean
        # Of each image token of the row that is learned, its place among those of all noisy frames.
        is_noisy, is_learned = np.repeat(noisy, frames.counts), np.repeat(row.learned, frames.counts)
        place_of = np.full(row.num_tokens - row.num_text, -1, dtype=np.int64)
        place_of[: len(is_noisy)] = np.where(is_learned, is_noisy.cumsum() - 1, -1)
        mine = np.split(place_of, place.context[1])[place.context[0]]  # as ``visibility.local_index``
        chosen = np.flatnonzero(mine >= 0)
        merge = encoder.spatial_merge_size
        return cls(
            images=images,
            features=features,
            feature_grids=[(int(rows) // merge, int(columns) // merge) for _, rows, columns in row.target_grids],
            number_of=row.target_of_frame[noisy].tolist(),
            grids=list(grids_of(frames.sizes[noisy])),
            chosen=torch.from_numpy(chosen).to(place.device, non_blocking=True),
            rows=torch.from_numpy(mine[chosen]).to(place.device, non_blocking=True),
        )


def alignment_loss(
    projector: nn.Module, hidden_tH: Tensor, targets: Targets, width: int, teacher: Callable[[VisionInput], Tensor]
) -> Tensor:
    """Σ (1 − cos) over this rank's tokens that something is learned of, a scalar.

    Args:
        width: F; a teacher may have more behind (deepstack levels).
        teacher: of pictures ``[V, ≥ F]``, one behind the other; asked where nothing was computed beforehand.
    """
    if not len(targets.chosen):
        # The projector takes part with nothing, so that its gradients are there on every rank.
        return projector(hidden_tH[:1]).float().sum() * 0.0
    found = projector(hidden_tH.index_select(0, targets.chosen))  # [n, F]
    with torch.no_grad():
        features = targets.features
        if features is None:
            assert targets.images is not None
            features = teacher(targets.images)
        wanted = at_grids(features[:, :width], targets.feature_grids, targets.number_of, targets.grids)
    return cosine_loss(found, wanted.index_select(0, targets.rows))


def aligned_rows(stage: StageConfig, alignment: RepresentationAlignmentConfig | None) -> int:
    """Rows between pipeline stages, and with an alignment loss one more on every rank."""
    parallel, rows = stage.system.parallel, travelling_rows(stage)
    if alignment is None or parallel.pipeline == 1:
        return rows
    return rows + parallel.context * (parallel.tensor if parallel.sequence else 1)
