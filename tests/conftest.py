"""What all tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def repo() -> Path:
    """The folder of the checkout."""
    return Path(__file__).resolve().parent.parent
