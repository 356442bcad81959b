"""Attention over packed rows: what attends to what is described once per micro-batch, on the host, and lowered to a
kernel.

Layouts: t tokens of this rank (T / context), T tokens of the row, N heads, D head size. Rows are packed: ``[t, N, D]``.
A segment is a stretch that attends only inside itself: a sample in the decoder, an image or a window in a vision tower.
Under context parallelism of size c each segment is cut into 2c chunks and rank r holds chunks r and 2c-1-r, which
balances causal work.

    segments of lengths 2 and 3, causal:        [[1 0 0 0 0],
                                                 [1 1 0 0 0],
                                                 [0 0 1 0 0],
                                                 [0 0 1 1 0],
                                                 [0 0 1 1 1]]
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_unimm.models.rotary import rotate


@dataclass(frozen=True)
class SegmentGroup:
    """Segments of one length, computed as a batch."""

    num_segments: int
    num_queries: int
    """Of this rank in each: length / c."""
    num_keys: int
    """length."""
    mask: Tensor | None
    """bool ``[length / c, length]``, True attends; None leaves it to ``causal``."""
    causal: bool


@dataclass(frozen=True)
class Segments:
    """One description of what attends to what, lowered for both kernels."""

    groups: tuple[SegmentGroup, ...]
    query_index: Tensor
    """int64 ``[t]``: tokens of this rank, group by group."""
    key_index: Tensor
    """int64 ``[T]``: tokens of the row, group by group."""
    order: Tensor
    """int64 ``[t]``: where each of this rank's tokens stands in ``query_index``."""
    gathered_order: Tensor | None
    """int64 ``[T]``: position of each token of the row in the concatenation of all context ranks; None without
    context parallelism."""
    cu_seqlens: Tensor
    """int32 ``[segments + 1]`` over the whole row, for Transformer Engine."""
    max_length: int

    @classmethod
    def build(
        cls, bounds: np.ndarray, causal: bool, device: torch.device, context_rank: int = 0, context_size: int = 1
    ) -> "Segments":
        """Lower segment bounds (``[segments + 1]``, 0 first, T last) for one context rank.

        Raises:
            AssertionError: a segment's length is not a multiple of twice the context size (the packer aligns them).
        """
        lengths = np.diff(bounds)
        local = context_index(bounds, context_rank, context_size)
        local_bounds = bounds // context_size
        groups, query_index, key_index = [], [], []
        for length in np.unique(lengths):
            chosen = np.flatnonzero(lengths == length)
            queries = local_bounds[chosen][:, None] + np.arange(length // context_size)
            keys = bounds[chosen][:, None] + np.arange(length)
            mask = None
            if causal and context_size > 1:
                inside = local[queries[0]] - bounds[chosen[0]]
                mask = torch.from_numpy(np.arange(length)[None, :] <= inside[:, None]).to(device)
            groups.append(SegmentGroup(*queries.shape, int(length), mask, causal))
            query_index.append(queries.reshape(-1))
            key_index.append(keys.reshape(-1))
        by_group = np.concatenate(query_index)
        gathered = None
        if context_size > 1:
            everyone = np.concatenate([context_index(bounds, rank, context_size) for rank in range(context_size)])
            gathered = _index(np.argsort(everyone), device)
        cu_seqlens = torch.from_numpy(bounds.astype(np.int32)).to(device)
        return cls(
            tuple(groups),
            _index(by_group, device),
            _index(np.concatenate(key_index), device),
            _index(np.argsort(by_group), device),
            gathered,
            cu_seqlens,
            int(lengths.max()),
        )


def context_index(bounds: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Tokens of the row that one context rank holds, in its order: int64 ``[T / size]``."""
    if size == 1:
        return np.arange(bounds[-1])
    assert np.all(np.diff(bounds) % (2 * size) == 0), (
        f"segment lengths {np.diff(bounds)} are not multiples of {2 * size}"
    )
    parts = []
    for start, stop in pairwise(bounds):
        chunk = (stop - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            parts.append(np.arange(start + number * chunk, start + (number + 1) * chunk))
    return np.concatenate(parts)


def _index(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device, non_blocking=True)


class KeyValueStore(Protocol):
    """A decoding session's keys and values."""

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Append ``[t, groups, D]`` keys and values of a layer and attend ``[t, N, D]`` queries to all that are
        stored."""
        ...


@dataclass
class PackedContext(PackedSeqParams):
    """What every attention layer of one forward pass shares. Megatron-Core hands it from block to layer to attention
    untouched."""

    qkv_format: str = "thd"
    segments: dict[str, Segments] = field(default_factory=dict)
    """By kind: ``full``, ``window``."""
    cos: Tensor | None = None
    """``[t, D / 2]`` in the computing dtype."""
    sin: Tensor | None = None
    modality: Tensor | None = None
    """bool ``[gates, t]``: which tokens each further gate of the routers routes (``models/gates.py``); None for a model
    without."""
    cache: KeyValueStore | None = None

    @classmethod
    def with_angles(cls, angles: Tensor, dtype: torch.dtype, **fields: object) -> "PackedContext":
        """Context with the cosine and sine of rotary angles ``[t, D / 2]`` (float32)."""
        return cls(cos=angles.cos().to(dtype), sin=angles.sin().to(dtype), **fields)  # type: ignore[arg-type]


class PackedAttention(torch.nn.Module):
    """Core attention of a Megatron-Core layer on packed rows; applies rotary positions itself, so that no layer
    recomputes or misplaces them.

    Args:
        kind: which of the context's segments this layer uses.
        transformer_engine: use its fused kernel; else torch's scaled dot product attention, segment lengths batched.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        kind: str = "full",
        transformer_engine: bool = False,
    ) -> None:
        super().__init__()
        assert pg_collection is not None, "process groups are handed in"
        self.kind = kind
        self.layer_number = layer_number
        self.scale = softmax_scale
        self.context_group = pg_collection.cp
        self.fused = None
        if transformer_engine:
            from megatron.core.extensions.transformer_engine import TEDotProductAttention

            self.fused = TEDotProductAttention(
                config,
                layer_number,
                attn_mask_type,
                attention_type,
                softmax_scale=softmax_scale,
                cp_comm_type=cp_comm_type,
                pg_collection=pg_collection,
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedContext,
    ) -> Tensor:
        """Attend ``[t, N, D]`` queries to ``[t, groups, D]`` keys and values; returns ``[t, N * D]``."""
        context = packed_seq_params
        if context.cos is not None and context.sin is not None:
            query = rotate(query, context.cos, context.sin)
            key = rotate(key, context.cos, context.sin)
        if context.cache is not None:
            return context.cache.attend(self.layer_number, query, key, value, self.scale).flatten(1)
        segments = context.segments[self.kind]
        if self.fused is not None:
            return self._fused(query, key, value, segments, attn_mask_type)
        return segment_attention(query, key, value, segments, self.scale, self.context_group).flatten(1)

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, attn_mask_type: AttnMaskType
    ) -> Tensor:
        assert self.fused is not None
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=segments.cu_seqlens,
            cu_seqlens_kv=segments.cu_seqlens,
            max_seqlen_q=segments.max_length,
            max_seqlen_kv=segments.max_length,
        )
        return self.fused(query, key, value.contiguous(), None, attn_mask_type, packed_seq_params=packed)


def torch_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """torch's attention, looked up when it is called: on the meta device it is another (``platform_meta.py``).

    On a CPU it computes in float32, whatever comes in: backward in bf16 takes several times as long there.

    Args:
        query: ``[..., N, queries, D]``. key, value: ``[..., N, keys, D]``.
        options: as torch has them.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), **options).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, **options)


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    context_group: torch.distributed.ProcessGroup,
) -> Tensor:
    """torch's attention, one call per distinct segment length.

    Args:
        query: ``[t, N, D]``. key, value: ``[t, groups, D]``.

    Returns:
        ``[t, N, D]``.
    """
    if segments.gathered_order is not None:
        # Every rank needs all keys of its segments; backward sums what the ranks contribute to each key.
        key_value = torch.cat([key, value], dim=-1)
        key_value = gather_from_sequence_parallel_region(
            key_value, tensor_parallel_output_grad=True, group=context_group
        )
        key, value = key_value.index_select(0, segments.gathered_order).split([key.shape[-1], value.shape[-1]], dim=-1)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # Brought into the groups' order once and cut: the backward of many small look-ups writes as many whole gradients.
    key_sizes = [group.num_segments * group.num_keys for group in segments.groups]
    outputs = []
    for group, queries, keys, values in zip(
        segments.groups,
        query.index_select(0, segments.query_index).split([g.num_segments * g.num_queries for g in segments.groups]),
        key.index_select(0, segments.key_index).split(key_sizes),
        value.index_select(0, segments.key_index).split(key_sizes),
        strict=True,
    ):
        attended = torch_attention(
            queries.unflatten(0, (group.num_segments, -1)).transpose(1, 2),  # [n, N, length / c, D]
            keys.unflatten(0, (group.num_segments, -1)).transpose(1, 2),  # [n, N, length, D]
            values.unflatten(0, (group.num_segments, -1)).transpose(1, 2),
            attn_mask=group.mask,
            is_causal=group.causal and group.mask is None,
            scale=scale,
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, segments.order)
