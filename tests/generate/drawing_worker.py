"""Answers the conversations of tiny_checkpoint.py at one layout after another, and writes down what was said.

usage, under torchrun: drawing_worker.py FOLDER TASKS; TASKS is a JSON list of {"name": …, "tensor": …, "pipeline": …}
or {"name": …, "overrides": […]}

The first kind loads the checkpoint FOLDER/run; the second builds the model as training does and decodes with it as it
is. Rank 0 writes FOLDER/NAME.pt, and the last rank FOLDER/NAME.last.pt.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tiny_checkpoint import picture, prompts, stage_config

from megatron_unimm.checkpoint.manifest import find_checkpoint
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.sampling import DecodeSettings
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.state import Start

SETTINGS = DecodeSettings(max_new_tokens=20)
DRAWN = DecodeSettings(max_new_tokens=4, temperature=1.0)


def live(folder: Path, overrides: list[str]) -> Generator:
    """The checkpoint in a model that is set up to train, in training mode."""
    stage = stage_config(folder / "base", *overrides)
    platform, groups = setup.enter(stage)
    method, chunks = setup.build_model(stage, platform, groups)
    setup.fill(chunks, stage, method, Start(find_checkpoint(folder / "run"), resume=False), groups)
    for chunk in chunks:
        chunk.train()
    return Generator(chunks, stage, groups, platform, setup.chat_format(stage), draws=True, origin="live")


def load(folder: Path, tensor: int, pipeline: int) -> Generator:
    """The checkpoint as people load it."""
    run, base = folder / "run", folder / "base"
    return Generator.load(run, tensor=tensor, pipeline=pipeline, with_targets=True, base=base)


def results(generator: Generator) -> dict[str, Any]:
    """Everything that must not depend on the layout."""
    answers = generator.answer(prompts(generator), SETTINGS)
    drawn = generator.answer(prompts(generator), DRAWN)
    return {
        "ids": [answer.token_ids for answer in answers],
        "drawn": [answer.token_ids for answer in drawn],
        "visual": torch.cat([image.visual_tokens for answer in answers for image in answer.images]),
        "targets": torch.cat(generator.target_features([picture(7), picture(8)])),
    }


def main(folder: Path, tasks: list[dict[str, Any]]) -> None:
    for task in tasks:
        is_live = "overrides" in task
        generator = live(folder, task["overrides"]) if is_live else load(folder, task["tensor"], task["pipeline"])
        torch.set_num_threads(1)
        switches = [chunk.config.sequence_parallel for chunk in generator.chunks]
        found = results(generator)
        for rank, suffix in ((0, ".pt"), (dist.get_world_size() - 1, ".last.pt")):
            if dist.get_rank() == rank:
                torch.save(found, folder / f"{task['name']}{suffix}")
        if is_live:
            assert [chunk.config.sequence_parallel for chunk in generator.chunks] == switches
            assert all(module.training for chunk in generator.chunks for module in chunk.backbone.modules())
        # The job stays: its ranks meet once. The next layout has groups of its own.
        parallel_state.destroy_model_parallel()
    destroy_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
