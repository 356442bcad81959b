"""Loads imported image generators at one layout, and writes down what they compute or saves them again. Started by
torchrun.

usage: mmdit_worker.py '[{"checkpoint": …, "parallel": {…}, "to": …, …}, …]'

A task with ``row`` (an npz of pictures) writes their velocities, one behind the other, to ``to`` (an npy); with
``weights`` (an npy as large) rather the gradients of their weighted sum (an npz). One without saves the checkpoint at
this layout.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_unimm.parallel  # noqa: F401 isort: skip - before Megatron-Core, on a machine without a GPU

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_unimm.checkpoint.folder import HF_FOLDER
from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.checkpoint.store import load, save
from megatron_unimm.config.mmdit import FluxConfig, ImageGeneratorConfig, SanaConfig, Sd3Config
from megatron_unimm.config.parallel import ParallelConfig, PrecisionConfig, SystemConfig
from megatron_unimm.models.diffusion import build_diffusion_transformer
from megatron_unimm.models.mmdit.attention import JointContext, lower
from megatron_unimm.models.mmdit.pictures import PictureBatches
from megatron_unimm.models.mmdit.positions import flux_positions, table_index
from megatron_unimm.models.mmdit.rotary import axes_angles
from megatron_unimm.models.mmdit.row import MMDiTRow
from megatron_unimm.models.mmdit.trunk import DiffusionTransformer, MMDiTInput
from megatron_unimm.models.mmdit.visibility import Role, TokenTable, local_index
from megatron_unimm.models.specs import layers_backend
from megatron_unimm.models.transformer_config import mmdit_transformer_config
from megatron_unimm.models.vae import build_vae
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from megatron_unimm.parallel.platform import Platform, select_platform
from megatron_unimm.train.state import sharding_metadata

CPU = torch.device("cpu")
ALIGNMENT = 8
"""Each stream is padded beyond a multiple of this."""


@dataclass(frozen=True)
class Stage:
    """The model at a task's layout: this rank's chunks."""

    model: ImageGeneratorConfig
    groups: ParallelGroups
    chunks: list[DiffusionTransformer]

    @property
    def parallel(self) -> ParallelConfig:
        return self.groups.config

    def state(self) -> dict[str, Any]:
        metadata = sharding_metadata(self.groups)
        return {
            f"model{number}": chunk.sharded_state_dict(prefix="mmdit.", metadata=metadata)
            for number, chunk in enumerate(self.chunks)
        }


def build_chunks(
    model: ImageGeneratorConfig, system: SystemConfig, platform: Platform, groups: ParallelGroups
) -> list[DiffusionTransformer]:
    config = mmdit_transformer_config(model.mmdit, system, platform)
    backend = layers_backend(system.layers, platform, fp8=False)
    virtual = system.parallel.virtual_pipeline
    return [
        build_diffusion_transformer(
            model.mmdit,
            config,
            backend,
            groups.collection,
            pre_process=groups.is_first_stage(number),
            post_process=groups.is_last_stage(number),
            virtual_stage=number if virtual > 1 else None,
        )
        for number in range(virtual)
    ]


def enter(task: dict[str, Any]) -> Stage:
    system = SystemConfig(
        platform="cpu",
        cpu_threads=1,
        parallel=ParallelConfig(**task["parallel"]),
        precision=PrecisionConfig(dtype=task.get("dtype", "float32")),
    )
    platform = select_platform(system.platform, system.cpu_threads)
    groups = initialize_groups(system.parallel, platform, 0, 5)
    source = Path(task["checkpoint"])
    model = ImageGeneratorConfig.model_validate(read_meta(source)["architecture"])
    stage = Stage(model, groups, build_chunks(model, system, platform, groups))
    for chunk in stage.chunks:
        if system.precision.dtype == "bfloat16":
            chunk.bfloat16()
    load(stage.state(), source, may_be_unread=("vae.*",))
    return stage


# ---------------------------------------------------------------------------------------------- one packed row


@dataclass(frozen=True)
class Packed:
    """A row of pictures as one rank sees it."""

    row: MMDiTRow
    inputs: MMDiTInput
    place: np.ndarray
    """Of this rank's image tokens that are no padding, where in the stream."""


def padded_size(size: int) -> int:
    return (size // ALIGNMENT + 1) * ALIGNMENT


def padded(values: Tensor, size: int) -> Tensor:
    """Padding that would show if anything read it."""
    return torch.cat([values, torch.full((size - len(values), *values.shape[1:]), 3.0)])


def pack(arrays: dict[str, np.ndarray], stage: Stage) -> Packed:
    groups, m = stage.groups, stage.model.mmdit
    lengths, grids = arrays["lengths"], arrays["grids"]
    areas = grids.prod(axis=1)
    num_text, num_image = padded_size(lengths.sum()), padded_size(areas.sum())
    count = len(lengths)
    num_vectors = count + count % 2
    streams = [(lengths, num_text), (areas, num_image)]

    def per_token(values: np.ndarray, rest: int) -> np.ndarray:
        parts = [np.concatenate([np.repeat(values, sizes), [rest] * (n - sizes.sum())]) for sizes, n in streams]
        return np.concatenate(parts).astype(np.int64)

    sample = per_token(np.arange(count), -1)
    roles = per_token(np.full(count, int(Role.NOISY)), int(Role.PADDING))
    table = TokenTable(sample=sample, frame=np.zeros_like(sample), role=roles, num_text=num_text)
    vector = per_token(np.arange(count), num_vectors - 1)
    context = groups.context_rank, groups.config.context
    sequence = (groups.tensor_rank, groups.config.tensor) if groups.config.sequence else (0, 1)
    mine = local_index(table, *context)
    text, image = np.split(mine, [num_text // context[1]])
    joint = JointContext(lowerings={kind: lower(table, kind, "torch", CPU, *context) for kind in m.attention_kinds})
    position_index = None
    if isinstance(m, FluxConfig):
        ids = np.concatenate([flux_positions(*grid) for grid in grids], axis=1)  # [3, image tokens]
        whole = np.zeros((3, num_text + num_image), dtype=np.int64)
        whole[:, num_text : num_text + ids.shape[1]] = ids
        angles = axes_angles(torch.from_numpy(whole[:, mine]), m.rotary_axes, m.rotary_theta)
        joint.cos, joint.sin = angles.cos(), angles.sin()
    elif isinstance(m, Sd3Config):
        index = np.concatenate([table_index(*grid, m.position_grid) for grid in grids])
        index = np.pad(index, (0, num_image - len(index)))
        position_index = torch.from_numpy(index[image - num_text])
    row = MMDiTRow.build(table, vector, num_vectors, joint, CPU, torch.float32, context=context, sequence=sequence)
    if isinstance(m, SanaConfig):
        row.pictures = PictureBatches.build(grids, CPU)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    inputs = MMDiTInput(
        condition=padded(tensors["condition"], num_text)[text],
        patches=padded(tensors["patches"], num_image)[image - num_text],
        position_index=position_index,
        timestep=padded(tensors["timestep"], num_vectors),
        pooled=padded(tensors["pooled"], num_vectors) if m.pooled_size else None,
        guidance=padded(tensors["guidance"], num_vectors) if m.guidance else None,
    )
    return Packed(row, inputs, image - num_text)


def run(stage: Stage, packed: Packed) -> Tensor | None:
    """The velocity on the last stage; what goes from stage to stage is sent by hand."""
    parallel, pipe = stage.parallel, dist.get_process_group_ranks(stage.groups.collection.pp)
    first = stage.groups.pipeline_rank
    scattered = parallel.tensor if parallel.sequence else 1
    vectors = packed.row.num_vectors * stage.model.mmdit.rows_per_vector
    tokens = len(packed.inputs.condition) + len(packed.inputs.patches) + vectors
    output = None
    for number, chunk in enumerate(stage.chunks):
        received = None
        if not chunk.pre_process:
            received = torch.empty(tokens // scattered, 1, stage.model.mmdit.hidden_size)
            dist.recv(received, pipe[first - 1])
        output = chunk(packed.row, packed.inputs if chunk.pre_process else None, received)
        if not chunk.post_process:
            dist.send(output.contiguous(), pipe[(first + 1) % len(pipe)])
            assert number < len(stage.chunks) - 1 or first < len(pipe) - 1
            output = None
    return output


def velocities(task: dict[str, Any]) -> None:
    stage = enter(task)
    with np.load(task["row"]) as arrays:
        packed = pack(dict(arrays), stage)
        count = int(arrays["grids"].prod(axis=1).sum())
    with torch.no_grad():
        output = run(stage, packed)
    if output is None:
        return
    parts = [torch.empty_like(output) for _ in range(stage.parallel.context)]
    dist.all_gather(parts, output.contiguous(), group=stage.groups.collection.cp)
    if stage.groups.tensor_rank == 0 and stage.groups.context_rank == 0:
        np.save(task["to"], torch.cat(parts)[:count].numpy())


def gradients(task: dict[str, Any]) -> None:
    """Of all weights and inputs, under their names in checkpoints and of the input; one rank."""
    stage = enter(task)
    with np.load(task["row"]) as arrays:
        packed = pack(dict(arrays), stage)
    names = ["condition", "patches", *(["pooled"] if stage.model.mmdit.pooled_size else [])]
    for name in names:
        vars(packed.inputs)[name].requires_grad_()
    output = run(stage, packed)
    assert output is not None
    weights = torch.from_numpy(np.load(task["weights"]))
    (output[: len(weights)] * weights).sum().backward()
    (chunk,) = stage.chunks
    found = {f"mmdit.{name}": parameter.grad for name, parameter in chunk.named_parameters()}
    found |= {name: vars(packed.inputs)[name].grad for name in names}
    np.savez(task["to"], **{name: gradient.numpy() for name, gradient in found.items() if gradient is not None})


def save_again(task: dict[str, Any]) -> None:
    stage = enter(task)
    source, state = Path(task["checkpoint"]), stage.state()
    if stage.model.vae is not None:
        vae = build_vae(stage.model.vae)
        if task.get("dtype") == "bfloat16":
            vae.bfloat16()
        # The same on all ranks, of which the first writes it.
        tensors = vae.state_dict()
        state["vae"] = {
            name: ShardedTensor.from_rank_offsets(f"vae.{name}", tensor, replica_id=dist.get_rank())
            for name, tensor in tensors.items()
        }
        load({"vae": state["vae"]}, source, may_be_unread=("mmdit.*",))
    save(state, Path(task["to"]), read_meta(source), hf_files=source / HF_FOLDER)


def main() -> None:
    for task in json.loads(sys.argv[1]):
        work = gradients if "weights" in task else velocities if "row" in task else save_again
        work(task)
        parallel_state.destroy_model_parallel()
    destroy_groups()


if __name__ == "__main__":
    main()
