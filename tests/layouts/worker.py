"""Runs a stage of a Shapes recipe (ORION's unless a task says otherwise) for three steps at one layout and writes down
what must not depend on it. Started by torchrun.

usage: worker.py '[{"folder": …, "recipe": "orion", "stage": …, "name": …, "overrides": […]}, …]'

A task named init writes random checkpoints from one rank: for language models FOLDER/base and FOLDER/start (and
FOLDER/siglip where that is the teacher), for what draws FOLDER/start, which is its image generator, with the language
model where there is one beside it (FOLDER/base comes from the other). Any other name writes FOLDER/NAME.json (losses,
gradient norms) and FOLDER/NAME (gradients of the first step). One start serves many layouts, since importing takes
longer than training.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import megatron_unimm.parallel  # noqa: F401 isort: skip - before Megatron-Core, on a machine without a GPU

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.router import TopKRouter

from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.methods import HieraQueryConfig, SparConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.schedule import learning_rate
from megatron_unimm.train.state import Start, model_state, sharding_metadata
from megatron_unimm.train.step import TrainStep

REPO = Path(__file__).resolve().parents[2]
NUM_STEPS = 3


SMALL = (
    "model.vision_encoder.num_layers=2",
    "model.vision_encoder.hidden_size=32",
    "model.vision_encoder.mlp_size=48",
    "model.vision_encoder.full_attention_layers=[1]",
    "model.vision_encoder.out_size=64",
    "model.backbone.num_layers=4",
    "model.backbone.hidden_size=64",
    "model.backbone.num_heads=4",
    "model.backbone.head_size=16",
    "model.backbone.mlp_size=96",
    "model.backbone.mrope_sections=[2,3,3]",
    "data.sequence_length=512",
    f"data.tokenizer={REPO}/tools/base_models/shapes_vlm",
    "train.global_batch_size=12",
    "train.ema_decay=0.9",
    "system.precision.dtype=float32",
    "system.parallel.tensor=1",
    "system.parallel.sequence=false",
    "system.cpu_threads=1",
)
GENERATOR = (
    "generator.mmdit.num_layers=4",
    "generator.mmdit.num_heads=4",
    "generator.mmdit.head_size=8",
    "generator.mmdit.condition_size=24",
    "generator.mmdit.pooled_size=12",
    "generator.mmdit.latent_channels=4",
    "generator.vae={latent_channels: 4, block_channels: [8, 8, 8, 8], norm_groups: 4}",
)
SCALES = (
    "hieraquery.scales=[[1, 2], 2]",
    "hieraquery.connector={num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, head_size: 8, mlp_size: 48}",
)
TOKENIZER = (
    "tokenizer.latent_channels=8",
    "tokenizer.semantic={num_layers: 1, hidden_size: 32, num_heads: 2, mlp_size: 48}",
    "tokenizer.pixel={num_layers: 2, hidden_size: 32, num_heads: 2, mlp_size: 48, encoder_layers: [0, 1]}",
    "tokenizer.decoder={num_layers: 2, hidden_size: 32, num_heads: 4, mlp_size: 64, channels: 8, num_blocks: 1,"
    " norm_groups: 4}",
)
RECIPES = dict.fromkeys(("orion", "mmcore"), (*SMALL, *GENERATOR)) | {
    "hieraquery": (*SMALL, *GENERATOR, *SCALES),
    "spar": (
        *SMALL,
        *(setting for setting in GENERATOR if "latent_channels" not in setting),
        *TOKENIZER,
        "generator.mmdit.latent_channels=8",
        "generator.vae.latent_channels=8",
        "queries.num_queries=4",
    ),
}
"""With smaller models, of four layers."""


FILES = {"base": "base", "generator": "start", "tokenizer": "tokenizer"}
"""Checkpoints of a stage in its folder."""


def stage_config(folder: Path, recipe: str, name: str, overrides: list[str]) -> StageConfig:
    """A stage of a small Shapes recipe whose checkpoints are in a folder."""
    files = [f"{what}_checkpoint={folder}/{name}" for what, name in FILES.items()]
    return load_recipe(REPO / f"configs/{recipe}/shapes.yaml", [*RECIPES[recipe], *files, *overrides]).stages[name]


def init(folder: Path, stage: StageConfig) -> None:
    """Two random models, so that student and teacher differ; biases and norms too, so that none is invisible."""
    platform, groups = setup.enter(stage)
    _, chunks = setup.build_model(stage, platform, groups)
    decodes = stage.method.trunk == "mmdit"
    trained = stage.generator if decodes else stage.model
    family = "sd3" if decodes else "qwen2_5_vl"
    meta = {"kind": "base_model", "family": family, "architecture": trained.model_dump(mode="json")}
    for seed, name in enumerate(("start",) if decodes else ("base", "start")):
        generator = torch.Generator().manual_seed(seed)
        for parameter in chunks[0].parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        save(model_state(chunks, groups), folder / name, meta)
    if isinstance(stage.method, HieraQueryConfig | SparConfig):  # its VLM is the base model's
        state = model_state(chunks, groups)["model0"]
        of_vlm = {key: value for key, value in state.items() if value.key.startswith(("vision_encoder.", "backbone."))}
        meta = {"kind": "base_model", "family": "qwen2_5_vl", "architecture": stage.model.model_dump(mode="json")}
        save({"model0": of_vlm}, folder / "base", meta)
    if isinstance(stage.method, SparConfig):
        assert stage.tokenizer is not None
        of_tokenizer = {key: value for key, value in state.items() if value.key.startswith("vae.")}
        for value in of_tokenizer.values():
            value.key = chunks[0].imported_name(value.key)
        save({"model0": of_tokenizer}, folder / "tokenizer", {"tokenizer": stage.tokenizer.model_dump(mode="json")})
    siglip = chunks[0].base_sharded_state_dict("siglip", sharding_metadata(groups))
    if siglip:
        save({"siglip": siglip}, folder / "siglip", {"kind": "base_model", "family": "siglip"})


def run(folder: Path, stage: StageConfig, name: str) -> None:
    """Three optimizer steps from FOLDER/start."""
    platform, groups = setup.enter(stage)
    method, chunks = setup.build_model(stage, platform, groups)
    start = Start(folder / "start", resume=False)
    setup.fill(chunks, stage, method, start, groups)
    loader, total_steps = setup.open_data(stage, method, start, platform, groups)
    router_gaps = watch_routers(chunks)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    step = TrainStep(stage, method, wrapped, build_optimizer(wrapped, stage, groups), platform, groups)
    steps = []
    for number in range(NUM_STEPS):
        batch = next(loader)
        router_gaps.clear()
        result = step.run(batch.rows, learning_rate(number, total_steps, stage.train.schedule))
        kinds = sorted({kind for row in batch.rows for kind in row.kinds})
        steps.append(
            {
                "losses": result.losses.tolist(),
                "norm": result.gradient_norm.item(),
                "modules": result.module_norms.tolist(),
                "router_gap": min(router_gaps, default=None),
                "kinds": kinds,
                "samples": sorted(name for row in batch.rows for name in row.sample_ids),
            }
        )
        if number == 0:
            save(gradient_state(wrapped, groups), folder / name, {})
    loader.close()
    if dist.get_rank() == dist.get_world_size() - 1:
        (folder / f"{name}.json").write_text(json.dumps({"modules": step.meter.modules, "steps": steps}))


def watch_routers(chunks: Sequence[torch.nn.Module]) -> list[float]:
    """Grows with every call of a router by the smallest gap, over this rank's tokens, between the logits of the last
    expert that a token takes and of the first that it leaves."""
    gaps: list[float] = []

    def watched(router: TopKRouter, routing: Callable[..., Any]) -> Callable[..., Any]:
        def route(logits: torch.Tensor, **arguments: Any) -> Any:
            best = logits.detach().flatten(0, -2).topk(router.topk + 1).values
            gaps.append((best[:, -2] - best[:, -1]).min().item())
            return routing(logits, **arguments)

        return route

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.routing = watched(module, module.routing)
    return gaps


def gradient_state(wrapped: list[DistributedDataParallel], groups: ParallelGroups) -> dict:
    """The checkpoint's view of the model with each parameter's gradient in its place.

    The update clips gradients inside the optimizer's kernel, so the buffers still hold what was reduced; each
    data-parallel rank holds its shard of it, which is put together here.
    """
    for chunk in wrapped:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            for bucket in buffer.buckets:
                size, rank = buffer.data_parallel_group.size(), buffer.data_parallel_group.rank()
                shards = list(bucket.grad_data.chunk(size))
                dist.all_gather(
                    [torch.empty_like(shards[0]) for _ in range(size)] if size == 1 else shards,
                    shards[rank].clone(),
                    group=buffer.data_parallel_group,
                )
    state = model_state([chunk.module for chunk in wrapped], groups)
    for number, chunk in enumerate(wrapped):
        parameters = dict(chunk.module.named_parameters())
        found = state[f"model{number}"]
        # Buffers and what is frozen have none.
        for key in [key for key in found if key not in parameters or not parameters[key].requires_grad]:
            del found[key]
        for key, value in found.items():
            value.data = parameters[key].main_grad
    return state


def main() -> None:
    plan = json.loads(sys.stdin.read() if sys.argv[1] == "-" else sys.argv[1])
    for task in plan:
        torch.manual_seed(0)
        folder, name = Path(task["folder"]), task["name"]
        stage = stage_config(folder, task.get("recipe", "orion"), task["stage"], task["overrides"])
        init(folder, stage) if name == "init" else run(folder, stage, name)
        parallel_state.destroy_model_parallel()
    destroy_groups()


if __name__ == "__main__":
    main()
