"""What the tests of faults share: the small recipe of tests/train, and a folder with its data and base model."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from job import Job
from small_orion import SMALL

from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.load import load_recipe, select_stage
from megatron_unimm.data.shapes import write_shapes
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


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """Shapes data and a random base model's checkpoint."""
    folder = tmp_path_factory.mktemp("faults")
    write_shapes(folder / "data", count=60, seed=1)
    write_base(repo, folder / "base")
    return folder


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


@pytest.fixture
def job(repo: Path, world_folder: Path, tmp_path: Path) -> Job:
    """SFT of all three kinds of sample from the base model, six steps with a checkpoint after every second."""
    kinds = ("understanding", "text_to_image", "editing")
    data = [f"data.sources.{kind}.path={world_folder}/data/train/{kind}.jsonl" for kind in kinds]
    settings = [
        *SETTINGS,
        *data,
        f"base_checkpoint={world_folder}/base",
        "stages.sft.after=null",
        "train.steps=6",
        "train.checkpoint.every_steps=2",
    ]
    return Job(repo / "configs/orion/shapes.yaml", "sft", tmp_path / "run", settings)
