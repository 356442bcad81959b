"""Held-out pictures, questions and edits of the Shapes world, judged on pixels.

``overall`` is the mean of GenEval's six kinds of prompts. Beside it stands what the parts after the language model can
reach on the true pictures of the same prompts, which tells where a loss comes from::

    overall_scorer   true picture                                               -> scorer       must be 1
    overall_vae      true picture -> VAE -> picture                             -> scorer
    overall_decoder  true picture -> vision encoder -> diffusion decoder, VAE   -> scorer
    overall          prompt -> language model, vision head -> decoder, VAE      -> scorer

Of a model whose queries nothing but drawing teaches (HieraQuery) there is nothing true for the decoder to draw from,
and no score of that.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_unimm.data import images
from megatron_unimm.data.sample import Turn
from megatron_unimm.data.shapes import (
    PROMPT_KINDS,
    QUESTION_TYPES,
    Prompt,
    Score,
    geneval_prompts,
    is_correct,
    prompt_from_dict,
    prompt_scene,
    render_array,
)
from megatron_unimm.data.shapes.conversations import generator as numbers_of
from megatron_unimm.data.shapes.edits import EDIT_TYPES
from megatron_unimm.evaluate import shapes_qa
from megatron_unimm.evaluate.shapes_edits import EditItem, EditVerdict, heldout_edits, judge_edit
from megatron_unimm.evaluate.shapes_qa import QuestionItem
from megatron_unimm.evaluate.shapes_retrieval import TEMPLATES
from megatron_unimm.evaluate.suite import (
    SHEET_COLUMNS,
    Suite,
    SuiteResult,
    gather,
    list_file,
    require_pixels,
    share,
)
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.decode import Prompt as ModelPrompt
from megatron_unimm.generate.sampling import DecodeSettings

NAME = "shapes"
_TRUTH = 15
"""Stream of random numbers of the true pictures' jitter, beside those of data/shapes/eval_sets.py."""
ROUNDING_ERROR = 1 / 12
"""Mean squared error of rounding to whole grey levels: below it, at 58.9 dB, nothing is measured."""
SHEET_DRAWN, SHEET_EDITS = 4 * SHEET_COLUMNS, 2 * SHEET_COLUMNS
"""Generated and edited pictures on the sheet."""


@dataclass(frozen=True)
class PromptItem:
    """A prompt, and a picture that it asks for."""

    prompt: Prompt
    picture: np.ndarray
    """uint8 (H, H, 3)."""


@dataclass(frozen=True)
class EditPictures:
    """An edit with the picture that it starts from."""

    item: EditItem
    source: np.ndarray
    """uint8 (H, H, 3)."""


@dataclass(frozen=True)
class ShapesSamples:
    """What the model is asked; kinds and types take turns in each list."""

    prompts: list[PromptItem]
    questions: list[QuestionItem]
    edits: list[EditPictures]


@dataclass(frozen=True)
class Drawn:
    """What became of one prompt."""

    right: bool
    decoder_right: bool | None
    """None where nothing is drawn from true visual tokens; so is the next but two."""
    vae_right: bool
    scorer_right: bool
    squared_error: float | None
    """Of the decoder's picture from the true visual tokens, mean over its numbers, in squared grey levels."""
    pictures: tuple[np.ndarray, ...] = ()
    """For the sheet: generated, by the VAE, and by the decoder where it draws any; empty for most prompts, they would
    travel for nothing."""


@dataclass(frozen=True)
class Edited:
    """What became of one edit."""

    verdict: EditVerdict
    picture: np.ndarray | None
    """For the sheet, as above."""


def load_samples(data: Path | None, count: int) -> ShapesSamples:
    """``count`` prompts of each of six kinds, questions of each of six types, edits of each of five types.

    Prompts and questions come from ``prompts.jsonl`` and ``questions.jsonl``, or are made on the spot (the same lists).
    Edits and the true pictures of prompts are made in either case, at the size of the questions' pictures.

    Raises:
        DataError: no such files.
    """
    num_prompts = count * len(PROMPT_KINDS)
    questions = shapes_qa.load_questions(data, count * len(QUESTION_TYPES))
    if data is None:
        prompts = geneval_prompts(num_prompts)
    else:
        lines = list_file(data, "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:num_prompts]
        prompts = [prompt_from_dict(json.loads(line)) for line in lines]
    canvas = questions[0].picture.shape[0]
    return ShapesSamples(
        prompts=[
            PromptItem(prompt, render_array(prompt_scene(prompt, numbers_of(0, index, _TRUTH)), canvas))
            for index, prompt in enumerate(prompts)
        ],
        questions=questions,
        edits=[
            EditPictures(item, render_array(item.source, canvas)) for item in heldout_edits(count * len(EDIT_TYPES))
        ],
    )


def run(generator: Generator, samples: ShapesSamples) -> SuiteResult:
    """All scores, ``overall`` first.

    Raises:
        UserError: the model gives no pixels.
    """
    require_pixels(generator, NAME)
    drawn, edited = draw(generator, samples.prompts), edit(generator, samples.edits)
    answered = shapes_qa.run(generator, samples.questions)
    scores, counts = summarise(samples, drawn, edited)
    for name, score in answered.scores.items():
        scores[name.replace("accuracy", "understanding")] = score
    return SuiteResult(scores, counts | answered.counts, sheet(samples, drawn, edited))


def draw(generator: Generator, items: Sequence[PromptItem]) -> list[Drawn]:
    """Have every prompt drawn, and its true picture drawn again by the decoder and by the VAE alone."""
    mine = share(generator, len(items))
    prompts = [
        generator.prompt([Turn("user", (request(items[i].prompt, i),))], open_image=True, number=i) for i in mine
    ]
    generated = _pixels(generator, prompts)
    truth = [items[i].picture for i in mine]
    round_trips = _again(generator.vae_round_trip, truth)
    decoded = _again(generator.reconstruct, truth) if generator.reconstructs else [None] * len(truth)
    results: dict[int, Drawn] = {}
    for i, ours, by_decoder, by_vae in zip(mine, generated, decoded, round_trips, strict=True):
        prompt, true = items[i].prompt, items[i].picture
        results[i] = Drawn(
            right=is_correct(prompt, ours),
            decoder_right=None if by_decoder is None else is_correct(prompt, by_decoder),
            vae_right=is_correct(prompt, by_vae),
            scorer_right=is_correct(prompt, true),
            squared_error=None if by_decoder is None else squared_error(by_decoder, true),
            pictures=(ours, by_vae, *([] if by_decoder is None else [by_decoder])) if i < SHEET_DRAWN else (),
        )
    return gather(generator, results)


def edit(generator: Generator, items: Sequence[EditPictures]) -> list[Edited]:
    """Have every edit done."""
    mine = share(generator, len(items))
    prompts = [
        generator.prompt(
            [Turn("user", (0, items[i].item.edit.instruction))], [items[i].source], open_image=True, number=i
        )
        for i in mine
    ]
    pictures = _pixels(generator, prompts)
    return gather(
        generator,
        {
            i: Edited(judge_edit(items[i].item, picture), picture if i < SHEET_EDITS else None)
            for i, picture in zip(mine, pictures, strict=True)
        },
    )


def request(prompt: Prompt, index: int) -> str:
    """Asks for a prompt's picture; every kind, of which each sixth prompt is one, gets all templates in turn."""
    return TEMPLATES[index // len(PROMPT_KINDS) % len(TEMPLATES)].format(prompt.caption)


def _pixels(generator: Generator, prompts: Sequence[ModelPrompt]) -> list[np.ndarray]:
    """The image that each answer begins with."""
    found = []
    for answer in generator.answer(prompts, DecodeSettings(stop_after_image=True)):
        pixels = answer.images[0].pixels
        assert pixels is not None, "a generator that paints left an image without pixels"
        found.append(pixels)
    return found


def _again(make: Callable[[Sequence[np.ndarray]], list[np.ndarray]], pictures: list[np.ndarray]) -> list[np.ndarray]:
    """A replica may have no picture at all where there are more replicas than pictures."""
    return make(pictures) if pictures else []


# -- figures -----------------------------------------------------------------------------------------------------------


def squared_error(picture: np.ndarray, truth: np.ndarray) -> float:
    """Mean over all numbers, uint8 (H, W, 3) both; the truth is brought to the size that the decoder makes."""
    height, width = picture.shape[:2]
    difference = picture.astype(np.float64) - images.resize(truth, width, height)
    return float(np.square(difference).mean())


def decibels(squared_errors: Sequence[float]) -> float:
    """Peak signal to noise ratio of pictures of equal size together, in dB."""
    return float(10 * np.log10(255**2 / max(float(np.mean(squared_errors)), ROUNDING_ERROR)))


def by_kind(prompts: Sequence[Prompt], right: Sequence[bool]) -> Score:
    """Share of right pictures by kind of prompt."""
    hits = {kind: [hit for p, hit in zip(prompts, right, strict=True) if p.kind == kind] for kind in PROMPT_KINDS}
    hits = {kind: found for kind, found in hits.items() if found}
    return Score({k: sum(h) / len(h) for k, h in hits.items()}, {k: len(h) for k, h in hits.items()})


def summarise(
    samples: ShapesSamples, drawn: Sequence[Drawn], edited: Sequence[Edited]
) -> tuple[dict[str, float], dict[str, int]]:
    """Scores and counts of pictures and edits."""
    prompts = [item.prompt for item in samples.prompts]
    ours = by_kind(prompts, [d.right for d in drawn])
    by_decoder = [d.decoder_right for d in drawn if d.decoder_right is not None]
    errors = [d.squared_error for d in drawn if d.squared_error is not None]
    verdicts = [e.verdict for e in edited]
    whole = [v.succeeded and v.untouched for v in verdicts]
    scores = {
        "overall": ours.overall,
        **ours.by_kind,
        **({"overall_decoder": by_kind(prompts, by_decoder).overall} if by_decoder else {}),
        "overall_vae": by_kind(prompts, [d.vae_right for d in drawn]).overall,
        "overall_scorer": by_kind(prompts, [d.scorer_right for d in drawn]).overall,
        **({"reconstruction_psnr": decibels(errors)} if errors else {}),
        "editing": float(np.mean(whole)),
        "editing/success": float(np.mean([v.succeeded for v in verdicts])),
        "editing/untouched": float(np.mean([v.untouched for v in verdicts])),
    }
    counts = {"prompts": len(prompts), **{f"prompts/{kind}": n for kind, n in ours.counts.items()}}
    counts["edits"] = len(edited)
    for type_ in EDIT_TYPES:
        of_type = [hit for hit, edit in zip(whole, samples.edits, strict=True) if edit.item.edit.type == type_]
        scores[f"editing/{type_}"], counts[f"edits/{type_}"] = float(np.mean(of_type)), len(of_type)
    return scores, counts


# -- pictures ----------------------------------------------------------------------------------------------------------


def sheet(samples: ShapesSamples, drawn: Sequence[Drawn], edited: Sequence[Edited]) -> list[tuple[str, np.ndarray]]:
    """A row each of true pictures, VAE round trips and, where there are any, the decoder's, rows of generated ones, and
    of edits in pairs."""
    shown = list(zip(samples.prompts, drawn, strict=True))
    first = shown[:SHEET_COLUMNS]
    cells = [(f"true picture\n{item.prompt.caption}", item.picture) for item, _ in first]
    cells += [(f"VAE alone: {_word(found.vae_right)}", found.pictures[1]) for _, found in first]
    cells += [
        (f"decoder on true tokens: {_word(bool(found.decoder_right))}", found.pictures[2])
        for _, found in first
        if found.decoder_right is not None
    ]
    cells += [
        (f"{item.prompt.kind}: {_word(found.right)}\n{item.prompt.caption}", found.pictures[0])
        for item, found in shown[:SHEET_DRAWN]
    ]
    for pair, found in zip(samples.edits, edited, strict=True):
        if found.picture is not None:
            verdict = found.verdict
            result = f"{_word(verdict.succeeded)}, the rest {'untouched' if verdict.untouched else 'changed'}"
            cells += [(f"{pair.item.edit.type}\n{pair.item.edit.instruction}", pair.source), (result, found.picture)]
    return cells


def _word(right: bool) -> str:
    return "correct" if right else "wrong"


SUITE = Suite(
    name=NAME,
    about="pictures, edits and answers in the Shapes world, judged on pixels",
    num_samples=20,
    draws=True,
    needs_targets=True,
    needs_pixels=True,
    load=load_samples,
    run=run,
)
