"""What the tests of faults share: the small recipe of tests/train, and a folder with its data and base model."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from job import Job
from small_base import SETTINGS, write_base

from megatron_unimm.data.shapes import write_shapes


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """Shapes data and a random base model's checkpoint."""
    folder = tmp_path_factory.mktemp("faults")
    write_shapes(folder / "data", count=60, seed=1)
    write_base(repo, folder / "base")
    return folder


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
