"""What all tests share."""

from pathlib import Path

import pytest

import megatron_unimm.parallel  # noqa: F401 - before any test imports Megatron-Core, on a machine without a GPU


@pytest.fixture(scope="session")
def repo() -> Path:
    """The folder of the checkout."""
    return Path(__file__).resolve().parent.parent
