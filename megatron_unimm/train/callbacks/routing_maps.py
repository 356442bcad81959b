"""Which layers tokens take, as pictures: a row for each mixed layer, the first at the bottom, a column for each token.

They cost no extra forward pass: the last pipeline stage hands over the weights of the first micro-batch of a step that
is to be shown. Under context parallelism the first rank's tokens are shown.
"""

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_unimm.methods.interface import ShowsRouting
from megatron_unimm.train.loop import Loop

CELL = 8
"""Pixels of a weight, each way."""
MOST_TOKENS = 256
"""Columns of a picture."""


class RoutingMaps:
    """Collects the weights of data-parallel rank 0's first row, and draws them on rank 0.

    Args:
        every_steps: steps that are shown are multiples of this, and the first one after the start of the job.
    """

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self._next = 0
        self._waiting = False
        self._weights: Tensor | None = None

    def start(self, loop: Loop) -> None:
        """Get ready, on all ranks, before the first step."""
        groups = loop.groups
        if groups.data_rank == groups.tensor_rank == groups.context_rank == 0:
            for chunk in loop.train_step.chunks:
                if chunk.module.post_process and isinstance(chunk.module, ShowsRouting):
                    chunk.module.routing_observer = self._observe
        self._next = loop.step + 1
        self._waiting = True

    def _observe(self, weights_nL: Tensor) -> None:
        if self._waiting and len(weights_nL):
            self._weights = weights_nL[:MOST_TOKENS].float()
            self._waiting = False

    def after_step(self, loop: Loop) -> np.ndarray | None:
        """uint8 (H, W, 3) on rank 0 if the step that has just ended is shown, else None. All ranks call it every
        step."""
        found = None
        if loop.step == self._next:
            everyone: list[np.ndarray | None] = [None] * dist.get_world_size()
            mine = None if self._weights is None else self._weights.cpu().numpy()
            is_first = dist.get_rank() == 0
            dist.gather_object(mine, everyone if is_first else None, group=loop.groups.host)
            shown = [weights for weights in everyone if weights is not None]
            found = routing_map(shown[0]) if shown else None
            self._weights = None
            self._next = (loop.step // self.every_steps + 1) * self.every_steps
        self._waiting = loop.step + 1 == self._next
        return found


def routing_map(weights_nL: np.ndarray) -> np.ndarray:
    """Weights in [0, 1] from white to black: uint8 (L cells, n cells, 3)."""
    grey = np.round(255 * (1 - weights_nL.T[::-1])).astype(np.uint8)
    return np.repeat(np.repeat(np.repeat(grey, CELL, axis=0), CELL, axis=1)[:, :, None], 3, axis=2)
