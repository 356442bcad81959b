"""Hidden states between pipeline stages, and results back to all of them, outside of Megatron-Core's schedule."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_unimm.parallel.groups import ParallelGroups


class StageLink:
    """This rank's neighbours in the pipeline.

    Args:
        hidden_size, dtype: of hidden states ``[r, 1, H]``.
    """

    def __init__(self, groups: ParallelGroups, device: torch.device, dtype: torch.dtype, hidden_size: int) -> None:
        self.groups = groups
        self.device = device
        self.dtype = dtype
        self.hidden_size = hidden_size

    def send(self, hidden_r1H: Tensor) -> None:
        """To the next stage; from the last to the first, whose next chunk takes it."""
        next_rank = self._rank_of_stage(self.groups.pipeline_rank + 1)
        dist.send(hidden_r1H.contiguous(), next_rank, group=self.groups.collection.pp)

    def receive(self, num_rows: int) -> Tensor:
        """``[num_rows, 1, H]`` from the stage before."""
        hidden = torch.empty(num_rows, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        dist.recv(hidden, self._rank_of_stage(self.groups.pipeline_rank - 1), group=self.groups.collection.pp)
        return hidden

    def broadcast(self, tensor: Tensor, stage: int) -> None:
        """What a stage holds, into the same tensor of all."""
        if self.groups.config.pipeline > 1:
            dist.broadcast(tensor, self._rank_of_stage(stage), group=self.groups.collection.pp)

    def _rank_of_stage(self, stage: int) -> int:
        return dist.get_global_rank(self.groups.collection.pp, stage % self.groups.config.pipeline)
