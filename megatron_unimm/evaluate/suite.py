"""What a suite is, and how its samples are spread over replicas."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from megatron_unimm.errors import DataError, UserError
from megatron_unimm.generate.api import Generator

T = TypeVar("T")


@dataclass(frozen=True)
class SuiteResult:
    """What a suite measured."""

    scores: dict[str, float]
    """By name; the suite's main figure first."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many samples stand behind them."""
    pictures: Sequence[tuple[str, np.ndarray]] = ()
    """For people to look at: captions and uint8 (H, W, 3), in rows of ``SHEET_COLUMNS``."""


@dataclass(frozen=True)
class SuiteFiles:
    """Where a suite keeps what is more than numbers."""

    images: Path
    """Folder of the images that it makes."""
    rows: Path
    """JSON-lines file with what was found in each image."""
    detections: Path | None = None
    """JSON file with the boxes that a detector found in the images; None where it has not seen them yet."""


@dataclass(frozen=True)
class Suite:
    """A named way to score a model."""

    name: str
    about: str
    """One line for ``unimm evaluate --help``."""
    num_samples: int
    """Unless asked for another number; of what, the suite says."""
    draws: bool
    """Whether the model must be able to generate images."""
    needs_targets: bool
    """Whether the base model's vision encoder is read (``Generator.target_features``)."""
    load: Callable[[Path | None, int], Any]
    """Its samples: from the files of ``unimm data shapes`` in a folder or, without one, made on the spot. Raises
    DataError."""
    run: Callable[[Any, Any], SuiteResult]
    """Scores the model (a ``Generator``, or what ``of_tokenizers`` says) on samples; called on all ranks, returns the
    same on all."""
    needs_pixels: bool = False
    """Whether an image decoder must make pictures of what the model draws."""
    of_tokenizers: bool = False
    """Whether it scores a ``PictureTokenizer``."""
    with_files: Callable[[Any, SuiteFiles], Any] | None = None
    """The samples with the places of files, for a suite that writes images; it runs only from the command line."""
    score_files: Callable[[Any], SuiteResult] | None = None
    """Scores the images that are there by ``SuiteFiles.detections``, without a model and on one rank."""


SHEET_COLUMNS = 6
"""Pictures in a row of ``SuiteResult.pictures``."""


def require_pixels(generator: Generator, suite: str) -> None:
    """Refuse a model whose images remain visual tokens.

    Raises:
        UserError: no decoder is loaded.
    """
    if not generator.paints:
        raise UserError(
            generator.origin,
            f"makes visual tokens, but suite {suite} judges pixels; train a diffusion decoder for them (a stage with "
            "method.name: orion_decoder) and give its checkpoint as --decoder",
        )


def share(generator: Generator, count: int) -> range:
    """The samples that this rank's replica of the model answers.

    Replicas of a mixture of experts that share experts answer everything together: they must take as many steps as
        one another.
    """
    groups = generator.groups
    if groups.config.expert > 1:
        return range(count)
    return range(groups.data_rank, count, groups.data_size)


def is_writer(generator: Generator) -> bool:
    """Whether this rank writes the files of its replica's share: one rank of each replica does, and one of all where
    replicas answer everything together."""
    groups = generator.groups
    is_first = groups.tensor_rank == groups.context_rank == groups.pipeline_rank == 0
    return is_first and (groups.config.expert == 1 or groups.data_rank == 0)


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
