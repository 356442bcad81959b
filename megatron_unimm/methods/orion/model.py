"""ORION's network (figure 2): one autoregressive VLM with a text head and a vision head, and its frozen base beside it.

Layout: ``[r, 1, H]`` between pipeline stages, with a teacher ``[2 r, 1, H]``, the student's rows first; r = t tokens of
this rank, and deepstack levels that still wait for their layer under them (``models/backbone/deepstack.py``).
Features of V visual tokens are ``[V, (1 + K) H]``: what the token is, then its K deepstack levels (0 for Qwen2.5-VL).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_unimm.config.methods import OrionConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.orion import losses
from megatron_unimm.methods.orion.batch import OrionBatch, Role, Sight
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.models.attention import PackedContext
from megatron_unimm.models.backbone.decoder import Backbone, merge_visual_tokens
from megatron_unimm.models.backbone.deepstack import Deepstack, place_levels, travelling_levels
from megatron_unimm.models.heads import build_vision_head
from megatron_unimm.models.specs import layers_backend
from megatron_unimm.models.transformer_config import (
    backbone_transformer_config,
    vision_transformer_config,
    whole_sequence,
)
from megatron_unimm.models.vision import VisionInput, VisionTower, build_vision_encoder
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.pipeline import with_zero_gradient
from megatron_unimm.parallel.platform import Platform


@dataclass(frozen=True)
class FrozenParts:
    """What the stage's table of trainables leaves out; decides which copies are needed."""

    vision_encoder: bool
    backbone: bool


class OrionModel(StageModel):
    """One pipeline stage of ORION.

    Parts:
        vision_encoder: the student's tower (first stage). backbone: the student's decoder layers. vision_head: f of
            eq. 2 (last stage).
        base: the frozen base model, never saved and never trained: ``base.backbone`` is the teacher of eq. 3 (every
            stage, only with a KL weight); ``base.vision_encoder`` makes the visual tokens that are regressed, on the
            first stage where the student's tower trains, and on the last stage of a pipeline.
    """

    def __init__(
        self,
        stage: StageConfig,
        platform: Platform,
        groups: ParallelGroups,
        frozen: FrozenParts,
        virtual_stage: int = 0,
        with_base: bool = True,
    ) -> None:
        config = backbone_transformer_config(stage.model.backbone, stage.system, platform)
        super().__init__(config, groups, virtual_stage)
        self.frozen = frozen
        self.share_embeddings_and_output_weights = stage.model.backbone.tie_embeddings
        assert isinstance(stage.method, OrionConfig)
        self.weights = stage.method.loss_weights
        self.text_observer: Callable[[Tensor], None] | None = None  # see methods/interface.py
        backend = layers_backend(stage.system.layers, platform, stage.system.precision.fp8 is not None)
        vision_config = vision_transformer_config(stage.model.vision_encoder, stage.system, platform)

        num_levels = len(stage.model.vision_encoder.deepstack_layers)
        num_travelling = travelling_levels(stage.model, stage.system.parallel)

        def tower() -> VisionTower:
            return build_vision_encoder(stage.model.vision_encoder, vision_config, backend, groups.alone())

        def decoder() -> Backbone:
            return Backbone(
                stage.model.backbone,
                config,
                backend,
                groups.collection,
                self.pre_process,
                self.post_process,
                self.vp_stage,
                Deepstack(num_levels, num_travelling, self.pre_process, self.post_process),
            )

        if self.pre_process:
            self.vision_encoder = tower()
        self.backbone = decoder()
        if self.post_process:
            # Its weights come from the seed alone, not from what this rank drew before: the same at every layout.
            torch.manual_seed(stage.train.seed)
            self.vision_head = build_vision_head(stage.method.vision_head, whole_sequence(config), groups.collection)
        self.has_teacher = with_base and self.weights.kl > 0
        if self.has_teacher:
            self.base.backbone = decoder()
        makes_targets = self.post_process and not self.pre_process and not stage.data.feature_cache
        if with_base and ((self.pre_process and not frozen.vision_encoder) or makes_targets):
            self.base.vision_encoder = tower()
        self.freeze_base()

    def role(self) -> Role:
        """What a micro-batch must hold for this stage."""
        return Role(
            context_rank=self.groups.context_rank,
            context_size=self.groups.config.context,
            first_stage=self.pre_process,
            last_stage=self.post_process,
            vision_encoder_trains=not self.frozen.vision_encoder,
        )

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """For the gradient sum between a tied embedding and output layer on different stages."""
        return self.backbone.shared_embedding_or_output_weight()

    def forward(self, batch: OrionBatch) -> Tensor:
        """The next stage's input, or on the last stage the sums of the loss terms, float32 ``[3]``."""
        features = None
        if self.pre_process:
            student, teacher, features = self._enter(batch)
        else:
            student, teacher = self._split(self.input_tensor)
        student = self._student(student, batch)  # [r, 1, H]; on the last stage [t, 1, H]
        teacher = self._teacher(teacher, batch)  # the same, or None
        if self.post_process:
            output = self._losses(student, teacher, features, batch)  # [3]
        else:
            output = student if teacher is None else torch.cat([student, teacher])  # [2 r, 1, H]
        return output if self.pre_process else with_zero_gradient(output, self.input_tensor)

    # -- first stage

    def _enter(self, batch: OrionBatch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Token embeddings with visual tokens among them, for student and teacher, and the frozen tower's features
        ``[V, H]``."""
        assert batch.sight is not None
        frozen = self._frozen_features(batch.sight)  # [V, H] or None
        seen = self._seen_features(batch.sight, frozen)  # [V, (1 + K) H] or None
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and not (self.frozen.backbone and self.frozen.vision_encoder)
        ):
            student = self._embed(self.backbone, seen, batch)
        teacher = None
        if self.has_teacher:
            with torch.no_grad():
                teacher = (
                    self._embed(self.base.backbone, frozen, batch) if batch.generates else torch.zeros_like(student)
                )
        return student, teacher, frozen

    def _frozen_features(self, sight: Sight) -> Tensor | None:
        if sight.frozen is None:
            return sight.features
        tower = self.vision_encoder if self.frozen.vision_encoder else self.base.vision_encoder
        with torch.no_grad():
            return tower(sight.frozen)

    def _seen_features(self, sight: Sight, frozen: Tensor | None) -> Tensor | None:
        """What the student sees: images that are read through its own tower, images to be generated as their
        targets, with noise on them."""
        if sight.noise is not None:
            assert frozen is not None
            frozen = frozen + F.pad(sight.noise, (0, frozen.shape[1] - sight.noise.shape[1]))  # levels stay
        if sight.trained is None:
            return frozen
        trained = self.vision_encoder(sight.trained)
        if not len(sight.read_rows):
            # A blank image keeps every rank's tower in the step; it counts for nothing.
            nothing = trained.sum() * 0
            return nothing if frozen is None else frozen + nothing
        return trained if frozen is None else frozen.index_copy(0, sight.read_rows, trained)

    def _embed(self, backbone: Backbone, features: Tensor | None, batch: OrionBatch) -> Tensor:
        """Rows ``[r, 1, H]`` for the first layer: token embeddings with visual tokens among them, deepstack levels."""
        assert batch.sight is not None
        hidden = backbone.embed(batch.input_ids)  # [T, 1, H]
        levels = hidden.new_zeros(backbone.deepstack.num_received, *hidden.shape)  # [K, T, 1, H]
        if features is not None and features.dim() == 0:
            hidden = hidden + features
        elif features is not None:
            visual, rest = self._tokens(features), self._levels(features)  # [V, H], [V, K, H]
            hidden = merge_visual_tokens(hidden, visual, batch.sight.visual_index)
            if rest.numel():
                # An image that is generated has no levels: nothing would know them when it is.
                read = batch.sight.read_rows
                levels = place_levels(rest[read], batch.sight.visual_index[read], len(hidden))
        return self._rows(backbone, torch.cat([hidden[None], levels.to(hidden.dtype)]), batch.local_index)

    def _rows(self, backbone: Backbone, blocks_BT1H: Tensor, local_index: Tensor | None) -> Tensor:
        """This rank's part of each block's sequence, one block under the other: ``[B t, 1, H]``."""
        if local_index is not None:
            blocks_BT1H = blocks_BT1H.index_select(1, local_index)  # [B, T / context, 1, H]
        return torch.cat([backbone.scatter(block) for block in blocks_BT1H])

    def _tokens(self, features_VF: Tensor) -> Tensor:
        return features_VF[:, : self.config.hidden_size]  # [V, H]

    def _levels(self, features_VF: Tensor) -> Tensor:
        return features_VF[:, self.config.hidden_size :].unflatten(1, (-1, self.config.hidden_size))  # [V, K, H]

    # -- every stage

    def _split(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.has_teacher:
            return hidden, None
        student, teacher = hidden.chunk(2)  # [r, 1, H] each
        return student, teacher.detach()

    def _student(self, hidden: Tensor, batch: OrionBatch) -> Tensor:
        if self.frozen.backbone and self.frozen.vision_encoder:
            with torch.no_grad():
                return self.backbone(hidden.detach(), batch.context)
        return self.backbone(hidden, batch.context)

    def _teacher(self, hidden: Tensor | None, batch: OrionBatch) -> Tensor | None:
        # Under expert parallelism ranks with other rows meet in the experts' exchange, so all must come.
        if hidden is None:
            return None
        with torch.no_grad():
            if batch.generates or self.groups.config.expert > 1:
                return self.base.backbone(hidden, batch.context)
            return self.base.backbone.skip(hidden)

    # -- last stage

    def _losses(self, student: Tensor, teacher: Tensor | None, features: Tensor | None, batch: OrionBatch) -> Tensor:
        """Eq. 1-3, the sums over this rank's positions."""
        assert batch.targets is not None
        targets, group = batch.targets, self.groups.collection.tp
        hidden = self.backbone.gather(student)[:, 0]  # [T / context, H]
        hidden_text = hidden.index_select(0, targets.text_index)  # [n_text, H]
        hidden_vision = hidden.index_select(0, targets.vision_index)  # [n_vision, H]
        zero = hidden.sum() * 0.0
        ce = mse = kl = zero
        if self.weights.cross_entropy and len(hidden_text):
            logits = self.backbone.logits(hidden_text)  # [n_text, vocab / tensor]
            if self.text_observer is not None:
                self.text_observer(logits.detach())
            ce = losses.text_understanding_loss(logits, targets.text_labels)
        if batch.generates:
            if features is None:
                features = targets.features
            if features is None:
                with torch.no_grad():
                    features = self.base.vision_encoder(targets.images)
            assert features is not None
            predicted = self.vision_head(hidden_vision)  # [n_vision, H]
            wanted = self._tokens(features).index_select(0, targets.feature_rows)  # [n_vision, H]
            mse = losses.image_generation_loss(predicted, wanted)
            if teacher is not None:
                with torch.no_grad():
                    teacher_vision = self.base.backbone.gather(teacher)[:, 0].index_select(0, targets.vision_index)
                    teacher_logits = self.base.backbone.logits(teacher_vision)
                kl = losses.representation_consistency_loss(teacher_logits, self.backbone.logits(hidden_vision), group)
        else:
            # The head takes part with nothing, so that its gradients are there on every rank.
            mse = self.vision_head(hidden[:1]).sum() * 0.0
        return losses.stack_terms(ce, mse, kl)

    # -- generation: the contract of generate/staged.py

    def see(self, images: VisionInput) -> Tensor:
        """Features ``[V, (1 + K) H]`` of images that are read, through the student's tower (first stage)."""
        return self.vision_encoder(images)

    def target_features(self, images: VisionInput) -> Tensor:
        """Visual tokens ``[V, H]`` as eq. 2 regresses them: of the base model's tower (first stage)."""
        tower = self.vision_encoder if self.frozen.vision_encoder else self.base.vision_encoder
        return self._tokens(tower(images))

    def embed_tokens(self, input_ids: Tensor, features_VF: Tensor | None, visual_index: Tensor | None) -> Tensor:
        """Rows ``[r, 1, H]`` of int64 ``[t]`` token ids, with visual tokens at ``visual_index`` (first stage).

        Features are ``[V, (1 + K) H]`` of images that were seen, or ``[V, H]`` of visual tokens that were predicted.
        """
        hidden = self.backbone.embed(input_ids)  # [t, 1, H]
        levels = hidden.new_zeros(self.backbone.deepstack.num_received, *hidden.shape)  # [K, t, 1, H]
        if features_VF is not None:
            assert visual_index is not None
            hidden = merge_visual_tokens(hidden, self._tokens(features_VF), visual_index)
            if self._levels(features_VF).numel():
                levels = place_levels(self._levels(features_VF), visual_index, len(hidden)).to(hidden.dtype)
        return torch.cat([hidden[None], levels]).flatten(0, 1)

    def advance(self, rows_r1H: Tensor, context: PackedContext) -> Tensor:
        """Through this stage's layers."""
        return self.backbone(rows_r1H, context)

    def text_logits(self, hidden_nH: Tensor) -> Tensor:
        """``[n, vocab / tensor]`` (last stage)."""
        return self.backbone.logits(hidden_nH)

    def next_visual(self, hidden_nH: Tensor) -> Tensor:
        """f of eq. 2: the visual tokens ``[n, H]`` that follow (last stage)."""
        return self.vision_head(hidden_nH)
