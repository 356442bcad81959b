"""The small recipe of tests/train as the tests of faults take it, and a base model for it."""

import shutil
from pathlib import Path

from small_orion import SMALL

from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.load import load_recipe, select_stage
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.state import model_state

SETTINGS = (
    *SMALL,
    "data.sequence_length=256",
    "train.global_batch_size=4",
    "train.logging.every_steps=1",
    "train.logging.tensorboard=false",
    "stages.warm_up.train.evaluation.at_start=false",
)


def write_base(repo: Path, directory: Path, *overrides: str) -> None:
    """A random model with a tokenizer."""
    stage = select_stage(load_recipe(repo / "configs/orion/shapes.yaml", [*SETTINGS, *overrides]), "warm_up")
    platform, groups = setup.enter(stage)
    _, chunks = setup.build_model(stage, platform, groups)
    meta = {"kind": "base_model", "family": "qwen2_5_vl", "architecture": stage.model.model_dump(mode="json")}
    hf_files = directory.parent / "hf"
    hf_files.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(repo / "tools/base_models/shapes_vlm" / name, hf_files / name)
    save(model_state(chunks, groups), directory, meta, hf_files=hf_files)
    destroy_groups()
