"""A row of pictures on the device, as the image decoder's stages read it. Everything that depends on positions or
timesteps is worked out here, once per micro-batch.

Legend  n pictures of the row, V condition tokens, U image tokens, both without padding; t tokens of this context rank,
        t_text and t_image of its streams; F values of a patch of latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.mmdit import FluxConfig, ImageGeneratorConfig, Sd3Config
from megatron_unimm.models.mmdit.attention import JointContext, lower
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
    """Conditioning vectors of every row, where a pipeline wants the same number; None for as many as pictures."""


@dataclass(frozen=True)
class Canvas:
    """A row of the diffusion transformer, before anything is on it: its layers' view, and where its tokens are."""

    row: MMDiTRow
    text_index: Tensor
    """int64 ``[t_text]``: of the row's condition tokens, zeros behind them."""
    image_index: Tensor
    """int64 ``[t_image]``: the same for its image tokens."""
    position_index: Tensor | None
    """int64 ``[t_image]``: rows of SD3's table."""
    picture_of_token: Tensor
    """int64 ``[U]``."""

    @classmethod
    def build(
        cls,
        num_condition: np.ndarray,
        pictures: np.ndarray,
        num_text: int,
        num_tokens: int,
        model: ImageGeneratorConfig,
        place: Place,
    ) -> "Canvas":
        """Lay pictures (int64 ``[n, 2]``, rows and columns of patches) with ``num_condition`` (int64 ``[n]``) tokens of
        condition each into a row of ``num_tokens``, of which the first ``num_text`` are text."""
        counts = pictures.prod(axis=1)
        text = _filled(np.repeat(np.arange(len(counts)), num_condition), num_text)
        image = _filled(np.repeat(np.arange(len(counts)), counts), num_tokens - num_text)
        picture = np.concatenate([text, image])
        role = np.where(np.arange(num_tokens) < num_text, Role.CONDITION, Role.NOISY)
        role = np.where(picture < 0, Role.PADDING, role)
        table = TokenTable(picture, np.zeros(num_tokens, dtype=np.int64), role, num_text)
        local = local_index(table, *place.context)
        in_text = local < num_text
        kinds = ["joint"]
        if isinstance(model.mmdit, Sd3Config) and model.mmdit.dual_attention_layers:
            kinds.append("image")
        joint = JointContext(
            lowerings={kind: lower(table, kind, place.backend, place.device, *place.context) for kind in kinds}
        )
        positions = None
        if isinstance(model.mmdit, Sd3Config):
            positions = np.zeros(num_tokens - num_text, dtype=np.int64)
            grid = model.mmdit.position_grid
            found = [table_index(int(rows), int(columns), grid) for rows, columns in pictures]
            positions[: counts.sum()] = np.concatenate([np.zeros(0, dtype=np.int64), *found])
            positions = _tensor(positions[local[~in_text] - num_text], place)
        else:
            joint.cos, joint.sin = _rotary(model.mmdit, pictures, num_text, num_tokens, local, place)
        num_vectors = place.num_vectors or max(1, len(counts))
        assert len(counts) <= num_vectors, (len(counts), num_vectors)
        row = MMDiTRow.build(
            table,
            np.maximum(picture, 0),  # padding goes by any vector
            num_vectors,
            joint,
            place.device,
            place.dtype,
            context=place.context,
            sequence=place.sequence,
        )
        return cls(
            row=row,
            text_index=_tensor(local[in_text], place),
            image_index=_tensor(local[~in_text] - num_text, place),
            position_index=positions,
            picture_of_token=_tensor(image[: counts.sum()], place),
        )


def _filled(values: np.ndarray, size: int) -> np.ndarray:
    """With -1 for padding behind them."""
    return np.concatenate([values, np.full(size - len(values), -1, dtype=np.int64)])


def _rotary(
    model: FluxConfig, pictures: np.ndarray, num_text: int, num_tokens: int, local: np.ndarray, place: Place
) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[t, D / 2]`` of this rank's tokens; text and padding are at the origin."""
    positions = np.zeros((3, num_tokens), dtype=np.int64)
    found = [flux_positions(int(rows), int(columns)) for rows, columns in pictures]
    whole = np.concatenate([np.zeros((3, 0), dtype=np.int64), *found], axis=1)
    positions[:, num_text : num_text + whole.shape[1]] = whole
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
