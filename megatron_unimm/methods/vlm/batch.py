"""A packed row of conversations on the device, as the stages of a vision-language model read it. Everything that
depends on positions is worked out here, once per micro-batch.

Layouts: T tokens of the row, t = T / context of this rank, V visual tokens, n chosen positions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.model import ModelConfig
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow
from megatron_unimm.models.attention import PackedContext, Segments, context_index
from megatron_unimm.models.gates import modality_mask
from megatron_unimm.models.rotary import token_angles
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
    device: torch.device
    dtype: torch.dtype


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
    read_rows: Tensor
    """int64: which of the V are of images that are read (those that the trained tower sees); the others are to be
    generated."""

    @classmethod
    def of(cls, row: PackedRow, model: ModelConfig, role: Role) -> "Sight":
        trained, read_rows = None, feature_rows(row, ~row.is_target, model)
        if row.features is not None:
            assert not role.vision_encoder_trains, "checked when the cache is opened"
            features = on_device(row.features, role)
            return cls(None, None, as_tensor(row.visual_index, role), features, as_tensor(read_rows, role))
        if role.vision_encoder_trains:
            patches, grids = choose_images(row, ~row.is_target)
            if not len(grids):
                patches, grids = blank_image(model)
            trained = VisionInput.build(patches, grids, model.vision_encoder, role.device, role.dtype)
        # With a tower that trains, the frozen one serves targets and teacher, and is needed only where something is
        # generated.
        frozen = None
        if len(row.grids) and (not role.vision_encoder_trains or len(row.predict_index)):
            frozen = VisionInput.build(row.patches, row.grids, model.vision_encoder, role.device, role.dtype)
        return cls(frozen, trained, as_tensor(row.visual_index, role), None, as_tensor(read_rows, role))


@dataclass(frozen=True)
class VlmBatch:
    """One micro-batch, as every method on a language model has it."""

    input_ids: Tensor
    """int64 ``[T]``."""
    local_index: Tensor | None
    """int64 ``[t]``: this context rank's tokens; None when it has all."""
    context: PackedContext
    sight: Sight | None


@dataclass(frozen=True)
class Words:
    """What the text head of the last stage is compared with. Positions count this context rank's tokens."""

    index: Tensor
    """int64 ``[n_text]``: positions whose next token is text."""
    labels: Tensor
    """int64 ``[n_text]``."""

    @classmethod
    def of(cls, row: PackedRow, local: np.ndarray, role: Role) -> "Words":
        labels = row.labels[local]
        index = np.flatnonzero(labels != IGNORED_LABEL)
        return cls(as_tensor(index, role), as_tensor(labels[index], role))


def local_tokens(row: PackedRow, role: Role) -> np.ndarray:
    """Tokens of the row that this context rank holds: int64 ``[t]``."""
    bounds = np.asarray(row.segment_bounds, dtype=np.int64)
    return context_index(bounds, role.context_rank, role.context_size)


def packed_context(row: PackedRow, local: np.ndarray, model: ModelConfig, role: Role) -> PackedContext:
    """What the decoder's layers share: causal segments, and rotary angles and modality of this rank's tokens."""
    bounds = np.asarray(row.segment_bounds, dtype=np.int64)
    positions = row.position_ids
    if model.backbone.positions == "sequential":
        places = np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))
        positions = np.tile(places, (3, 1))
    segments = Segments.build(
        bounds, causal=True, device=role.device, context_rank=role.context_rank, context_size=role.context_size
    )
    return PackedContext.with_angles(
        token_angles(as_tensor(positions[:, local], role), model.backbone),
        role.dtype,
        segments={"full": segments},
        modality=modality_mask(as_tensor(row.input_ids[local], role), model),
    )


def local_places(index: np.ndarray, local: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Of positions in the row: where each that this context rank holds stands among its tokens, int64 ``[n]``, and
    which of them these are, bool."""
    place = np.full(num_tokens, -1, dtype=np.int64)
    place[local] = np.arange(len(local))
    mine = place[index] >= 0
    return place[index[mine]], mine


def choose_images(row: PackedRow, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Patches and grids of the chosen images."""
    return row.patches[np.repeat(chosen, row.grids.prod(axis=1))], row.grids[chosen]


def feature_rows(row: PackedRow, chosen: np.ndarray, model: ModelConfig) -> np.ndarray:
    """Rows of the chosen images among the merged features of all: int64."""
    tokens = row.grids.prod(axis=1) // model.vision_encoder.spatial_merge_size**2
    return np.flatnonzero(np.repeat(chosen, tokens))


def on_device(stored: np.ndarray, role: Role) -> Tensor:
    """Features ``[V, F]`` that were computed beforehand; bfloat16 comes as its bits."""
    values = torch.from_numpy(stored)
    return (values.view(torch.bfloat16) if values.dtype == torch.int16 else values).to(role.device, role.dtype)


def as_tensor(values: np.ndarray, role: Role) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(role.device, non_blocking=True)


def blank_image(model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """One visual token's worth of zero patches, and its grid."""
    merge = model.vision_encoder.spatial_merge_size
    return np.zeros((merge**2, model.vision_encoder.patch_dim), dtype=np.float32), np.array([[1, merge, merge]])
