"""A running average of the weights (EMA), sharded like the optimizer's master weights and saved with the checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_unimm.checkpoint.folder import AVERAGE_PREFIX

MOMENT = "exp_avg"
"""The optimizer state whose way into checkpoints the average takes: it has its shape and its sharding."""
MOMENT_PREFIX = "optimizer.state.exp_avg."


class WeightAverage:
    """ā ← d ā + (1 − d) w after every step, with d = min(decay, (1 + n) / (10 + n)) in the n-th, so that a young
    average is not held back by where it began (as diffusers' EMAModel). Steps that were skipped leave it alone.

    Each data-parallel rank keeps the average of its shard of the fp32 master weights. Nothing waits for the device.
    """

    def __init__(self, optimizer: ChainedOptimizer, decay: float, device: torch.device) -> None:
        self.optimizer = optimizer
        self.decay = decay
        parts = [part.optimizer for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
        owned = [(part, weight) for part in parts for group in part.param_groups for weight in group["params"]]
        self.weights = [weight for _, weight in owned]
        self._owners = [part for part, _ in owned]
        self.average = [weight.detach().clone() for weight in self.weights]
        self.steps = torch.zeros((), device=device)
        """Steps that were taken: counted on every rank, also where nothing trains, since the first rank saves them."""

    @torch.no_grad()
    def update(self, skip: Tensor) -> None:
        """After a step; ``skip`` is 1.0 where the update was left out."""
        taken = 1.0 - skip.reshape(())
        self.steps += taken
        if not self.weights:
            return
        share = 1.0 - torch.clamp((1.0 + self.steps) / (10.0 + self.steps), max=self.decay)
        differences = torch._foreach_sub(self.weights, self.average)
        torch._foreach_mul_(differences, share * taken)
        torch._foreach_add_(self.average, differences)

    def sharded_state_dict(self, model_state: dict[str, Any], is_loading: bool, metadata: dict[str, Any]) -> Any:
        """What a checkpoint keeps: fp32 tensors shaped like the parameters, one for each that trains."""
        moments = self._swap(self.average)
        try:
            state = self.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
        finally:
            self._swap(moments)
        return _renamed(state)

    def load(self, optimizer_state: Any, average_state: Any, steps: float) -> None:
        """Take the average from a checkpoint; leaves the optimizer with its own state loaded."""
        self.optimizer.load_state_dict(_with_moments(optimizer_state, average_state))
        for average, state in zip(self.average, self._states(), strict=True):
            average.copy_(state[MOMENT])
        self.optimizer.load_state_dict(optimizer_state)
        self.steps.fill_(steps)

    def _swap(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Put tensors in the place of the first moments; returns what was there, None before the first step."""
        before = []
        for state, tensor in zip(self._states(), tensors, strict=True):
            before.append(state.pop(MOMENT, None))
            if tensor is not None:
                state[MOMENT] = tensor
        return before

    def _states(self) -> list[dict[str, Tensor]]:
        return [owner.state[weight] for owner, weight in zip(self._owners, self.weights, strict=True)]


def _renamed(state: Any) -> Any:
    """The first moments of a state dict, under the average's names; nothing else of it."""
    if not isinstance(state, dict):
        return {}
    kept: dict[Any, Any] = {}
    for key, value in state.items():
        if key == MOMENT:
            value.key = AVERAGE_PREFIX + value.key.removeprefix(MOMENT_PREFIX)
            kept[key] = value
        elif inner := _renamed(value):
            kept[key] = inner
    return kept


def _with_moments(state: Any, moments: Any) -> Any:
    """The state dict with other first moments."""
    if not isinstance(state, dict):
        return state
    return {
        key: moments[key] if key == MOMENT else _with_moments(value, moments.get(key, {}))
        for key, value in state.items()
    }
