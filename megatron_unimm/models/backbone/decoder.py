"""The decoder-only language model of the Qwen VLMs and of Ming-Lite-Omni, as one pipeline stage holds it.

Layout: t tokens of this rank between the layers (T / context, and / tensor under sequence parallelism), ``[t, 1, H]``.
"""

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_unimm.config.model import BackboneConfig
from megatron_unimm.config.routing import RoutingConfig
from megatron_unimm.models.attention import PackedContext
from megatron_unimm.models.backbone.deepstack import Deepstack, DeepstackLayer
from megatron_unimm.models.backbone.routing import LayerMixture, Mixture, RoutedLayer
from megatron_unimm.models.specs import block_spec, layer_spec
from megatron_unimm.models.transformer_config import whole_sequence
from megatron_unimm.parallel.pipeline import through_layers

NORM_EPSILON = 1e-7
"""Added to the length of a column that logits are divided by, fixed in BailingMoE's code."""


class Backbone(LanguageModule):
    """Embedding (first stage), layers, final norm and output layer (last stage).

    Args:
        model: architecture.
        config: the same for Megatron-Core, with the layout (``models/transformer_config.py``).
        backend: layer implementation, see ``models/specs.py``.
        groups: process groups.
        pre_process: hold the embedding. post_process: hold the final norm and the output layer.
        virtual_stage: number of this model chunk on its rank under virtual pipelining.
        deepstack: the vision encoder's levels that this chunk adds and hands on; none if left out.
        routing: a mixture of the layers' states for every token, beside the last; none if left out.
    """

    def __init__(
        self,
        model: BackboneConfig,
        config: TransformerConfig,
        backend: str,
        groups: ProcessGroupCollection,
        pre_process: bool = True,
        post_process: bool = True,
        virtual_stage: int | None = None,
        deepstack: Deepstack | None = None,
        routing: RoutingConfig | None = None,
    ) -> None:
        super().__init__(config, pg_collection=groups)
        self.model = model
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = virtual_stage
        self.deepstack = deepstack or Deepstack()
        self.routing = (
            None if routing is None else LayerMixture.of(routing, model.num_layers, model.hidden_size, pre_process)
        )
        self.share_embeddings_and_output_weights = model.tie_embeddings
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                model.vocab_size,
                model.max_position,
                position_embedding_type="none",
                scatter_to_sequence_parallel=False,
                tp_group=groups.tp,
            )
        num_layers = get_num_layers_to_build(config, virtual_stage, groups.pp.rank())
        first = get_transformer_layer_offset(config, virtual_stage, groups.pp.rank())
        layers = [
            _layer(model, backend, first + number, self.deepstack, number == num_layers - 1, routing, self.routing)
            for number in range(num_layers)
        ]
        self.decoder = TransformerBlock(
            config,
            block_spec(backend, layers),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=virtual_stage,
        )
        if post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                model.hidden_size,
                model.vocab_size,
                config=whole_sequence(config),
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and model.tie_embeddings,
                tp_group=groups.tp,
            )
        if self.routing is not None and post_process:
            assert isinstance(self.decoder.final_layernorm, torch.nn.Module)
            self.decoder.final_layernorm.register_forward_pre_hook(self.routing.take_off)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings: int64 ``[T]`` to ``[T, 1, H]``, whole rows on every rank."""
        return self.embedding(input_ids[None], None)

    def scatter(self, hidden_T1H: Tensor) -> Tensor:
        """This rank's part of the sequence under sequence parallelism."""
        return (
            scatter_to_sequence_parallel_region(hidden_T1H, group=self.tp_group)
            if self.config.sequence_parallel
            else hidden_T1H
        )

    def gather(self, hidden_t1H: Tensor) -> Tensor:
        """The whole sequence again. What follows must be the same on all tensor-parallel ranks, or sum its gradients
        itself."""
        if not self.config.sequence_parallel:
            return hidden_t1H
        return gather_from_sequence_parallel_region(hidden_t1H, tensor_parallel_output_grad=False, group=self.tp_group)

    def forward(self, rows_r1H: Tensor, context: PackedContext) -> Tensor:
        """The layers of this stage, and the final norm on the last: ``[r, 1, H]`` to ``[t, 1, H]`` there, elsewhere to
        what the next stage takes. The rows are the hidden states and the deepstack levels that still wait for their
        layer (``models/backbone/deepstack.py``). With routing they have the mixture behind them, also what the last
        stage gives (``models/backbone/routing.py``)."""
        if self.routing is not None:
            return self._routed(self.routing, rows_r1H, context)
        hidden, levels = self.deepstack.split(rows_r1H)  # [t, 1, H], [K, t, 1, H] or None
        hidden = self._through(hidden, levels, context)  # [t, 1, H]
        return self.deepstack.join(hidden, levels)

    def _routed(self, mixture: LayerMixture, rows_r1H: Tensor, context: PackedContext) -> Tensor:
        rows, state = mixture.split(rows_r1H, 1 + self.deepstack.num_received)
        hidden, levels = self.deepstack.split(rows)
        if len(self.decoder.layers):
            carried = state if levels is None else torch.cat([levels.flatten(0, 1), state])
            output = self._through(hidden, carried, context)
        else:
            output = self._through(torch.cat([hidden, state]), None, context)
        if self.post_process:
            return torch.cat([output, mixture.taken()])
        return torch.cat([self.deepstack.join(output[: len(hidden)], levels), output[len(hidden) :]])

    def _through(self, hidden: Tensor, carried: Tensor | None, context: PackedContext) -> Tensor:
        return through_layers(
            self.decoder,
            hidden,
            context=carried,
            packed_seq_params=context,
            padding_mask=self._modality(context),
        )

    def unmixed(self, rows_r1H: Tensor, context: PackedContext) -> Tensor:
        """As :meth:`forward` without routing: hidden states and levels alone, between stages too."""
        mixture = self.routing
        if mixture is None:
            return self(rows_r1H, context)
        nothing = mixture.num_rows(len(rows_r1H) // (1 + self.deepstack.num_received))
        state = rows_r1H.new_zeros(0 if mixture.first else nothing, *rows_r1H.shape[1:])
        output = self(torch.cat([rows_r1H, state]), context)
        return output[: len(output) - nothing]

    def mixture(self, rows_r1H: Tensor) -> tuple[Tensor, Mixture]:
        """Of the last stage's rows: the last hidden states ``[t, 1, H]``, and with routing what is mixed."""
        assert self.routing is not None
        state_follows = LayerMixture(self.routing.layers, self.routing.hidden_size, self.routing.top_k, first=False)
        hidden, state = state_follows.split(rows_r1H, 1)
        return hidden, self.routing.result(state, len(hidden))

    def _modality(self, context: PackedContext) -> Tensor | None:
        """Of the tokens that this rank has between the layers: bool ``[gates, t]``, where routers ask for it."""
        if self.model.moe is None or not self.model.moe.gates:
            return None
        modality = context.modality
        assert modality is not None, "the context of a model with several gates says what tokens are"
        if self.config.sequence_parallel:
            assert self.tp_group is not None
            modality = modality.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
        return modality

    def skip(self, rows_r1H: Tensor) -> Tensor:
        """What :meth:`forward` gives, without the layers."""
        if self.routing is None:
            return self.deepstack.join(*self.deepstack.split(rows_r1H))
        rows, state = self.routing.split(rows_r1H, 1 + self.deepstack.num_received)
        return torch.cat([self.deepstack.join(*self.deepstack.split(rows)), state])

    def logits(self, hidden_nH: Tensor) -> Tensor:
        """Vocabulary logits of chosen positions: ``[n, H]`` to ``[n, vocab / tensor]``, each rank its part of the
        vocabulary."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if self.model.normalize_output:
            # Dividing the hidden states is dividing the columns, and needs no second output layer.
            hidden_nH = hidden_nH / self._output_norm(self.output_layer.weight if weight is None else weight)
        return self.output_layer(hidden_nH, weight=weight)[0]

    @torch.no_grad()
    def _output_norm(self, weight_VH: Tensor) -> Tensor:
        """Length of each column of the whole output layer: ``[H]`` of this rank's rows ``[vocab / tensor, H]``. No
        gradient passes through it, as in BailingMoE."""
        squares = torch.linalg.vector_norm(weight_VH, dim=0, dtype=torch.float32).square()
        torch.distributed.all_reduce(squares, group=self.tp_group)
        return (squares.sqrt() + NORM_EPSILON).to(weight_VH.dtype)


def _layer(
    model: BackboneConfig,
    backend: str,
    number: int,
    deepstack: Deepstack,
    last_of_chunk: bool,
    routing: RoutingConfig | None,
    mixture: LayerMixture | None,
) -> ModuleSpec:
    """Layer ``number`` (0 first), dense or a mixture of experts."""
    moe = model.moe if model.moe is not None and model.moe.in_layer(number) else None
    experts, gates = (None, []) if moe is None else (moe.num_experts, moe.gates)
    spec = layer_spec(backend, causal=True, qk_norm=model.qk_norm, num_experts=experts, gates=gates)
    level = deepstack.place(number) if number < deepstack.num_levels else None
    if routing is not None and mixture is not None:
        place = mixture.layers.index(number) if number in mixture.layers else None
        spec.module = RoutedLayer
        spec.params = {
            "mixture": mixture,
            "routing": routing,
            "place": place,
            "level": level,
            "num_levels": deepstack.num_received,
            "hands_on": last_of_chunk,
        }
    elif level is not None:
        spec.module, spec.params = DeepstackLayer, {"level": level}
    return spec


def merge_visual_tokens(embeddings_T1H: Tensor, visual_VH: Tensor, visual_index: Tensor) -> Tensor:
    """Put visual tokens ``[V, H]`` at their positions (int64 ``[V]``) among the token embeddings."""
    return embeddings_T1H.index_copy(0, visual_index, visual_VH[:, None].to(embeddings_T1H.dtype))
