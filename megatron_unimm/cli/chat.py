"""``unimm chat``: a conversation in the terminal, with images in both directions."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_unimm.cli.options import decoding, layout, model, painting, sampler_of

if TYPE_CHECKING:
    from megatron_unimm.generate.session import Session

HELP = "/image FILE attaches an image to what you say next, /reset forgets the conversation, /quit ends it."


@click.command(epilog="Example: unimm chat --model runs/quickstart")
@model
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep generated images in this folder: as PNG, without an image decoder as visual tokens.",
)
@decoding
@painting
@layout
def chat(
    model_dir: Path,
    to: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    decoder: Path | None,
    base: Path | None,
    tensor: int,
    pipeline: int,
    context: int,
    **drawing: Any,
) -> None:
    """Talk with a model. It sees the images that it has generated.

    /image FILE attaches an image to what you say next, /reset forgets the conversation, /quit ends it.
    """
    from megatron_unimm.train.log import setup_logging

    setup_logging()  # before Megatron-Core is imported, which warns

    from megatron_unimm.generate.load import load_generator
    from megatron_unimm.generate.sampling import DecodeSettings
    from megatron_unimm.generate.session import Session

    settings = DecodeSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with load_generator(
        model_dir, tensor=tensor, pipeline=pipeline, context=context, decoder=decoder, base=base
    ) as generator:
        if generator.sampler is not None:
            settings = replace(settings, sampler=sampler_of(generator.sampler, **drawing))
        show = click.echo if generator.is_main else _silent
        show(HELP if generator.draws else f"{HELP} This model has no vision head: it answers in text only.")
        converse(Session(generator, settings), lambda: generator.agree(_read_line), show, to)


def converse(session: "Session", read: Callable[[], str], show: Callable[[str], object], to: Path | None) -> None:
    """The conversation, until ``/quit`` or the end of the input.

    Args:
        read: the next line; called on every rank, gives all the same, ``/quit`` at the end.
        show: prints a line.
        to: folder for generated images.
    """
    from megatron_unimm.errors import UserError
    from megatron_unimm.generate.pictures import read_pictures

    attached: list[Path] = []
    turn = 0  # over all conversations, so that none writes over the pictures of the one before
    while (line := read().strip()) != "/quit":
        command, _, rest = line.partition(" ")
        try:
            if command == "/image":
                read_pictures([Path(rest)])  # complains now rather than with the next words
                attached.append(Path(rest))
            elif command == "/reset":
                session.reset()
                attached = []
            elif command.startswith("/"):
                show(HELP)
            elif line:
                turn += 1
                file = to / f"turn_{turn:03d}.png" if to is not None else None
                _answer(session, line, attached, show, file)
                attached = []
        except UserError as error:
            show(f"error: {error}")


def _answer(
    session: "Session", text: str, attached: list[Path], show: Callable[[str], object], file: Path | None
) -> None:
    """One turn; what it draws goes to ``file``, or to numbered ones beside it."""
    from megatron_unimm.generate.pictures import read_pictures, write_pictures, write_visual_tokens

    answer = session.say(text, read_pictures(attached))
    show("".join(part if isinstance(part, str) else f"[image {part + 1}]" for part in answer.parts))
    if answer.images and file is not None and session.generator.is_main:
        count = len(answer.images)
        if session.generator.paints:
            numbers = [len(session.turns) - 1] * count
            written = write_pictures(answer.images, file, [text] * count, numbers, session.settings, session.generator)
        else:
            written = [write_visual_tokens(answer.images, file.with_suffix(".safetensors"))]
        show(f"({', '.join(map(str, written))})")


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return "/quit"


def _silent(text: str) -> None:
    """On ranks that do not talk to the person."""
