"""Learning from rewards relative to a group's: GRPO's advantages and clipped objective, as Flow-GRPO uses them
(arXiv 2402.03300, section 4.1; arXiv 2505.05470, section 3).

Legend  P prompts, G samples of each (its group), n pairs of a sample and a step.

Advantages are made on the host, in float64, of all rewards of a rollout, which every rank has gathered. The objective
is a value per sample and step: sums and counts are added over ranks and divided once.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_unimm.config.rl import AdvantageStd

Float64: TypeAlias = NDArray[np.float64]

STD_FLOOR = 1e-4
"""Added to standard deviations of rewards; the published code's."""


def group_advantages(rewards: Float64, std: AdvantageStd, clip: float) -> Float64:
    """(r - mean of the group) / (std + 1e-4), cut to [-clip, clip]; ``[P, G]`` in and out.

    A group whose rewards are all equal says nothing: its advantages are exactly 0.

    Args:
        rewards: a row for each prompt.
        std: whether the (population) standard deviation is each group's own or that of all rewards.
    """
    assert rewards.ndim == 2, f"rewards {list(rewards.shape)} are not [prompts, samples of each]"
    assert np.isfinite(rewards).all(), "rewards are checked where they are made"
    scale = rewards.std(axis=1, keepdims=True) if std == "group" else rewards.std()
    advantages = (rewards - rewards.mean(axis=1, keepdims=True)) / (scale + STD_FLOOR)
    # The mean of equal numbers may differ from them in the last bit.
    return np.where(without_spread(rewards)[:, None], 0.0, advantages.clip(-clip, clip))


def without_spread(rewards: Float64) -> NDArray[np.bool_]:
    """Of each group ``[P]``, whether its rewards ``[P, G]`` are all equal. The share of such prompts tells whether the
    prompts are too hard, or too easy, to learn from."""
    return rewards.max(axis=1) == rewards.min(axis=1)


@dataclass(frozen=True)
class PolicyTerms:
    """Of each sample and step, ``[n]``; all but the loss are for monitoring and have no gradient."""

    loss: Tensor
    """What is minimised: -min(ρ A, clip(ρ) A)."""
    ratio: Tensor
    """ρ, the new probability over the old, per coordinate (a geometric mean)."""
    above: Tensor
    """1 where the ratio is above its range, else 0."""
    below: Tensor
    """1 where it is below."""
    approx_kl: Tensor
    """(log ρ)² / 2, whose mean under the old policy estimates its divergence from the new one (J. Schulman,
    Approximating KL Divergence, 2020: the estimator k2)."""


def clipped_objective(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float
) -> PolicyTerms:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) of samples and steps ``[n]``.

    Where a ratio has left [1 - clip_low, 1 + clip_high] in the direction that its advantage asks for, the gradient
    is 0.

    Args:
        log_prob: under the model that is trained, see :func:`~megatron_unimm.flow.stochastic.log_probability`.
        old_log_prob: under the model that drew the sample.
    """
    assert log_prob.shape == old_log_prob.shape == advantage.shape, "one number for each sample and step"
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    return PolicyTerms(
        loss,
        ratio,
        above=(ratio > 1 + clip_high).to(ratio.dtype),
        below=(ratio < 1 - clip_low).to(ratio.dtype),
        approx_kl=log_ratio.square() / 2,
    )
