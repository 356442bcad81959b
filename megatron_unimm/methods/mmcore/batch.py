"""A packed row on the device, as the stages of MMCORE's VLM read it: ``methods/vlm/batch.py``, with queries and what
they are aligned to.

Layouts: T tokens of the row, Q queries of it, q of them of this context rank, F pictures to be drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_unimm.config.model import ModelConfig
from megatron_unimm.config.queries import QueryVlmConfig, SiglipTeacher
from megatron_unimm.data.queries import QueryRow
from megatron_unimm.methods.vlm.batch import (
    Role,
    Sight,
    Words,
    as_tensor,
    local_tokens,
    on_device,
    packed_context,
)
from megatron_unimm.methods.vlm.queries import Queries, QueryBatch
from megatron_unimm.models.vision import VisionInput
from megatron_unimm.models.vision.siglip import SiglipInput


@dataclass(frozen=True)
class Alignment:
    """What the last stage aligns its visual latents to."""

    sizes: Sequence[tuple[int, int]]
    """Rows and columns of the teacher's features of each picture."""
    images: VisionInput | SiglipInput | None
    """The pictures for the teacher; None where its features were computed beforehand, or there are none."""
    features: Tensor | None
    """``[V, F']``."""
    learned: Tensor
    """int64: which of this context rank's q queries something is learned from."""


@dataclass(frozen=True)
class MMCoreBatch(QueryBatch):
    """One micro-batch."""

    words: Words | None
    alignment: Alignment | None


def build_batch(row: QueryRow, model: ModelConfig, vlm: QueryVlmConfig, role: Role) -> MMCoreBatch:
    """Move a row to the device for one role."""
    local = local_tokens(row.tokens, role)
    queries, chosen = Queries.of(row.tokens, row.query_index, local, role)
    return MMCoreBatch(
        input_ids=as_tensor(row.tokens.input_ids, role),
        local_index=as_tensor(local, role) if role.context_size > 1 else None,
        context=packed_context(row.tokens, local, model, role),
        sight=Sight.of(row.tokens, model, role) if role.first_stage else None,
        queries=queries,
        words=Words.of(row.tokens, local, role) if role.last_stage else None,
        alignment=_alignment(row, chosen, model, vlm, role) if role.last_stage else None,
    )


def _alignment(row: QueryRow, query_rows: np.ndarray, model: ModelConfig, vlm: QueryVlmConfig, role: Role) -> Alignment:
    merge = 1 if isinstance(vlm.teacher, SiglipTeacher) else model.vision_encoder.spatial_merge_size
    sizes = [(int(rows) // merge, int(columns) // merge) for _, rows, columns in row.target_grids]
    images = features = None
    if row.target_features is not None:
        features = on_device(row.target_features, role)
    elif len(row.target_grids) and isinstance(vlm.teacher, SiglipTeacher):
        images = SiglipInput.from_patches(row.target_patches, sizes, role.device, role.dtype)
    elif len(row.target_grids):
        images = VisionInput.build(row.target_patches, row.target_grids, model.vision_encoder, role.device, role.dtype)
    learned = np.flatnonzero(np.repeat(row.learned, vlm.num_queries)[query_rows])
    return Alignment(sizes, images, features, as_tensor(learned, role))
