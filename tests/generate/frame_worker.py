"""Asks MMCORE's run at one layout after another, and writes down what it answered.

usage, under torchrun with tests/convert on PYTHONPATH: frame_worker.py TASKS; TASKS is a JSON list of {"name": …,
"folder": …, "layout": {axis: size, …}}. The first rank writes FOLDER/NAME.pt, the last FOLDER/NAME.last.pt.
"""

import json
import sys
from pathlib import Path
from typing import Any

import megatron_unimm.parallel  # noqa: F401 isort: skip - before Megatron-Core, on a machine without a GPU

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tiny_mmcore import picture

from megatron_unimm.data.sample import Turn
from megatron_unimm.generate.load import load_generator
from megatron_unimm.generate.query_generator import QueryGenerator
from megatron_unimm.generate.sampling import DecodeSettings
from megatron_unimm.parallel.groups import destroy_groups

GIVEN = 12
"""Pictures of a conversation."""
SIZES = [(64, 64), (96, 48), (50, 70)]


def results(generator: QueryGenerator) -> dict[str, Any]:
    """Everything that must not depend on the layout: a picture of many and one of words alone, drawn together; latents
    of the first; words about many."""
    torch.set_num_threads(1)
    pictures = [picture(number, *SIZES[number % 3]) for number in range(GIVEN)]
    pictures[-1] = picture(GIVEN)  # a square, as the other picture will be
    many = [Turn("user", (*range(GIVEN), "All of them in one, please."))]
    settings = DecodeSettings(max_new_tokens=6, seed=5, sampler=generator.sampler)
    drawing = [
        generator.prompt(many, pictures, open_image=True, number=3),
        generator.prompt([Turn("user", ("a red circle",))], open_image=True, number=4),
    ]
    requests = [generator._request(prompt, []) for prompt in drawing]
    drawables = [generator.frames.lay_out(request) for request in requests]
    answers = generator.answer([*drawing, generator.prompt(many, pictures)], settings)
    return {
        "latents": generator.frames.latents(drawables, generator.sampler, settings.seed),
        "pictures": [torch.from_numpy(answer.images[0].pixels) for answer in answers[:2]],
        "ids": answers[2].token_ids,
    }


def main(tasks: list[dict[str, Any]]) -> None:
    for task in tasks:
        generator = load_generator(Path(task["folder"]) / "run", **task["layout"])
        assert isinstance(generator, QueryGenerator)
        found = results(generator)
        for rank, suffix in ((0, ".pt"), (dist.get_world_size() - 1, ".last.pt")):
            if dist.get_rank() == rank:
                torch.save(found, Path(task["folder"]) / f"{task['name']}{suffix}")
        # The job stays: its ranks meet once. The next layout has groups of its own.
        parallel_state.destroy_model_parallel()
    destroy_groups()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
