"""A vision-language model as the stages of its methods train it: a vision encoder on the first pipeline stage, a
decoder over all of them.

Layout: ``[r, 1, H]`` between pipeline stages; r = t tokens of this rank, and deepstack levels that still wait for their
layer under them (``models/backbone/deepstack.py``). Features of V visual tokens are ``[V, (1 + K) H]``: what the token
is, then its K deepstack levels (0 for Qwen2.5-VL).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.methods.vlm.batch import Role, Sight, Words
from megatron_unimm.models.attention import PackedContext
from megatron_unimm.models.backbone.decoder import Backbone, merge_visual_tokens
from megatron_unimm.models.backbone.deepstack import Deepstack, place_levels, travelling_levels
from megatron_unimm.models.specs import layers_backend
from megatron_unimm.models.transformer_config import (
    DTYPES,
    backbone_transformer_config,
    vision_transformer_config,
)
from megatron_unimm.models.vision import VisionInput, VisionTower, build_vision_encoder
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.parallel.vocabulary import cross_entropy


@dataclass(frozen=True)
class FrozenParts:
    """What the stage's table of trainables leaves out; decides which copies and graphs are needed."""

    vision_encoder: bool
    backbone: bool
    inputs: bool = True
    """What else a method puts among the decoder's inputs."""

    @property
    def up_to_layers(self) -> bool:
        """Whether nothing trains up to the last layer of the decoder."""
        return self.vision_encoder and self.backbone and self.inputs


class VlmModel(StageModel):
    """One pipeline stage.

    Parts:
        vision_encoder: the tower that reads images (first stage). backbone: decoder layers.
        base.vision_encoder: the base model's tower, where a method asks for it.
    """

    def __init__(
        self,
        stage: StageConfig,
        platform: Platform,
        groups: ParallelGroups,
        frozen: FrozenParts,
        virtual_stage: int = 0,
    ) -> None:
        config = backbone_transformer_config(stage.model.backbone, stage.system, platform)
        super().__init__(config, groups, virtual_stage)
        self.stage = stage
        self.platform = platform
        self.frozen = frozen
        self.backend = layers_backend(stage.system.layers, platform, stage.system.precision.fp8 is not None)
        self.share_embeddings_and_output_weights = stage.model.backbone.tie_embeddings
        self.text_observer: Callable[[Tensor], None] | None = None  # see methods/interface.py
        if self.pre_process:
            self.vision_encoder = self.new_tower()
        self.backbone = self.new_decoder()

    def new_tower(self) -> VisionTower:
        """A vision encoder, whole on this stage."""
        encoder = self.stage.model.vision_encoder
        config = vision_transformer_config(encoder, self.stage.system, self.platform)
        return build_vision_encoder(encoder, config, self.backend, self.groups.alone())

    def new_decoder(self) -> Backbone:
        """This stage's layers of the decoder."""
        model = self.stage.model
        num_levels = len(model.vision_encoder.deepstack_layers)
        num_travelling = travelling_levels(model, self.groups.config)
        return Backbone(
            model.backbone,
            self.config,
            self.backend,
            self.groups.collection,
            self.pre_process,
            self.post_process,
            self.vp_stage,
            Deepstack(num_levels, num_travelling, self.pre_process, self.post_process),
            self.stage.routing,
        )

    def role(self) -> Role:
        """What a micro-batch must hold for this stage."""
        return Role(
            context_rank=self.groups.context_rank,
            context_size=self.groups.config.context,
            first_stage=self.pre_process,
            last_stage=self.post_process,
            vision_encoder_trains=not self.frozen.vision_encoder,
            device=self.platform.device,
            dtype=DTYPES[self.stage.system.precision.dtype],
        )

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """For the gradient sum between a tied embedding and output layer on different stages."""
        return self.backbone.shared_embedding_or_output_weight()

    # -- first stage

    def frozen_features(self, sight: Sight) -> Tensor | None:
        """Of all images ``[V, (1 + K) H]``, as the base model sees them; None where nothing asks for them."""
        if sight.frozen is None:
            return sight.features
        tower = self.vision_encoder if self.frozen.vision_encoder else self.base.vision_encoder
        with torch.no_grad():
            return tower(sight.frozen)

    def seen_features(self, sight: Sight, frozen: Tensor | None) -> Tensor | None:
        """What the student sees: images that are read through its own tower, the others as they are in ``frozen``. A
        scalar zero where it sees nothing, but its tower must take part."""
        if sight.trained is None:
            return frozen
        trained = self.vision_encoder(sight.trained)
        if not len(sight.read_rows):
            # A blank image keeps every rank's tower in the step; it counts for nothing.
            nothing = trained.sum() * 0
            return nothing if frozen is None else frozen + nothing
        return trained if frozen is None else frozen.index_copy(0, sight.read_rows, trained)

    def embed(
        self, backbone: Backbone, words_T1H: Tensor, features: Tensor | None, sight: Sight, local_index: Tensor | None
    ) -> Tensor:
        """Rows ``[r, 1, H]`` for the first layer: token embeddings with visual tokens among them, deepstack levels.

        Args:
            local_index: int64 ``[t]``: this context rank's tokens; None when it has all.
        """
        hidden = words_T1H
        levels = hidden.new_zeros(backbone.deepstack.num_received, *hidden.shape)  # [K, T, 1, H]
        if features is not None and features.dim() == 0:
            hidden = hidden + features
        elif features is not None:
            visual, rest = self.tokens_of(features), self.levels_of(features)  # [V, H], [V, K, H]
            hidden = merge_visual_tokens(hidden, visual, sight.visual_index)
            if rest.numel():
                # An image that is generated has no levels: nothing would know them when it is.
                read = sight.read_rows
                levels = place_levels(rest[read], sight.visual_index[read], len(hidden))
        return self._rows(backbone, torch.cat([hidden[None], levels.to(hidden.dtype)]), local_index)

    def _rows(self, backbone: Backbone, blocks_BT1H: Tensor, local_index: Tensor | None) -> Tensor:
        """This rank's part of each block's sequence, one block under the other: ``[B t, 1, H]``."""
        if local_index is not None:
            blocks_BT1H = blocks_BT1H.index_select(1, local_index)  # [B, T / context, 1, H]
        return torch.cat([backbone.scatter(block) for block in blocks_BT1H])

    def tokens_of(self, features_VF: Tensor) -> Tensor:
        """Visual tokens without their deepstack levels."""
        return features_VF[:, : self.config.hidden_size]  # [V, H]

    def levels_of(self, features_VF: Tensor) -> Tensor:
        """Their deepstack levels."""
        return features_VF[:, self.config.hidden_size :].unflatten(1, (-1, self.config.hidden_size))  # [V, K, H]

    # -- every stage

    def student(self, rows_r1H: Tensor, context: PackedContext) -> Tensor:
        """Through this stage's layers: what the next stage takes, or the last hidden states ``[t, 1, H]``, with what is
        mixed of layers behind them where there is routing."""
        if self.frozen.up_to_layers:
            with torch.no_grad():
                return self.backbone(rows_r1H.detach(), context)
        return self.backbone(rows_r1H, context)

    # -- last stage

    def text_loss(self, hidden_tH: Tensor, words: Words) -> Tensor:
        """−Σ log p of the next token, over the positions whose next token is text; a scalar."""
        chosen = hidden_tH.index_select(0, words.index)  # [n_text, H]
        if not len(chosen):
            return self.no_text_loss(hidden_tH)
        logits = self.backbone.logits(chosen)  # [n_text, vocab / tensor]
        if self.text_observer is not None:
            self.text_observer(logits.detach())
        return cross_entropy(logits, words.labels).sum()

    def no_text_loss(self, hidden_tH: Tensor) -> Tensor:
        """Zero; the output layer takes part with nothing, so that its gradient is there on every rank, in one order
        (overlapped reduction waits for each)."""
        return self.backbone.logits(hidden_tH[:0]).sum()

    # -- generation: the contract of generate/staged.py

    def see(self, images: VisionInput) -> Tensor:
        """Features ``[V, (1 + K) H]`` of images that are read, through the student's tower (first stage)."""
        return self.vision_encoder(images)

    def embed_tokens(self, input_ids: Tensor, features_VF: Tensor | None, visual_index: Tensor | None) -> Tensor:
        """Rows ``[r, 1, H]`` of int64 ``[t]`` token ids, with visual tokens at ``visual_index`` (first stage).

        Features are ``[V, (1 + K) H]`` of images that were seen, or ``[V, H]`` of visual tokens that were predicted.
        """
        hidden = self.backbone.embed(input_ids)  # [t, 1, H]
        levels = hidden.new_zeros(self.backbone.deepstack.num_received, *hidden.shape)  # [K, t, 1, H]
        if features_VF is not None:
            assert visual_index is not None
            hidden = merge_visual_tokens(hidden, self.tokens_of(features_VF), visual_index)
            if self.levels_of(features_VF).numel():
                levels = place_levels(self.levels_of(features_VF), visual_index, len(hidden)).to(hidden.dtype)
        return torch.cat([hidden[None], levels]).flatten(0, 1)

    def advance(self, rows_r1H: Tensor, context: PackedContext) -> Tensor:
        """Through this stage's layers."""
        return self.backbone.unmixed(rows_r1H, context)

    def text_logits(self, hidden_nH: Tensor) -> Tensor:
        """``[n, vocab / tensor]`` (last stage)."""
        return self.backbone.logits(hidden_nH)
