"""Joint attention over packed MMDiT rows: the rules of visibility.py lowered to a kernel once per micro-batch, on the
host.

Layouts: T tokens of the row, t = T / context tokens of this rank, N heads of this rank, D head size; rows are packed,
``[t, N, D]``. For kinds of the image stream T and t count that stream only: queries, keys, values and outputs are its
own. For ``cross`` queries and outputs are the image stream's, keys and values the text stream's.

| layers | kinds | kernel | lowering |
|---|---|---|---|
| torch | all | scaled dot product attention, equal sizes batched | :class:`JointSegments` |
| transformer_engine | joint, image, cross | its variable-length attention | :class:`JointSegments` |
| transformer_engine | block_causal, image_block_causal | torch's FlexAttention, compiled | :class:`JointBlocks` |

Under context parallelism each rank has a slice of either stream (visibility.py) and its own queries; keys and values
are gathered from all ranks, and backward sums what the ranks contribute to each. Gathered keys stay in the order of the
ranks: the lowerings know where each token of the row lies there.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_unimm.models.attention import torch_attention
from megatron_unimm.models.mmdit.rotary import rotate_pairs
from megatron_unimm.models.mmdit.visibility import (
    BLOCK_CAUSAL_KINDS,
    CROSS,
    IMAGE_KINDS,
    TokenTable,
    Traits,
    local_index,
    sees,
    visible,
)

BLOCK = 128
"""Tokens along each side of FlexAttention's blocks."""


class SegmentBatch(NamedTuple):
    """Segments of one size, computed as a batch."""

    num_segments: int
    num_queries: int
    num_keys: int


@dataclass(frozen=True)
class JointSegments:
    """A row cut into segments: queries of this rank that see the same keys, with these keys. Nothing is masked inside a
    segment, and a pair that is not seen costs nothing.

    A sample is one segment in ``joint`` and ``image``. In the block-causal kinds a frame is two (clean, and the rest),
    and clean tokens are keys of several. Padding is in none.
    """

    query_index: Tensor
    """int64 ``[q]``: tokens of this rank, segment by segment; all but padding."""
    key_index: Tensor
    """int64 ``[k]``: tokens of the gathered row, segment by segment."""
    batches: tuple[SegmentBatch, ...]
    """The segments in their order, by size."""
    cu_seqlens_q: Tensor
    """int32 ``[segments + 1]``, as is ``cu_seqlens_kv``, for Transformer Engine."""
    cu_seqlens_kv: Tensor
    context_size: int

    @classmethod
    def build(
        cls, table: TokenTable, kind: str, device: torch.device, context_rank: int = 0, context_size: int = 1
    ) -> "JointSegments":
        """Lower one kind of attention for one context rank.

        Args:
            table: the whole row, also for kinds of the image stream.
        """
        cells = Cells.build(table, kind, context_rank, context_size)
        segments = sorted(_segments(cells), key=lambda segment: (len(segment[0]), len(segment[1])))
        sizes = [(len(queries), len(keys)) for queries, keys in segments]
        none = [np.empty(0, dtype=np.int64)]
        return cls(
            _to_device(np.concatenate(none + [queries for queries, _ in segments]), device),
            _to_device(np.concatenate(none + [keys for _, keys in segments]), device),
            tuple(SegmentBatch(len(list(same)), *size) for size, same in groupby(sizes)),
            _to_device(np.cumsum([0] + [size[0] for size in sizes], dtype=np.int32), device),
            _to_device(np.cumsum([0] + [size[1] for size in sizes], dtype=np.int32), device),
            context_size,
        )


@dataclass(frozen=True)
class JointBlocks:
    """The same for FlexAttention: which blocks of queries and keys meet, and the rule inside those that are mixed."""

    block_mask: BlockMask
    """Queries are this rank's t tokens, keys the T tokens of the gathered row."""
    context_size: int

    @classmethod
    def build(
        cls, table: TokenTable, kind: str, device: torch.device, context_rank: int = 0, context_size: int = 1
    ) -> "JointBlocks":
        """Lower one kind of attention for one context rank.

        torch's ``create_block_mask`` would write down all t × T pairs; counting each block's cells gives the same.
        """
        cells = Cells.build(table, kind, context_rank, context_size)
        count = len(cells.sees)
        seen = _per_block(cells.of_query, count) @ cells.sees.astype(np.float32) @ _per_block(cells.of_key, count).T
        full = seen == BLOCK * BLOCK
        query, key = (
            Traits(*(_to_device(values, device) for values in cells.traits.at(cell_of)))
            for cell_of in (cells.of_query, cells.of_key)
        )

        def mask_mod(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
            return sees(kind, query.at(query_index), key.at(key_index))

        block_mask = BlockMask.from_kv_blocks(
            *_ordered((seen > 0) & ~full, device),
            *_ordered(full, device),
            BLOCK_SIZE=BLOCK,
            mask_mod=mask_mod,
            seq_lengths=(len(cells.of_query), len(cells.of_key)),
        )
        return cls(block_mask, context_size)


Lowering = JointSegments | JointBlocks


def lower(
    table: TokenTable, kind: str, backend: str, device: torch.device, context_rank: int = 0, context_size: int = 1
) -> Lowering:
    """The lowering for the kernel that is best at this kind, see the table above."""
    chosen = JointBlocks if kind in BLOCK_CAUSAL_KINDS and backend == "transformer_engine" else JointSegments
    return chosen.build(table, kind, device, context_rank, context_size)


@dataclass
class JointContext(PackedSeqParams):
    """What every layer of one forward pass shares, once per micro-batch. Megatron-Core hands it from block to layer
    untouched."""

    qkv_format: str = "thd"
    lowerings: dict[str, Lowering] = field(default_factory=dict)
    """By the ``kind`` of the attention that takes it."""
    cos: Tensor | None = None
    """``[t, D / 2]`` of the rotary angles of models that have them (FLUX), see rotary.py."""
    sin: Tensor | None = None


class JointAttention(torch.nn.Module):
    """Core attention of a joint block: no weights, no dropout.

    Args:
        config: for the number of heads, their size, and the size of the tensor group.
        backend: ``transformer_engine`` or ``torch``.
        context_group: the ranks that share a row.
        kind: which of the context's lowerings this attention takes. A model that was built for ``joint`` runs
            block-causally when the context has a lowering of ``block_causal`` in its place.
    """

    def __init__(
        self, config: TransformerConfig, backend: str, context_group: torch.distributed.ProcessGroup, kind: str
    ) -> None:
        super().__init__()
        assert backend in ("torch", "transformer_engine"), backend
        with_te = backend == "transformer_engine"
        self.kind = kind
        self.context_group = context_group
        self.variable_length = _variable_length(config) if with_te else None
        self.block_sparse = torch.compile(flex_attention) if with_te else flex_attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: JointContext) -> Tensor:
        """Attend ``[t, N, D]`` queries to ``[t, N, D]`` keys and values of all context ranks, rotated if the context
        has angles; returns ``[t, N * D]``, zeros at padding."""
        if context.cos is not None and context.sin is not None:
            query = rotate_pairs(query, context.cos, context.sin)
            key = rotate_pairs(key, context.cos, context.sin)
        return self.attend(query, key, value, context.lowerings[self.kind])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, lowering: Lowering) -> Tensor:
        """The same for one lowering, heads as they are."""
        assert lowering.context_size == self.context_group.size(), "the row was lowered for another context size"
        if lowering.context_size > 1:
            key_value = torch.cat([key, value], dim=-1)
            key_value = gather_from_sequence_parallel_region(
                key_value, tensor_parallel_output_grad=True, group=self.context_group
            )
            key, value = key_value.chunk(2, dim=-1)
        if isinstance(lowering, JointBlocks):
            return self._by_blocks(query, key, value, lowering.block_mask).flatten(1)
        return self._by_segments(query, key, value, lowering).flatten(1)

    def _by_blocks(self, query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask) -> Tensor:
        query, key, value = (heads.transpose(0, 1)[None] for heads in (query, key, value))  # [1, N, t or T, D]
        return self.block_sparse(query, key, value, block_mask=block_mask)[0].transpose(0, 1)

    def _by_segments(self, query: Tensor, key: Tensor, value: Tensor, segments: JointSegments) -> Tensor:
        queries = query.index_select(0, segments.query_index)  # [q, N, D]
        keys, values = (heads.index_select(0, segments.key_index) for heads in (key, value))  # [k, N, D]
        if not segments.batches:
            # This rank has only padding. Its empty tensors stay in the graph: the gather's backward is collective.
            attended = queries + keys + values
        elif self.variable_length is not None:
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=segments.cu_seqlens_q,
                cu_seqlens_kv=segments.cu_seqlens_kv,
                max_seqlen_q=max(batch.num_queries for batch in segments.batches),
                max_seqlen_kv=max(batch.num_keys for batch in segments.batches),
            )
            # Megatron-Core makes of no_mask the type "padding", the one that Transformer Engine takes for packed rows.
            attended = self.variable_length(queries, keys, values, None, AttnMaskType.no_mask, packed_seq_params=packed)
            attended = attended.view(queries.shape)
        else:
            attended = batched(queries, keys, values, segments.batches, torch_attention)
        return torch.zeros_like(query).index_copy(0, segments.query_index, attended)


def batched(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    batches: tuple[SegmentBatch, ...],
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attention with one call per size of segment: ``[q, N, D]`` to ``[k, N, D]``.

    Args:
        kernel: of ``[segments, N, num_queries or num_keys, D]``.
    """
    key_sizes = [batch.num_segments * batch.num_keys for batch in batches]
    outputs = []
    for batch, query, key, value in zip(
        batches,
        queries.split([batch.num_segments * batch.num_queries for batch in batches]),
        keys.split(key_sizes),
        values.split(key_sizes),
        strict=True,
    ):
        attended = kernel(
            query.unflatten(0, (batch.num_segments, -1)).transpose(1, 2),  # [segments, N, num_queries, D]
            key.unflatten(0, (batch.num_segments, -1)).transpose(1, 2),  # [segments, N, num_keys, D]
            value.unflatten(0, (batch.num_segments, -1)).transpose(1, 2),
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _variable_length(config: TransformerConfig) -> torch.nn.Module:
    """Transformer Engine's attention on this rank's heads. It is told of no parallelism: its own context parallelism
    cuts segments in other ways, and here keys and values are gathered before."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    own = copy.copy(config)
    own.num_attention_heads = own.num_query_groups = config.num_attention_heads // config.tensor_model_parallel_size
    own.tensor_model_parallel_size = own.context_parallel_size = 1
    return TEDotProductAttention(
        own,
        layer_number=1,  # only names the module
        attn_mask_type=AttnMaskType.no_mask,
        attention_type="cross",  # a segment's queries and keys may differ in number
        attention_dropout=0.0,
        pg_collection=ProcessGroupCollection(tp=None, cp=None),
    )


@dataclass(frozen=True)
class Cells:
    """Tokens that are the same to the rules (one sample, frame, stream; clean, shared or neither) fall into one cell,
    so that visibility is worked out between some hundreds of cells and not between all tokens."""

    traits: Traits
    """Of each cell."""
    sees: np.ndarray
    """bool ``[cells, cells]``"""
    of_query: np.ndarray
    """int64 ``[t]``: the cell of each token of this rank."""
    of_key: np.ndarray
    """int64 ``[T]``: the cell of each token of the gathered row, all context ranks' tokens one behind the other."""

    @classmethod
    def build(cls, table: TokenTable, kind: str, context_rank: int, context_size: int) -> "Cells":
        if kind in IMAGE_KINDS:
            table = table.image_stream()
        _, first, cell_of = np.unique(np.stack(table.traits()), axis=1, return_index=True, return_inverse=True)
        cell_of = cell_of.reshape(-1)
        parts = [local_index(table, rank, context_size) for rank in range(context_size)]
        queries, keys = parts[context_rank], np.concatenate(parts)
        if kind == CROSS:
            queries, keys = queries[queries >= table.num_text], keys[keys < table.num_text]
        sees = visible(table, kind, first, first)
        return cls(table.traits().at(first), sees, cell_of[queries], cell_of[keys])


def _segments(cells: Cells) -> list[tuple[np.ndarray, np.ndarray]]:
    """Queries and keys of each segment: as many segments as there are different sets of visible keys."""
    count = len(cells.sees)
    queries_of, keys_of = _members(cells.of_query, count), _members(cells.of_key, count)
    patterns, pattern_of = np.unique(cells.sees, axis=0, return_inverse=True)
    members_of = _members(pattern_of.reshape(-1), len(patterns))
    segments = []
    for pattern, members in zip(patterns, members_of, strict=True):
        queries = np.concatenate([queries_of[cell] for cell in members])
        if pattern.any() and len(queries):
            segments.append((queries, np.concatenate([keys_of[cell] for cell in np.flatnonzero(pattern)])))
    return segments


def _members(group_of: np.ndarray, count: int) -> list[np.ndarray]:
    """Where each of ``count`` groups stands in an array of group numbers, ascending."""
    bounds = np.cumsum(np.bincount(group_of, minlength=count))[:-1]
    return np.split(np.argsort(group_of, kind="stable"), bounds)


def _per_block(cell_of: np.ndarray, count: int) -> np.ndarray:
    """float32 ``[blocks, cells]``: tokens of each cell in each block; the last block may be short."""
    blocks = np.arange(len(cell_of)) // BLOCK
    per_block = np.zeros((-(-len(cell_of) // BLOCK), count), dtype=np.float32)
    np.add.at(per_block, (blocks, cell_of), 1)
    return per_block


def _ordered(mask: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """How FlexAttention takes a mask of blocks: of each row, how many columns are set, and their numbers first."""
    order = np.argsort(~mask, axis=-1, kind="stable")
    return _to_device(mask.sum(-1, dtype=np.int32)[None, None], device), _to_device(
        order.astype(np.int32)[None, None], device
    )


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)
