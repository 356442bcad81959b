"""The image decoder's network: visual tokens in, the velocity of a picture's latents out (section 3.3.2; Nexus-Gen,
arXiv 2504.21356, the generation decoder).

    picture ─ vision encoder (frozen) ─► visual tokens ─ connector ─► condition ─┐
    picture ─ VAE (frozen) ─► x_0 ─┐                                             ├─ diffusion transformer ─► velocity
                             ε ────┴─► x_t = (1 − t) x_0 + t ε ──────────────────┘
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_unimm.config.methods import OrionDecoderConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.drawing.model import Condition, DrawingBatch, DrawingModel
from megatron_unimm.models.connectors import VisualTokenConnector
from megatron_unimm.models.transformer_config import vision_transformer_config
from megatron_unimm.models.vision import VisionInput, build_vision_encoder
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


@dataclass(frozen=True)
class ConditionInput:
    """What the first stage makes the condition of."""

    images: VisionInput | None
    """For the vision encoder; None where features were computed beforehand, or without any picture."""
    features: Tensor | None
    """``[V, F]`` of these."""
    kept: Tensor
    """``[V]``: 0 where a picture is drawn from no condition."""
    is_source: Tensor
    """``[V]``: 1 for tokens of source images."""
    noise: Tensor | None = None
    """``[V, H]``, added to visual tokens in training."""


@dataclass(frozen=True)
class DecoderBatch(DrawingBatch):
    """One micro-batch."""

    condition: ConditionInput | None


class OrionDecoderModel(DrawingModel):
    """One pipeline stage of the decoder.

    Parts, beside a drawing model's:
        connector: visual tokens to the condition (first stage).
        base: the base model's vision encoder (first stage).
    """

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups, virtual_stage: int = 0) -> None:
        super().__init__(stage, platform, groups, virtual_stage)
        assert isinstance(stage.method, OrionDecoderConfig)
        if self.pre_process:
            # Its weights come from the seed alone, not from what this rank drew before: the same at every layout.
            torch.manual_seed(stage.train.seed)
            visual, mmdit = stage.model.vision_encoder.out_size, self.model.mmdit
            self.connector = VisualTokenConnector(
                stage.method.connector, visual, mmdit.condition_size, mmdit.pooled_size
            )
            if not stage.data.feature_cache:
                tower_config = vision_transformer_config(stage.model.vision_encoder, stage.system, platform)
                self.base.vision_encoder = build_vision_encoder(
                    stage.model.vision_encoder, tower_config, self.backend, groups.alone()
                )
        self.freeze_base()

    # -- first stage

    def conditions(self, batch: DrawingBatch) -> Condition:
        assert isinstance(batch, DecoderBatch)
        assert batch.condition is not None
        return Condition(self.condition(self._visual_tokens(batch.condition), batch.condition))

    def pooled(self, num_vectors: int) -> Tensor | None:
        return None if self.connector.pooled is None else self.connector.pooled.expand(num_vectors, -1)

    def _visual_tokens(self, condition: ConditionInput) -> Tensor:
        """``[V, H]``, of images as the base model's vision encoder sees them, without deepstack levels."""
        size = self.stage.model.vision_encoder.out_size
        if condition.features is not None:
            return condition.features[:, :size]
        if condition.images is None:
            return self.connector.linear_1.weight.new_zeros(0, size)
        with torch.no_grad():
            return self.base.vision_encoder(condition.images)[:, :size]

    def condition(self, visual_VH: Tensor, condition: ConditionInput) -> Tensor:
        """``[V, C]``; nothing is what zeros in place of visual tokens stand for."""
        if condition.noise is not None:
            visual_VH = visual_VH + condition.noise
        return self.connector(visual_VH * condition.kept[:, None].to(visual_VH.dtype), condition.is_source)
