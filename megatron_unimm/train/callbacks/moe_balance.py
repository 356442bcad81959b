"""How evenly the router spreads tokens over experts, per layer."""

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.record import Record

FROZEN_COMPANIONS = "base."
"""The teacher's routers are not looked at."""


class MoEBalance(Callback):
    """Adds ``moe/imbalance/layer_NN`` to each record: tokens of the busiest expert over the mean of all experts.

    1 is even; num_experts / top_k means that the same top_k experts get everything.

    Routers tell by a forward hook how many tokens each expert got; counts stay on the device and are summed over ranks
    once per record. Forward passes that recompute is made of count twice, which leaves the ratio as it is. Padding is
    routed and counted like any token.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def on_start(self, loop: Loop) -> None:
        backbone = loop.stage.model.backbone
        if backbone.moe is None:
            return
        self._counts = torch.zeros(backbone.num_layers, backbone.moe.num_experts, device=loop.platform.device)
        for chunk in loop.train_step.chunks:
            for name, module in chunk.module.named_modules():
                if isinstance(module, Router) and not name.startswith(FROZEN_COMPANIONS):
                    module.register_forward_hook(self._count)

    @torch.no_grad()
    def _count(self, router: Router, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        assert self._counts is not None
        assert router.layer_number is not None, "set by Megatron-Core when it builds the layer"
        _, routing_map = output  # bool [tokens, experts]
        self._counts[router.layer_number - 1] += routing_map.sum(dim=0)

    def on_record(self, loop: Loop, record: Record) -> None:
        if self._counts is None:
            return
        # A layer is on one pipeline stage only, so a sum over the world is one over its data, context and tensor ranks.
        dist.all_reduce(self._counts)
        for layer, counts in enumerate(self._counts.tolist()):
            if sum(counts) > 0:  # 0: a dense layer
                record.extra[f"moe/imbalance/layer_{layer:02}"] = max(counts) * len(counts) / sum(counts)
        self._counts.zero_()
