"""A row of pictures on the device, before anything is on it: its layers' view, and where its tokens are. Everything
that depends on positions is worked out here, once per micro-batch.

Legend  n frames of the row, V condition tokens, U image tokens, both without padding; t tokens of this context rank,
        t_text and t_image of its streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.mmdit import FluxConfig, ImageGeneratorConfig, SanaConfig, Sd3Config
from megatron_unimm.models.mmdit.attention import JointContext, lower
from megatron_unimm.models.mmdit.frames import Frames
from megatron_unimm.models.mmdit.pictures import PictureBatches
from megatron_unimm.models.mmdit.positions import flux_positions, table_index
from megatron_unimm.models.mmdit.rotary import axes_angles
from megatron_unimm.models.mmdit.row import MMDiTRow
from megatron_unimm.models.mmdit.visibility import Role, TokenTable, local_index


@dataclass(frozen=True)
class Place:
    """Where this rank's model chunk stands."""

    backend: str
    device: torch.device
    dtype: torch.dtype
    context: tuple[int, int]
    """(rank, size), as the next."""
    sequence: tuple[int, int]
    """Tensor-parallel ranks that share a sequence; (0, 1) without sequence parallelism."""
    num_vectors: int | None
    """Conditioning vectors of every row, where a pipeline wants the same number; None for as many as frames."""


@dataclass(frozen=True)
class Canvas:
    """A row of the diffusion transformer."""

    row: MMDiTRow
    text_index: Tensor
    """int64 ``[t_text]``: of the row's condition tokens, zeros behind them."""
    image_index: Tensor
    """int64 ``[t_image]``: the same for its image tokens."""
    position_index: Tensor | None
    """int64 ``[t_image]``: rows of SD3's table."""
    frame_of_token: Tensor
    """int64 ``[U]``."""
    frame_number: Tensor
    """int64 ``[t_image]``: place of each token's frame in its sample; 0 for padding."""

    @classmethod
    def build(
        cls, frames: Frames, num_text: int, num_tokens: int, model: ImageGeneratorConfig, place: Place
    ) -> "Canvas":
        """Lay frames with their conditions into a row of ``num_tokens``, of which the first ``num_text`` are text."""
        text = _filled(np.repeat(np.arange(len(frames)), frames.num_condition), num_text)
        image = _filled(np.repeat(np.arange(len(frames)), frames.counts), num_tokens - num_text)
        frame = np.concatenate([text, image])
        table = _table(frames, frame, num_text)
        local = local_index(table, *place.context)
        in_text = local < num_text
        assert model.mmdit.looks_back or not frames.look_back, f"{model.mmdit.family} sees one picture at a time"
        # Layers ask for the plain kinds; where frames look back, they get the block-causal ones in their place.
        rules = {kind: _BLOCK_CAUSAL[kind] if frames.look_back else kind for kind in model.mmdit.attention_kinds}
        joint = JointContext(
            lowerings={
                kind: lower(table, rule, place.backend, place.device, *place.context) for kind, rule in rules.items()
            }
        )
        positions = None
        if isinstance(model.mmdit, Sd3Config):
            positions = np.zeros(num_tokens - num_text, dtype=np.int64)
            grid = model.mmdit.position_grid
            found = [table_index(rows, columns, grid) for rows, columns in grids_of(frames.sizes)]
            positions[: frames.counts.sum()] = np.concatenate([np.zeros(0, dtype=np.int64), *found])
            positions = _tensor(positions[local[~in_text] - num_text], place)
        elif isinstance(model.mmdit, FluxConfig):
            joint.cos, joint.sin = _rotary(model.mmdit, frames, frame, num_text, local, place)
        num_vectors = place.num_vectors or max(1, len(frames))
        assert len(frames) <= num_vectors, (len(frames), num_vectors)
        row = MMDiTRow.build(
            table,
            np.maximum(frame, 0),  # padding goes by any vector
            num_vectors,
            joint,
            place.device,
            place.dtype,
            context=place.context,
            sequence=place.sequence,
        )
        if isinstance(model.mmdit, SanaConfig):
            row.pictures = PictureBatches.build(frames.sizes, place.device)
        return cls(
            row=row,
            text_index=_tensor(local[in_text], place),
            image_index=_tensor(local[~in_text] - num_text, place),
            position_index=positions,
            frame_of_token=_tensor(image[: frames.counts.sum()], place),
            frame_number=_tensor(_of_frame(frames.number, frame, 0)[local[~in_text]], place),
        )


_BLOCK_CAUSAL = {"joint": "block_causal", "image": "image_block_causal"}


def _table(frames: Frames, frame_of_token: np.ndarray, num_text: int) -> TokenTable:
    """The row's tokens; ``frame_of_token`` is -1 at padding."""
    in_image = np.arange(len(frame_of_token)) >= num_text
    role = np.where(in_image, Role.NOISY, Role.CONDITION)
    role = np.where(in_image & _of_frame(frames.is_clean, frame_of_token, False), Role.CLEAN, role)
    if frames.num_shared is not None:
        ends = np.repeat(frames.num_condition.cumsum(), frames.num_condition)
        is_last = ends - np.arange(len(ends)) <= np.repeat(frames.num_shared, frames.num_condition)
        role[: len(ends)][is_last] = Role.SHARED
    role = np.where(frame_of_token < 0, Role.PADDING, role)
    sample, number = (_of_frame(values, frame_of_token, -1) for values in (frames.sample, frames.number))
    return TokenTable(sample, np.maximum(number, 0), role, num_text)


def _of_frame(values: np.ndarray, frame_of_token: np.ndarray, at_padding: int) -> np.ndarray:
    """What each token's frame has."""
    found = np.full(len(frame_of_token), at_padding, dtype=values.dtype)
    found[frame_of_token >= 0] = values[frame_of_token[frame_of_token >= 0]]
    return found


def _filled(values: np.ndarray, size: int) -> np.ndarray:
    """With -1 for padding behind them."""
    return np.concatenate([values, np.full(size - len(values), -1, dtype=np.int64)])


def _rotary(
    model: FluxConfig, frames: Frames, frame_of_token: np.ndarray, num_text: int, local: np.ndarray, place: Place
) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[t, D / 2]`` of this rank's tokens; padding is at the origin. A frame's number is the first
    axis of all its tokens, condition included: alone it is as the model has learned, and earlier frames lie behind
    it."""
    positions = np.zeros((3, len(frame_of_token)), dtype=np.int64)
    found = [flux_positions(rows, columns) for rows, columns in grids_of(frames.sizes)]
    whole = np.concatenate([np.zeros((3, 0), dtype=np.int64), *found], axis=1)
    positions[:, num_text : num_text + whole.shape[1]] = whole
    positions[0] = _of_frame(frames.number, frame_of_token, 0)
    angles = axes_angles(_tensor(positions[:, local], place), model.rotary_axes, model.rotary_theta)
    return angles.cos(), angles.sin()


def _tensor(values: np.ndarray, place: Place) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(place.device, non_blocking=True)


def padded_to(rows_RF: Tensor, size: int) -> Tensor:
    """With zeros behind, ``[size, F]``."""
    return torch.nn.functional.pad(rows_RF, (0, 0) * (rows_RF.dim() - 1) + (0, size - len(rows_RF)))


def grids_of(pictures: np.ndarray) -> Sequence[tuple[int, int]]:
    """Rows and columns as numbers."""
    return [(int(rows), int(columns)) for rows, columns in pictures]
