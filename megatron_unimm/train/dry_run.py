"""``unimm train --dry-run``: build one rank's model of a recipe without memory, peers or data, and say what it would
hold."""

import json
import os

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.registry import build_method
from megatron_unimm.models.trainable import apply_rules
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.parallel.groups import destroy_groups, initialize_groups
from megatron_unimm.parallel.platform import select_platform
from megatron_unimm.train.setup import describe_trainable

OPTIMIZER_BYTES = 12
"""fp32 master weight and two moments, per trained parameter, spread over the data-parallel ranks."""
GRADIENT_BYTES = 4


def smallest_world(stage: StageConfig) -> int:
    """Ranks of one replica of the model."""
    parallel = stage.system.parallel
    dense = parallel.tensor * parallel.context * parallel.pipeline
    experts = parallel.expert * parallel.expert_tensor * parallel.pipeline
    return dense if experts <= 1 or dense % experts == 0 else dense * experts // parallel.pipeline


def dry_run_stage(stage: StageConfig, rank: int = 0) -> int:
    """Check the layout for ``WORLD_SIZE`` ranks (or one replica), build ``rank``'s model on meta tensors, print its
    sizes.

    Returns:
        0, the exit code.

    Raises:
        ConfigError: the layout cannot run.
    """
    world = int(os.environ.get("WORLD_SIZE", smallest_world(stage)))
    data_size = check_layout(stage, world)
    platform = select_platform(stage.system.platform, stage.system.cpu_threads)
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    groups = initialize_groups(stage.system.parallel, platform, stage.train.seed, host_backend="fake")
    try:
        method = build_method(stage, platform, groups)
        with torch.device("meta"):
            chunks = [method.build(number) for number in range(stage.system.parallel.virtual_pipeline)]
        apply_rules(chunks, stage.train.trainable)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        total = sum(parameter.numel() for parameter in parameters)
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        weights = total * DTYPES[stage.system.precision.dtype].itemsize
        sizes = {
            "stage": stage.name,
            "world_size": world,
            "rank": rank,
            "data_parallel": data_size,
            "parameters": total,
            "trained_parameters": trained,
            "weights_gib": round(weights / 2**30, 3),
            "gradients_gib": round(trained * GRADIENT_BYTES / 2**30, 3),
            "optimizer_gib": round(trained * OPTIMIZER_BYTES / data_size / 2**30, 3),
        }
        print(describe_trainable(chunks))
        print(json.dumps(sizes))
    finally:
        destroy_groups()
    return 0
