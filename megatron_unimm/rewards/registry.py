"""Rewards of a recipe, and their weighted sum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_unimm.config.rewards import (
    PythonRewardConfig,
    RewardConfig,
    ShapesRewardConfig,
    SiglipRewardConfig,
)
from megatron_unimm.rewards.python import PythonReward
from megatron_unimm.rewards.reward import Float64, Reward, RewardPrompt, check_pictures, checked_values
from megatron_unimm.rewards.shapes import ShapesReward
from megatron_unimm.rewards.siglip import SiglipReward


@dataclass(frozen=True)
class RewardValues:
    """What n pictures are worth."""

    total: Float64
    """``[n]``: the weighted sum."""
    parts: dict[str, Float64]
    """``[n]`` of each reward, before its weight."""


class RewardSum:
    """The sum of weight x value over named rewards; a reward itself.

    Args:
        where: where the rewards stand in the recipe, for messages.
    """

    def __init__(self, where: str, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        assert rewards.keys() == weights.keys(), "every reward has a weight"
        self.where = where
        self.rewards = dict(rewards)
        self.weights = dict(weights)

    def values(self, pictures: Sequence[np.ndarray], prompts: Sequence[RewardPrompt]) -> RewardValues:
        """The sum and its parts.

        Raises:
            UserError: a reward could not score a sample, or gave something else than a finite number.
        """
        check_pictures(self.where, pictures, prompts)
        parts = {
            name: checked_values(f"{self.where}.{name}", reward(pictures, prompts), prompts)
            for name, reward in self.rewards.items()
        }
        total = np.zeros(len(prompts))
        for name, value in parts.items():
            total += self.weights[name] * value
        return RewardValues(total, parts)

    def __call__(self, pictures: Sequence[np.ndarray], prompts: Sequence[RewardPrompt]) -> Float64:
        return self.values(pictures, prompts).total


def build_reward(config: Mapping[str, RewardConfig], device: torch.device, where: str = "rewards") -> RewardSum:
    """The rewards of a recipe.

    Args:
        device: where models that score live.
        where: the mapping's place in the recipe, for messages.

    Raises:
        ConfigError: a model's folder or a user's function that cannot be loaded.
    """
    rewards = {name: _build(f"{where}.{name}", one, device) for name, one in config.items()}
    return RewardSum(where, rewards, {name: one.weight for name, one in config.items()})


def _build(where: str, config: RewardConfig, device: torch.device) -> Reward:
    match config:
        case ShapesRewardConfig():
            return ShapesReward(where, config.grading)
        case SiglipRewardConfig():
            return SiglipReward(where, config.path, config.value, config.batch_size, device)
        case PythonRewardConfig():
            return PythonReward(where, config.entry_point)
