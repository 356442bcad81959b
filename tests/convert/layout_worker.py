"""Loads imported models at one layout, and writes down what they compute or saves them again. Started by torchrun.

usage: layout_worker.py '[{"checkpoint": …, "parallel": {…}, "to": …, …}, …]'

A task with ``row`` (an npz of a sample) writes the logits of all its positions to ``to`` (an npy). One with ``images``
(an npz of images) does the same for a SigLIP tower's features. One with neither saves the checkpoint at this layout.
"""

import json
import sys
from pathlib import Path
from typing import Any

import megatron_unimm.parallel  # noqa: F401 isort: skip - before Megatron-Core, on a machine without a GPU

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_unimm.checkpoint.folder import HF_FOLDER
from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.checkpoint.store import load, save
from megatron_unimm.config.model import SiglipConfig
from megatron_unimm.config.parallel import ParallelConfig, PrecisionConfig, SystemConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.packing import build_row
from megatron_unimm.data.sample import TokenizedSample
from megatron_unimm.generate.checkpoint import generation_stage
from megatron_unimm.models.specs import layers_backend
from megatron_unimm.models.transformer_config import vision_transformer_config
from megatron_unimm.models.vision.siglip import SiglipInput, SiglipVisionEncoder
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from megatron_unimm.parallel.platform import select_platform
from megatron_unimm.train import setup
from megatron_unimm.train.state import load_weights, model_state, sharding_metadata

ALIGNMENT = 8


def stage_of(task: dict[str, Any]) -> StageConfig:
    """The imported model's stage at the task's layout, with all losses but cross entropy off."""
    world = dist.get_world_size() if dist.is_initialized() else setup.world_size()
    meta = read_meta(Path(task["checkpoint"]))
    stage = generation_stage(meta, ParallelConfig(), world_size=world, dtype=None, with_base=False)
    stage.system = system_of(task)
    stage.data.sequence_length = task.get("length", ALIGNMENT)
    return stage


def system_of(task: dict[str, Any]) -> SystemConfig:
    return SystemConfig(
        platform="cpu",
        cpu_threads=1,
        parallel=ParallelConfig(**task["parallel"]),
        precision=PrecisionConfig(dtype=task.get("dtype", "float32")),
    )


def logits(task: dict[str, Any]) -> None:
    """Through the training path: a packed row, Megatron-Core's schedule, the text observer."""
    stage = stage_of(task)
    platform, groups = setup.enter(stage)
    method, chunks = setup.build_model(stage, platform, groups)
    load_weights(chunks, Path(task["checkpoint"]), groups)
    row = build_row(
        [TokenizedSample(**sample_fields(Path(task["row"])))],
        sequence_length=stage.data.sequence_length,
        alignment=1,
        pad_id=0,
        patch_dim=stage.model.vision_encoder.patch_dim,
    )
    seen: list[Tensor] = []
    for chunk in chunks:
        # A copy: the loss works on the logits in place.
        chunk.text_observer = lambda logits: seen.append(logits.clone())
        chunk.eval()
    run_forward(stage, groups, method, chunks, row)
    if groups.is_last_stage():
        whole = gathered(seen[0], groups.collection.tp)
        if groups.collection.tp.rank() == 0 and groups.data_rank == 0:
            np.save(task["to"], whole.float().numpy())


def sample_fields(file: Path) -> dict[str, Any]:
    with np.load(file) as arrays:
        fields: dict[str, Any] = dict(arrays)
    return fields | {"id": "sample", "kind": "understanding"}


def run_forward(stage: StageConfig, groups: ParallelGroups, method: Any, chunks: list[Any], row: Any) -> None:
    def forward_step(iterator: Any, chunk: Any) -> Any:
        next(iterator)
        batch = method.batch(row, chunk, torch.device("cpu"))

        def done(sums: Tensor) -> tuple[Tensor, Tensor, dict]:
            return sums.sum(), torch.zeros((), dtype=torch.int32), {}

        return chunk(batch), done

    virtual = stage.system.parallel.virtual_pipeline
    schedule = get_forward_backward_func(stage.system.parallel.pipeline, virtual if virtual > 1 else None)
    pipelined = groups.config.pipeline > 1
    with torch.no_grad():
        schedule(
            forward_step_func=forward_step,
            # The interleaved schedule wants a micro-batch for every stage.
            data_iterator=[iter(range(8)) for _ in chunks],
            model=chunks,
            num_microbatches=1 if virtual == 1 else stage.system.parallel.pipeline,
            seq_length=method.travelling_rows(),
            micro_batch_size=1,
            forward_only=True,
            p2p_communicator=P2PCommunicator(groups.collection.pp, chunks[0].config) if pipelined else None,
            pg_collection=groups.collection,
        )


def gathered(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def siglip(task: dict[str, Any]) -> None:
    system = system_of(task)
    platform = select_platform(system.platform, system.cpu_threads)
    groups = initialize_groups(system.parallel, platform, 0, 5)
    model = SiglipConfig.model_validate(read_meta(Path(task["checkpoint"]))["architecture"])
    config = vision_transformer_config(model, system, platform)
    backend = layers_backend(system.layers, platform, fp8=False)
    tower = SiglipVisionEncoder(model, config, backend, groups.alone())
    state = tower.sharded_state_dict(metadata=sharding_metadata(groups))
    load(state, Path(task["checkpoint"]), may_be_unread=("carried.*",))
    with np.load(task["images"]) as arrays:
        images = [torch.from_numpy(arrays[name]) for name in sorted(arrays)]
    with torch.no_grad():
        given = SiglipInput.from_pixels(images, model.patch_size)
        features = tower(given)
        pooled = tower.pool(features, given)
    if dist.get_rank() == 0:
        np.savez(task["to"], features=features.numpy(), pooled=pooled.numpy())


def save_again(task: dict[str, Any]) -> None:
    stage = stage_of(task)
    platform, groups = setup.enter(stage)
    _, chunks = setup.build_model(stage, platform, groups)
    source = Path(task["checkpoint"])
    load_weights(chunks, source, groups)
    state = {
        name: {key: value for key, value in part.items() if not key.startswith("vision_head.")}
        for name, part in model_state(chunks, groups).items()
    }
    save(state, Path(task["to"]), read_meta(source), hf_files=source / HF_FOLDER)


def main() -> None:
    for task in json.loads(sys.argv[1]):
        work = logits if "row" in task else siglip if "images" in task else save_again
        work(task)
        parallel_state.destroy_model_parallel()
    destroy_groups()


if __name__ == "__main__":
    main()
