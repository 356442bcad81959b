"""Scoring a checkpoint."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.errors import UserError
from megatron_unimm.evaluate.suite import SHEET_COLUMNS, Suite, SuiteFiles, SuiteResult
from megatron_unimm.evaluate.suites import suite_of
from megatron_unimm.generate.api import find_language_model
from megatron_unimm.generate.load import load_generator
from megatron_unimm.generate.picture_tokenizer import PictureTokenizer
from megatron_unimm.generate.png import picture_grid, write_png


def evaluate(
    model_dir: Path,
    suite: str,
    data: Path | None = None,
    to: Path | None = None,
    num_samples: int | None = None,
    *,
    base: Path | None = None,
    decoder: Path | None = None,
    images: Path | None = None,
    detections: Path | None = None,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
) -> dict[str, Any]:
    """Score a checkpoint with a suite; called on every rank that torchrun or srun started (one without them).

    Args:
        model_dir: as ``load_generator``.
        suite: a name of ``evaluate/suites.py``.
        data: folder with the suite's files (``unimm data shapes``), or its file; None has them made.
        to: JSON file for the result, written by rank 0, with pictures beside it (``.png``) where the suite gives some.
        num_samples: None takes the suite's own number.
        base: the base model's checkpoint, for suites that compare with its features; None takes the training's.
        decoder: an image decoder's checkpoint or stage; None takes the one in the run's folder, if it has one.
        images: folder of the images that a suite writes; None takes ``to`` without its suffix.
        detections: boxes that a detector found in those images: they are scored, and no model is built.

    Returns:
        suite, checkpoint, stage, step, scores, counts, seconds: what the file holds.

    Raises:
        UserError: no such suite, file or checkpoint, or a model that cannot do what the suite asks.
    """
    chosen = suite_of(suite, "suite")
    if (images is not None or detections is not None) and chosen.with_files is None:
        raise UserError("suite", f"{chosen.name} writes no images to score; leave --images and --detections out")
    samples = chosen.load(data, num_samples or chosen.num_samples)
    if chosen.with_files is not None:
        samples = chosen.with_files(samples, _files(to, images, detections))
    if detections is not None:
        assert chosen.score_files is not None, f"suite {chosen.name} writes images that it cannot score"
        started = time.perf_counter()
        report = _report(chosen, find_language_model(model_dir), chosen.score_files(samples), started)
        if to is not None:
            _write(report, (), to)
        return report
    if chosen.of_tokenizers:
        return _evaluate_tokenizer(chosen, samples, model_dir, to, tensor, base)
    with load_generator(
        model_dir,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        with_targets=chosen.needs_targets,
        base=base,
        decoder=decoder,
    ) as generator:
        if chosen.draws and not generator.draws:
            raise UserError(
                generator.origin,
                f"is a model without a vision head, but suite {chosen.name} asks for images; take a trained checkpoint",
            )
        started = time.perf_counter()
        result = chosen.run(generator, samples)
        report = _report(chosen, Path(generator.origin), result, started)
        if to is not None and generator.is_main:
            _write(report, result.pictures, to)
    return report


def _evaluate_tokenizer(
    suite: Suite, samples: Any, model_dir: Path, to: Path | None, tensor: int, base: Path | None
) -> dict[str, Any]:
    with PictureTokenizer.open(model_dir, tensor, base) as tokenizer:
        started = time.perf_counter()
        result = suite.run(tokenizer, samples)
        report = _report(suite, Path(tokenizer.origin), result, started)
        if to is not None and tokenizer.is_main:
            _write(report, result.pictures, to)
    return report


def _files(to: Path | None, images: Path | None, detections: Path | None) -> SuiteFiles:
    """The images' folder and the rows' file, named after the result unless given."""
    if to is None:
        raise UserError("to", "the suite writes images and rows beside its result; give a file for it")
    return SuiteFiles(images or to.with_suffix(""), to.with_suffix(".jsonl"), detections)


def _report(suite: Suite, checkpoint: Path, result: SuiteResult, started: float) -> dict[str, Any]:
    meta = read_meta(checkpoint)
    return {
        "suite": suite.name,
        "checkpoint": str(checkpoint),
        "stage": meta.get("stage"),
        "step": meta.get("step"),
        "scores": result.scores,
        "counts": result.counts,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _write(report: dict[str, Any], pictures: Sequence[tuple[str, np.ndarray]], to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(report, indent=2) + "\n")
    if pictures:
        captions = [caption for caption, _ in pictures]
        sheet = picture_grid([picture for _, picture in pictures], captions, SHEET_COLUMNS)
        settings = {name: report[name] for name in ("suite", "checkpoint", "step") if report[name] is not None}
        write_png(to.with_suffix(".png"), sheet, settings)
