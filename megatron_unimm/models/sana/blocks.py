"""The block of SANA (arXiv 2410.10629, figure 5) as a layer of a Megatron-Core transformer block.

Legend  s tokens of this rank between layers, t tokens of its row (s, or tensor s under sequence parallelism), n
        conditioning vectors, N and D heads and head size of an attention, H hidden size, C width of cross attention.
Layout  ``[s, 1, H]`` between layers, text tokens in front: no block changes them, they travel along.

A layer takes and returns what Megatron-Core's block hands on: hidden states, and as ``context`` what modulates all
layers, ``[n, 6, H]``, to which each adds a table of its own.
"""

import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_unimm.config.mmdit import SanaConfig
from megatron_unimm.models.mmdit.attention import JointAttention
from megatron_unimm.models.mmdit.blocks import AttentionProjections, linear_options, recomputed
from megatron_unimm.models.mmdit.modulation import add_gated, modulate, plain_norm
from megatron_unimm.models.mmdit.row import MMDiTRow
from megatron_unimm.models.mmdit.visibility import CROSS
from megatron_unimm.models.sana.feed_forward import MixFeedForward
from megatron_unimm.models.sana.linear_attention import LinearAttention
from megatron_unimm.models.specs import layers_provider

IMAGE = "image"


def modulation_table(num_parts: int, config: TransformerConfig) -> torch.nn.Parameter:
    """``[num_parts, H]``, added to what modulates every layer. Under sequence parallelism each rank modulates its own
    tokens, and Megatron-Core sums the gradients over tensor-parallel ranks."""
    values = torch.randn(num_parts, config.hidden_size, dtype=config.params_dtype) / config.hidden_size**0.5
    table = torch.nn.Parameter(values)
    table.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return table


class CrossAttention(MegatronModule):
    """The image's attention to its condition, with softmax, of heads of its own size."""

    def __init__(
        self, model: SanaConfig, config: TransformerConfig, backend: str, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        provider, hidden, width = layers_provider(backend), config.hidden_size, model.cross_size
        self.head_size = model.cross_head_size
        self.linear_q = provider.column_parallel_linear()(
            hidden, width, gather_output=False, **linear_options("qkv", config, groups)
        )
        self.linear_kv = provider.column_parallel_linear()(
            hidden, 2 * width, gather_output=False, **linear_options("qkv", config, groups)
        )
        self.linear_proj = provider.row_parallel_linear()(
            width, hidden, input_is_parallel=True, **linear_options("proj", config, groups)
        )
        heads = copy.copy(config)
        heads.num_attention_heads = heads.num_query_groups = model.num_cross_heads
        heads.kv_channels = model.cross_head_size
        self.core = JointAttention(heads, backend, groups.cp, CROSS)

    def forward(self, image_s1H: Tensor, text_s1H: Tensor, row: MMDiTRow) -> Tensor:
        """``[s_image, 1, H]``."""
        query = self.linear_q(image_s1H)[0][:, 0].unflatten(1, (-1, self.head_size))  # [t_image, N / tensor, D]
        mixed = self.linear_kv(text_s1H)[0][:, 0]  # [t_text, 2 C / tensor]: key and value of each head
        key, value = mixed.unflatten(1, (-1, 2, self.head_size)).unbind(2)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.core(query, key, value, row.joint)

        attended = recomputed(self.config, "core_attn", attend, query, key, value)  # [t_image, C / tensor]
        return self.linear_proj(attended[:, None].contiguous())[0]


class SanaBlock(MegatronModule):
    """Linear attention, cross attention and Mix-FFN of the image; the first and the last are modulated."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
        *,
        model: SanaConfig,
        backend: str,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        self.modulation_table = modulation_table(6, config)
        self.attention = AttentionProjections(False, config, backend, pg_collection, qkv_bias=model.attention_bias)
        self.linear_attention = LinearAttention(IMAGE)
        self.cross_attention = CrossAttention(model, config, backend, pg_collection)
        self.feed_forward = MixFeedForward(config, backend, pg_collection)

    def forward(
        self, hidden_states: Tensor, context: Tensor, packed_seq_params: MMDiTRow, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """``[s, 1, H]`` and what modulates, ``[n, 6, H]``, unchanged."""
        row, vectors = packed_seq_params, packed_seq_params.image_vectors
        assert vectors is not None
        assert row.pictures is not None
        text, image = row.streams(hidden_states)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.modulation_table + context).unbind(1)  # [n, H] each
        update = self._attend(modulate(plain_norm(image), shift, scale, vectors), row)
        image = add_gated(image, update, gate, vectors)
        image = image + self.cross_attention(image, text, row)
        update = self.feed_forward(modulate(plain_norm(image), mlp_shift, mlp_scale, vectors), row.pictures)
        image = add_gated(image, update, mlp_gate, vectors)
        return torch.cat([text, image]), context

    def _attend(self, image_s1H: Tensor, row: MMDiTRow) -> Tensor:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.linear_attention(query, key, value, row.joint)

        attended = recomputed(self.config, "core_attn", attend, *self.attention.qkv(image_s1H))  # [t_image, H / tensor]
        return self.attention.output(attended)


def layer_spec(model: SanaConfig, backend: str, number: int) -> ModuleSpec:
    """Layer ``number`` (zero-based), all alike."""
    return ModuleSpec(SanaBlock, params=dict(model=model, backend=backend))
