"""A packed row on the device, as ORION's stages read it: ``methods/vlm/batch.py``, with noise and targets.

Layouts: T tokens of the row, t = T / context of this rank, V visual tokens, n chosen positions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.model import ModelConfig
from megatron_unimm.data.sample import PackedRow
from megatron_unimm.methods.vlm.batch import (
    Role,
    Sight,
    VlmBatch,
    Words,
    as_tensor,
    choose_images,
    feature_rows,
    local_places,
    local_tokens,
    on_device,
    packed_context,
)
from megatron_unimm.models.vision import VisionInput


@dataclass(frozen=True)
class Targets:
    """Visual tokens that the last stage regresses. Positions count this context rank's tokens."""

    vision_index: Tensor
    """int64 ``[n_vision]``: positions whose next token is visual."""
    feature_rows: Tensor
    """int64 ``[n_vision]``: rows of the features of ``images`` (or of all images, on a stage that has those)."""
    images: VisionInput | None
    """Images to be generated, for the last stage's copy of the frozen tower; None where the first stage is the same."""
    features: Tensor | None
    """Of all images, where they were computed beforehand and the first stage is another."""


@dataclass(frozen=True)
class OrionBatch(VlmBatch):
    """One micro-batch."""

    noise: Tensor | None
    """``[V, H]``: what the student sees on top of visual tokens of images to be generated; zeros for images that are
    read."""
    words: Words | None
    targets: Targets | None
    generates: bool
    """Whether the row has images to be generated, so that the teacher is needed."""


def build_batch(row: PackedRow, model: ModelConfig, role: Role, token_noise: float = 0.0) -> OrionBatch:
    """Move a row to the device for one role.

    Args:
        token_noise: largest standard deviation of noise on visual tokens, see ``OrionConfig``.
    """
    local = local_tokens(row, role)
    generates = len(row.predict_index) > 0
    return OrionBatch(
        input_ids=as_tensor(row.input_ids, role),
        local_index=as_tensor(local, role) if role.context_size > 1 else None,
        context=packed_context(row, local, model, role),
        sight=Sight.of(row, model, role) if role.first_stage else None,
        noise=_noise(row, model, token_noise, role) if role.first_stage and token_noise and generates else None,
        words=Words.of(row, local, role) if role.last_stage else None,
        targets=_targets(row, local, model, role) if role.last_stage else None,
        generates=generates,
    )


def _noise(row: PackedRow, model: ModelConfig, largest: float, role: Role) -> Tensor:
    """``[V, H]``. Made on the device: it is as large as the features are."""
    tokens = (row.grids.prod(axis=1) // model.vision_encoder.spatial_merge_size**2).tolist()
    parts = []
    for count, target, seed in zip(tokens, row.is_target, row.noise_seeds.tolist(), strict=True):
        shape = (count, model.backbone.hidden_size)
        if not target:
            parts.append(torch.zeros(shape, device=role.device))
            continue
        generator = torch.Generator(role.device).manual_seed(seed)
        deviation = largest * torch.rand((), generator=generator, device=role.device)
        parts.append(deviation * torch.randn(shape, generator=generator, device=role.device))
    return torch.cat(parts).to(role.dtype)


def _targets(row: PackedRow, local: np.ndarray, model: ModelConfig, role: Role) -> Targets:
    places, mine = local_places(row.predict_index, local, len(row.input_ids))
    rows = row.target_index[mine]
    images = features = None
    if not role.first_stage and row.features is not None:
        features = on_device(row.features, role)
    elif not role.first_stage and len(row.predict_index):
        patches, grids = choose_images(row, row.is_target)
        images = VisionInput.build(patches, grids, model.vision_encoder, role.device, role.dtype)
        rows = np.searchsorted(feature_rows(row, row.is_target, model), rows)
    return Targets(
        vision_index=as_tensor(places, role), feature_rows=as_tensor(rows, role), images=images, features=features
    )
