"""ORION's network (figure 2): one autoregressive VLM with a text head and a vision head, and its frozen base beside it.

Layout: as ``methods/vlm/model.py``; with a teacher ``[2 r, 1, H]`` travels between pipeline stages, the student's rows
first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_unimm.config.methods import OrionConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.orion import losses
from megatron_unimm.methods.orion.batch import OrionBatch
from megatron_unimm.methods.vlm.model import FrozenParts, VlmModel
from megatron_unimm.models.backbone.decoder import Backbone
from megatron_unimm.models.heads import build_vision_head
from megatron_unimm.models.transformer_config import whole_sequence
from megatron_unimm.models.vision import VisionInput
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.pipeline import with_zero_gradient
from megatron_unimm.parallel.platform import Platform


class OrionModel(VlmModel):
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
        super().__init__(stage, platform, groups, frozen, virtual_stage)
        assert isinstance(stage.method, OrionConfig)
        self.weights = stage.method.loss_weights
        if self.post_process:
            # Its weights come from the seed alone, not from what this rank drew before: the same at every layout.
            torch.manual_seed(stage.train.seed)
            self.vision_head = build_vision_head(
                stage.method.vision_head, whole_sequence(self.config), groups.collection
            )
        self.has_teacher = with_base and self.weights.kl > 0
        if self.has_teacher:
            self.base.backbone = self.new_decoder()
        makes_targets = self.post_process and not self.pre_process and not stage.data.feature_cache
        if with_base and ((self.pre_process and not frozen.vision_encoder) or makes_targets):
            self.base.vision_encoder = self.new_tower()
        self.freeze_base()

    def forward(self, batch: OrionBatch) -> Tensor:
        """The next stage's input, or on the last stage the sums of the loss terms, float32 ``[3]``."""
        features = None
        if self.pre_process:
            student, teacher, features = self._enter(batch)
        else:
            student, teacher = self._split(self.input_tensor)
        student = self.student(student, batch.context)  # [r, 1, H]; on the last stage [t, 1, H]
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
        frozen = self.frozen_features(batch.sight)  # [V, (1 + K) H] or None
        seen = self.seen_features(batch.sight, self._noisy(frozen, batch.noise))  # the same, or None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen.up_to_layers):
            student = self._embed(self.backbone, seen, batch)
        teacher = None
        if self.has_teacher:
            with torch.no_grad():
                teacher = (
                    self._embed(self.base.backbone, frozen, batch) if batch.generates else torch.zeros_like(student)
                )
        return student, teacher, frozen

    def _noisy(self, features: Tensor | None, noise_VH: Tensor | None) -> Tensor | None:
        """With noise on the tokens; levels stay."""
        if noise_VH is None:
            return features
        assert features is not None
        return features + F.pad(noise_VH, (0, features.shape[1] - noise_VH.shape[1]))

    def _embed(self, backbone: Backbone, features: Tensor | None, batch: OrionBatch) -> Tensor:
        assert batch.sight is not None
        return self.embed(backbone, backbone.embed(batch.input_ids), features, batch.sight, batch.local_index)

    # -- every stage

    def _split(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.has_teacher:
            return hidden, None
        student, teacher = hidden.chunk(2)  # [r, 1, H] each
        return student, teacher.detach()

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
        assert batch.words is not None
        assert batch.targets is not None
        targets, group = batch.targets, self.groups.collection.tp
        hidden = self.backbone.gather(student)[:, 0]  # [T / context, H]
        hidden_vision = hidden.index_select(0, targets.vision_index)  # [n_vision, H]
        mse = kl = hidden.sum() * 0.0
        ce = self.text_loss(hidden, batch.words) if self.weights.cross_entropy else self.no_text_loss(hidden)
        if batch.generates:
            if features is None:
                features = targets.features
            if features is None:
                with torch.no_grad():
                    features = self.base.vision_encoder(targets.images)
            assert features is not None
            predicted = self.vision_head(hidden_vision)  # [n_vision, H]
            wanted = self.tokens_of(features).index_select(0, targets.feature_rows)  # [n_vision, H]
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

    def target_features(self, images: VisionInput) -> Tensor:
        """Visual tokens ``[V, H]`` as eq. 2 regresses them: of the base model's tower (first stage)."""
        tower = self.vision_encoder if self.frozen.vision_encoder else self.base.vision_encoder
        return self.tokens_of(tower(images))

    def next_visual(self, hidden_nH: Tensor) -> Tensor:
        """f of eq. 2: the visual tokens ``[n, H]`` that follow (last stage)."""
        return self.vision_head(hidden_nH)
