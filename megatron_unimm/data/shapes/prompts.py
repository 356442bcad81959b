"""Text-to-image prompts of GenEval's six kinds. The caption fixes the scene up to a small jitter.

What a caption leaves open follows a rule: an unnamed colour is the default of the shape, an unnamed size is large, one
object stands in the middle, two stand side by side in the order named, equal objects stand in the fixed pattern of
their count. (A model that regresses visual tokens predicts their mean, and a caption with many right answers would
teach it a blur.)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_unimm.data.shapes.heldout import scene_is_held_out
from megatron_unimm.data.shapes.scene import (
    COLOURS,
    INVERSE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    ShapeObject,
    Split,
    count_layout,
    direction,
    pair_layout,
    pick,
)
from megatron_unimm.data.shapes.text import counted, with_article

PROMPT_KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's tags."""
RELATIONAL_KINDS = ("position", "color_attr")
"""The kinds that can hold a held-out combination: they name both looks and fix a relation."""
DEFAULT_COLOURS = {"circle": "red", "square": "blue", "triangle": "green", "cross": "black"}
DEFAULT_SIZE = "large"
MAX_COUNT = 4


@dataclass(frozen=True)
class Requirement:
    """What a prompt asks of some objects; None leaves it open.

    `position` is (relation, index): the objects stand in that relation to the objects of the requirement with that
    index.
    """

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None
    position: tuple[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """GenEval's words: class, count, color, position; and size. What is open is left out."""
        fields = {"class": self.shape, "count": self.count, "color": self.colour, "size": self.size}
        position = {"position": list(self.position)} if self.position else {}
        return {key: value for key, value in fields.items() if value is not None} | position

    @property
    def words(self) -> str:
        """``small red circle``, with only the words that are asked for."""
        return " ".join(word for word in (self.size, self.colour, self.shape) if word is not None)

    def example(self) -> ShapeObject:
        """An object that meets it, with the defaults for what is open."""
        return ShapeObject(self.shape, self.colour or DEFAULT_COLOURS[self.shape], self.size or DEFAULT_SIZE)


@dataclass(frozen=True)
class Prompt:
    """A caption and what it requires. The picture must hold the required objects and no others."""

    kind: str
    caption: str
    include: tuple[Requirement, ...]

    def to_dict(self) -> dict[str, Any]:
        """A line of GenEval's metadata file."""
        return {"tag": self.kind, "include": [item.to_dict() for item in self.include], "prompt": self.caption}


def prompt_from_dict(line: dict[str, Any]) -> Prompt:
    """Read what `Prompt.to_dict` wrote."""
    include = tuple(
        Requirement(
            shape=item["class"],
            count=item["count"],
            colour=item.get("color"),
            size=item.get("size"),
            position=(item["position"][0], int(item["position"][1])) if "position" in item else None,
        )
        for item in line["include"]
    )
    return Prompt(line["tag"], line["prompt"], include)


def prompt_scene(prompt: Prompt, rng: np.random.Generator | None = None) -> Scene:
    """The scene that the caption fixes, jittered by `rng` (exactly the pattern without one)."""
    first = prompt.include[0]
    if len(prompt.include) == 1:
        return count_layout(first.example(), first.count, rng)
    second = prompt.include[1]
    relation = INVERSE[second.position[0]] if second.position else "left of"
    return pair_layout(first.example(), second.example(), relation, rng)


def prompt_is_held_out(prompt: Prompt) -> bool:
    """Whether the scene that the prompt fixes holds a held-out combination."""
    return scene_is_held_out(prompt_scene(prompt))


def _single(kind: str, item: Requirement) -> Prompt:
    return Prompt(kind, with_article(item.words), (item,))


def position_prompt(a: Requirement, relation: str, b: Requirement) -> Prompt:
    """ "`a` `relation` `b`". As in GenEval, the second requirement carries the position, seen from itself."""
    placed = Requirement(b.shape, 1, b.colour, b.size, (INVERSE[relation], 0))
    return Prompt("position", f"{with_article(a.words)} {relation} {with_article(b.words)}", (a, placed))


def pair_prompt(kind: str, a: Requirement, b: Requirement) -> Prompt:
    """ "`a` and `b`", side by side in this order."""
    return Prompt(kind, f"{with_article(a.words)} and {with_article(b.words)}", (a, b))


def _two_shapes(rng: np.random.Generator) -> tuple[str, str]:
    first = int(rng.integers(len(SHAPES)))
    return SHAPES[first], SHAPES[(first + 1 + int(rng.integers(len(SHAPES) - 1))) % len(SHAPES)]


def _two_looks(rng: np.random.Generator) -> tuple[Requirement, Requirement]:
    """Two named looks that differ in colour, shape or both."""
    looks = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    first = int(rng.integers(len(looks)))
    second = (first + 1 + int(rng.integers(len(looks) - 1))) % len(looks)
    return Requirement(looks[first][0], 1, looks[first][1]), Requirement(looks[second][0], 1, looks[second][1])


def _draw_prompt(rng: np.random.Generator, kind: str) -> Prompt:
    colours, sizes = tuple(COLOURS), (None, *SIZES)
    if kind == "single_object":
        return _single(kind, Requirement(pick(rng, SHAPES), size=pick(rng, sizes)))
    if kind == "colors":
        return _single(kind, Requirement(pick(rng, SHAPES), colour=pick(rng, colours), size=pick(rng, sizes)))
    if kind == "counting":
        colour = pick(rng, colours) if rng.random() < 0.5 else None
        item = Requirement(pick(rng, SHAPES), int(rng.integers(1, MAX_COUNT + 1)), colour)
        return Prompt(kind, counted(item.words, item.count), (item,))
    if kind == "two_object":
        a, b = _two_shapes(rng)
        return pair_prompt(kind, Requirement(a), Requirement(b))
    if kind == "color_attr":
        return pair_prompt(kind, *_two_looks(rng))
    if kind != "position":
        raise ValueError(f"no such kind of prompt: {kind!r}; there are {', '.join(PROMPT_KINDS)}")
    if rng.random() < 0.2:
        shape_a, shape_b = _two_shapes(rng)
        a, b = Requirement(shape_a), Requirement(shape_b)
    else:
        a, b = _two_looks(rng)
    return position_prompt(a, pick(rng, RELATIONS), b)


def sample_prompt(rng: np.random.Generator, kind: str | None = None, split: Split = "train") -> Prompt:
    """Draw a prompt of a kind (of any kind where None) that belongs to the split.

    Raises:
        ValueError: an unknown kind, or the held-out split of a kind that has no held-out prompts.
    """
    kinds = PROMPT_KINDS if split == "train" else RELATIONAL_KINDS
    if split == "heldout" and kind is not None and kind not in kinds:
        raise ValueError(f"prompts of kind {kind!r} name no relation, none is held out; ask for {', '.join(kinds)}")
    while True:
        prompt = _draw_prompt(rng, kind if kind is not None else pick(rng, kinds))
        if prompt_is_held_out(prompt) == (split == "heldout"):
            return prompt


def look_of(item: ShapeObject) -> Requirement:
    """The requirement that names colour and shape of an object."""
    return Requirement(item.shape, 1, item.colour)


def relation_prompt(scene: Scene) -> Prompt:
    """The position prompt of a scene of two objects."""
    a, b = scene.objects
    return position_prompt(look_of(a), direction(a, b), look_of(b))
