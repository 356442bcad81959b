"""A job of one rank in the test's own process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_orion import small_stage

from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup


@pytest.fixture
def world(repo: Path) -> Iterator[tuple[Platform, ParallelGroups]]:
    """A job of one rank, in this process."""
    yield setup.enter(small_stage(repo))
    destroy_groups()
