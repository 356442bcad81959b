"""Runs a small decoder with Dynamic Token Routing for one step at one layout, and writes down losses and gradients.
Started by torchrun.

usage: routing_worker.py '[{"folder": …, "name": …, "model": …, "overrides": […]}, …]'

A task named init writes FOLDER/start. One named dense takes every layer's output by a hook and mixes them with plain
torch: what the others are compared with.
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
from torch import Tensor
from worker import gradient_state, stage_config

from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.config.routing import RoutingConfig
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.models.attention import PackedContext, Segments, context_index
from megatron_unimm.models.backbone.decoder import Backbone
from megatron_unimm.models.backbone.deepstack import Deepstack, travelling_levels
from megatron_unimm.models.backbone.routing import balance_loss
from megatron_unimm.models.transformer_config import backbone_transformer_config
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.state import load_weights, model_state
from megatron_unimm.train.step import TrainStep

NUM_TOKENS = 64
BOUNDS = np.array([0, 24, 64])


@dataclass(frozen=True)
class Row:
    """What a micro-batch is made of."""

    seed: int


class RoutedModel(StageModel):
    """A stage of a decoder whose loss reads the last hidden states and the mixture."""

    def __init__(
        self,
        stage: StageConfig,
        routing: RoutingConfig,
        platform: Platform,
        groups: ParallelGroups,
        virtual_stage: int,
        dense: bool,
    ) -> None:
        config = backbone_transformer_config(stage.model.backbone, stage.system, platform)
        super().__init__(config, groups, virtual_stage)
        self.routing = routing
        self.num_levels = len(stage.model.vision_encoder.deepstack_layers)
        travelling = travelling_levels(stage.model, groups.config)
        deepstack = Deepstack(self.num_levels, travelling, self.pre_process, self.post_process)
        self.backbone = Backbone(
            stage.model.backbone,
            config,
            "torch",
            groups.collection,
            self.pre_process,
            self.post_process,
            self.vp_stage,
            deepstack,
            routing,
        )
        self.outputs: dict[int, Tensor] = {}
        if dense:
            for number, layer in enumerate(self.backbone.decoder.layers):
                layer.register_forward_hook(
                    lambda module, args, output, number=number: self.outputs.update({number: output[0][:NUM_TOKENS, 0]})
                )
        self.dense = dense

    def forward(self, row: Row) -> Tensor:
        ranks, rank = self.groups.config.context, self.groups.context_rank
        hidden_size = self.config.hidden_size
        generator = torch.Generator().manual_seed(row.seed)
        ids = torch.randint(0, 100, (NUM_TOKENS,), generator=generator)
        levels = torch.randn(self.num_levels, NUM_TOKENS, 1, hidden_size, generator=generator)
        wanted = torch.randn(2, NUM_TOKENS, hidden_size, generator=generator)
        local = torch.from_numpy(context_index(BOUNDS, rank, ranks))
        if self.pre_process:
            blocks = torch.cat([self.backbone.embed(ids)[None], levels]).index_select(1, local)
            rows = torch.cat([self.backbone.scatter(block) for block in blocks])
        else:
            rows = self.input_tensor
        segments = {"full": Segments.build(BOUNDS, True, torch.device("cpu"), rank, ranks)}
        rows = self.backbone(rows, PackedContext(segments=segments))
        if not self.post_process:
            return rows
        hidden, (mixed, logits) = self.backbone.mixture(rows)
        hidden, mixed, logits = (self.backbone.gather(each) for each in (hidden, mixed[:, None], logits[:, None]))
        if self.dense:
            mixed, logits = self._mixed_densely()
        losses = [(found[:, 0] * each[local]).sum() for found, each in ((hidden, wanted[0]), (mixed, wanted[1]))]
        sample = torch.bucketize(local, torch.from_numpy(BOUNDS[1:-1]), right=True)
        balance = balance_loss(logits[:, 0], sample, 2, self.routing.top_k, self.groups.collection.cp)
        return torch.stack([*losses, balance])

    def _mixed_densely(self) -> tuple[Tensor, Tensor]:
        layers = self.routing.mixed(len(self.outputs))
        states = torch.stack([self.outputs[layer] for layer in layers], dim=1)  # [t, L, H]
        states = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        routers = [self.backbone.decoder.layers[layer].layer_router for layer in layers]
        logits = torch.cat([router.bias for router in routers]).expand(len(states), -1)
        if self.routing.mode == "dynamic":
            logits = logits + torch.einsum("tlh,lh->tl", states, torch.stack([router.weight for router in routers]))
        logits = logits / self.routing.temperature
        weights = logits.softmax(1)
        if self.routing.top_k is not None:
            threshold = logits.topk(self.routing.top_k, dim=1).values[:, -1:]
            weights = torch.where(logits >= threshold, weights, 0)
            weights = weights / weights.sum(1, keepdim=True)
        return torch.einsum("tl,tlh->th", weights, states)[:, None], logits[:, None]


class Toy:
    """As much of a method as a step asks for."""

    terms = ("hidden", "mixed", "balance")
    weights = (1.0, 1.0, 10.0)

    def __init__(self, stage: StageConfig, chunk: RoutedModel) -> None:
        parallel, backbone = stage.system.parallel, chunk.backbone
        shards = parallel.context * (parallel.tensor if parallel.sequence else 1)
        tokens = NUM_TOKENS // shards
        assert backbone.routing is not None
        blocks = 1 + travelling_levels(stage.model, parallel)
        self.rows = shards * (blocks * tokens + backbone.routing.num_rows(tokens))

    def travelling_rows(self) -> int:
        return self.rows

    def counts(self, rows: list[Row]) -> list[int]:
        return [NUM_TOKENS * len(rows)] * 2 + [2 * len(rows)]

    def batch(self, row: Row, model: Any, device: torch.device) -> Row:
        return row


def run(task: dict) -> None:
    folder, name = Path(task["folder"]), task["name"]
    stage = stage_config(folder, "orion", "sft", [*task["model"], *task["overrides"]])
    routing = RoutingConfig.model_validate(task["routing"])
    platform, groups = setup.enter(stage)
    chunks = [
        RoutedModel(stage, routing, platform, groups, number, name == "dense")
        for number in range(stage.system.parallel.virtual_pipeline)
    ]
    if name == "init":
        generator = torch.Generator().manual_seed(0)
        for parameter in chunks[0].parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        save(model_state(chunks, groups), folder / "start", {"kind": "base_model", "family": "qwen2_5_vl"})
        return
    load_weights(chunks, folder / "start", groups)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    step = TrainStep(stage, Toy(stage, chunks[0]), wrapped, build_optimizer(wrapped, stage, groups), platform, groups)
    losses = step.forward_backward([Row(seed) for seed in range(2)]).tolist()
    save(gradient_state(wrapped, groups), folder / name, {})
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(losses))


def main() -> None:
    for task in json.loads(sys.argv[1]):
        torch.manual_seed(0)
        run(task)
        parallel_state.destroy_model_parallel()
    destroy_groups()


if __name__ == "__main__":
    main()
