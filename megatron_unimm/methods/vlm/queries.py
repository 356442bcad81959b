"""A vision-language model that reads query tokens where it is to draw: by itself, and whole on the first pipeline stage
of a diffusion transformer.

Layouts: T tokens of the row, Q queries of it, q of them of this context rank, V visual tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_unimm.config.model import ModelConfig
from megatron_unimm.config.parallel import PrecisionConfig, SystemConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.sample import PackedRow
from megatron_unimm.methods.vlm.batch import (
    Role,
    Sight,
    VlmBatch,
    as_tensor,
    local_places,
    local_tokens,
    packed_context,
)
from megatron_unimm.methods.vlm.model import FrozenParts, VlmModel
from megatron_unimm.models.trainable import is_frozen
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform

VLM = "vlm."
"""Before the names of the VLM's parameters beside a diffusion transformer; in checkpoints they have the names of its
own."""


@dataclass(frozen=True)
class Queries:
    """Where the queries stand."""

    index: Tensor
    """int64 ``[Q]``: in the row."""
    local_index: Tensor
    """int64 ``[q]``: among this context rank's tokens."""
    rows: Tensor
    """int64 ``[q]``: which of the Q these are."""

    @classmethod
    def of(cls, row: PackedRow, query_index: np.ndarray, local: np.ndarray, role: Role) -> tuple["Queries", np.ndarray]:
        """And which of the Q this rank has, int64 ``[q]``.

        Args:
            query_index: int64 ``[Q]``. local: int64, this context rank's tokens.
        """
        places, mine = local_places(query_index, local, row.num_tokens)
        rows = np.flatnonzero(mine)
        return cls(as_tensor(query_index, role), as_tensor(places, role), as_tensor(rows, role)), rows


@dataclass(frozen=True)
class QueryBatch(VlmBatch):
    """One micro-batch."""

    queries: Queries


def build_condition_batch(row: PackedRow, query_index: np.ndarray, model: ModelConfig, role: Role) -> QueryBatch:
    """A row that the VLM only reads."""
    local = local_tokens(row, role)
    return QueryBatch(
        input_ids=as_tensor(row.input_ids, role),
        local_index=as_tensor(local, role) if role.context_size > 1 else None,
        context=packed_context(row, local, model, role),
        sight=Sight.of(row, model, role),
        queries=Queries.of(row, query_index, local, role)[0],
    )


class QueryVlm(VlmModel):
    """One pipeline stage.

    Parts, beside a VLM's:
        query_tokens: puts queries, at int64 ``[Q]`` places, among token embeddings ``[T, 1, H]`` (first stage).

    Args:
        new_queries: makes them.
    """

    def __init__(
        self,
        stage: StageConfig,
        platform: Platform,
        groups: ParallelGroups,
        frozen: FrozenParts,
        new_queries: Callable[["QueryVlm"], torch.nn.Module],
        virtual_stage: int = 0,
    ) -> None:
        super().__init__(stage, platform, groups, frozen, virtual_stage)
        if self.pre_process:
            # New weights come from the seed alone, not from what this rank drew before: the same at every layout.
            torch.manual_seed(stage.train.seed)
            self.query_tokens = new_queries(self)

    def enter(self, batch: QueryBatch) -> Tensor:
        """Token embeddings with visual tokens of the images that are read, and queries, among them (first stage)."""
        assert batch.sight is not None
        seen = self.seen_features(batch.sight, self.frozen_features(batch.sight))  # [V, (1 + K) H] or None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen.up_to_layers):
            words = self.query_tokens(self.backbone.embed(batch.input_ids), batch.queries.index)  # [T, 1, H]
            return self.embed(self.backbone, words, seen, batch.sight, batch.local_index)

    # -- beside a diffusion transformer, whole on one stage

    def last_hidden(self, batch: QueryBatch) -> Tensor:
        """The last hidden states of this context rank's tokens, ``[T / context, H]``."""
        hidden = self.student(self.enter(batch), batch.context)  # [t, 1, H]
        return self.backbone.gather(hidden)[:, 0]

    def visual_tokens(self, batch: QueryBatch) -> Tensor:
        """Of the images that a row reads, ``[V, H]``, whole on every rank; the tower looks at them again."""
        assert batch.sight is not None
        seen = self.seen_features(batch.sight, self.frozen_features(batch.sight))
        weight = next(self.query_tokens.parameters())
        nothing = weight.new_zeros(0, self.config.hidden_size)
        return nothing if seen is None or seen.dim() == 0 else self.tokens_of(seen)

    def whole(self, rows_tF: Tensor, index: Tensor, size: int) -> Tensor:
        """The rows of all context ranks, each at its place: ``[size, F]``."""
        group = self.groups.collection.cp
        whole = rows_tF.new_zeros(size, rows_tF.shape[1]).index_copy(0, index, rows_tF)
        return copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(whole, group=group), group=group
        )


def frozen_parts(stage: StageConfig, prefix: str = "") -> FrozenParts:
    """What the table of trainables leaves out.

    Args:
        prefix: before the names of the VLM's parameters.
    """
    rules = stage.train.trainable
    return FrozenParts(
        vision_encoder=is_frozen(f"{prefix}vision_encoder", rules),
        backbone=is_frozen(f"{prefix}backbone", rules),
        inputs=is_frozen(f"{prefix}query_tokens", rules),
    )


def frozen_vlm(stage: StageConfig) -> FrozenParts:
    """What the table leaves out of the VLM beside a diffusion transformer."""
    return frozen_parts(stage, VLM)


def vlm_stage(stage: StageConfig) -> StageConfig:
    """The stage as its VLM is built: whole on one pipeline stage, never in FP8 (its rows have any length), with nothing
    recomputed, and its images never computed beforehand."""
    parallel = stage.system.parallel.model_copy(update={"pipeline": 1, "virtual_pipeline": 1, "layers_per_stage": None})
    system = SystemConfig(
        platform=stage.system.platform,
        layers=stage.system.layers,
        parallel=parallel,
        precision=PrecisionConfig(dtype=stage.system.precision.dtype),
    )
    data = stage.data.model_copy(update={"feature_cache": ""})
    return stage.model_copy(update={"system": system, "data": data})
