"""Reinforcement learning of the diffusion transformer: rollouts, rewards, and the objective of an update."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_policy import WEIGHTS, World, build, guided_by, policy_stage, prompts

from megatron_unimm.errors import UserError
from megatron_unimm.generate.frame_painter import Guided
from megatron_unimm.methods.mmcore.policy.rows import PolicyRow
from megatron_unimm.train.step import TrainStep


def gradients(step: TrainStep, rows: list[PolicyRow]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    losses = step.forward_backward(rows)
    module = step.chunks[0].module
    return losses, {
        name: parameter.main_grad.clone() for name, parameter in module.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("kind", WEIGHTS)
def test_update_equals_ten_lines_of_torch(kind: str, repo: Path, world: World) -> None:
    """Losses and gradients of a packed update against each pair alone: probability of the step that was drawn under the
    guided velocity, of which only the fully conditioned part is learned through."""
    stage = policy_stage(repo, *guided_by(kind), "method.grpo.kl_weight=0.3", "method.grpo.kl_per=step")
    step, rollouts, _ = build(stage, world, repo)
    (rows,) = rollouts.updates(prompts(), 0)
    with torch.no_grad():  # so that ratio and divergence say something
        for parameter in step.chunks[0].module.mmdit.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    losses, found = gradients(step, rows)
    module, count = step.chunks[0].module, sum(row.num_pairs for row in rows)
    assert count == 2 * 3 * 2
    expected, terms = torch.zeros(()), torch.zeros(2)
    for row in rows:
        batch = step.method.batch(row, module, torch.device("cpu"))
        state = row.state
        inputs = module.mmdit_input(batch.canvas, module.conditions(batch), state, batch.timestep)
        velocity = module.mmdit(batch.canvas.row, inputs, None)
        parts = [velocity[torch.from_numpy(own)].view_as(row.before) for own in row.places]
        parts = [parts[0], *(part.detach() for part in parts[1:])]
        text, visual = WEIGHTS[kind]
        guided = parts[0]
        if kind == "two":
            guided = parts[1] + text * (parts[0] - parts[1])
        if kind == "three":
            guided = parts[2] + visual * (parts[1] - parts[2]) + text * (parts[0] - parts[1])
        for i in range(row.num_pairs):
            mean = float(row.keep[i]) * row.before[i] + float(row.pull[i]) * guided[i]
            chance = torch.distributions.Normal(mean, float(row.std[i])).log_prob(row.after[i]).mean()
            ratio, advantage = (chance - row.old_log_prob[i]).exp(), float(row.advantage[i])
            clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
            assert row.reference is not None
            kl = ((mean - row.reference[i]) / float(row.kl_std[i])).square().mean() / 2
            policy = -torch.minimum(ratio * advantage, clipped * advantage)
            expected = expected + (policy + 0.3 * kl) / count
            terms += torch.stack([policy.detach(), kl.detach()]) / count
    torch.testing.assert_close(losses[:2], terms, rtol=1e-5, atol=1e-7)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(expected, list(trained.values()), allow_unused=True)
    total = torch.stack([each.square().sum() for each in found.values()]).sum().sqrt()
    assert total > 1e-4
    for name, gradient in zip(trained, wanted, strict=True):
        right = torch.zeros_like(found[name]) if gradient is None else gradient
        assert (found[name] - right).norm() <= 1e-4 * right.norm() + 1e-6 * total, name


def test_a_fresh_policy_has_ratio_one_and_no_divergence(repo: Path, world: World) -> None:
    """What is trained on was drawn by the very model: in either way of computing it the probability is the same."""
    step, rollouts, _ = build(policy_stage(repo, *guided_by("two")), world, repo)
    (rows,) = rollouts.updates(prompts(), 0)
    losses, _ = gradients(step, rows)
    assert abs(losses[0]) < 1e-5  # advantages of a group sum to zero
    assert losses[1] < 1e-9
    assert losses[4] < 1e-9  # measured 1e-14: (log ratio)² / 2


def test_advantages_are_of_groups_and_rewards_are_told(repo: Path, world: World) -> None:
    _, rollouts, _ = build(policy_stage(repo, *guided_by("one")), world, repo)
    (rows,) = rollouts.updates(prompts(), 0)
    advantages = np.concatenate([row.advantage for row in rows])
    assert np.isclose(advantages.sum(), 0, atol=1e-6)
    assert len(np.unique(advantages.round(6))) == 6, "each drawing has its own, on both of its steps"
    figures = rollouts.figures.take()
    brightnesses = [float(picture.mean()) for _, picture in rollouts.figures.pictures]
    assert figures["reward/total"] == figures["reward/mine"] == pytest.approx(np.mean(brightnesses))
    groups = np.array(brightnesses).reshape(2, 3)
    assert figures["reward/std_in_group"] == pytest.approx(groups.std(axis=1).mean())
    assert figures["reward/share_without_spread"] == 0
    assert rollouts.figures.take() == {}


def test_chance_belongs_to_prompt_and_place(repo: Path, world: World) -> None:
    """A rollout's drawings do not depend on what else is drawn, nor on the order; another rollout's steps may."""
    stage = policy_stage(repo, *guided_by("one"))
    _, rollouts, _ = build(stage, world, repo)
    both = rollouts._draw(prompts()[0].samples, rollouts._steps(0))
    alone = rollouts._draw(prompts()[0].samples[1:], rollouts._steps(0))
    for one, other in zip(both[3:], alone, strict=True):
        assert one.name == other.name
        torch.testing.assert_close(one.transitions[0].after, other.transitions[0].after, rtol=1e-5, atol=1e-5)
        assert np.abs(one.picture.astype(int) - other.picture).max() <= 1
    starts = {float(rollouts._steps(number)[0].std) for number in range(20)}
    assert len(starts) == 2, "the window begins with the first step in some rollouts only"


def test_updates_share_the_drawings(repo: Path, world: World) -> None:
    stage = policy_stage(repo, *guided_by("one"), "method.grpo.num_updates=3", "method.grpo.epochs=2")
    _, rollouts, _ = build(stage, world, repo)
    updates = rollouts.updates(prompts(), 0)
    assert [sum(row.num_pairs for row in rows) for rows in updates] == [4] * 6  # 2 drawings of 2 steps each
    passes = [
        np.sort(np.concatenate([row.advantage for rows in part for row in rows])) for part in (updates[:3], updates[3:])
    ]
    np.testing.assert_array_equal(*passes)


def test_reference_comes_and_goes(repo: Path, world: World) -> None:
    step, _, reference = build(policy_stage(repo), world, repo)
    module = step.chunks[0].module
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        module.mmdit.final_linear.weight.add_(1.0)
    with reference.in_place():
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert torch.equal(module.mmdit.final_linear.weight, before["mmdit.final_linear.weight"] + 1.0)


def test_the_guided_velocity_of_rollouts_is_that_of_generation(repo: Path, world: World) -> None:
    """One class makes both; its velocity at a state equals the first step's mean taken back."""
    _, rollouts, _ = build(policy_stage(repo, *guided_by("three")), world, repo)
    drawn = rollouts._draw(prompts()[0].samples[:1], rollouts._steps(0))
    guided = Guided(rollouts.painter, [each.drawable for each in drawn], rollouts.grpo.sampler)
    first = drawn[0].transitions[0]
    states = torch.stack([each.transitions[0].before for each in drawn])
    with torch.no_grad():
        velocity = guided.velocity(states, first.step.t)
    mean = first.step.mean(states[0], velocity[0])
    noise = (first.after - mean) / first.step.std
    assert abs(noise.mean()) < 0.2
    assert 0.8 < noise.std() < 1.2


def test_a_bad_reward_ends_the_run_in_words(repo: Path, world: World) -> None:
    bad = "method.grpo.rewards={shapes: null, mine: {kind: python, entry_point: 'small_policy:nothing_good'}}"
    _, rollouts, _ = build(policy_stage(repo, bad), world, repo)
    with pytest.raises(UserError, match=r"method\.grpo\.rewards\.mine: gave nan .*must be finite"):
        rollouts.updates(prompts(), 0)


def test_nothing_to_draw_is_an_empty_update(repo: Path, world: World) -> None:
    """A rank whose samples are all broken takes part with nothing."""
    step, rollouts, _ = build(policy_stage(repo, *guided_by("two")), world, repo)
    row = rollouts._row([], 2)
    _, found = gradients(step, [row])
    assert all(not gradient.any() for gradient in found.values())
    assert row.num_tokens == 512
