"""What a suite is, and how its samples are spread over replicas."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_unimm.errors import DataError
from megatron_unimm.generate.api import Generator

T = TypeVar("T")


@dataclass(frozen=True)
class SuiteResult:
    """What a suite measured."""

    scores: dict[str, float]
    """By name; the suite's main figure first."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many samples stand behind them."""


@dataclass(frozen=True)
class Suite:
    """A named way to score a model."""

    name: str
    about: str
    """One line for ``unimm evaluate --help``."""
    num_samples: int
    """Unless asked for another number."""
    draws: bool
    """Whether the model must be able to generate images."""
    needs_targets: bool
    """Whether the base model's vision encoder is read (``Generator.target_features``)."""
    load: Callable[[Path | None, int], Sequence[Any]]
    """Its samples: from the files of ``unimm data shapes`` in a folder or, without one, made on the spot. Raises
    DataError."""
    run: Callable[[Generator, Sequence[Any]], SuiteResult]
    """Scores the model on samples; called on all ranks, returns the same on all."""


def share(generator: Generator, count: int) -> range:
    """The samples that this rank's replica of the model answers.

    Replicas of a mixture of experts that share experts answer everything together: they must take as many steps as
        one another.
    """
    groups = generator.groups
    if groups.config.expert > 1:
        return range(count)
    return range(groups.data_rank, count, groups.data_size)


def gather(generator: Generator, mine: dict[int, T]) -> list[T]:
    """The results of all replicas, by sample, on every rank."""
    everyone: list[dict[int, T]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine, group=generator.groups.host)
    found = {index: result for part in everyone for index, result in part.items()}
    return [found[index] for index in sorted(found)]


def list_file(data: Path, name: str) -> Path:
    """An evaluation list of a Shapes world: ``data/eval/name`` or ``data/name``.

    Raises:
        DataError: neither is there.
    """
    for path in (data / "eval" / name, data / name):
        if path.is_file():
            return path
    raise DataError(
        str(data), f"has no eval/{name}; give the folder of `unimm data shapes --to`, or none to have the list made"
    )
