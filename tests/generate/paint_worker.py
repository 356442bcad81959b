"""Draws the requests of tiny_decoder.py at one layout after another, and writes down what came of them.

usage, under torchrun: paint_worker.py TASKS; TASKS is a JSON list of {"name": …, "folder": …, "kind": …, …}

Kinds, each with its fields: ``load`` (tensor, pipeline, context) loads FOLDER/run as people do; ``live`` (overrides)
sets the decoder up as its training does; ``beside`` (overrides) loads it into the layout of a language model in
training. The first rank writes FOLDER/NAME.pt, the last FOLDER/NAME.last.pt.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tiny_checkpoint import picture, stage_config
from tiny_decoder import SQUARE, WIDE, decoder_stage, requests

from megatron_unimm.checkpoint.manifest import find_checkpoint
from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.paint import Painter
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.state import load_average, load_base

SAMPLER = SamplerConfig(steps=2, guidance_scale=2.0, image_guidance_scale=1.5)


def painter(task: dict[str, Any]) -> Painter:
    folder = Path(task["folder"])
    if task["kind"] == "load":
        layout = {axis: task[axis] for axis in ("tensor", "pipeline", "context") if axis in task}
        loaded = Generator.load(folder / "run", **layout).painter
        assert loaded is not None
        return loaded
    checkpoint = find_checkpoint(folder / "run/decoder")
    if task["kind"] == "beside":
        platform, groups = setup.enter(stage_config(folder / "base", *task["overrides"]))
        return Painter.load(checkpoint, groups, platform, "float32")
    stage = decoder_stage(folder, *task["overrides"])
    platform, groups = setup.enter(stage)
    method, chunks = setup.build_model(stage, platform, groups)
    load_base(chunks, method.base_parts(), groups)
    load_average(chunks, checkpoint, groups)
    for chunk in chunks:
        chunk.train()
    return Painter(chunks, stage, groups, platform, origin="live")


def results(painter: Painter) -> dict[str, Any]:
    """Everything that must not depend on the layout."""
    torch.set_num_threads(1)
    square = [request for request in requests() if request.grid is SQUARE]
    latents = painter.latents(square, (64, 64), SAMPLER, 5)
    photos = [picture(0), picture(1)]
    return {
        "latents": latents,
        "tokens": torch.cat(painter.visual_tokens(photos, torch.tensor([SQUARE, WIDE]).numpy())),
        "pictures": [torch.from_numpy(drawn) for drawn in painter.paint(requests(), SAMPLER, 5)],
        "round_trip": [torch.from_numpy(again) for again in painter.vae_round_trip(photos)],
    }


def main(tasks: list[dict[str, Any]]) -> None:
    for task in tasks:
        ready = painter(task)
        switches = [chunk.config.sequence_parallel for chunk in ready.chunks]
        modes = [module.training for chunk in ready.chunks for module in chunk.modules()]
        found = results(ready)
        assert [chunk.config.sequence_parallel for chunk in ready.chunks] == switches
        assert [module.training for chunk in ready.chunks for module in chunk.modules()] == modes
        for rank, suffix in ((0, ".pt"), (dist.get_world_size() - 1, ".last.pt")):
            if dist.get_rank() == rank:
                torch.save(found, Path(task["folder"]) / f"{task['name']}{suffix}")
        # The job stays: its ranks meet once. The next layout has groups of its own.
        parallel_state.destroy_model_parallel()
    destroy_groups()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
