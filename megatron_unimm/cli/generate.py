"""``unimm generate``: one answer, text or image, to a prompt with images."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megatron_unimm.cli.options import decoding, layout, model

if TYPE_CHECKING:
    from megatron_unimm.generate.decode import Answer

IMAGE_SUFFIXES = (".safetensors", ".png", ".jpg", ".jpeg", ".webp")


@click.command(
    epilog="""\b
Examples:
  unimm generate --model runs/quickstart --prompt "Draw a red circle." --to circle.safetensors
  unimm generate --model runs/quickstart --prompt "How many circles are there?" --image scene.png
  torchrun --nproc-per-node 2 -m megatron_unimm.cli generate --model DIR --tensor 2 --prompt "Who are you?\""""
)
@model
@click.option("--prompt", required=True, help="What to say to the model.")
@click.option(
    "--image",
    "image_files",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="An image that stands before the prompt; may be given several times.",
)
@click.option(
    "--to",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="FILE.safetensors (or an image's name) has the model begin with an image; FILE.txt leaves it to the model. "
    "Without it text goes to the terminal.",
)
@decoding
@layout
def generate(
    model_dir: Path,
    prompt: str,
    image_files: tuple[Path, ...],
    to: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    tensor: int,
    pipeline: int,
) -> None:
    """Answer a prompt, with text or with an image."""
    from megatron_unimm.train.log import setup_logging

    setup_logging()  # before Megatron-Core is imported, which warns

    from megatron_unimm.data.sample import Turn
    from megatron_unimm.generate.api import Generator
    from megatron_unimm.generate.pictures import read_pictures
    from megatron_unimm.generate.sampling import DecodeSettings

    settings = DecodeSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    pictures = read_pictures(image_files)
    turn = Turn("user", (*range(len(pictures)), prompt))
    with Generator.load(model_dir, tensor=tensor, pipeline=pipeline) as generator:
        open_image = to is not None and to.suffix.lower() in IMAGE_SUFFIXES
        asked = generator.prompt([turn], pictures, open_image=open_image)
        answer = generator.answer([asked], settings)[0]
        if generator.is_main:
            _write(answer, to)


def _write(answer: "Answer", to: Path | None) -> None:
    from megatron_unimm.generate.pictures import write_visual_tokens

    if to is None or to.suffix.lower() in IMAGE_SUFFIXES:
        click.echo(answer.text)
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(answer.text + "\n", encoding="utf-8")
    if not answer.complete:
        click.echo("(cut at --max-new-tokens)", err=True)
    if answer.images and to is None:
        number = len(answer.images)
        click.echo(f"({number} generated images not kept; give --to FILE.safetensors)", err=True)
    elif answer.images and to is not None:
        file = write_visual_tokens(answer.images, to.with_suffix(".safetensors"))
        click.echo(f"{file}: visual tokens; this version has no diffusion decoder to make pixels of them", err=True)
