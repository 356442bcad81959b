"""Combinations of colour, shape and relation that training never shows, so that a test can ask for something new.

A combination (colour, shape, relation) says that an object of that look stands in that relation to some object of
another look, e.g. a red triangle left of anything that is not a red triangle. Between two objects of equal look no
relation counts: no sentence can tell them apart. The eight combinations use every colour once and every shape and
relation twice; none is the default colour of a shape, so that prompts which leave the colour open stay in training.
"""

import re

from megatron_unimm.data.shapes.scene import COLOURS, INVERSE, RELATIONS, SHAPES, Scene, ShapeObject, direction

HELD_OUT: frozenset[tuple[str, str, str]] = frozenset(
    {
        ("red", "triangle", "left of"),
        ("orange", "circle", "above"),
        ("yellow", "square", "right of"),
        ("green", "cross", "below"),
        ("blue", "circle", "left of"),
        ("purple", "triangle", "above"),
        ("pink", "cross", "right of"),
        ("black", "square", "below"),
    }
)

_OBJECT = rf"(?:small |large )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_STATEMENT = re.compile(rf"{_OBJECT} (?:is )?({'|'.join(RELATIONS)}) (?:the|an|a) {_OBJECT}")


def relation_is_held_out(a: ShapeObject, b: ShapeObject, relation: str) -> bool:
    """Whether "`a` `relation` `b`", or the same seen from `b`, is kept from training."""
    if a.name == b.name:
        return False
    return (a.colour, a.shape, relation) in HELD_OUT or (b.colour, b.shape, INVERSE[relation]) in HELD_OUT


def scene_is_held_out(scene: Scene) -> bool:
    """Whether any two objects of the scene form a held-out combination (by the larger of their two offsets)."""
    objects = scene.objects
    return any(
        relation_is_held_out(a, b, direction(a, b)) for index, a in enumerate(objects) for b in objects[index + 1 :]
    )


def text_is_held_out(text: str) -> bool:
    """Whether a text states or asks a held-out combination in words, e.g. ``a red triangle left of a blue circle``."""
    for colour_a, shape_a, relation, colour_b, shape_b in _STATEMENT.findall(text):
        a, b = ShapeObject(shape_a, colour_a, "large"), ShapeObject(shape_b, colour_b, "large")
        if relation_is_held_out(a, b, relation):
            return True
    return False
