"""Held-out edits of Shapes pictures, and whether a picture shows what one asked for and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_unimm.data.shapes.conversations import free_scene, generator
from megatron_unimm.data.shapes.edits import EDIT_TYPES, Edit, make_edit
from megatron_unimm.data.shapes.heldout import scene_is_held_out
from megatron_unimm.data.shapes.scene import Scene, ShapeObject
from megatron_unimm.data.shapes.scorer import find_objects, shows_scene

_EDITS = 14
"""Stream of random numbers, beside those of data/shapes/eval_sets.py."""
TOLERANCE = 4 / 64
"""How far an object may be from its place along each axis, in shares of the side; as in ``scorer.shows_scene``. Objects
keep 15 / 64 from each other, and a move goes further than 8 / 64, so that no object is near two places."""


@dataclass(frozen=True)
class EditItem:
    """A picture to be edited."""

    source: Scene
    edit: Edit

    @property
    def untouched(self) -> list[ShapeObject]:
        """Objects that the edit leaves as they are."""
        return [item for item in self.source.objects if item in self.edit.result.objects]

    @property
    def wanted(self) -> list[ShapeObject]:
        """Objects that the edit brings about: new, or elsewhere, or of another colour."""
        return [item for item in self.edit.result.objects if item not in self.source.objects]

    @property
    def gone(self) -> list[ShapeObject]:
        """Objects that must not be seen any more as they were."""
        return [item for item in self.source.objects if item not in self.edit.result.objects]


@dataclass(frozen=True)
class EditVerdict:
    """Both hold where, and only where, the picture shows exactly the scene that the edit fixes."""

    succeeded: bool
    """What the edit brings about is there, and what it does away with is not."""
    untouched: bool
    """All other objects are as they were, and none came from nowhere."""


def heldout_edits(count: int, seed: int = 0) -> list[EditItem]:
    """`count` edits, the types in turn, of pictures whose scene is held out before and after."""
    found = []
    for index in range(count):
        rng = generator(seed, index, _EDITS)
        kind = EDIT_TYPES[index % len(EDIT_TYPES)]
        while True:
            scene = free_scene(rng, "heldout")
            edit = make_edit(scene, rng, kind)
            if edit is not None and scene_is_held_out(edit.result):
                break
        found.append(EditItem(scene, edit))
    return found


def judge_edit(item: EditItem, picture: np.ndarray) -> EditVerdict:
    """Judge the edited picture, uint8 (H, H, 3)."""
    rest = list(find_objects(picture).objects)
    has_untouched = _take(rest, item.untouched)
    has_wanted = _take(rest, item.wanted)
    # What is left over counts against the edit where it may be what the edit left behind or put in the wrong place, and
    # else against the untouched part.
    edited = item.wanted + item.gone
    names = {known.name for known in edited}
    left_behind = [o for o in rest if o.name in names or any(_is_near(o, known) for known in edited)]
    return EditVerdict(
        succeeded=has_wanted and not left_behind,
        untouched=has_untouched and len(left_behind) == len(rest),
    )


def _take(rest: list[ShapeObject], known: Sequence[ShapeObject]) -> bool:
    """Take known objects out of those that were found; whether all were among them."""
    found = [_find(rest, item) for item in known]
    for item in found:
        if item is not None:
            rest.remove(item)
    return None not in found


def _find(rest: Sequence[ShapeObject], known: ShapeObject) -> ShapeObject | None:
    like = (o for o in rest if (o.name, o.size) == (known.name, known.size) and _is_near(o, known))
    return next(like, None)


def _is_near(a: ShapeObject, b: ShapeObject) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) <= TOLERANCE


def copies(source: Scene, picture: np.ndarray) -> bool:
    """Whether a drawing, uint8 (H, H, 3), shows the picture that it was to be an edit of, unchanged.

    A model that has learned to copy its reference keeps every untouched object and edits nothing. One that draws
    nothing at all copies nothing.
    """
    return bool(source.objects) and shows_scene(source, picture, TOLERANCE)


def edit_of(shown: Scene, item: EditItem) -> EditItem | None:
    """The same change where the picture to be edited shows something else than it should.

    Objects that change keep their place if the edit leaves it to them, and else go to the place that the edit names.
    None where the change cannot be made: an object is not there, is not the only one of its look, or its new place is
    taken.

    Args:
        shown: what a model drew in place of ``item.source``.
    """
    names = [other.name for other in shown.objects]
    rest, places = list(shown.objects), {}
    for old in item.gone:
        seen = _find(rest, old)
        if seen is None or names.count(seen.name) > 1:
            return None
        rest.remove(seen)
        places[old.x, old.y] = seen.x, seen.y
    for new in item.wanted:
        moved = new.at(*places.get((new.x, new.y), (new.x, new.y)))
        if any(_overlap(moved, other) for other in rest):
            return None
        rest.append(moved)
    return EditItem(shown, Edit(item.edit.type, item.edit.instruction, Scene(tuple(rest))))


def _overlap(a: ShapeObject, b: ShapeObject) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) < a.extent + b.extent
