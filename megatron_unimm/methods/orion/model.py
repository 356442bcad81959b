"""ORION's network (figure 2): one autoregressive VLM with a text head and a vision head, and its frozen base beside it.

Layout: ``[t, 1, H]`` between pipeline stages, t tokens of this rank; with a teacher ``[2 t, 1, H]``, the student's
tokens first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.orion import losses
from megatron_unimm.methods.orion.batch import OrionBatch, Role, Sight
from megatron_unimm.models.attention import PackedContext
from megatron_unimm.models.backbone.decoder import Backbone, merge_visual_tokens
from megatron_unimm.models.heads import build_vision_head
from megatron_unimm.models.specs import layers_backend
from megatron_unimm.models.transformer_config import (
    backbone_transformer_config,
    vision_transformer_config,
    whole_sequence,
)
from megatron_unimm.models.vision.qwen2_5 import Qwen25VisionEncoder, VisionInput
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.pipeline import with_zero_gradient
from megatron_unimm.parallel.platform import Platform


@dataclass(frozen=True)
class FrozenParts:
    """What the stage's table of trainables leaves out; decides which copies are needed."""

    vision_encoder: bool
    backbone: bool


class OrionModel(MegatronModule):
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
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder  # read by Megatron-Core's schedule
        self.frozen = frozen
        self.pre_process = groups.is_first_stage(virtual_stage)
        self.post_process = groups.is_last_stage(virtual_stage)
        self.vp_stage = virtual_stage if groups.config.virtual_pipeline > 1 else None
        self.share_embeddings_and_output_weights = stage.model.backbone.tie_embeddings
        self.weights = stage.method.loss_weights
        self.groups = groups
        self.text_observer: Callable[[Tensor], None] | None = None  # see methods/interface.py
        backend = layers_backend(stage.system.layers, platform, stage.system.precision.fp8 is not None)
        vision_config = vision_transformer_config(stage.model.vision_encoder, stage.system, platform)

        def tower() -> Qwen25VisionEncoder:
            return Qwen25VisionEncoder(stage.model.vision_encoder, vision_config, backend, groups.alone())

        def decoder() -> Backbone:
            return Backbone(
                stage.model.backbone,
                config,
                backend,
                groups.collection,
                self.pre_process,
                self.post_process,
                self.vp_stage,
            )

        if self.pre_process:
            self.vision_encoder = tower()
        self.backbone = decoder()
        if self.post_process:
            # Its weights come from the seed alone, not from what this rank drew before: the same at every layout.
            torch.manual_seed(stage.train.seed)
            self.vision_head = build_vision_head(stage.method.vision_head, whole_sequence(config), groups.collection)
        self.base = torch.nn.Module()
        self.has_teacher = with_base and self.weights.kl > 0
        if self.has_teacher:
            self.base.backbone = decoder()
        if with_base and (
            (self.pre_process and not frozen.vision_encoder) or (self.post_process and not self.pre_process)
        ):
            self.base.vision_encoder = tower()
        self.base.requires_grad_(False).eval()

    def role(self) -> Role:
        """What a micro-batch must hold for this stage."""
        return Role(
            context_rank=self.groups.context_rank,
            context_size=self.groups.config.context,
            first_stage=self.pre_process,
            last_stage=self.post_process,
            vision_encoder_trains=not self.frozen.vision_encoder,
        )

    def train(self, mode: bool = True) -> "OrionModel":
        super().train(mode)
        self.base.eval()
        return self

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a checkpoint keeps: everything but the frozen base (which comes from its own checkpoint) and FP8
        history (rebuilt in a few steps)."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {
            key: value
            for key, value in state.items()
            if not key.startswith(f"{prefix}base.") and not key.endswith("_extra_state")
        }

    def base_sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """The frozen base under the names that the base model's checkpoint has."""
        state: dict[str, Any] = {}
        for name, part in self.base.named_children():
            state |= part.sharded_state_dict(prefix=f"{name}.", metadata=metadata)
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Megatron-Core's schedule hands over the previous stage's output here."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

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
        student = self._student(student, batch)  # [t, 1, H]
        teacher = self._teacher(teacher, batch)  # [t, 1, H] or None
        if self.post_process:
            output = self._losses(student, teacher, features, batch)  # [3]
        else:
            output = student if teacher is None else torch.cat([student, teacher])  # [2 t, 1, H]
        return output if self.pre_process else with_zero_gradient(output, self.input_tensor)

    # -- first stage

    def _enter(self, batch: OrionBatch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Token embeddings with visual tokens among them, for student and teacher, and the frozen tower's features
        ``[V, H]``."""
        assert batch.sight is not None
        frozen = self._frozen_features(batch.sight)  # [V, H] or None
        seen = self._seen_features(batch.sight, frozen)  # [V, H] or None
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
            return None
        tower = self.vision_encoder if self.frozen.vision_encoder else self.base.vision_encoder
        with torch.no_grad():
            return tower(sight.frozen)

    def _seen_features(self, sight: Sight, frozen: Tensor | None) -> Tensor | None:
        """What the student sees: images that are read through its own tower, images to be generated as their
        targets."""
        if sight.trained is None:
            return frozen
        trained = self.vision_encoder(sight.trained)
        if not len(sight.trained_rows):
            # A blank image keeps every rank's tower in the step; it counts for nothing.
            nothing = trained.sum() * 0
            return nothing if frozen is None else frozen + nothing
        return trained if frozen is None else frozen.index_copy(0, sight.trained_rows, trained)

    def _embed(self, backbone: Backbone, visual_VH: Tensor | None, batch: OrionBatch) -> Tensor:
        assert batch.sight is not None
        hidden = backbone.embed(batch.input_ids)  # [T, 1, H]
        if visual_VH is not None and visual_VH.dim() == 0:
            hidden = hidden + visual_VH
        elif visual_VH is not None:
            hidden = merge_visual_tokens(hidden, visual_VH, batch.sight.visual_index)
        if batch.local_index is not None:
            hidden = hidden.index_select(0, batch.local_index)  # [T / context, 1, H]
        return backbone.scatter(hidden)  # [t, 1, H]

    # -- every stage

    def _split(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.has_teacher:
            return hidden, None
        student, teacher = hidden.chunk(2)
        return student, teacher.detach()

    def _student(self, hidden: Tensor, batch: OrionBatch) -> Tensor:
        if self.frozen.backbone and self.frozen.vision_encoder:
            with torch.no_grad():
                return self.backbone(hidden.detach(), batch.context)
        return self.backbone(hidden, batch.context)

    def _teacher(self, hidden: Tensor | None, batch: OrionBatch) -> Tensor | None:
        # Under expert parallelism ranks with other rows meet in the experts' exchange, so all must come.
        if hidden is None or not (batch.generates or self.groups.config.expert > 1):
            return hidden
        with torch.no_grad():
            return self.base.backbone(hidden, batch.context)

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
                with torch.no_grad():
                    features = self.base.vision_encoder(targets.images)
            assert features is not None
            predicted = self.vision_head(hidden_vision)  # [n_vision, H]
            mse = losses.image_generation_loss(predicted, features.index_select(0, targets.feature_rows))
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
        """Visual tokens ``[V, H]`` of images that are read, through the student's tower (first stage)."""
        return self.vision_encoder(images)

    def target_features(self, images: VisionInput) -> Tensor:
        """Visual tokens ``[V, H]`` as eq. 2 regresses them: of the base model's tower (first stage)."""
        tower = self.vision_encoder if self.frozen.vision_encoder else self.base.vision_encoder
        return tower(images)

    def embed_tokens(self, input_ids: Tensor, visual_VH: Tensor | None, visual_index: Tensor | None) -> Tensor:
        """``[t, 1, H]`` of int64 ``[t]`` token ids, with visual tokens at ``visual_index`` (first stage)."""
        hidden = self.backbone.embed(input_ids)
        return hidden if visual_VH is None else merge_visual_tokens(hidden, visual_VH, visual_index)

    def advance(self, hidden_t1H: Tensor, context: PackedContext) -> Tensor:
        """Through this stage's layers."""
        return self.backbone(hidden_t1H, context)

    def text_logits(self, hidden_nH: Tensor) -> Tensor:
        """``[n, vocab / tensor]`` (last stage)."""
        return self.backbone.logits(hidden_nH)

    def next_visual(self, hidden_nH: Tensor) -> Tensor:
        """f of eq. 2: the visual tokens ``[n, H]`` that follow (last stage)."""
        return self.vision_head(hidden_nH)
