"""Held-out conversations of two edits in the Shapes world, with and without what was said and shown before, judged on
pixels; and choices among many given pictures.

Each conversation is led twice from the same first drawing, which tells what the model gains by its history (MMCORE,
arXiv 2604.19902, section 3.2: a frame is conditioned on all preceding images)::

    first              given picture, instruction 1                                    -> drawing 1
    with_history       given picture, instruction 1, drawing 1, instruction 2          -> drawing 2
    without_history                                  drawing 1 (pixels), instruction 2 -> drawing 2

Instruction 2 is in turn one that needs the newest picture only (``plain``) and one that needs the given picture or
instruction 1 as well (``history``; data/shapes/history.py). Of each drawing 2 stand here

    with_history           it shows exactly the scene that both instructions fix, and not what drawing 1 shows: who
                           leaves the given picture as it is twice has not undone anything
    with_history/change    only what instruction 2 asks for was done to what drawing 1 shows, be that right or wrong;
                           over the conversations whose drawing 1 allows it (counts: ``change``), 0 if there are none
    with_history/copied    it shows the same as drawing 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_unimm.data.sample import Turn
from megatron_unimm.data.shapes import (
    CANVAS,
    HISTORY_TYPES,
    Scene,
    find_objects,
    render_array,
    scene_is_held_out,
    shows_scene,
)
from megatron_unimm.data.shapes.conversations import free_scene
from megatron_unimm.data.shapes.conversations import generator as numbers_of
from megatron_unimm.data.shapes.edits import (
    EDIT_TYPES,
    MAX_GIVEN,
    MIN_GIVEN,
    Composition,
    Edit,
    make_edit,
    sample_choice,
)
from megatron_unimm.data.shapes.history import FROM_EARLIER, UNDOES, make_history_edit
from megatron_unimm.data.shapes.scene import pick
from megatron_unimm.evaluate import shapes_qa
from megatron_unimm.evaluate.shapes_edits import EditItem, EditVerdict, copies, edit_of, judge_edit
from megatron_unimm.evaluate.suite import SHEET_COLUMNS, Suite, SuiteResult, gather, require_pixels, share
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.decode import GeneratedImage, Prompt
from megatron_unimm.generate.sampling import DecodeSettings

NAME = "shapes_sessions"
_SESSIONS, _CHOICES = 16, 17
"""Streams of random numbers, beside those of evaluate/shapes.py and shapes_edits.py."""
SECOND_TYPES = tuple(kind for pair in zip(EDIT_TYPES, HISTORY_TYPES, strict=True) for kind in pair)
"""What the second instructions are, in turn."""
NUMBERS_GIVEN = tuple(range(MIN_GIVEN, MAX_GIVEN + 1))
"""How many pictures a choice is made from, in turn."""
GIVEN_GROUPS = {"up_to_6": range(MIN_GIVEN, 7), "7_to_10": range(7, 11), "over_10": range(11, MAX_GIVEN + 1)}
WAYS = ("with_history", "without_history")
SHEET_SESSIONS = len(SECOND_TYPES)
"""Conversations on the sheet, a row each."""


@dataclass(frozen=True)
class SessionItem:
    """A given picture and two instructions."""

    source: Scene
    first: Edit
    second: Edit

    @property
    def steps(self) -> tuple[EditItem, EditItem]:
        """Each edit with the scene that it starts from."""
        return EditItem(self.source, self.first), EditItem(self.first.result, self.second)

    @property
    def group(self) -> str:
        """``plain`` or ``history``."""
        return "history" if self.second.type in HISTORY_TYPES else "plain"


@dataclass(frozen=True)
class SessionSamples:
    """What the model is asked."""

    sessions: list[SessionItem]
    choices: list[Composition]
    canvas: int
    """Side of the given pictures, in pixels."""


@dataclass(frozen=True)
class Second:
    """What became of a second instruction."""

    right: bool
    """The drawing shows exactly the scene that both instructions fix, and is no copy of the first drawing."""
    change: bool | None
    """Only what was asked for was done to what the first drawing shows; None where that cannot be done to it."""
    copied: bool
    """The drawing shows what the first one shows."""


@dataclass(frozen=True)
class Led:
    """What became of one conversation."""

    first: EditVerdict
    first_copied: bool
    seconds: tuple[Second, ...]
    """As WAYS."""
    pictures: tuple[np.ndarray, ...] = ()
    """For the sheet: the first drawing, then as WAYS; empty for most, they would travel for nothing."""


@dataclass(frozen=True)
class Chosen:
    """What became of one choice among given pictures."""

    right: bool
    copied: bool
    """The drawing shows one of the given pictures."""


# -- samples -----------------------------------------------------------------------------------------------------------


def heldout_sessions(count: int, seed: int = 0) -> list[SessionItem]:
    """``count`` conversations, the types of the second instruction in turn; all scenes are held out."""
    return [_session(numbers_of(seed, i, _SESSIONS), SECOND_TYPES[i % len(SECOND_TYPES)]) for i in range(count)]


def _session(rng: np.random.Generator, kind: str) -> SessionItem:
    while True:
        source = free_scene(rng, "heldout")
        first = make_edit(source, rng, UNDOES.get(kind) or pick(rng, EDIT_TYPES))
        if first is None or not scene_is_held_out(first.result):
            continue
        if kind in HISTORY_TYPES:
            second = make_history_edit((source, first.result), rng, kind)
        else:
            second = make_edit(first.result, rng, kind)
        if second is not None and scene_is_held_out(second.result):
            return SessionItem(source, first, second)


def heldout_choices(count: int, seed: int = 0) -> list[Composition]:
    """``count`` choices among 3 to 12 pictures, these numbers in turn, whose result is held out."""
    return [
        sample_choice(numbers_of(seed, i, _CHOICES), "heldout", NUMBERS_GIVEN[i % len(NUMBERS_GIVEN)])
        for i in range(count)
    ]


def load_samples(data: Path | None, count: int) -> SessionSamples:
    """``count`` conversations of each of ten types of second instructions, and choices among each of ten numbers.

    All are made on the spot, at the size of the questions' pictures where a folder is given.

    Raises:
        DataError: no such files.
    """
    canvas = CANVAS if data is None else shapes_qa.load_questions(data, 1)[0].picture.shape[0]
    return SessionSamples(
        heldout_sessions(count * len(SECOND_TYPES)), heldout_choices(count * len(NUMBERS_GIVEN)), canvas
    )


# -- drawing -----------------------------------------------------------------------------------------------------------


def run(generator: Generator, samples: SessionSamples) -> SuiteResult:
    """All scores, ``with_history`` first.

    Raises:
        UserError: the model gives no pixels.
    """
    require_pixels(generator, NAME)
    led = lead(generator, samples)
    chosen = choose(generator, samples)
    scores, counts = summarise(samples, led, chosen)
    return SuiteResult(scores, counts, sheet(samples, led))


def lead(generator: Generator, samples: SessionSamples) -> list[Led]:
    """Lead every conversation, its second half in both ways with the same random numbers."""
    items = samples.sessions
    mine = share(generator, len(items))
    given = [render_array(items[i].source, samples.canvas) for i in mine]
    openings = [Turn("user", (0, items[i].first.instruction)) for i in mine]
    firsts = _drawn(
        generator,
        [
            generator.prompt([opening], [picture], open_image=True, number=i)
            for i, opening, picture in zip(mine, openings, given, strict=True)
        ],
    )
    with_history: list[Prompt] = []
    without: list[Prompt] = []
    for i, opening, picture, first in zip(mine, openings, given, firsts, strict=True):
        instruction, number = items[i].second.instruction, len(items) + i
        turns = [opening, Turn("assistant", (1,)), Turn("user", (instruction,))]
        with_history.append(generator.prompt(turns, [picture, first], open_image=True, number=number))
        newest = [Turn("user", (0, instruction))]
        without.append(generator.prompt(newest, [_pixels(first)], open_image=True, number=number))
    seconds = _drawn(generator, with_history), _drawn(generator, without)
    results: dict[int, Led] = {}
    for i, *drawings in zip(mine, firsts, *seconds, strict=True):
        results[i] = judge_session(items[i], *map(_pixels, drawings), keep_pictures=i < SHEET_SESSIONS)
    return gather(generator, results)


def choose(generator: Generator, samples: SessionSamples) -> list[Chosen]:
    """Have every choice among given pictures drawn."""
    items = samples.choices
    mine = share(generator, len(items))
    prompts = []
    for i in mine:
        given = [render_array(scene, samples.canvas) for scene in items[i].sources]
        turn = Turn("user", (*range(len(given)), items[i].instruction))
        prompts.append(generator.prompt([turn], given, open_image=True, number=2 * len(samples.sessions) + i))
    results: dict[int, Chosen] = {}
    for i, drawing in zip(mine, _drawn(generator, prompts), strict=True):
        picture = _pixels(drawing)
        copied = any(copies(source, picture) for source in items[i].sources)
        results[i] = Chosen(shows_scene(items[i].result, picture), copied)
    return gather(generator, results)


def _drawn(generator: Generator, prompts: Sequence[Prompt]) -> list[GeneratedImage]:
    """The image that each answer begins with."""
    return [answer.images[0] for answer in generator.answer(prompts, DecodeSettings(stop_after_image=True))]


def _pixels(image: GeneratedImage) -> np.ndarray:
    assert image.pixels is not None, "a generator that paints left an image without pixels"
    return image.pixels


# -- figures -----------------------------------------------------------------------------------------------------------


def judge_session(item: SessionItem, first: np.ndarray, *seconds: np.ndarray, keep_pictures: bool = False) -> Led:
    """Judge the first drawing and the second ones of each way, uint8 (H, H, 3)."""
    opening, step = item.steps
    shown = find_objects(first)
    if item.second.type in FROM_EARLIER:
        # The truth, whatever the drawing shows; nothing can be asked for where it shows that already.
        on_shown = None if copies(item.second.result, first) else step
    else:
        on_shown = edit_of(shown, step)
    return Led(
        first=judge_edit(opening, first),
        first_copied=copies(item.source, first),
        seconds=tuple(_judge_second(step, on_shown, shown, picture) for picture in seconds),
        pictures=(first, *seconds) if keep_pictures else (),
    )


def _judge_second(step: EditItem, on_shown: EditItem | None, shown: Scene, picture: np.ndarray) -> Second:
    """Judge a second drawing by the true step, and by the same step from what the first drawing shows."""
    copied = copies(shown, picture)
    return Second(
        right=_is_whole(judge_edit(step, picture)) and not copied,
        change=None if on_shown is None else _is_whole(judge_edit(on_shown, picture)),
        copied=copied,
    )


def _is_whole(verdict: EditVerdict) -> bool:
    return verdict.succeeded and verdict.untouched


def summarise(
    samples: SessionSamples, led: Sequence[Led], chosen: Sequence[Chosen]
) -> tuple[dict[str, float], dict[str, int]]:
    """Scores and counts."""
    kinds = [item.second.type for item in samples.sessions]
    groups = [item.group for item in samples.sessions]
    scores: dict[str, float] = {}
    for way, name in enumerate(WAYS):
        seconds = [found.seconds[way] for found in led]
        right = [second.right for second in seconds]
        scores[name] = _mean(right)
        scores |= {f"{name}/{group}": _mean(_where(right, groups, group)) for group in ("plain", "history")}
        scores |= {f"{name}/{kind}": _mean(_where(right, kinds, kind)) for kind in SECOND_TYPES}
        scores[f"{name}/change"] = _mean([second.change for second in seconds if second.change is not None])
        scores[f"{name}/copied"] = _mean([second.copied for second in seconds])
    scores["first"] = _mean([_is_whole(found.first) for found in led])
    scores["first/copied"] = _mean([found.first_copied for found in led])
    hits = [found.right for found in chosen]
    given = [len(item.sources) for item in samples.choices]
    scores["multi_image"] = _mean(hits)
    for name, numbers in GIVEN_GROUPS.items():
        scores[f"multi_image/{name}"] = _mean(
            [hit for hit, number in zip(hits, given, strict=True) if number in numbers]
        )
    scores["multi_image/copied"] = _mean([found.copied for found in chosen])
    counts = {"sessions": len(led), "plain": groups.count("plain"), "history": groups.count("history")}
    counts["change"] = sum(found.seconds[0].change is not None for found in led)
    return scores, counts | {"multi_image": len(chosen)}


def _where(hits: Sequence[bool], names: Sequence[str], name: str) -> list[bool]:
    return [hit for hit, own in zip(hits, names, strict=True) if own == name]


def _mean(hits: Sequence[bool]) -> float:
    return float(np.mean(hits)) if hits else 0.0


# -- pictures ----------------------------------------------------------------------------------------------------------


def sheet(samples: SessionSamples, led: Sequence[Led]) -> list[tuple[str, np.ndarray]]:
    """A row for each conversation: the given picture, the first drawing, both second ones, the true results."""
    cells: list[tuple[str, np.ndarray]] = []
    for item, found in zip(samples.sessions, led, strict=True):
        if not found.pictures:
            continue
        first, *seconds = found.pictures
        row = [(f"given\n{item.first.instruction}", render_array(item.source, samples.canvas))]
        row.append((f"{_word(_is_whole(found.first))}\n{item.second.instruction}", first))
        for way, second, picture in zip(WAYS, found.seconds, seconds, strict=True):
            row.append((f"{way.replace('_', ' ')}: {_word(second.right)}\n{item.second.type}", picture))
        row.append(("true first", render_array(item.first.result, samples.canvas)))
        row.append(("true second", render_array(item.second.result, samples.canvas)))
        assert len(row) == SHEET_COLUMNS, f"a row of {len(row)} pictures on a sheet of {SHEET_COLUMNS}"
        cells += row
    return cells


def _word(right: bool) -> str:
    return "correct" if right else "wrong"


SUITE = Suite(
    name=NAME,
    about="two edits in a conversation, with and without its history, and choices among many pictures",
    num_samples=10,
    draws=True,
    needs_targets=False,
    needs_pixels=True,
    load=load_samples,
    run=run,
)
