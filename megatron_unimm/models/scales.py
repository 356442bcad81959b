"""Query tokens at several scales, and the way from what a language model says at them to the condition of a diffusion
transformer (HieraQuery, section 3.1, eq. 1 to 5).

    START_1 q…q END_1 START_2 q……q END_2 … ─ language model ─► hidden states at the q ─ MLP ─ connector ─ MLP ─► tokens

All of it is plain torch, which exports' pipelines (``hub/``) share, but the connector (``models/scale_connector.py``).

Legend  K scales of N_1 … N_K queries, N their sum; F pictures to be drawn, Q = F N: picture by picture, coarse to fine;
        H hidden size of the VLM, C width of the condition, P of the pooled one.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_unimm.config.hieraquery import MultiScaleConfig
from megatron_unimm.models.mmdit.embedding import sincos_table

INIT_STD = 0.02
"""Of queries and marks at the start; Megatron-Core's for all weights."""


class ScaleQueries(nn.Module):
    """N learnable inputs, the same for every picture, with a learnable mark before and behind each scale. Whole on
    every tensor-parallel rank."""

    places: Tensor

    def __init__(self, model: MultiScaleConfig, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.ends = np.cumsum(model.picture_scales.queries).tolist()
        self.has_marks = model.mode == "learned"
        weight = torch.empty(self.ends[-1], hidden_size, dtype=dtype).normal_(std=INIT_STD)
        if not self.has_marks:
            self.weight = nn.Parameter(F.normalize(weight, dim=-1))
            return
        self.weight = nn.Parameter(weight)  # [N, H]
        marks = torch.empty(len(self.ends), 2, hidden_size, dtype=dtype).normal_(std=INIT_STD)
        self.marks = nn.Parameter(marks)  # START and END of each scale
        # Of the length of the queries: of their own they would drown them in the residual stream.
        places = torch.cat([grid_places(hidden_size, *grid) for grid in model.grids]) * (INIT_STD * 2**0.5)
        self.register_buffer("places", places, persistent=False)  # [N, H]

    def forward(self, embeddings_T1H: Tensor, query_index: Tensor) -> Tensor:
        """Put the queries of all pictures at their positions (int64 ``[Q]``) among the token embeddings, and the marks
        around each scale."""
        if not len(query_index):
            nothing = self.weight.sum() + self.marks.sum() if self.has_marks else self.weight.sum()
            return embeddings_T1H + nothing * 0.0  # they take part in every step
        queries = self.weight + self.places.to(self.weight.dtype) if self.has_marks else self.weight
        pictures = len(query_index) // len(queries)
        embeddings = _put(embeddings_T1H, query_index, queries.repeat(pictures, 1))
        if not self.has_marks:
            return embeddings
        index = query_index.unflatten(0, (pictures, -1))  # [F, N]
        starts = index[:, [0, *self.ends[:-1]]] - 1
        stops = index[:, [end - 1 for end in self.ends]] + 1
        around = torch.stack([starts, stops], dim=2).flatten()  # [F K 2]
        return _put(embeddings, around, self.marks.flatten(0, 1).repeat(pictures, 1))


def _put(embeddings_T1H: Tensor, index: Tensor, rows_nH: Tensor) -> Tensor:
    return embeddings_T1H.index_copy(0, index, rows_nH[:, None].to(embeddings_T1H.dtype))


def grid_places(size: int, rows: int, columns: int) -> Tensor:
    """Sines and cosines of the places of a grid, row by row: float32 ``[rows columns, size]``; zeros behind them where
    the size is no multiple of 4."""
    side = max(rows, columns)
    table = sincos_table(size - size % 4, side, side).unflatten(0, (side, side))[:rows, :columns]
    return F.pad(table.flatten(0, 1), (0, size % 4))


class TwoLayers(nn.Module):
    """Linear, GELU, Linear (section 4.2: "we use a two-layer multilayer perceptron")."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, out_size)

    def forward(self, values: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(values)))


class ScaleAdapters(nn.Module):
    """What stands around the connector. Whole on every rank.

    Tokens of the condition are told apart by a vector of their place in their scale's grid, sines and cosines at first
    and learned from there, as MMCORE's visual latents (``models/pathways.py``); Ming's weights were trained without.
    The pooled condition (where the transformer has one), which text encoders gave the pretrained model, is made of the
    mean of a picture's tokens (Ming pools them too).
    """

    def __init__(self, model: MultiScaleConfig, hidden_size: int, condition_size: int, pooled_size: int) -> None:
        super().__init__()
        inner = model.connector.hidden_size
        self.inward = TwoLayers(hidden_size, inner, inner) if hidden_size != inner else nn.Identity()
        self.outward = TwoLayers(inner, condition_size, condition_size) if inner != condition_size else nn.Identity()
        self.pooled = TwoLayers(condition_size, condition_size, pooled_size) if pooled_size else None
        self.has_places = model.mode == "learned"
        if self.has_places:
            places = torch.cat([grid_places(condition_size, *grid) for grid in model.grids])
            self.place = nn.Parameter(places)  # [N, C]

    def condition(self, refined_QH: Tensor) -> Tensor:
        """``[Q, C]``."""
        condition = self.outward(refined_QH)
        if not self.has_places:
            return condition
        if not len(condition):
            return condition + self.place[:0]
        return condition + self.place.repeat(len(condition) // len(self.place), 1)

    def pool(self, condition_VC: Tensor, frame_of_token: Tensor, num_frames: int) -> Tensor | None:
        """``[num_frames, P]`` of the mean of each frame's tokens; frames without any have zeros in its place. None for
        a transformer without a pooled condition (SANA).

        Args:
            frame_of_token: int64 ``[V]``.
        """
        if self.pooled is None:
            return None
        sums = condition_VC.new_zeros(num_frames, condition_VC.shape[1]).index_add(0, frame_of_token, condition_VC)
        ones = torch.ones_like(frame_of_token, dtype=condition_VC.dtype)
        counts = ones.new_zeros(num_frames).index_add(0, frame_of_token, ones)
        return self.pooled(sums / counts.clamp(min=1)[:, None])


class AlignmentProjector(nn.Sequential):
    """From hidden states of a diffusion transformer to features of a vision encoder: three linear layers with SiLU
    between them (REPA, arXiv 2410.06940)."""

    def __init__(self, hidden_size: int, inner_size: int, feature_size: int) -> None:
        super().__init__(
            nn.Linear(hidden_size, inner_size),
            nn.SiLU(),
            nn.Linear(inner_size, inner_size),
            nn.SiLU(),
            nn.Linear(inner_size, feature_size),
        )


def at_grids(
    features_VF: Tensor,
    feature_grids: Sequence[tuple[int, int]],
    number_of: Sequence[int],
    grids: Sequence[tuple[int, int]],
) -> Tensor:
    """Features of pictures brought to other grids by bilinear interpolation (section 3.2: "we employ interpolation at
    the feature level"); a coarser grid averages, with the triangle filter of antialiasing.

    Args:
        features_VF: pictures one behind the other, row by row.
        feature_grids: rows and columns of each picture's.
        number_of: which picture each wanted grid is of.
        grids: rows and columns that are wanted.

    Returns:
        ``[Σ rows columns, F]``.
    """
    parts = features_VF.split([rows * columns for rows, columns in feature_grids])
    found = [features_VF[:0]]
    for number, grid in zip(number_of, grids, strict=True):
        laid = parts[number].unflatten(0, feature_grids[number]).movedim(-1, 0)[None].float()  # [1, F, rows, columns]
        brought = F.interpolate(laid, grid, mode="bilinear", align_corners=False, antialias=True)
        found.append(brought[0].flatten(1).T.to(features_VF.dtype))
    return torch.cat(found)
