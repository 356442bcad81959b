"""Lists to evaluate on: questions about held-out scenes, held-out captions with pictures, and prompts of six kinds."""

from dataclasses import dataclass

import numpy as np

from megatron_unimm.data.shapes.conversations import free_scene, generator
from megatron_unimm.data.shapes.heldout import relation_is_held_out
from megatron_unimm.data.shapes.prompts import (
    PROMPT_KINDS,
    RELATIONAL_KINDS,
    Prompt,
    Requirement,
    pair_prompt,
    position_prompt,
    prompt_scene,
    sample_prompt,
)
from megatron_unimm.data.shapes.questions import QUESTION_TYPES, Question, ask
from megatron_unimm.data.shapes.scene import COLOURS, INVERSE, SHAPES, Scene, ShapeObject

_QUESTIONS, _RETRIEVAL, _PROMPTS = 11, 12, 13
"""Streams of random numbers, so that the lists are independent of each other and of the training samples."""


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a held-out scene."""

    scene: Scene
    question: Question


@dataclass(frozen=True)
class RetrievalPair:
    """A held-out caption and the scene that it fixes."""

    prompt: Prompt
    scene: Scene


def heldout_questions(count: int, seed: int = 0) -> list[SceneQuestion]:
    """`count` questions, each about its own held-out scene, the types in turn."""
    found = []
    for index in range(count):
        rng = generator(seed, index, _QUESTIONS)
        kind = QUESTION_TYPES[index % len(QUESTION_TYPES)]
        scene = free_scene(rng, "heldout")
        while (question := ask(scene, rng, kind, "heldout")) is None:
            scene = free_scene(rng, "heldout")
        found.append(SceneQuestion(scene, question))
    return found


def _heldout_layouts() -> list[tuple[ShapeObject, str, ShapeObject]]:
    """Every held-out pair once, written with the relation left of or above, so that no two draw the same picture."""
    looks = [ShapeObject(shape, colour, "large") for shape in SHAPES for colour in COLOURS]
    return [
        (a, relation, b)
        for relation in ("left of", "above")
        for a in looks
        for b in looks
        if relation_is_held_out(a, b, relation)
    ]


def _caption(rng: np.random.Generator, a: ShapeObject, relation: str, b: ShapeObject) -> Prompt:
    """One of the captions of a layout."""
    first, second = Requirement(a.shape, 1, a.colour), Requirement(b.shape, 1, b.colour)
    draw = rng.random()
    if relation == "left of" and draw < 0.2:
        return pair_prompt("color_attr", first, second)
    if draw < 0.6:
        return position_prompt(first, relation, second)
    return position_prompt(second, INVERSE[relation], first)


def retrieval_pairs(count: int, seed: int = 0) -> list[RetrievalPair]:
    """Held-out captions with their scenes; any 64 consecutive ones (any 240, in fact) show different scenes.

    The list walks again and again through one shuffled order of all held-out layouts.
    """
    layouts = _heldout_layouts()
    order = generator(seed, 0, _RETRIEVAL).permutation(len(layouts))
    found = []
    for index in range(count):
        rng = generator(seed, index, _RETRIEVAL, 1)
        prompt = _caption(rng, *layouts[order[index % len(layouts)]])
        found.append(RetrievalPair(prompt, prompt_scene(prompt, rng)))
    return found


def geneval_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of GenEval's six kinds in turn. Those that can be held out (position, color_attr) are."""
    found = []
    for index in range(count):
        rng = generator(seed, index, _PROMPTS)
        kind = PROMPT_KINDS[index % len(PROMPT_KINDS)]
        found.append(sample_prompt(rng, kind, "heldout" if kind in RELATIONAL_KINDS else "train"))
    return found
