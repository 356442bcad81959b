"""``unimm generate``: one answer, text or image, to a prompt with images."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_unimm.cli.options import decoding, layout, model, painting, sampler_of

if TYPE_CHECKING:
    from megatron_unimm.generate.api import Generator
    from megatron_unimm.generate.decode import Answer
    from megatron_unimm.generate.sampling import DecodeSettings

PICTURE, TOKENS = ".png", ".safetensors"


@click.command(
    epilog="""\b
Examples:
  unimm generate --model runs/quickstart --prompt "a red circle left of a blue square" --to out.png
  unimm generate --model runs/quickstart --prompt "Make the circle green." --image scene.png --to edited.png
  unimm generate --model runs/quickstart --prompt "two blue squares" --count 4 --steps 30 --to grid.png
  unimm generate --model runs/hieraquery --prompt "a red circle" --all-scales --to out.png
  unimm generate --model runs/quickstart --prompt "How many circles are there?" --image scene.png
  torchrun --nproc-per-node 2 -m megatron_unimm.cli generate --model DIR --tensor 2 --prompt "Who are you?"
  torchrun --nproc-per-node 2 -m megatron_unimm.cli generate --model DIR --context 2 --image 1.png --image 2.png … \\
      --prompt "Put them all into one picture." --to out.png"""
)
@model
@click.option("--prompt", "prompts", required=True, multiple=True, help="What to say; several are answered in a batch.")
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
    help="FILE.png has the model draw, FILE.safetensors keeps the visual tokens of what it draws, FILE.txt leaves it "
    "to the model what to answer. Without it text goes to the terminal.",
)
@click.option(
    "--count",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Pictures per prompt, with seeds that count up; several stand in FILE.png as a grid, and each in "
    "FILE_000.png and so on.",
)
@click.option(
    "--all-scales",
    is_flag=True,
    help="Of a model that draws at several scales, also the coarser pictures, in FILE_16x16.png and so on.",
)
@decoding
@painting
@layout
def generate(
    model_dir: Path,
    prompts: tuple[str, ...],
    image_files: tuple[Path, ...],
    to: Path | None,
    count: int,
    all_scales: bool,
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
    """Answer a prompt, with text or with an image."""
    from megatron_unimm.train.log import setup_logging

    setup_logging()  # before Megatron-Core is imported, which warns

    from megatron_unimm.errors import UserError
    from megatron_unimm.generate.load import load_generator
    from megatron_unimm.generate.pictures import read_pictures
    from megatron_unimm.generate.sampling import DecodeSettings

    settings = DecodeSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    pictures = read_pictures(image_files)
    with load_generator(
        model_dir, tensor=tensor, pipeline=pipeline, context=context, decoder=decoder, base=base
    ) as generator:
        suffix = "" if to is None else to.suffix.lower()
        if all_scales and generator.num_scales == 1:
            raise UserError("--all-scales", f"{generator.origin} draws every picture at one scale; leave it out")
        settings = replace(settings, all_scales=all_scales)
        if generator.sampler is not None:
            settings = replace(settings, sampler=sampler_of(generator.sampler, **drawing))
        elif suffix == PICTURE and generator.draws:
            raise UserError(generator.origin, f"has no image decoder beside it to make {to}; give one with --decoder")
        answers = _answers(generator, prompts, pictures, settings, count, open_image=suffix in (PICTURE, TOKENS))
        if generator.is_main:
            _write(
                answers, [(prompt, number) for prompt in prompts for number in range(count)], to, settings, generator
            )


def _answers(
    generator: "Generator",
    prompts: tuple[str, ...],
    pictures: list,
    settings: "DecodeSettings",
    count: int,
    open_image: bool,
) -> list["Answer"]:
    """Of each prompt, ``count`` answers one behind the other."""
    from megatron_unimm.data.sample import Turn

    asked = [
        generator.prompt(
            [Turn("user", (*range(len(pictures)), prompt))], pictures, open_image=open_image, number=number
        )
        for prompt in prompts
        for number in range(count)
    ]
    return generator.answer(asked, settings)


def _write(
    answers: list["Answer"],
    asked: list[tuple[str, int]],
    to: Path | None,
    settings: "DecodeSettings",
    generator: "Generator",
) -> None:
    """Text to the terminal or a file, images to files. ``asked``: prompt and number of each answer."""
    from megatron_unimm.generate.pictures import write_pictures, write_visual_tokens

    text = "\n".join(answer.text for answer in answers if answer.text)
    images = [image for answer in answers for image in answer.images]
    if to is None or to.suffix.lower() in (PICTURE, TOKENS):
        click.echo(text, nl=bool(text))
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text + "\n", encoding="utf-8")
    if not all(answer.complete for answer in answers):
        click.echo("(cut at --max-new-tokens)", err=True)
    if images and to is None:
        click.echo(f"({len(images)} generated images not kept; give --to FILE.png)", err=True)
    elif images and to is not None and (to.suffix.lower() == TOKENS or not generator.paints):
        click.echo(f"{write_visual_tokens(images, to.with_suffix(TOKENS))}: visual tokens", err=True)
    elif images and to is not None:
        drawn = [each for each, answer in zip(asked, answers, strict=True) for _ in answer.images]
        captions, numbers = [prompt for prompt, _ in drawn], [number for _, number in drawn]
        for file in write_pictures(images, to.with_suffix(PICTURE), captions, numbers, settings, generator):
            click.echo(str(file), err=True)
