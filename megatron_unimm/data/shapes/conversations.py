"""Samples of the Shapes world: conversations with the scenes that their images show.

Each is a pure function of (seed, index, kind, split).

In a conversation `<image>` stands where an image stands: in a human turn for an image that is read, in a gpt turn for
one to be made.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_unimm.data.shapes.edits import EDIT_TYPES, Edit, make_edit, sample_choice, sample_composition, sample_edit
from megatron_unimm.data.shapes.heldout import scene_is_held_out
from megatron_unimm.data.shapes.history import HISTORY_TYPES, UNDOES, make_history_edit
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

KINDS = ("understanding", "text_to_image", "editing", "interleaved")
"""A kind's number is part of its samples' random stream: new kinds go to the end."""


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


# -- interleaved -------------------------------------------------------------------------------------------------------


@dataclass
class _Talk:
    """A conversation that grows turn by turn, from a prompt's picture or a given one. Every picture but the given one
    is drawn."""

    scenes: list[Scene]
    prompt: Prompt | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def draw(self, edit: Edit) -> None:
        """An instruction, and the picture that it asks for."""
        self._say(edit.instruction, IMAGE_MARK)
        self.scenes.append(edit.result)

    def ask(self, rng: np.random.Generator, split: Split) -> None:
        """A question about the newest picture."""
        for question in sample_questions(self.scenes[-1], rng, 1, split):
            self._say(question.question, question.answer)

    def _say(self, human: str, gpt: str) -> None:
        # A picture that stands before the first turn is given with it.
        self.turns += [("human", human if self.turns else IMAGE_MARK + human), ("gpt", gpt)]

    def finish(self, task: str) -> Conversation:
        return Conversation("interleaved", task, tuple(self.turns), tuple(self.scenes), self.prompt)


def _open_with_prompt(rng: np.random.Generator, split: Split) -> _Talk:
    prompt = sample_prompt(rng, None, split)
    turns = [("human", request(prompt.caption, rng)), ("gpt", IMAGE_MARK)]
    return _Talk([prompt_scene(prompt, rng)], prompt, turns)


def _draw_and_edit(rng: np.random.Generator, split: Split) -> Conversation | None:
    """A prompt, two edits, and in three of ten a question."""
    talk = _open_with_prompt(rng, split)
    if not _edit_twice(talk, rng, split, ask_between=False):
        return None
    if rng.random() < 0.3:
        talk.ask(rng, split)
    return talk.finish("draw_and_edit")


def _edit_and_ask(rng: np.random.Generator, split: Split) -> Conversation | None:
    """In three of ten a question about the given picture; then an edit, a question, an edit."""
    talk = _Talk([free_scene(rng, split)])
    if rng.random() < 0.3:
        talk.ask(rng, split)
    return talk.finish("edit_and_ask") if _edit_twice(talk, rng, split, ask_between=True) else None


def _edit_twice(talk: _Talk, rng: np.random.Generator, split: Split, ask_between: bool) -> bool:
    """Whether both edits were found."""
    for is_second in (False, True):
        if is_second and ask_between:
            talk.ask(rng, split)
        edit = sample_edit(talk.scenes[-1], rng, split)
        if edit is None:
            return False
        talk.draw(edit)
    return True


def _look_back(rng: np.random.Generator, split: Split) -> Conversation:
    """One or two edits of a prompt's picture or a given one, and an instruction about what was seen before."""
    kind = pick(rng, HISTORY_TYPES)
    while True:
        talk = _open_with_prompt(rng, split) if rng.random() < 0.5 else _Talk([free_scene(rng, split)])
        if _look_back_at(talk, rng, split, kind):
            return talk.finish(kind)


def _look_back_at(talk: _Talk, rng: np.random.Generator, split: Split, kind: str) -> bool:
    """Whether the pictures allowed it."""
    first = make_edit(talk.scenes[-1], rng, UNDOES.get(kind) or pick(rng, EDIT_TYPES))
    if first is None or not _belongs(first, split):
        return False
    talk.draw(first)
    between = rng.random()
    if between < 0.35:
        second = sample_edit(talk.scenes[-1], rng, split)
        if second is None:
            return False
        talk.draw(second)
    elif between < 0.6:
        talk.ask(rng, split)
    last = make_history_edit(talk.scenes, rng, kind)
    if last is None or not _belongs(last, split):
        return False
    talk.draw(last)
    return True


def _belongs(edit: Edit, split: Split) -> bool:
    return scene_is_held_out(edit.result) == (split == "heldout")


def _choose(rng: np.random.Generator, split: Split) -> Conversation | None:
    """A composition of two out of three to twelve given pictures; then an edit or a question."""
    chosen = sample_choice(rng, split)
    asked = IMAGE_MARK * len(chosen.sources) + chosen.instruction
    talk = _Talk([chosen.result], None, [("human", asked), ("gpt", IMAGE_MARK)])
    if rng.random() < 0.5:
        edit = sample_edit(chosen.result, rng, split)
        if edit is None:
            return None
        talk.draw(edit)
    else:
        talk.ask(rng, split)
    talk.scenes[:0] = chosen.sources
    return talk.finish("multi_image")


def interleaved(rng: np.random.Generator, split: Split = "train") -> Conversation:
    """Two to four turns that read and draw, each picture an edit of one before (MMCORE, arXiv 2604.19902, section 3.2).

    A prompt and edits (a quarter), edits with questions in between (a quarter), instructions that need earlier pictures
    than the newest (three in ten), or a choice among many given pictures.
    """
    while True:
        draw = rng.random()
        maker = (
            _draw_and_edit if draw < 0.25 else _edit_and_ask if draw < 0.5 else _look_back if draw < 0.8 else _choose
        )
        found = maker(rng, split)
        if found is not None:
            return found


_MAKERS: dict[str, Callable[[np.random.Generator, Split], Conversation]] = {
    "understanding": understanding,
    "text_to_image": text_to_image,
    "editing": editing,
    "interleaved": interleaved,
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
