"""What the policy learns: Flow-GRPO's clipped objective with a divergence from the model it started from (arXiv
2505.05470; ``flow/policy.py`` and ``flow/stochastic.py`` have the formulas).

Every term is a sum over pairs of a sample and a step; counts are those of the whole update.
"""

import torch
from torch import Tensor

from megatron_unimm.config.rl import FlowGrpoConfig
from megatron_unimm.flow.policy import clipped_objective
from megatron_unimm.flow.stochastic import gaussian_log_probability

TERMS = ("policy", "kl", "policy/above", "policy/below", "policy/approx_kl")
"""The objective, the divergence; and for monitoring the shares of ratios beyond their range, and how far the policy has
gone from the one that drew."""


def policy_loss(
    mean_iF: Tensor,
    after_iF: Tensor,
    reference_iF: Tensor | None,
    std_i: Tensor,
    kl_std_i: Tensor,
    old_log_prob_i: Tensor,
    advantage_i: Tensor,
    config: FlowGrpoConfig,
) -> Tensor:
    """Sums over pairs, float32 ``[terms]`` in the order of :data:`TERMS`.

    Args:
        mean_iF: of the Gaussian of each step under the model, ``[i, coordinates]``; pairs of one size.
        after_iF: the state that was drawn. reference_iF: the mean under the model that training started from.
        std_i: standard deviation of the step. kl_std_i: that of the divergence.
    """
    log_prob = gaussian_log_probability(after_iF, mean_iF, std_i)
    terms = clipped_objective(
        log_prob, old_log_prob_i, advantage_i, clip_low=config.clip_low, clip_high=config.clip_high
    )
    kl = torch.zeros_like(log_prob)
    if reference_iF is not None:
        kl = ((mean_iF - reference_iF) / kl_std_i[:, None]).square().mean(dim=1) / 2
    return torch.stack([each.sum() for each in (terms.loss, kl, terms.above, terms.below, terms.approx_kl)])
