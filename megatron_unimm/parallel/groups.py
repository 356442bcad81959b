"""From a layout and a world size to the process groups that are handed to every module."""

import copy
import os
import tempfile
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.rendezvous import rendezvous

from megatron_unimm.config.parallel import ParallelConfig
from megatron_unimm.parallel.platform import Platform


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's place in the layout, and Megatron-Core's groups around it."""

    config: ParallelConfig
    collection: ProcessGroupCollection
    host: dist.ProcessGroup
    """All ranks, over gloo: small host-side agreements and checkpoint planning, beside the device's traffic."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def tensor_rank(self) -> int:
        return self.collection.tp.rank()

    @property
    def context_rank(self) -> int:
        return self.collection.cp.rank()

    @property
    def data_rank(self) -> int:
        return self.collection.dp.rank()

    @property
    def data_size(self) -> int:
        return self.collection.dp.size()

    @property
    def pipeline_rank(self) -> int:
        return self.collection.pp.rank()

    def is_first_stage(self, virtual_stage: int = 0) -> bool:
        """Whether this rank's model chunk number ``virtual_stage`` holds the embedding and the vision encoder."""
        return self.pipeline_rank == 0 and virtual_stage == 0

    def is_last_stage(self, virtual_stage: int | None = None) -> bool:
        """Whether this rank's model chunk number ``virtual_stage`` (None: its last) holds the heads."""
        last = self.config.virtual_pipeline - 1
        return self.pipeline_rank == self.config.pipeline - 1 and (virtual_stage is None or virtual_stage == last)

    def alone(self) -> ProcessGroupCollection:
        """The same groups for a module that sits whole on one pipeline stage and sees the whole row: no pipeline, no
        context parallel."""
        single = _SINGLES.group()
        names = ("tp", "ep", "expt_tp", "tp_ep", "dp", "dp_cp", "expt_dp", "mp")
        return ProcessGroupCollection(
            pp=None, cp=single, tp_cp=self.collection.tp, **{n: getattr(self.collection, n) for n in names}
        )

    def without_pipeline(self) -> "ParallelGroups":
        """The same layout for a model that sits whole on one pipeline stage: its ranks see one another as they do for
        the rest of the stage."""
        changed = {"pipeline": 1, "virtual_pipeline": 1, "layers_per_stage": None}
        collection = copy.copy(self.collection)
        collection.pp = collection.embd = collection.pos_embd = _SINGLES.group()
        return replace(self, config=self.config.model_copy(update=changed), collection=collection)

    def without_context(self) -> "ParallelGroups":
        """The same layout for ranks of a context that have each rows of their own."""
        collection = copy.copy(self.collection)
        collection.cp, collection.tp_cp = _SINGLES.group(), collection.tp
        return replace(self, config=self.config.model_copy(update={"context": 1}), collection=collection)


class _Singles:
    """Groups of one rank each, made collectively at start-up (every rank must take part in making every group)."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    def create(self) -> None:
        for rank in range(dist.get_world_size()):
            group = dist.new_group([rank])
            if isinstance(group, dist.ProcessGroup):  # the others get a placeholder
                self._group = group

    def group(self) -> dist.ProcessGroup:
        assert self._group is not None, "initialize_groups() has not run"
        return self._group


_SINGLES = _Singles()


def initialize_distributed(platform: Platform, timeout_minutes: float) -> None:
    """Join the job: torchrun's or srun's environment, or a world of one rank when there is none."""
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        # torchrun keeps one store over restarts (torch 2.13), where ranks would find the addresses of those that died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            platform.backend,
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
        return
    store_file = Path(tempfile.mkdtemp(prefix="unimm-")) / "store"
    dist.init_process_group(platform.backend, init_method=f"file://{store_file}", rank=0, world_size=1, timeout=timeout)


def initialize_groups(
    config: ParallelConfig, platform: Platform, seed: int, timeout_minutes: float = 10.0, host_backend: str = "gloo"
) -> ParallelGroups:
    """Build the process groups of a layout (checked before by ``config.layout.check_layout``) and seed the parallel
    random states."""
    initialize_distributed(platform, timeout_minutes)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        distributed_timeout_minutes=max(1, int(timeout_minutes)),
        create_gloo_process_groups=False,
    )
    _SINGLES.create()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    host = dist.new_group(backend=host_backend, timeout=timedelta(minutes=timeout_minutes))
    assert isinstance(host, dist.ProcessGroup)
    return ParallelGroups(config, ProcessGroupCollection.use_mpu_process_groups(), host)


def destroy_groups() -> None:
    """Leave the job in order; a rank that dies without it makes the others wait for the time-out."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
