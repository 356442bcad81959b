"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


def model(command: Command) -> Command:
    """Which checkpoint."""
    return click.option(
        "--model",
        "model_dir",
        required=True,
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Checkpoint, or the folder of a stage or run: its newest.",
    )(command)


def layout(command: Command) -> Command:
    """How the model is spread over the ranks of torchrun or srun; replicas share the work where there are more."""
    command = click.option("--pipeline", default=1, show_default=True, help="Pipeline stages.")(command)
    return click.option("--tensor", default=1, show_default=True, help="Tensor-parallel ranks.")(command)


def decoding(command: Command) -> Command:
    """How an answer is chosen."""
    for option in reversed(
        (
            click.option(
                "--max-new-tokens", default=512, show_default=True, help="Longest answer, visual tokens included."
            ),
            click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token."),
            click.option(
                "--top-p", default=1.0, show_default=True, help="Draw from the likeliest with this probability."
            ),
            click.option("--seed", default=0, show_default=True, help="Of the draws, with a temperature above 0."),
        )
    ):
        command = option(command)
    return command
