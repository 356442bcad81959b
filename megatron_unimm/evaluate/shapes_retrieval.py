"""Whether the visual tokens that a model generates for a held-out caption are those of the right picture.

For each caption the generated sequence is compared with the frozen vision encoder's features of 64 pictures, one of
which is the caption's; the nearest one is the model's answer. Chance is 1 / 64.

Legend  M captions, C = 64 candidates, F = V H numbers of a flattened sequence of visual tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.images import decode
from megatron_unimm.data.sample import Turn
from megatron_unimm.data.shapes import render_array, retrieval_pairs
from megatron_unimm.data.shapes.text import PROMPT_TEMPLATES
from megatron_unimm.errors import DataError
from megatron_unimm.evaluate.shapes_qa import MAX_IMAGE_PIXELS
from megatron_unimm.evaluate.suite import Suite, SuiteResult, gather, list_file, share
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.sampling import DecodeSettings

NUM_CANDIDATES = 64
"""Any 64 neighbours of the list show different scenes (data/shapes/eval_sets.py)."""
TEMPLATES = tuple(template for style in PROMPT_TEMPLATES.values() for template in style)


@dataclass(frozen=True)
class CaptionItem:
    """A caption and the picture that it fixes."""

    caption: str
    picture: np.ndarray
    """uint8 (H, W, 3)."""


@dataclass(frozen=True)
class Comparison:
    """One generated sequence beside its candidates."""

    nearest: bool
    """The true picture is the nearest by squared distance."""
    most_similar: bool
    """The true picture is the most similar by cosine, the mean of the candidates taken away first."""
    squared_error: float
    """Mean over the F numbers, to the true picture."""
    squared_error_of_mean: float
    """The same for the mean of the candidates: what a model that ignores the caption can reach."""


def load_pairs(data: Path | None, count: int) -> list[CaptionItem]:
    """The first ``count`` (at least 64) pairs of ``retrieval.jsonl``, or as many made on the spot (the same list).

    Raises:
        DataError: no such file, or fewer than 64 pairs in it.
    """
    count = max(count, NUM_CANDIDATES)
    if data is None:
        return [CaptionItem(pair.prompt.caption, render_array(pair.scene)) for pair in retrieval_pairs(count)]
    path = list_file(data, "retrieval.jsonl")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    if len(records) < NUM_CANDIDATES:
        raise DataError(str(path), f"has {len(records)} pairs, a caption needs {NUM_CANDIDATES} candidate pictures")
    return [
        CaptionItem(record["caption"], decode(DiskImage(path.parent / record["image"]), MAX_IMAGE_PIXELS))
        for record in records
    ]


def run(generator: Generator, pairs: Sequence[CaptionItem]) -> SuiteResult:
    """Accuracy by distance (the main figure) and by centred cosine, and the squared error."""
    candidates = torch.stack(generator.target_features([pair.picture for pair in pairs])).flatten(1).float()  # [M, F]
    mine = share(generator, len(pairs))
    prompts = [
        generator.prompt(
            [Turn("user", (TEMPLATES[i % len(TEMPLATES)].format(pairs[i].caption),))], open_image=True, number=i
        )
        for i in mine
    ]
    answers = generator.answer(prompts, DecodeSettings(stop_after_image=True, pixels=False))
    generated = [answer.images[0].visual_tokens.flatten().float() for answer in answers]
    return summarise(
        gather(generator, {i: compare(vector, candidates, i) for i, vector in zip(mine, generated, strict=True)})
    )


def compare(generated: Tensor, features: Tensor, index: int) -> Comparison:
    """A generated sequence ``[F]`` for caption ``index`` beside the features ``[M, F]`` of its 64 candidates."""
    first = window_start(index, len(features))
    candidates, truth = features[first : first + NUM_CANDIDATES], index - first
    errors = (candidates - generated).square().mean(dim=1)  # [C]
    mean = candidates.mean(dim=0)
    similarity = torch.nn.functional.cosine_similarity(candidates - mean, (generated - mean)[None])  # [C]
    return Comparison(
        nearest=int(errors.argmin()) == truth,
        most_similar=int(similarity.argmax()) == truth,
        squared_error=float(errors[truth]),
        squared_error_of_mean=float((candidates[truth] - mean).square().mean()),
    )


def window_start(index: int, count: int) -> int:
    """The first of the 64 neighbours that are a caption's candidates: blocks of 64, the last one moved back to be
    whole."""
    return min(index // NUM_CANDIDATES * NUM_CANDIDATES, count - NUM_CANDIDATES)


def summarise(comparisons: Sequence[Comparison]) -> SuiteResult:
    """Means over the captions."""
    return SuiteResult(
        scores={
            "accuracy": float(np.mean([c.nearest for c in comparisons])),
            "accuracy_cosine": float(np.mean([c.most_similar for c in comparisons])),
            "squared_error": float(np.mean([c.squared_error for c in comparisons])),
            "squared_error_of_mean": float(np.mean([c.squared_error_of_mean for c in comparisons])),
        },
        counts={"captions": len(comparisons), "candidates": NUM_CANDIDATES},
    )


SUITE = Suite(
    name="shapes_retrieval",
    about="generated visual tokens of held-out captions against 64 pictures",
    num_samples=64,
    draws=True,
    needs_targets=True,
    load=load_pairs,
    run=run,
)
