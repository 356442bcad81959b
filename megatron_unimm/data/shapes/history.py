"""Instructions that the newest picture alone does not tell how to follow: they speak of what earlier pictures showed.

Written for pictures 0 (given or drawn first), 1, 2, … of a conversation, each an edit of the one before::

    undo           "Undo that."                                        the picture before the newest
    bring_back     "Bring the removed circle back."                    the newest, with what a removal took away
    old_colour     "Give the blue square its old colour back."         the newest, with the colour of picture 0
    move_back      "Move the red cross back."                          the newest, with the place of picture 0
    first_picture  "Go back to the first picture and make the …"       an edit of picture 0

Each fixes its result, and names what it means only where one thing can be meant.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from megatron_unimm.data.shapes.edits import EDIT_TYPES, Edit, make_edit, replaced, unique_objects
from megatron_unimm.data.shapes.scene import MAX_OBJECTS, Scene, ShapeObject, fits, pick

HISTORY_TYPES = ("undo", "bring_back", "old_colour", "move_back", "first_picture")
UNDOES = {"bring_back": "remove", "old_colour": "recolour", "move_back": "move"}
"""The edit that must have come before, for those that take back one of a kind."""
FROM_EARLIER = ("undo", "first_picture")
"""Those whose result does not depend on the newest picture."""


def make_history_edit(scenes: Sequence[Scene], rng: np.random.Generator, kind: str) -> Edit | None:
    """An instruction of a kind about the pictures so far, or None where they allow no unambiguous one.

    Args:
        scenes: what the pictures show, the newest last; at least two.
        kind: one of HISTORY_TYPES.
    """
    return _MAKERS[kind](scenes, rng)


def _undo(scenes: Sequence[Scene], rng: np.random.Generator) -> Edit:
    return Edit("undo", pick(rng, ("Undo that.", "Undo the last change.")), scenes[-2])


def _bring_back(scenes: Sequence[Scene], rng: np.random.Generator) -> Edit | None:
    newest = scenes[-1]
    removed = [gone[0] for gone, come in map(_difference, pairwise(scenes)) if len(gone) == 1 and not come]
    shapes = [item.shape for item in removed]
    items = [item for item in removed if shapes.count(item.shape) == 1 and fits(item, newest.objects)]
    if not items or len(newest.objects) >= MAX_OBJECTS:
        return None
    item = pick(rng, items)
    noun = "object" if len(removed) == 1 and rng.random() < 0.5 else item.shape
    words = pick(rng, ("Bring the removed {} back.", "Put the removed {} back."))
    return Edit("bring_back", words.format(noun), Scene((*newest.objects, item)))


def _old_colour(scenes: Sequence[Scene], rng: np.random.Generator) -> Edit | None:
    pairs = [(old, new) for old, new in _changed(scenes) if old.colour != new.colour]
    if not pairs:
        return None
    old, new = pick(rng, pairs)
    words = pick(rng, ("Give the {} its old colour back.", "Turn the {} back to its old colour."))
    return Edit("old_colour", words.format(_name(new, scenes[-1])), replaced(scenes[-1], new, old))


def _move_back(scenes: Sequence[Scene], rng: np.random.Generator) -> Edit | None:
    newest = scenes[-1]
    pairs = [
        (old, new)
        for old, new in _changed(scenes)
        if old.name == new.name and fits(old, [other for other in newest.objects if other is not new])
    ]
    if not pairs:
        return None
    old, new = pick(rng, pairs)
    words = pick(rng, ("Move the {} back.", "Put the {} back where it was."))
    return Edit("move_back", words.format(_name(new, newest)), replaced(newest, new, old))


def _first_picture(scenes: Sequence[Scene], rng: np.random.Generator) -> Edit | None:
    """An edit of what has not changed since, so that the first picture is needed for the rest."""
    first, newest = scenes[0], scenes[-1]
    edit = make_edit(first, rng, pick(rng, EDIT_TYPES))
    if edit is None or set(first.objects) == set(newest.objects):
        return None
    gone, come = _difference((first, edit.result))
    if any(item not in newest.objects for item in gone) or any(item in newest.objects for item in come):
        return None
    words = pick(rng, ("Go back to the first picture and {}", "Go back to the first image and {}"))
    return Edit("first_picture", words.format(edit.instruction[0].lower() + edit.instruction[1:]), edit.result)


_MAKERS: dict[str, Callable[[Sequence[Scene], np.random.Generator], Edit | None]] = {
    "undo": _undo,
    "bring_back": _bring_back,
    "old_colour": _old_colour,
    "move_back": _move_back,
    "first_picture": _first_picture,
}


def _difference(step: tuple[Scene, Scene]) -> tuple[list[ShapeObject], list[ShapeObject]]:
    """What a step did away with, and what it brought about."""
    before, after = step
    gone = [item for item in before.objects if item not in after.objects]
    return gone, [item for item in after.objects if item not in before.objects]


def _changed(scenes: Sequence[Scene]) -> list[tuple[ShapeObject, ShapeObject]]:
    """Objects that one step changed and no other, (as it was, as it is), which their look singles out now."""
    steps = [_difference(step) for step in pairwise(scenes)]
    pairs = [(gone[0], come[0]) for gone, come in steps if len(gone) == len(come) == 1]
    nameable = {item: item for item in unique_objects(scenes[-1])}
    return [(old, nameable[new]) for old, new in pairs if old in scenes[0].objects and new in nameable]


def _name(item: ShapeObject, scene: Scene) -> str:
    """The shape where only one has it, else colour and shape."""
    alone = [other.shape for other in scene.objects].count(item.shape) == 1
    return item.shape if alone else item.name
