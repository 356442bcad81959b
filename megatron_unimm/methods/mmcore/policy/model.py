"""The diffusion transformer as a policy: its guided velocity makes each step of a drawing a Gaussian, whose probability
the reward moves.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_unimm.config.methods import MMCorePolicyConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.flow.guidance import combined
from megatron_unimm.methods.drawing.model import DrawingBatch
from megatron_unimm.methods.mmcore.diffusion.model import DiffusionBatch, MMCoreDiffusionModel
from megatron_unimm.methods.mmcore.policy.losses import policy_loss
from megatron_unimm.methods.vlm.model import FrozenParts
from megatron_unimm.models.mmdit.trunk import MMDiTInput
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


@dataclass(frozen=True)
class PolicyInput:
    """What the last stage compares its steps with; tensors of ``rows.PolicyRow`` on the device."""

    places: Tensor
    guided: Tensor
    before: Tensor
    after: Tensor
    reference: Tensor | None
    keep: Tensor
    pull: Tensor
    std: Tensor
    kl_std: Tensor
    old_log_prob: Tensor
    advantage: Tensor


@dataclass(frozen=True)
class PolicyBatch(DiffusionBatch):
    """One micro-batch."""

    policy: PolicyInput | None


class MMCorePolicyModel(MMCoreDiffusionModel):
    """One pipeline stage; parts as of the diffusion stage."""

    def __init__(
        self,
        stage: StageConfig,
        platform: Platform,
        groups: ParallelGroups,
        frozen: FrozenParts,
        virtual_stage: int = 0,
    ) -> None:
        super().__init__(stage, platform, groups, frozen, virtual_stage)
        assert isinstance(stage.method, MMCorePolicyConfig)
        self.grpo = stage.method.grpo

    def _inputs(self, batch: DrawingBatch, latents: Tensor | None) -> MMDiTInput:
        """States are given, not made of pictures and noise."""
        assert latents is not None
        state = latents.to(self.mmdit.latent_embedder.linear.weight.dtype)
        return self.mmdit_input(batch.canvas, self.conditions(batch), state, batch.timestep)

    def _loss(self, velocity_tF: Tensor, latents: Tensor | None, batch: DrawingBatch) -> Tensor:
        assert isinstance(batch, PolicyBatch)
        assert batch.policy is not None
        policy = batch.policy
        velocity = self._whole(velocity_tF, batch).float()  # [image tokens of the row, F]
        if not len(policy.advantage):
            return velocity.sum() * 0.0 * velocity.new_zeros(5)
        guided = self._guided(velocity, policy)  # [i, u, F]
        mean = policy.keep[:, None, None] * policy.before + policy.pull[:, None, None] * guided
        sums = policy_loss(
            mean.flatten(1),
            policy.after.flatten(1),
            None if policy.reference is None else policy.reference.flatten(1),
            policy.std,
            policy.kl_std,
            policy.old_log_prob,
            policy.advantage,
            self.grpo,
        )
        # Every context rank has worked out all of it; one answers.
        return sums * float(self.groups.context_rank == 0)

    def _whole(self, velocity_tF: Tensor, batch: PolicyBatch) -> Tensor:
        """The image stream of all context ranks."""
        group = self.groups.collection.cp
        if group.size() == 1:
            return velocity_tF
        size = len(velocity_tF) * group.size()
        whole = velocity_tF.new_zeros(size, velocity_tF.shape[1]).index_copy(0, batch.canvas.image_index, velocity_tF)
        return copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(whole, group=group), group=group
        )

    def _guided(self, velocity_UF: Tensor, policy: PolicyInput) -> Tensor:
        """As rollouts guide it. Only the fully conditioned velocity is learned through, as in the published code."""
        parts = [
            velocity_UF.index_select(0, places).view_as(policy.before) for places in policy.places
        ]  # k of [i, u, F]
        if len(parts) == 1:
            return parts[0]
        full, *others = parts
        guided = combined([full, *(other.detach() for other in others)], self.grpo.sampler)
        return torch.where(policy.guided[:, None, None], guided, full)
