"""Questions about pictures, with short answers, so that an exact match is a fair score."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_unimm.data.shapes.heldout import HELD_OUT, relation_is_held_out
from megatron_unimm.data.shapes.scene import (
    COLOURS,
    INVERSE,
    RELATIONS,
    SHAPES,
    Scene,
    ShapeObject,
    Split,
    clear_direction,
    pick,
)
from megatron_unimm.data.shapes.text import NUMBERS, plural, with_article

QUESTION_TYPES = ("count", "colour", "relation", "existence", "shape", "size")


@dataclass(frozen=True)
class Question:
    """A question with its answer; `type` is one of QUESTION_TYPES."""

    type: str
    question: str
    answer: str


def _unique(scene: Scene, key: Callable[[ShapeObject], str]) -> list[ShapeObject]:
    """Objects whose key no other object of the scene shares."""
    keys = [key(item) for item in scene.objects]
    return [item for item, own in zip(scene.objects, keys, strict=True) if keys.count(own) == 1]


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _count(scene: Scene, rng: np.random.Generator, split: Split) -> Question:
    """Of all objects, of a colour, of a shape, or of a look; three names out of four are taken from the scene."""
    source = (
        pick(rng, scene.objects)
        if rng.random() < 0.75
        else ShapeObject(pick(rng, SHAPES), pick(rng, tuple(COLOURS)), "")
    )
    form = int(rng.integers(4))
    if form == 0:
        words, count = "objects", len(scene.objects)
    elif form == 1:
        words, count = plural(source.shape), sum(o.shape == source.shape for o in scene.objects)
    elif form == 2:
        words, count = f"{source.colour} objects", sum(o.colour == source.colour for o in scene.objects)
    else:
        words, count = plural(source.name), sum(o.name == source.name for o in scene.objects)
    return Question("count", f"How many {words} are there?", NUMBERS[count])


def _colour(scene: Scene, rng: np.random.Generator, split: Split) -> Question | None:
    by_shape = [(o.shape, o) for o in _unique(scene, lambda o: o.shape)]
    by_size = [(f"{o.size} {o.shape}", o) for o in _unique(scene, lambda o: f"{o.size} {o.shape}")]
    if not by_shape and not by_size:
        return None
    words, item = pick(rng, by_shape + by_size)
    return Question("colour", f"What colour is the {words}?", item.colour)


def _shape(scene: Scene, rng: np.random.Generator, split: Split) -> Question | None:
    by_colour = [(f"{o.colour} object", o) for o in _unique(scene, lambda o: o.colour)]
    by_size = [(f"{o.size} {o.colour} object", o) for o in _unique(scene, lambda o: f"{o.size} {o.colour}")]
    if not by_colour and not by_size:
        return None
    words, item = pick(rng, by_colour + by_size)
    return Question("shape", f"What shape is the {words}?", item.shape)


def _size(scene: Scene, rng: np.random.Generator, split: Split) -> Question | None:
    items = _unique(scene, lambda o: o.name)
    if not items:
        return None
    item = pick(rng, items)
    return Question("size", f"Is the {item.name} small or large?", item.size)


def _existence(scene: Scene, rng: np.random.Generator, split: Split) -> Question:
    """Half are there. Of the others most share the colour or the shape of something that is there."""
    names = {item.name for item in scene.objects}
    item = pick(rng, scene.objects)
    if rng.random() < 0.5:
        return Question("existence", f"Is there {with_article(item.name)}?", "yes")
    while True:
        keep = rng.random(2) < 0.5
        other = ShapeObject(
            item.shape if keep[0] else pick(rng, SHAPES), item.colour if keep[1] else pick(rng, tuple(COLOURS)), ""
        )
        if other.name not in names:
            return Question("existence", f"Is there {with_article(other.name)}?", "no")


def _clear_pairs(scene: Scene) -> list[tuple[ShapeObject, ShapeObject, str]]:
    items = _unique(scene, lambda o: o.name)
    pairs = [(a, b, clear_direction(a, b)) for a in items for b in items if a is not b]
    return [(a, b, relation) for a, b, relation in pairs if relation is not None]


def _relation(scene: Scene, rng: np.random.Generator, split: Split) -> Question | None:
    """An open question, or a statement to confirm. The held-out split asks about its combinations where it can."""
    pairs = _clear_pairs(scene)
    if split == "heldout":
        pairs = [(a, b, r) for a, b, r in pairs if (a.colour, a.shape, r) in HELD_OUT] or pairs
    if not pairs:
        return None
    a, b, relation = pick(rng, pairs)
    if rng.random() < 0.6:
        return Question("relation", f"Where is the {a.name} relative to the {b.name}?", relation)
    asked = relation
    if rng.random() < 0.5:
        asked = INVERSE[relation] if rng.random() < 0.5 else pick(rng, RELATIONS)
        if split == "train" and relation_is_held_out(a, b, asked):
            asked = relation
    return Question("relation", f"Is the {a.name} {asked} the {b.name}?", _yes_no(asked == relation))


_MAKERS: dict[str, Callable[[Scene, np.random.Generator, Split], Question | None]] = {
    "count": _count,
    "colour": _colour,
    "relation": _relation,
    "existence": _existence,
    "shape": _shape,
    "size": _size,
}


def ask(scene: Scene, rng: np.random.Generator, kind: str, split: Split = "train") -> Question | None:
    """A question of a kind, or None where the scene allows no unambiguous one."""
    return _MAKERS[kind](scene, rng, split)


def sample_questions(scene: Scene, rng: np.random.Generator, count: int, split: Split = "train") -> list[Question]:
    """Up to `count` different questions about a scene, their kinds in turn from a shuffled list."""
    kinds = [QUESTION_TYPES[i] for i in rng.permutation(len(QUESTION_TYPES))]
    found: dict[str, Question] = {}
    for attempt in range(12 * count):
        question = ask(scene, rng, kinds[attempt % len(kinds)], split)
        if question is not None:
            found.setdefault(question.question, question)
        if len(found) == count:
            break
    return list(found.values())


def _count_of(scene: Scene, words: str) -> int:
    """How many objects answer to a shape, a colour or a look."""
    return sum(words in (item.shape, item.colour, item.name) for item in scene.objects)


def _compare(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Question:
    item = pick(rng, pick(rng, scenes).objects)
    words, noun = pick(
        rng, (("", "objects"), (item.shape, plural(item.shape)), (item.colour, f"{item.colour} objects"))
    )
    first, second = (_count_of(scene, words) if words else len(scene.objects) for scene in scenes)
    answer = "first" if first > second else "second" if second > first else "equal"
    return Question("count", f"Which image has more {noun}?", answer)


def _in_one(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Question:
    which = int(rng.integers(2))
    name = pick(rng, pick(rng, scenes).objects).name
    answer = _yes_no(_count_of(scenes[which], name) > 0)
    return Question("existence", f"Is there {with_article(name)} in the {('first', 'second')[which]} image?", answer)


def _count_in_one(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Question:
    which = int(rng.integers(2))
    number = NUMBERS[len(scenes[which].objects)]
    return Question("count", f"How many objects are there in the {('first', 'second')[which]} image?", number)


def sample_pair_questions(scenes: tuple[Scene, Scene], rng: np.random.Generator, count: int) -> list[Question]:
    """Up to `count` different questions about two pictures."""
    found: dict[str, Question] = {}
    for _ in range(3 * count):
        question = pick(rng, (_compare, _in_one, _count_in_one))(scenes, rng)
        found.setdefault(question.question, question)
        if len(found) == count:
            break
    return list(found.values())
