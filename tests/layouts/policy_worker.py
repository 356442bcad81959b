"""One rollout and the update that it is good for, at one layout, from one checkpoint. Started by torchrun.

usage, with tests/train on PYTHONPATH: policy_worker.py '[{"folder": …, "name": …, "overrides": […]}, …]'

A task named init writes FOLDER/start from one rank; any other FOLDER/NAME.json (losses, figures of the rollout),
FOLDER/NAME.npy (pictures that the first rank's prompts made) and FOLDER/NAME (gradients).
"""

import json
import sys
from pathlib import Path

import megatron_unimm.parallel  # noqa: F401 isort: skip - before Megatron-Core, on a machine without a GPU

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from small_policy import policy_stage, prompts, ready, shake
from worker import gradient_state

from megatron_unimm.checkpoint.store import save
from megatron_unimm.data.prompts import PromptRow
from megatron_unimm.methods.mmcore.policy.method import MMCorePolicy
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.state import load_weights, model_state

REPO = Path(__file__).resolve().parents[2]


def run(folder: Path, name: str, overrides: list[str]) -> None:
    stage = policy_stage(REPO, *overrides)
    world = setup.enter(stage)
    _, groups = world
    method, chunks = setup.build_model(stage, *world)
    assert isinstance(method, MMCorePolicy)
    if name == "init":
        shake(chunks)
        save(model_state(chunks, groups), folder / "start", {"kind": "base_model"})
        return
    load_weights(chunks, folder / "start", groups)
    step, rollouts, _ = ready(stage, world, REPO, method, chunks)
    (row,) = prompts()
    mine = PromptRow(row.samples[groups.data_rank :: groups.data_size], row.num_tokens)
    (rows,) = rollouts.updates([mine], 0)
    losses = step.forward_backward(rows)
    save(gradient_state(step.chunks, groups), folder / name, {})
    if dist.get_rank() == 0:
        np.save(folder / f"{name}.npy", np.stack([picture for _, picture in rollouts.figures.pictures]))
    if dist.get_rank() == dist.get_world_size() - 1:
        found = {"losses": losses.tolist(), "figures": rollouts.figures.take()}
        (folder / f"{name}.json").write_text(json.dumps(found))


def main() -> None:
    for task in json.loads(sys.argv[1]):
        run(Path(task["folder"]), task["name"], task["overrides"])
        parallel_state.destroy_model_parallel()
    destroy_groups()


if __name__ == "__main__":
    main()
