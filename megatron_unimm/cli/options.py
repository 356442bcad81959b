"""Options that several commands share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from megatron_unimm.config.flow import SamplerConfig
    from megatron_unimm.config.recipe import Recipe

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


def run_dir(command: Command) -> Command:
    """Where the stages of a run are; see :func:`run_dir_of`."""
    return click.option(
        "--run-dir",
        type=click.Path(path_type=Path),
        help="Checkpoints and logs of all stages.  [default: runs/NAME-OF-RECIPE]",
    )(command)


def run_dir_of(recipe: "Recipe", given: Path | None) -> Path:
    """The folder that was given, or the recipe's."""
    return given or Path(os.environ.get("RUNS", "runs")) / recipe.name


def layout(command: Command) -> Command:
    """How the model is spread over the ranks of torchrun or srun; replicas share the work where there are more."""
    for option in reversed(
        (
            click.option("--tensor", default=1, show_default=True, help="Tensor-parallel ranks."),
            click.option("--pipeline", default=1, show_default=True, help="Pipeline stages."),
            click.option(
                "--context",
                default=1,
                show_default=True,
                help="Ranks that share the tokens of pictures that are drawn, and of those before them.",
            ),
        )
    ):
        command = option(command)
    return command


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
            click.option("--seed", default=0, show_default=True, help="Of drawn words and of pictures' noise."),
        )
    ):
        command = option(command)
    return command


def painting(command: Command) -> Command:
    """How pictures are drawn; what is not given is as the decoder's recipe has it."""
    for option in reversed(
        (
            click.option(
                "--decoder",
                type=click.Path(path_type=Path),
                metavar="DIR",
                help="Image decoder: its checkpoint or stage.  [default: the one in the run's folder]",
            ),
            click.option(
                "--base",
                type=click.Path(path_type=Path),
                metavar="DIR",
                help="Base model that the decoder sees edited images with.  [default: that of its training]",
            ),
            click.option("--steps", type=click.IntRange(min=1), help="Steps from noise to picture."),
            click.option("--guidance-scale", type=click.FloatRange(min=0), help="Of the condition; 1 is none."),
            click.option(
                "--image-guidance-scale",
                type=click.FloatRange(min=0),
                help="Of images that are edited, where the model tells them from its condition.",
            ),
            click.option("--solver", type=click.Choice(["euler", "heun", "dpm++2m"]), help="What takes the steps."),
        )
    ):
        command = option(command)
    return command


def sampler_of(recipe: "SamplerConfig", **chosen: Any) -> "SamplerConfig":
    """The recipe's sampler with what was chosen in its place."""
    given = {name: value for name, value in chosen.items() if value is not None}
    return type(recipe).model_validate(recipe.model_dump() | given)
