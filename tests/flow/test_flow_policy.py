"""Advantages and the clipped objective against numbers by hand and short references."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_unimm.flow.policy import STD_FLOOR, PolicyTerms, clipped_objective, group_advantages, without_spread

REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 3.0], [0.1, 0.1, 0.1, 0.1]])
"""Standard deviations 0.5, 1, 0."""


def test_advantages_by_the_groups_deviation() -> None:
    expected = [[1, -1, -1, 1] / np.array(1 + 2e-4), [1, -1, -1, 1] / np.array(1 + 1e-4), [0, 0, 0, 0]]
    np.testing.assert_allclose(group_advantages(REWARDS, "group", clip=5), expected, rtol=1e-12)


def test_advantages_by_the_deviation_of_all() -> None:
    """The mean of all is (2 + 8 + 0.4) / 12 = 13/15, of squares 22.04 / 12."""
    std = math.sqrt(22.04 / 12 - (13 / 15) ** 2)
    expected = np.array([[0.5, -0.5, -0.5, 0.5], [1, -1, -1, 1], [0, 0, 0, 0]]) / (std + STD_FLOOR)
    np.testing.assert_allclose(group_advantages(REWARDS, "all", clip=5), expected, rtol=1e-12)


def test_advantages_against_a_loop() -> None:
    rewards = np.random.default_rng(0).normal(size=(7, 24))
    ours = group_advantages(rewards, "group", clip=1.5)
    for row, group in enumerate(rewards):
        mean = sum(group) / 24
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 24)
        for place, reward in enumerate(group):
            expected = max(-1.5, min(1.5, (reward - mean) / (std + 1e-4)))
            assert ours[row, place] == pytest.approx(expected, rel=1e-12)
    assert (abs(ours) == 1.5).any(), "nothing was clipped, so the test of clipping says nothing"


@pytest.mark.parametrize("std", ["group", "all"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9, 0.0])
def test_groups_without_spread_give_exactly_zero(std: str, value: float) -> None:
    """The mean of 7 times 0.1 is not 0.1 in floats."""
    rewards = np.array([[value] * 7, [0, 1, 2, 3, 4, 5, 6]])
    advantages = group_advantages(rewards, std, clip=5)  # type: ignore[arg-type]
    assert (advantages[0] == 0).all()
    assert (advantages[1][[0, -1]] != 0).all()
    assert without_spread(rewards).tolist() == [True, False]


LOG_RATIOS = [0.0, 0.05, 0.3, 0.3, -0.3, -0.3]
ADVANTAGES = [1.0, -2.0, 1.0, -1.0, 1.0, -1.0]


def terms() -> tuple[Tensor, PolicyTerms]:
    old = torch.tensor([-1.0, -0.5, -1.5, -2.0, -1.0, -0.25])
    new = (old + torch.tensor(LOG_RATIOS)).requires_grad_()
    return new, clipped_objective(new, old, torch.tensor(ADVANTAGES), clip_low=0.1, clip_high=0.2)


def test_clipped_objective_by_hand() -> None:
    """The range is [0.9, 1.2]; e^0.3 = 1.35 is above, e^-0.3 = 0.74 below."""
    _, found = terms()
    expected = [-1, 2 * math.exp(0.05), -1.2, math.exp(0.3), -math.exp(-0.3), 0.9]
    torch.testing.assert_close(found.loss.detach(), torch.tensor(expected))
    torch.testing.assert_close(found.ratio, torch.tensor(LOG_RATIOS).exp())
    assert found.above.tolist() == [0, 0, 1, 1, 0, 0]
    assert found.below.tolist() == [0, 0, 0, 0, 1, 1]
    torch.testing.assert_close(found.approx_kl, torch.tensor(LOG_RATIOS).square() / 2)


def test_gradient_is_zero_where_clipped() -> None:
    """Only where the ratio has left the range in the advantage's own direction; elsewhere it is -A ratio."""
    new, found = terms()
    found.loss.sum().backward()
    expected = [-1, 2 * math.exp(0.05), 0, math.exp(0.3), -math.exp(-0.3), 0]
    torch.testing.assert_close(new.grad, torch.tensor(expected))
    assert new.grad is not None
    assert (new.grad[[2, 5]] == 0).all()
    for value in (found.ratio, found.above, found.below, found.approx_kl):
        assert not value.requires_grad


def test_gradient_at_the_start_is_the_policy_gradient() -> None:
    """At ratio 1 the objective's gradient is that of -A log p, however narrow the range."""
    log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.7, -1.3])
    clipped_objective(log_prob, log_prob.detach(), advantages, clip_low=1e-5, clip_high=1e-5).loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, -advantages)


def test_sums_over_ranks_divide_once() -> None:
    """Spread over ranks of unequal load, sums and counts add up to the mean over all."""
    new, whole = terms()
    old = new.detach() - torch.tensor(LOG_RATIOS)
    total, count = 0.0, 0
    for mine in (slice(0, 1), slice(1, 5), slice(5, 6)):
        advantages = torch.tensor(ADVANTAGES)[mine]
        part = clipped_objective(new[mine], old[mine], advantages, clip_low=0.1, clip_high=0.2)
        total, count = total + part.loss.sum().item(), count + len(part.loss)
    assert total / count == pytest.approx(whole.loss.mean().item(), rel=1e-6)
