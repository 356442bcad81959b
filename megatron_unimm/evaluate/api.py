"""Scoring a checkpoint."""

import json
import time
from pathlib import Path
from typing import Any

from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.errors import UserError
from megatron_unimm.evaluate.suites import suite_of
from megatron_unimm.generate.api import Generator


def evaluate(
    model_dir: Path,
    suite: str,
    data: Path | None = None,
    to: Path | None = None,
    num_samples: int | None = None,
    *,
    base: Path | None = None,
    tensor: int = 1,
    pipeline: int = 1,
) -> dict[str, Any]:
    """Score a checkpoint with a suite; called on every rank that torchrun or srun started (one without them).

    Args:
        model_dir: as ``Generator.load``.
        suite: a name of ``evaluate/suites.py``.
        data: folder with the suite's files (``unimm data shapes``); None has them made.
        to: JSON file for the result, written by rank 0.
        num_samples: None takes the suite's own number.
        base: the base model's checkpoint, for suites that compare with its features; None takes the training's.

    Returns:
        suite, checkpoint, step, scores, counts, seconds: what the file holds.

    Raises:
        UserError: no such suite, file or checkpoint, or a model that cannot do what the suite asks.
    """
    chosen = suite_of(suite, "suite")
    samples = chosen.load(data, num_samples or chosen.num_samples)
    with Generator.load(
        model_dir, tensor=tensor, pipeline=pipeline, with_targets=chosen.needs_targets, base=base
    ) as generator:
        if chosen.draws and not generator.draws:
            raise UserError(
                generator.origin,
                f"is a model without a vision head, but suite {suite} asks for images; take a trained checkpoint",
            )
        started = time.perf_counter()
        result = chosen.run(generator, samples)
        meta = read_meta(Path(generator.origin))
        report = {
            "suite": suite,
            "checkpoint": generator.origin,
            "stage": meta.get("stage"),
            "step": meta.get("step"),
            "scores": result.scores,
            "counts": result.counts,
            "seconds": round(time.perf_counter() - started, 3),
        }
        if to is not None and generator.is_main:
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(json.dumps(report, indent=2) + "\n")
    return report
