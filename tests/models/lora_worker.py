"""Runs a small trunk with adapters at one layout: loss, gradients and one AdamW step of two rows. Also home of the
trunks, rows and losses that test_lora.py shares. Started by torchrun.

usage: lora_worker.py FOLDER '[{"trunk": …, "name": …, "parallel": {…}}, …]'

A task named init writes, from one rank, FOLDER/TRUNK/base (no adapters) and FOLDER/TRUNK/start (with adapters that are
not zero). Any other name writes, in FOLDER/TRUNK: NAME_fresh (the base checkpoint loaded into a model with adapters),
NAME_again (start, loaded and saved), NAME_gradients, NAME_after (weights and optimizer behind the step) and NAME.json
(the loss).
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
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_unimm.checkpoint.store import load, save
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.lora import LoraConfig
from megatron_unimm.config.parallel import ParallelConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.models.attention import PackedContext, Segments
from megatron_unimm.models.backbone.decoder import Backbone
from megatron_unimm.models.lora import ADAPTERS, add_lora
from megatron_unimm.models.mmdit.attention import JointContext, lower
from megatron_unimm.models.mmdit.model import MMDiT, MMDiTInput
from megatron_unimm.models.mmdit.positions import flux_positions
from megatron_unimm.models.mmdit.rotary import axes_angles
from megatron_unimm.models.mmdit.row import MMDiTRow
from megatron_unimm.models.mmdit.visibility import Role, TokenTable
from megatron_unimm.models.rotary import mrope_angles
from megatron_unimm.models.trainable import apply_rules
from megatron_unimm.models.transformer_config import DTYPES, backbone_transformer_config, mmdit_transformer_config
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from megatron_unimm.parallel.platform import Platform, select_platform
from megatron_unimm.train.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from megatron_unimm.train.state import model_state, sharding_metadata

REPO = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, alpha=6.0)
SEED = 7
NUM_TOKENS, NUM_TEXT = 16, 8
NUM_ROWS = 2
LEARNING_RATE = 1e-2
SMALL = (
    "model.vision_encoder.out_size=32",
    "model.backbone.num_layers=2",
    "model.backbone.hidden_size=32",
    "model.backbone.head_size=8",
    "model.backbone.mlp_size=48",
    "model.backbone.vocab_size=64",
    "model.backbone.mrope_sections=[1,1,2]",
    "generator.mmdit={family: flux, num_layers: 1, num_single_layers: 1, num_heads: 2, head_size: 16,"
    " rotary_axes: [4, 6, 6], latent_channels: 4, condition_size: 24, pooled_size: 12, guidance: true}",
    "generator.vae={latent_channels: 4, block_channels: [8, 8, 8, 8], norm_groups: 4}",
    "system.precision.dtype=float32",
    "system.cpu_threads=1",
    "train.trainable=[{pattern: '*lora_*'}, {pattern: '*', train: false}]",
)
TRUNKS = {
    "dense": (),
    "moe": (
        "model.backbone.moe={num_experts: 4, top_k: 2, expert_mlp_size: 24, shared_expert_size: 40, aux_loss_coeff: 0}",
    ),
    "flux": (),
}


def stage_config(trunk: str, *overrides: str) -> StageConfig:
    """A stage whose sections describe a small trunk; its method does not count."""
    return load_recipe(REPO / "configs/orion/shapes.yaml", [*SMALL, *TRUNKS[trunk], *overrides]).stages["sft"]


def enter(stage: StageConfig) -> tuple[Platform, ParallelGroups]:
    platform = select_platform("cpu", 1)
    return platform, initialize_groups(stage.system.parallel, platform, 0, 5)


def build_trunk(
    trunk: str, stage: StageConfig, platform: Platform, groups: ParallelGroups, lora: LoraConfig | None = LORA
) -> MegatronModule:
    """This rank's stage; its own random state left behind, so that what is drawn depends on what came before."""
    ends = groups.is_first_stage(), groups.is_last_stage()
    if trunk == "flux":
        assert stage.generator is not None
        config = mmdit_transformer_config(stage.generator.mmdit, stage.system, platform)
        module = MMDiT(stage.generator.mmdit, config, "torch", groups.collection, *ends)
    else:
        config = backbone_transformer_config(stage.model.backbone, stage.system, platform)
        module = Backbone(stage.model.backbone, config, "torch", groups.collection, *ends)
    if lora is not None:
        add_lora(module, lora, "torch", groups.collection, SEED)
    return module.to(DTYPES[stage.system.precision.dtype])


def shake(module: torch.nn.Module, pattern: str, scale: float = 0.1) -> None:
    """Add noise to parameters with a word in their names; one rank."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if pattern in name:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter)


# ---------------------------------------------------------------------------------------------- one row


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss_of(module: MegatronModule, stage: StageConfig, number: int, received: Tensor | None = None) -> Tensor:
    """Of a row: a weighted sum of the last stage's output, in fp32 at least; on other stages what they hand on."""
    if isinstance(module, MMDiT):
        output = velocity(module, stage, number)
    else:
        output = hidden_states(module, stage, number, received)
        if not module.post_process:
            return output
        output = module.gather(output)[:, 0]
    return (output * draw(*output.shape, seed=100 + number)).sum() / NUM_TOKENS


def hidden_states(module: Backbone, stage: StageConfig, number: int, received: Tensor | None) -> Tensor:
    """``[t, 1, H]`` of random token ids, in two segments."""
    model, dtype = stage.model.backbone, next(module.parameters()).dtype
    positions = torch.arange(NUM_TOKENS).expand(3, -1)
    angles = mrope_angles(positions, model.head_size, model.rope_theta, model.mrope_sections, model.mrope_interleaved)
    segments = Segments.build(np.array([0, 6, NUM_TOKENS]), causal=True, device=CPU)
    context = PackedContext.with_angles(angles, dtype, segments={"full": segments})
    if received is None:
        ids = torch.randint(0, model.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(number))
        received = module.scatter(module.embed(ids))
    return module(received, context)


def velocity(module: MMDiT, stage: StageConfig, number: int) -> Tensor:
    """``[t, patch dim]`` of one picture of 2 x 4 patches and as many text tokens."""
    assert stage.generator is not None
    model, dtype = stage.generator.mmdit, next(module.parameters()).dtype
    none = np.zeros(NUM_TOKENS, dtype=np.int64)
    table = TokenTable(sample=none, frame=none, role=np.full(NUM_TOKENS, int(Role.NOISY)), num_text=NUM_TEXT)
    positions = np.concatenate([np.zeros((3, NUM_TEXT), dtype=np.int64), flux_positions(2, 4)], axis=1)
    angles = axes_angles(torch.from_numpy(positions), model.rotary_axes, model.rotary_theta)
    joint = JointContext(lowerings={"joint": lower(table, "joint", "torch", CPU)}, cos=angles.cos(), sin=angles.sin())
    group = module.tp_group
    sequence = (group.rank(), group.size()) if module.config.sequence_parallel else (0, 1)
    row = MMDiTRow.build(table, none, 2, joint, CPU, dtype, sequence=sequence)
    inputs = MMDiTInput(
        condition=draw(NUM_TEXT, model.condition_size, seed=number).to(dtype),
        patches=draw(NUM_TOKENS - NUM_TEXT, model.patch_dim, seed=number + 10).to(dtype),
        position_index=None,
        timestep=torch.tensor([0.3, 0.6]),
        pooled=draw(2, model.pooled_size, seed=number + 20).to(dtype),
        guidance=torch.tensor([3.5, 3.5]),
    )
    return module(row, inputs, None)


def backward(module: MegatronModule, stage: StageConfig, groups: ParallelGroups, number: int) -> Tensor:
    """Adds a row's gradients; returns its loss, 0 but on the last stage. What goes from stage to stage is sent by
    hand."""
    received, neighbour = None, 1 - groups.pipeline_rank
    if not module.pre_process:
        parts = stage.system.parallel.tensor if stage.system.parallel.sequence else 1
        received = torch.empty(NUM_TOKENS // parts, 1, module.config.hidden_size)
        dist.recv(received, neighbour)
        received.requires_grad_()
    output = loss_of(module, stage, number, received)
    if module.post_process:
        output.backward()
        if received is not None:
            assert received.grad is not None
            dist.send(received.grad, neighbour)
        return output.detach()
    dist.send(output.detach(), neighbour)
    gradient = torch.empty_like(output)
    dist.recv(gradient, neighbour)
    output.backward(gradient)
    return torch.zeros(())


# ---------------------------------------------------------------------------------------------- tasks


def init(folder: Path, trunk: str, stage: StageConfig) -> None:
    platform, groups = enter(stage)
    plain = build_trunk(trunk, stage, platform, groups, lora=None)
    shake(plain, "")
    save(model_state([plain], groups), folder / "base", {})
    adapted = build_trunk(trunk, stage, platform, groups)
    load(model_state([adapted], groups), folder / "base", may_be_absent=(ADAPTERS,))
    shake(adapted, "lora_")
    save(model_state([adapted], groups), folder / "start", {})


def run(folder: Path, trunk: str, name: str, stage: StageConfig) -> None:
    platform, groups = enter(stage)
    torch.manual_seed(dist.get_rank())  # adapters must not depend on it
    module = build_trunk(trunk, stage, platform, groups)
    load(model_state([module], groups), folder / "base", may_be_absent=(ADAPTERS,))
    save(model_state([module], groups), folder / f"{name}_fresh", {})
    load(model_state([module], groups), folder / "start")
    save(model_state([module], groups), folder / f"{name}_again", {})
    apply_rules([module], stage.train.trainable)
    (wrapped,) = wrap_data_parallel([module], stage, groups)
    optimizer = build_optimizer([wrapped], stage, groups)
    wrapped.zero_grad_buffer()
    losses = [backward(module, stage, groups, number) for number in range(groups.data_rank, NUM_ROWS, groups.data_size)]
    finalize_model_grads([wrapped], pg_collection=groups.collection)
    loss = torch.stack(losses).sum()
    dist.all_reduce(loss, group=groups.collection.dp)
    dist.all_reduce(loss, group=groups.collection.pp)
    save(gradient_state(wrapped, groups), folder / f"{name}_gradients", {})
    set_learning_rate(optimizer, LEARNING_RATE, 0.0)
    optimizer.step()
    state = model_state([module], groups)
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), metadata=sharding_metadata(groups))
    save(state, folder / f"{name}_after", {})
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps({"loss": loss.item()}))


def gradient_state(wrapped: DistributedDataParallel, groups: ParallelGroups) -> dict[str, Any]:
    """The checkpoint's view of what trains, with gradients in the place of values. Each data-parallel rank holds its
    shard of what was reduced, which is put together here."""
    for buffer in [*wrapped.buffers, *wrapped.expert_parallel_buffers]:
        for bucket in buffer.buckets:
            group = buffer.data_parallel_group
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
    parameters = dict(wrapped.module.named_parameters())
    state = model_state([wrapped.module], groups)
    found = state["model0"]
    for key in [key for key in found if not (key in parameters and parameters[key].requires_grad)]:
        del found[key]
    for key, value in found.items():
        value.data = parameters[key].main_grad
    return state


def main(folder: Path, tasks: list[dict[str, Any]]) -> None:
    for task in tasks:
        trunk = task["trunk"]
        overrides = [
            f"system.parallel.{field}={json.dumps(value)}"
            for field, value in ({"tensor": 1, "sequence": False} | task.get("parallel", {})).items()
        ]
        stage = stage_config(trunk, *overrides)
        assert stage.system.parallel == ParallelConfig(**task.get("parallel", {}))
        (folder / trunk).mkdir(exist_ok=True)
        if task["name"] == "init":
            init(folder / trunk, trunk, stage)
        else:
            run(folder / trunk, trunk, task["name"], stage)
        parallel_state.destroy_model_parallel()
    destroy_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
