"""The tiny checkpoints, made once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import make_checkpoints
from tiny_decoder import make_all

from megatron_unimm.generate.api import Generator


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny checkpoints: base, run."""
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoints(folder)
    return folder


@pytest.fixture(scope="session")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny run that draws: base, generator, run with its stages sft and decoder."""
    folder = tmp_path_factory.mktemp("drawing")
    make_all(folder)
    return folder


@pytest.fixture(scope="module")
def generator(tiny: Path) -> Iterator[Generator]:
    """The trained tiny model on one rank."""
    with Generator.load(tiny / "run") as loaded:
        torch.set_num_threads(1)  # the matrices are tiny, threads would only wait for one another
        yield loaded
