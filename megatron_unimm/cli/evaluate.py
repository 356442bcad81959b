"""``unimm evaluate``: score a checkpoint."""

from pathlib import Path

import click

from megatron_unimm.cli.options import layout, model


@click.command(
    epilog="""\b
Examples:
  unimm evaluate --model runs/quickstart --suite shapes_qa --to qa.json
  unimm evaluate --model runs/quickstart/sft --suite shapes_retrieval --data data/shapes --to retrieval.json
  unimm evaluate --model DIR --suite geneval_images --data evaluation_metadata.jsonl --to geneval.json
  unimm evaluate --model DIR --suite geneval_images --data evaluation_metadata.jsonl --to geneval.json \\
      --detections boxes.json
\b
Suites:
  shapes            pictures, edits and answers in the Shapes world, judged on pixels
  shapes_sessions   two edits in a conversation, with and without its history, and choices among many pictures
  shapes_scales     agreement of one prompt's pictures over a model's scales
  shapes_qa         exact match of answers about held-out scenes
  shapes_retrieval  generated visual tokens of held-out captions against 64 pictures
  geneval_images    images for GenEval, and its scores from a detector's boxes
  reconstruction    pictures that a tokenizer draws again, and what its streams tell apart"""
)
@model
@click.option("--suite", required=True, metavar="NAME", help="What to score, see below.")
@click.option(
    "--to", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.json", help="Result to write."
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    metavar="PATH",
    help="Folder of `unimm data shapes --to` (default: the lists are made on the spot), or GenEval's metadata file.",
)
@click.option(
    "--num-samples",
    type=click.IntRange(min=1),
    help="Questions or captions; of shapes and shapes_scales, prompts of each kind; of geneval_images, images of each "
    "prompt.  [default: the suite's]",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Base model whose features are the truth.  [default: the base_checkpoint of the training]",
)
@click.option(
    "--decoder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Image decoder of suites that judge pixels: its checkpoint or stage.  [default: the one in the run's folder]",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of the images of geneval_images; those that are there are kept.  [default: --to without its suffix]",
)
@click.option(
    "--detections",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE.json",
    help="Boxes that a detector found in those images, to score them; no model is built.",
)
@layout
def evaluate(
    model_dir: Path,
    suite: str,
    to: Path,
    data: Path | None,
    num_samples: int | None,
    base: Path | None,
    decoder: Path | None,
    images: Path | None,
    detections: Path | None,
    tensor: int,
    pipeline: int,
    context: int,
) -> None:
    """Score a model and write the result as JSON."""
    import os

    from megatron_unimm.train.log import setup_logging

    setup_logging()  # before Megatron-Core is imported, which warns

    from megatron_unimm.evaluate import api

    report = api.evaluate(
        model_dir,
        suite,
        data,
        to,
        num_samples,
        base=base,
        decoder=decoder,
        images=images,
        detections=detections,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
    )
    if os.environ.get("RANK", "0") == "0":
        for name, score in report["scores"].items():
            click.echo(f"{score:8.4f}  {name}")
        click.echo(f"{to}: {report['checkpoint']}, {report['seconds']:.1f} s")
