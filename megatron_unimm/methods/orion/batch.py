"""A packed row on the device, as ORION's stages read it. Everything that depends on positions is worked out here,
once per micro-batch.

Layouts: T tokens of the row, t = T / context of this rank, V visual tokens, n chosen positions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.model import ModelConfig
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow
from megatron_unimm.models.attention import PackedContext, Segments, context_index
from megatron_unimm.models.rotary import mrope_angles
from megatron_unimm.models.vision import VisionInput


@dataclass(frozen=True)
class Role:
    """What this rank's model chunk needs of a row."""

    context_rank: int
    context_size: int
    first_stage: bool
    last_stage: bool
    vision_encoder_trains: bool
    """Then images that are read go through the student's tower, and all images through the frozen one besides."""


@dataclass(frozen=True)
class Sight:
    """Images for the first stage."""

    frozen: VisionInput | None
    """All images of the row, for the frozen tower; None when it has nothing to do."""
    trained: VisionInput | None
    """Images that are read, for a trainable tower; a blank one when there are none, so that every rank's tower runs;
    None if the tower is frozen."""
    visual_index: Tensor
    """int64 ``[V]``: where the visual tokens stand in the row."""
    features: Tensor | None
    """``[V, (1 + K) H]`` of all images, where they were computed beforehand; then the two above are None."""
    noise: Tensor | None
    """``[V, H]``: what the student sees on top of visual tokens of images to be generated; zeros for images that are
    read."""
    read_rows: Tensor
    """int64: which of the V are of images that are read (those that the trained tower sees); the others are to be
    generated."""


@dataclass(frozen=True)
class Targets:
    """What the last stage is compared with. Positions count this context rank's tokens."""

    text_index: Tensor
    """int64 ``[n_text]``: positions whose next token is text."""
    text_labels: Tensor
    """int64 ``[n_text]``."""
    vision_index: Tensor
    """int64 ``[n_vision]``: positions whose next token is visual."""
    feature_rows: Tensor
    """int64 ``[n_vision]``: rows of the features of ``images`` (or of all images, on a stage that has those)."""
    images: VisionInput | None
    """Images to be generated, for the last stage's copy of the frozen tower; None where the first stage is the same."""
    features: Tensor | None
    """Of all images, where they were computed beforehand and the first stage is another."""


@dataclass(frozen=True)
class OrionBatch:
    """One micro-batch."""

    input_ids: Tensor
    """int64 ``[T]``."""
    local_index: Tensor | None
    """int64 ``[t]``: this context rank's tokens; None when it has all."""
    context: PackedContext
    sight: Sight | None
    targets: Targets | None
    generates: bool
    """Whether the row has images to be generated, so that the teacher is needed."""


def build_batch(
    row: PackedRow, model: ModelConfig, role: Role, device: torch.device, dtype: torch.dtype, token_noise: float = 0.0
) -> OrionBatch:
    """Move a row to the device for one role.

    Args:
        token_noise: largest standard deviation of noise on visual tokens, see ``OrionConfig``.
    """
    bounds = np.asarray(row.segment_bounds, dtype=np.int64)
    local = context_index(bounds, role.context_rank, role.context_size)
    backbone = model.backbone
    position_ids = _tensor(row.position_ids[:, local], device)
    angles = mrope_angles(
        position_ids, backbone.head_size, backbone.rope_theta, backbone.mrope_sections, backbone.mrope_interleaved
    )
    segments = Segments.build(
        bounds, causal=True, device=device, context_rank=role.context_rank, context_size=role.context_size
    )
    return OrionBatch(
        input_ids=_tensor(row.input_ids, device),
        local_index=_tensor(local, device) if role.context_size > 1 else None,
        context=PackedContext.with_angles(angles, dtype, segments={"full": segments}),
        sight=_sight(row, model, role, device, dtype, token_noise) if role.first_stage else None,
        targets=_targets(row, local, model, role, device, dtype) if role.last_stage else None,
        generates=len(row.predict_index) > 0,
    )


def _sight(
    row: PackedRow, model: ModelConfig, role: Role, device: torch.device, dtype: torch.dtype, token_noise: float
) -> Sight:
    trained, read_rows = None, _feature_rows(row, ~row.is_target, model)
    noise = _noise(row, model, token_noise, device, dtype) if token_noise and len(row.predict_index) else None
    if row.features is not None:
        assert not role.vision_encoder_trains, "checked when the cache is opened"
        features = _features(row.features, device, dtype)
        return Sight(None, None, _tensor(row.visual_index, device), features, noise, _tensor(read_rows, device))
    if role.vision_encoder_trains:
        patches, grids = _choose(row, ~row.is_target)
        if not len(grids):
            patches, grids = _blank(model)
        trained = VisionInput.build(patches, grids, model.vision_encoder, device, dtype)
    # With a tower that trains, the frozen one serves targets and teacher, and is needed only where something is
    # generated.
    frozen = None
    if len(row.grids) and (not role.vision_encoder_trains or len(row.predict_index)):
        frozen = VisionInput.build(row.patches, row.grids, model.vision_encoder, device, dtype)
    return Sight(frozen, trained, _tensor(row.visual_index, device), None, noise, _tensor(read_rows, device))


def _noise(row: PackedRow, model: ModelConfig, largest: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[V, H]``. Made on the device: it is as large as the features are."""
    tokens = (row.grids.prod(axis=1) // model.vision_encoder.spatial_merge_size**2).tolist()
    parts = []
    for count, target, seed in zip(tokens, row.is_target, row.noise_seeds.tolist(), strict=True):
        shape = (count, model.backbone.hidden_size)
        if not target:
            parts.append(torch.zeros(shape, device=device))
            continue
        generator = torch.Generator(device).manual_seed(seed)
        deviation = largest * torch.rand((), generator=generator, device=device)
        parts.append(deviation * torch.randn(shape, generator=generator, device=device))
    return torch.cat(parts).to(dtype)


def _targets(
    row: PackedRow, local: np.ndarray, model: ModelConfig, role: Role, device: torch.device, dtype: torch.dtype
) -> Targets:
    labels = row.labels[local]
    text = np.flatnonzero(labels != IGNORED_LABEL)
    place = np.full(len(row.input_ids), -1, dtype=np.int64)
    place[local] = np.arange(len(local))
    mine = place[row.predict_index] >= 0
    feature_rows = row.target_index[mine]
    images = features = None
    if not role.first_stage and row.features is not None:
        features = _features(row.features, device, dtype)
    elif not role.first_stage and len(row.predict_index):
        patches, grids = _choose(row, row.is_target)
        images = VisionInput.build(patches, grids, model.vision_encoder, device, dtype)
        feature_rows = np.searchsorted(_feature_rows(row, row.is_target, model), feature_rows)
    return Targets(
        text_index=_tensor(text, device),
        text_labels=_tensor(labels[text], device),
        vision_index=_tensor(place[row.predict_index[mine]], device),
        feature_rows=_tensor(feature_rows, device),
        images=images,
        features=features,
    )


def _features(stored: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[V, F]`` on the device; bfloat16 comes as its bits."""
    values = torch.from_numpy(stored)
    return (values.view(torch.bfloat16) if values.dtype == torch.int16 else values).to(device, dtype)


def _choose(row: PackedRow, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Patches and grids of the chosen images."""
    return row.patches[np.repeat(chosen, row.grids.prod(axis=1))], row.grids[chosen]


def _feature_rows(row: PackedRow, chosen: np.ndarray, model: ModelConfig) -> np.ndarray:
    """Rows of the chosen images among the merged features of all: int64."""
    tokens = row.grids.prod(axis=1) // model.vision_encoder.spatial_merge_size**2
    return np.flatnonzero(np.repeat(chosen, tokens))


def _blank(model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """One visual token's worth of zero patches."""
    merge = model.vision_encoder.spatial_merge_size
    return np.zeros((merge**2, model.vision_encoder.patch_dim), dtype=np.float32), np.array([[1, merge, merge]])


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)
