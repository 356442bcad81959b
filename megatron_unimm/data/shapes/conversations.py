"""Samples of the Shapes world: conversations with the scenes that their images show.

Each is a pure function of (seed, index, kind, split).

In a conversation `<image>` stands where an image stands: in a human turn for an image that is read, in a gpt turn for
one to be made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_unimm.data.shapes.edits import sample_composition, sample_edit
from megatron_unimm.data.shapes.heldout import scene_is_held_out
from megatron_unimm.data.shapes.prompts import PROMPT_KINDS, RELATIONAL_KINDS, Prompt, prompt_scene, sample_prompt
from megatron_unimm.data.shapes.questions import sample_pair_questions, sample_questions
from megatron_unimm.data.shapes.scene import Scene, Split, pick, sample_free_scene
from megatron_unimm.data.shapes.text import (
    BRIEF_REQUESTS,
    DETAILED_REQUESTS,
    IMAGE_MARK,
    brief_caption,
    detailed_caption,
    request,
)

KINDS = ("understanding", "text_to_image", "editing")


@dataclass(frozen=True)
class Conversation:
    """One sample before its images are drawn."""

    kind: str
    """One of KINDS."""
    task: str
    """What exactly, e.g. ``qa``, ``position``, ``recolour``."""
    turns: tuple[tuple[str, str], ...]
    """(human or gpt, text), alternating."""
    scenes: tuple[Scene, ...]
    """What the images show, in the order of their marks."""
    prompt: Prompt | None = None
    """What the first image to be made must show, for text to image."""

    def to_dict(self, name: str, images: list[str]) -> dict[str, Any]:
        """The record of ORION's appendix A.2, with what a scorer needs beside it.

        Args:
            name: the sample's id.
            images: one path for each mark.
        """
        record: dict[str, Any] = {
            "id": name,
            "image": images[0] if len(images) == 1 else images,
            "conversations": [{"from": who, "value": value} for who, value in self.turns],
            "kind": self.kind,
            "task": self.task,
            "scenes": [scene.to_list() for scene in self.scenes],
        }
        return record | ({"geneval": self.prompt.to_dict()} if self.prompt is not None else {})


def generator(seed: int, index: int, *stream: int) -> np.random.Generator:
    """The generator of sample `index`; `stream` separates kinds of draws."""
    return np.random.default_rng([seed, index, *stream])


def free_scene(rng: np.random.Generator, split: Split, num_objects: int | None = None) -> Scene:
    """A freely laid out scene that belongs to the split (held-out scenes have at least two objects)."""
    if split == "heldout" and num_objects is None:
        num_objects = int(rng.integers(2, 6))
    while True:
        scene = sample_free_scene(rng, num_objects)
        if scene_is_held_out(scene) == (split == "heldout"):
            return scene


def _dialogue(pairs: list[tuple[str, str]], num_images: int) -> tuple[tuple[str, str], ...]:
    """Human and gpt turns, the marks of `num_images` images at the very beginning."""
    turns = [turn for question, answer in pairs for turn in (("human", question), ("gpt", answer))]
    turns[0] = ("human", IMAGE_MARK * num_images + turns[0][1])
    return tuple(turns)


def _two_images(rng: np.random.Generator, split: Split) -> Conversation:
    scenes = free_scene(rng, split), free_scene(rng, split)
    pairs = [(q.question, q.answer) for q in sample_pair_questions(scenes, rng, 4)]
    return Conversation("understanding", "qa_two_images", _dialogue(pairs, 2), scenes)


def understanding(rng: np.random.Generator, split: Split = "train") -> Conversation:
    """Four to six questions about one image, or up to four about two; half of the former start with a caption."""
    if rng.random() < 0.12:
        return _two_images(rng, split)
    scene = free_scene(rng, split)
    pairs: list[tuple[str, str]] = []
    draw = rng.random()
    if draw < 0.3:
        pairs.append((pick(rng, DETAILED_REQUESTS), detailed_caption(scene)))
    elif draw < 0.5:
        pairs.append((pick(rng, BRIEF_REQUESTS), brief_caption(scene)))
    count = int(rng.integers(4, 7)) - len(pairs)
    pairs += [(q.question, q.answer) for q in sample_questions(scene, rng, count, split)]
    return Conversation("understanding", "caption_qa" if draw < 0.5 else "qa", _dialogue(pairs, 1), (scene,))


def text_to_image(rng: np.random.Generator, split: Split = "train", kind: str | None = None) -> Conversation:
    """A prompt in one of three styles, and its picture."""
    prompt = sample_prompt(rng, kind, split)
    turns = (("human", request(prompt.caption, rng)), ("gpt", IMAGE_MARK))
    return Conversation("text_to_image", prompt.kind, turns, (prompt_scene(prompt, rng),), prompt)


def _single_edit(rng: np.random.Generator, split: Split) -> Conversation | None:
    scene = free_scene(rng, split)
    edit = sample_edit(scene, rng, split)
    if edit is None:
        return None
    turns = (("human", IMAGE_MARK + edit.instruction), ("gpt", IMAGE_MARK))
    return Conversation("editing", edit.type, turns, (scene, edit.result))


def _composition(rng: np.random.Generator, split: Split) -> Conversation:
    drawn = sample_composition(rng, split)
    turns = (("human", IMAGE_MARK * 2 + drawn.instruction), ("gpt", IMAGE_MARK))
    return Conversation("editing", "composition", turns, (*drawn.sources, drawn.result))


def _multi_turn(rng: np.random.Generator, split: Split) -> Conversation | None:
    """A prompt or a given picture, then one or two edits of the picture before, then perhaps a question."""
    prompt = None
    turns: list[tuple[str, str]] = []
    if rng.random() < 0.5:
        prompt = sample_prompt(rng, None, split)
        scenes = [prompt_scene(prompt, rng)]
        turns += [("human", request(prompt.caption, rng)), ("gpt", IMAGE_MARK)]
    else:
        scenes = [free_scene(rng, split)]
    for _ in range(2 if prompt is None else int(rng.integers(1, 3))):
        edit = sample_edit(scenes[-1], rng, split)
        if edit is None:
            return None
        mark = "" if turns else IMAGE_MARK
        turns += [("human", mark + edit.instruction), ("gpt", IMAGE_MARK)]
        scenes.append(edit.result)
    if rng.random() < 0.5:
        turns += [
            turn
            for q in sample_questions(scenes[-1], rng, 1, split)
            for turn in (("human", q.question), ("gpt", q.answer))
        ]
    return Conversation("editing", "multi_turn", tuple(turns), tuple(scenes), prompt)


def editing(rng: np.random.Generator, split: Split = "train") -> Conversation:
    """An edit (seven in ten), a composition of two images, or several turns."""
    while True:
        draw = rng.random()
        maker = _single_edit if draw < 0.7 else _composition if draw < 0.85 else _multi_turn
        found = maker(rng, split)
        if found is not None:
            return found


_MAKERS: dict[str, Callable[[np.random.Generator, Split], Conversation]] = {
    "understanding": understanding,
    "text_to_image": text_to_image,
    "editing": editing,
}


def make_conversation(kind: str, seed: int, index: int, split: Split = "train") -> Conversation:
    """Sample `index` of a kind. Prompts take GenEval's kinds in turn, so that each is equally frequent.

    Raises:
        ValueError: an unknown kind or split.
    """
    if kind not in KINDS or split not in ("train", "heldout"):
        raise ValueError(f"no such kind or split: {kind!r}, {split!r}; kinds are {', '.join(KINDS)}")
    rng = generator(seed, index, KINDS.index(kind), int(split == "heldout"))
    if kind == "text_to_image":
        kinds = PROMPT_KINDS if split == "train" else RELATIONAL_KINDS
        return text_to_image(rng, split, kinds[index % len(kinds)])
    return _MAKERS[kind](rng, split)
