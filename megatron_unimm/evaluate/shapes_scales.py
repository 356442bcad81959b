"""Whether the pictures of one prompt at a model's scales show the same (HieraQuery, section 3.2: "cross-scale
consistency"), judged on pixels of the Shapes world.

Each scale is drawn from noise of its own, so that nothing but the model makes them agree. Two measures, of a coarser
picture beside the finest one of the same prompt::

    agreement   correlation of their pixels, the finest made as small as the coarser one: 1 where they are the same
                picture, about 0 where they have nothing in common
    objects     share of prompts in which the scorer reads the same objects in both, by shape and colour

Beside them stand what they can and what they need not be: ``objects_scorer`` is ``objects`` of a true picture made
small; ``agreement/other_noise`` is that of two pictures of the finest scale, of one prompt and other noise, and
``agreement/other_prompt`` of two prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_unimm.data import images
from megatron_unimm.data.sample import Turn
from megatron_unimm.data.shapes import is_correct
from megatron_unimm.data.shapes.scorer import find_objects
from megatron_unimm.errors import UserError
from megatron_unimm.evaluate.shapes import PromptItem, ShapesSamples, by_kind, load_samples, request
from megatron_unimm.evaluate.suite import Suite, SuiteResult, gather, require_pixels, share
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.decode import GeneratedImage
from megatron_unimm.generate.sampling import DecodeSettings

NAME = "shapes_scales"
SHEET_PROMPTS = 8


@dataclass(frozen=True)
class Drawn:
    """The pictures of one prompt, uint8 (h, w, 3)."""

    scales: tuple[np.ndarray, ...]
    """Coarse to fine."""
    again: np.ndarray
    """At the finest scale, from other noise."""


def run(generator: Generator, samples: ShapesSamples) -> SuiteResult:
    """``agreement``, the mean over all coarser scales, first; scales go by their side in that of the finest.

    Raises:
        UserError: the model gives no pixels, or draws at one scale.
    """
    require_pixels(generator, NAME)
    if generator.num_scales == 1:
        what = f"draws every picture at one scale, but suite {NAME} compares scales; take a model that has several"
        raise UserError(generator.origin, what)
    drawn = draw(generator, samples.prompts)
    return SuiteResult(summarise(samples.prompts, drawn), {"prompts": len(drawn)}, sheet(samples.prompts, drawn))


def draw(generator: Generator, items: Sequence[PromptItem]) -> list[Drawn]:
    """Have every prompt drawn at all scales, and once more."""
    mine = share(generator, len(items))

    def pictures(first: int, all_scales: bool) -> list[GeneratedImage]:
        prompts = [
            generator.prompt([Turn("user", (request(items[i].prompt, i),))], open_image=True, number=first + i)
            for i in mine
        ]
        settings = DecodeSettings(stop_after_image=True, all_scales=all_scales)
        return [answer.images[0] for answer in generator.answer(prompts, settings)]

    results: dict[int, Drawn] = {}
    for i, picture, again in zip(mine, pictures(0, True), pictures(len(items), False), strict=True):
        assert picture.pixels is not None, "a generator that paints left an image without pixels"
        assert again.pixels is not None
        results[i] = Drawn((*picture.coarser, picture.pixels), again.pixels)
    return gather(generator, results)


# -- figures


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of the numbers of two pictures of one size, each around its own mean; 0 where one of them is all alike."""
    first, second = (picture.astype(np.float64).ravel() - picture.mean() for picture in (one, other))
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / lengths if lengths else 0.0


def agreement(coarse: np.ndarray, fine: np.ndarray) -> float:
    """The correlation of a picture with a finer one, made as small."""
    return correlation(coarse, images.resize(fine, coarse.shape[1], coarse.shape[0]))


def names(picture: np.ndarray) -> list[str]:
    """Shapes and colours that a picture shows."""
    return sorted(item.name for item in find_objects(picture).objects)


def summarise(items: Sequence[PromptItem], drawn: Sequence[Drawn]) -> dict[str, float]:
    """All scores."""
    coarser = range(len(drawn[0].scales) - 1)
    labels = [_label(picture, drawn[0].scales[-1]) for picture in drawn[0].scales]
    read = [names(each.scales[-1]) for each in drawn]
    agreements = [_mean([agreement(each.scales[k], each.scales[-1]) for each in drawn]) for k in coarser]
    same = [_mean([names(each.scales[k]) == own for each, own in zip(drawn, read, strict=True)]) for k in coarser]
    # What the scorer can read of true pictures at that size at best.
    best = [
        _mean([names(item.picture) == names(_like(item.picture, drawn[0].scales[k])) for item in items])
        for k in coarser
    ]
    finest = [each.scales[-1] for each in drawn]
    scores = {
        "agreement": _mean(agreements),
        **{f"agreement/{labels[k]}": agreements[k] for k in coarser},
        "agreement/other_noise": _mean([correlation(each.scales[-1], each.again) for each in drawn]),
        "agreement/other_prompt": _mean([correlation(*pair) for pair in zip(finest, _turned(finest), strict=True)]),
        "objects": _mean(same),
        **{f"objects/{labels[k]}": same[k] for k in coarser},
        **{f"objects_scorer/{labels[k]}": best[k] for k in coarser},
    }
    for k, label in enumerate(labels):
        right = [is_correct(item.prompt, each.scales[k]) for item, each in zip(items, drawn, strict=True)]
        scores[f"overall/{label}"] = by_kind([item.prompt for item in items], right).overall
    return scores


def _label(picture: np.ndarray, finest: np.ndarray) -> str:
    return f"{picture.shape[0] / finest.shape[0]:g}x"


def _like(picture: np.ndarray, size: np.ndarray) -> np.ndarray:
    return images.resize(picture, size.shape[1], size.shape[0])


def _turned(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each has its neighbour's place."""
    return [*pictures[1:], pictures[0]]


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    return float(np.mean(values))


def sheet(items: Sequence[PromptItem], drawn: Sequence[Drawn]) -> list[tuple[str, np.ndarray]]:
    """Prompts with their pictures, coarse to fine."""
    return [
        (f"{_label(picture, found.scales[-1])}\n{item.prompt.caption}", picture)
        for item, found in zip(items[:SHEET_PROMPTS], drawn[:SHEET_PROMPTS], strict=True)
        for picture in found.scales
    ]


SUITE = Suite(
    name=NAME,
    about="agreement of one prompt's pictures over a model's scales",
    num_samples=20,
    draws=True,
    needs_targets=False,
    needs_pixels=True,
    load=load_samples,
    run=run,
)
