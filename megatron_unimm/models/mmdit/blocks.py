"""The blocks of SD3 (arXiv 2403.03206, figure 2 b) and FLUX.1 as layers of a Megatron-Core transformer block.

Legend  s tokens of this rank between layers, t tokens of its context rank (s, or tensor s under sequence
        parallelism), n conditioning vectors, N heads, D head size, H hidden size.
Layout  ``[s, 1, H]`` between layers, text tokens in front; ``[t, N / tensor, D]`` in attention.

A layer takes and returns what Megatron-Core's block hands on: hidden states, and as ``context`` the conditioning
vectors (after their SiLU), which are the same for all layers and reach each as an argument, so that recompute gives
them gradients.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_unimm.config.mmdit import FluxConfig, Sd3Config
from megatron_unimm.models.mmdit.attention import JointAttention
from megatron_unimm.models.mmdit.modulation import Modulation, VectorOfToken, add_gated, modulate, plain_norm
from megatron_unimm.models.mmdit.row import MMDiTRow
from megatron_unimm.models.specs import layers_provider

JOINT, IMAGE = "joint", "image"


class AttentionProjections(MegatronModule):
    """Queries, keys and values of one stream, and the way back from what it attended to.

    Args:
        with_output: False where nothing reads the stream afterwards.
        qkv_bias: of queries, keys and values.
    """

    def __init__(
        self,
        qk_norm: bool,
        config: TransformerConfig,
        backend: str,
        groups: ProcessGroupCollection,
        with_output: bool = True,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(config)
        provider = layers_provider(backend)
        self.linear_qkv = provider.column_parallel_linear()(
            config.hidden_size,
            3 * config.hidden_size,
            gather_output=False,
            **linear_options("qkv", config, groups, bias=qkv_bias),
        )
        self.has_norm = qk_norm
        if qk_norm:
            norm = provider.layer_norm(rms_norm=True, for_qk=True)
            self.q_layernorm = norm(config=config, hidden_size=config.kv_channels, eps=config.layernorm_epsilon)
            self.k_layernorm = norm(config=config, hidden_size=config.kv_channels, eps=config.layernorm_epsilon)
        if with_output:
            self.linear_proj = provider.row_parallel_linear()(
                config.hidden_size, config.hidden_size, input_is_parallel=True, **linear_options("proj", config, groups)
            )

    def qkv(self, hidden_s1H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[t, N / tensor, D]`` each."""
        mixed = self.linear_qkv(hidden_s1H)[0][:, 0]  # [t, 3 H / tensor]: query, key and value of each head
        query, key, value = mixed.unflatten(1, (-1, 3, self.config.kv_channels)).unbind(2)
        if self.has_norm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value

    def output(self, attended_tF: Tensor) -> Tensor:
        """``[t, H / tensor]`` to ``[s, 1, H]``."""
        return self.linear_proj(attended_tF[:, None].contiguous())[0]


class Stream(MegatronModule):
    """One stream's half of a joint block.

    Args:
        context_pre_only: the stream is looked at and ends here: no output, no MLP.
        dual_attention: a second attention inside the stream, beside the joint one (SD3.5 medium).
    """

    def __init__(
        self,
        qk_norm: bool,
        config: TransformerConfig,
        backend: str,
        groups: ProcessGroupCollection,
        *,
        context_pre_only: bool = False,
        dual_attention: bool = False,
    ) -> None:
        super().__init__(config)
        self.context_pre_only = context_pre_only
        self.dual_attention = dual_attention
        num_parts = 2 if context_pre_only else 9 if dual_attention else 6
        self.modulation = Modulation(num_parts, config, groups)
        self.attention = AttentionProjections(qk_norm, config, backend, groups, with_output=not context_pre_only)
        if dual_attention:
            self.attention_2 = AttentionProjections(qk_norm, config, backend, groups)
        if not context_pre_only:
            self.mlp = _mlp(config, backend, groups)


class JointBlock(MegatronModule):
    """Two streams with weights of their own and one attention over both."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
        *,
        qk_norm: bool,
        backend: str,
        context_pre_only: bool = False,
        dual_attention: bool = False,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        parts = (qk_norm, config, backend, pg_collection)
        self.text = Stream(*parts, context_pre_only=context_pre_only)
        self.image = Stream(*parts, dual_attention=dual_attention)
        self.joint_attention = JointAttention(config, backend, pg_collection.cp, JOINT)
        if dual_attention:
            self.image_attention = JointAttention(config, backend, pg_collection.cp, IMAGE)

    def forward(
        self, hidden_states: Tensor, context: Tensor, packed_seq_params: MMDiTRow, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """``[s, 1, H]`` and the vectors ``[n, H]``, unchanged."""
        row = packed_seq_params
        text, image = row.streams(hidden_states)
        on_text, on_image = self.text.modulation(context), self.image.modulation(context)
        normed = plain_norm(image)  # the second attention reads it too
        text_out, image_out = self._attend(text, normed, on_text, on_image, row)
        image = add_gated(image, image_out, on_image[2], row.image_vectors)
        if self.image.dual_attention:
            update = self._attend_inside(modulate(normed, on_image[6], on_image[7], row.image_vectors), row)
            image = add_gated(image, update, on_image[8], row.image_vectors)
        image = self._mlp(self.image, image, on_image, row.image_vectors)
        if text_out is not None:
            text = add_gated(text, text_out, on_text[2], row.text_vectors)
            text = self._mlp(self.text, text, on_text, row.text_vectors)
        return torch.cat([text, image]), context

    def _attend(
        self, text: Tensor, normed: Tensor, on_text: tuple[Tensor, ...], on_image: tuple[Tensor, ...], row: MMDiTRow
    ) -> tuple[Tensor | None, Tensor]:
        """What each stream gets from both; None for a text that ends here."""
        # Without an output the published weights give the scale first.
        shift, scale = on_text[:2] if not self.text.context_pre_only else on_text[::-1]
        text_in = modulate(plain_norm(text), shift, scale, row.text_vectors)  # [s_text, 1, H]
        image_in = modulate(normed, on_image[0], on_image[1], row.image_vectors)  # [s_image, 1, H]
        of_text, of_image = self.text.attention.qkv(text_in), self.image.attention.qkv(image_in)
        query, key, value = (torch.cat(pair) for pair in zip(of_text, of_image, strict=True))  # [t, N / tensor, D]
        attended = _core(self.config, self.joint_attention, query, key, value, row)  # [t, H / tensor]
        to_text, to_image = attended.split([len(of_text[0]), len(of_image[0])])
        text_out = None if self.text.context_pre_only else self.text.attention.output(to_text)
        return text_out, self.image.attention.output(to_image)

    def _attend_inside(self, image_in: Tensor, row: MMDiTRow) -> Tensor:
        """The image's attention to itself."""
        attended = _core(self.config, self.image_attention, *self.image.attention_2.qkv(image_in), row)
        return self.image.attention_2.output(attended)

    def _mlp(self, stream: Stream, hidden: Tensor, on: tuple[Tensor, ...], vectors: VectorOfToken | None) -> Tensor:
        hidden_in = modulate(plain_norm(hidden), on[3], on[4], vectors)
        return add_gated(hidden, _run_mlp(self.config, stream.mlp, hidden_in), on[5], vectors)


class SingleBlock(MegatronModule):
    """FLUX's second kind: one set of weights for both streams, attention and MLP side by side."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
        *,
        backend: str,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        provider = layers_provider(backend)
        self.modulation = Modulation(3, config, pg_collection)
        self.attention = AttentionProjections(True, config, backend, pg_collection, with_output=False)
        self.linear_fc1 = provider.column_parallel_linear()(
            config.hidden_size,
            config.ffn_hidden_size,
            gather_output=False,
            **linear_options("fc1", config, pg_collection),
        )
        assert config.ffn_hidden_size is not None
        self.linear_out = provider.row_parallel_linear()(
            config.hidden_size + config.ffn_hidden_size,
            config.hidden_size,
            input_is_parallel=True,
            **linear_options("fc2", config, pg_collection),
        )
        self.joint_attention = JointAttention(config, backend, pg_collection.cp, JOINT)

    def forward(
        self, hidden_states: Tensor, context: Tensor, packed_seq_params: MMDiTRow, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """``[s, 1, H]`` and the vectors ``[n, H]``, unchanged."""
        row = packed_seq_params
        shift, scale, gate = self.modulation(context)
        hidden_in = modulate(plain_norm(hidden_states), shift, scale, row.all_vectors)  # [s, 1, H]
        query, key, value = (row.to_streams(part) for part in self.attention.qkv(hidden_in))  # [t, N / tensor, D]
        attended = row.to_gathered(_core(self.config, self.joint_attention, query, key, value, row))  # [t, H / tensor]
        grown = self.config.activation_func(self.linear_fc1(hidden_in)[0])  # [t, 1, 4 H / tensor]
        update = self.linear_out(torch.cat([attended[:, None], grown], dim=-1))[0]  # [s, 1, H]
        return add_gated(hidden_states, update, gate, row.all_vectors), context

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The output layer reads what attention and MLP made, each cut over tensor-parallel ranks: a rank's columns are
        two stretches of the whole matrix."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        key = f"{prefix}linear_out.weight"
        state[key] = _two_stretches(state[key], self.config.hidden_size // self.config.tensor_model_parallel_size)
        return state


def layer_spec(model: Sd3Config | FluxConfig, backend: str, number: int) -> ModuleSpec:
    """Layer ``number`` (zero-based) of a model."""
    if isinstance(model, FluxConfig):
        if number < model.num_layers:
            return ModuleSpec(JointBlock, params=dict(qk_norm=True, backend=backend))
        return ModuleSpec(SingleBlock, params=dict(backend=backend))
    return ModuleSpec(
        JointBlock,
        params=dict(
            qk_norm=model.qk_norm,
            backend=backend,
            context_pre_only=number == model.num_layers - 1,
            dual_attention=number in model.dual_attention_layers,
        ),
    )


def linear_options(
    name: str, config: TransformerConfig, groups: ProcessGroupCollection, *, bias: bool = True
) -> dict[str, Any]:
    """What all linear layers are built with."""
    return dict(
        config=config,
        init_method=config.init_method,
        bias=bias,
        skip_bias_add=False,
        is_expert=False,
        tp_comm_buffer_name=name,
        tp_group=groups.tp,
    )


def _mlp(config: TransformerConfig, backend: str, groups: ProcessGroupCollection) -> MLP:
    provider = layers_provider(backend)
    submodules = MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear())
    return MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)


def _run_mlp(config: TransformerConfig, mlp: MLP, hidden: Tensor) -> Tensor:
    def run(hidden: Tensor) -> Tensor:
        grown, bias = mlp(hidden)
        return grown + bias

    return recomputed(config, "mlp", run, hidden)


def _core(
    config: TransformerConfig, attention: JointAttention, query: Tensor, key: Tensor, value: Tensor, row: MMDiTRow
) -> Tensor:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, row.joint)

    return recomputed(config, "core_attn", run, query, key, value)


def recomputed(config: TransformerConfig, name: str, run: Any, *inputs: Tensor) -> Tensor:
    """``run(*inputs)``, done again in the backward pass where the config says so."""
    chosen = config.recompute_granularity == "selective" and name in (config.recompute_modules or ())
    if chosen and torch.is_grad_enabled():
        return tensor_parallel.checkpoint(run, False, *inputs)
    return run(*inputs)


def _two_stretches(tensor: ShardedTensor, width: int) -> ShardedTensorFactory:
    """A rank's part ``[H, width + k width]`` of a matrix ``[H, ranks (width + k width)]``: ``width`` columns of its
    first part, and k times as many of its second, which begins after all ranks' ``width``. In pieces of ``width``
    columns the whole matrix is a regular grid."""
    assert tensor.axis_fragmentations is not None
    ranks = tensor.axis_fragmentations[1]
    rank = tensor.global_offset[1] // tensor.local_shape[1]
    times = tensor.local_shape[1] // width - 1
    columns = [rank, *(ranks + rank * times + number for number in range(times))]

    @torch.no_grad()
    def build(key: str, data: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        assert flattened_range is None
        return [
            ShardedTensor.from_rank_offsets(key, piece, (1, column, ranks * (1 + times)), replica_id=replica_id)
            for piece, column in zip(data.split(width, dim=1), columns, strict=True)
        ]

    @torch.no_grad()
    def merge(pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces, dim=1)

    return ShardedTensorFactory(tensor.key, tensor.data, build, merge, tensor.replica_id)
