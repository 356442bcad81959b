"""AdamW with clipping and skipping fused into the update, so that neither needs the host."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) on torch's fused kernel, CPU and GPU, in the shape that Megatron-Core's distributed
    optimizer expects of Apex's.

    Before :meth:`step` set ``grad_scale`` (gradients are divided by it: clipping) and ``found_inf`` (1.0 leaves
    parameters, moments and step count
    untouched: skipping). Both are float32 device tensors, so that the decision never waits for the host.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay"
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0))
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._steps: Tensor | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._steps = None

    def state_dict(self) -> dict[str, Any]:
        if self._steps is not None:
            for group in self.param_groups:
                group["step"] = int(self._steps.item())
        return super().state_dict()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        params = [
            parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None
        ]
        if not params:
            return
        device = params[0].device
        if self._steps is None:
            self._steps = torch.tensor(float(max(group["step"] for group in self.param_groups)), device=device)
        self._steps += 1.0 if self.found_inf is None else 1.0 - self.found_inf.reshape(())
        for group in self.param_groups:
            self._update(group, [parameter for parameter in group["params"] if parameter.grad is not None])

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not params:
            return
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        assert self._steps is not None
        torch._fused_adamw_(
            params,
            [parameter.grad for parameter in params],
            [self.state[parameter]["exp_avg"] for parameter in params],
            [self.state[parameter]["exp_avg_sq"] for parameter in params],
            [],
            [self._steps] * len(params),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
        )
