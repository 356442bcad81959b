"""Query tokens of a VLM, and what becomes of its hidden states at them (MMCORE, arXiv 2604.19902, section 3.1; query
tokens and connectors after MetaQuery, arXiv 2504.06256).

Legend  F pictures, N queries of each, Q = F N, H hidden size of the VLM, D width of a visual latent.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_unimm.config.queries import QueryConnectorConfig
from megatron_unimm.models.attention import PackedContext, Segments
from megatron_unimm.models.specs import block_spec, layer_spec


class QueryTokens(torch.nn.Module):
    """N learnable inputs, the same for every picture. Whole on every tensor-parallel rank."""

    def __init__(self, num_queries: int, config: TransformerConfig) -> None:
        super().__init__()
        shape = (num_queries, config.hidden_size)
        weight = torch.empty(shape, dtype=config.params_dtype).normal_(std=config.init_method_std)
        self.weight = torch.nn.Parameter(weight)

    def forward(self, embeddings_T1H: Tensor, query_index: Tensor) -> Tensor:
        """Put the queries of all pictures at their positions (int64 ``[Q]``) among the token embeddings."""
        if not len(query_index):
            return embeddings_T1H + self.weight.sum() * 0.0  # they take part in every step
        pictures = len(query_index) // len(self.weight)
        queries = self.weight.repeat(pictures, 1)[:, None]  # [Q, 1, H]
        return embeddings_T1H.index_copy(0, query_index, queries.to(embeddings_T1H.dtype))


class QueryConnector(MegatronModule):
    """From hidden states at the queries to visual latents: ``[q, H]`` to ``[q, D]``.

    Args:
        config: of its layers, see ``connector_transformer_config``; without layers only sizes are read of it.
        context_group: ranks that share a row, and may each hold a part of a picture's queries.
    """

    def __init__(
        self,
        model: QueryConnectorConfig,
        num_queries: int,
        latent_size: int,
        config: TransformerConfig,
        backend: str,
        groups: ProcessGroupCollection,
        context_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.num_queries = num_queries
        self.context_group = context_group
        self.layers = None
        if model.num_layers:
            layers = [layer_spec(backend, causal=False) for _ in range(model.num_layers)]
            self.layers = TransformerBlock(config, block_spec(backend, layers), pg_collection=groups)
        hidden = config.hidden_size
        sizes = [hidden, latent_size] if model.projection == "linear" else [hidden, hidden, latent_size]
        self.projection = torch.nn.ModuleList(
            torch.nn.Linear(wide, to, dtype=config.params_dtype) for wide, to in pairwise(sizes)
        )

    def forward(self, hidden_qH: Tensor, query_rows: Tensor, num_rows: int) -> Tensor:
        """Visual latents ``[q, D]`` of this context rank's queries.

        Args:
            query_rows: int64 ``[q]``: which of the row's Q queries these are.
            num_rows: Q.
        """
        hidden = hidden_qH
        if self.layers is not None and num_rows:
            hidden = self._through_layers(hidden, query_rows, num_rows)  # [q, H]
        for number, linear in enumerate(self.projection):
            hidden = linear(F.gelu(hidden) if number else hidden)
        return hidden

    def _through_layers(self, hidden_qH: Tensor, query_rows: Tensor, num_rows: int) -> Tensor:
        """A picture's queries see one another, wherever they are; every context rank works on all of them, and answers
        for its own."""
        everyone = hidden_qH.new_zeros(num_rows, hidden_qH.shape[1]).index_copy(0, query_rows, hidden_qH)  # [Q, H]
        if self.context_group.size() > 1:
            everyone = reduce_from_tensor_model_parallel_region(everyone, group=self.context_group)
            everyone = copy_to_tensor_model_parallel_region(everyone, group=self.context_group)
        bounds = np.arange(0, num_rows + 1, self.num_queries)
        context = PackedContext(segments={"full": Segments.build(bounds, causal=False, device=hidden_qH.device)})
        assert self.layers is not None
        hidden = self.layers(everyone[:, None], attention_mask=None, packed_seq_params=context)[:, 0]  # [Q, H]
        return hidden.index_select(0, query_rows)


def pooled_to_grid(features_VF: Tensor, sizes: Sequence[tuple[int, int]], grid: tuple[int, int]) -> Tensor:
    """Features of the patches of pictures, averaged over the cells of a grid laid over each picture (arXiv 2604.19902,
    section 3.1.1: "pool ViT patch features into a K x K grid"). A cell averages all patches that it shares some area
    with, as many as they are: neighbours may share a patch, and cells smaller than a patch have one each, or a few.

    Args:
        features_VF: pictures one behind the other, row by row.
        sizes: rows and columns of each picture's features.
        grid: rows and columns of cells.

    Returns:
        ``[F rows columns, F']`` in the order of the pictures.
    """
    parts = list(features_VF.split([rows * columns for rows, columns in sizes]))
    for rows, columns in dict.fromkeys(sizes):
        same = [number for number, size in enumerate(sizes) if size == (rows, columns)]
        laid = torch.stack([parts[number] for number in same]).unflatten(1, (rows, columns)).movedim(-1, 1)
        cells = F.adaptive_avg_pool2d(laid.float(), grid).to(features_VF.dtype)  # [same, F', rows, columns]
        for number, pooled in zip(same, cells.flatten(2).transpose(1, 2), strict=True):
            parts[number] = pooled
    return torch.cat(parts)
