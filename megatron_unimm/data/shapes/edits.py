"""Edit instructions: recolour, remove, add, move, swap, and compositions of pictures. Each fixes its result."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_unimm.data.shapes.heldout import scene_is_held_out
from megatron_unimm.data.shapes.scene import (
    CELLS,
    COLOURS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    ShapeObject,
    Split,
    cell_centre,
    cell_of,
    fits,
    pair_layout,
    pick,
    sample_free_scene,
)
from megatron_unimm.data.shapes.text import at_cell, to_cell, with_article

EDIT_TYPES = ("recolour", "remove", "add", "move", "swap")


@dataclass(frozen=True)
class Edit:
    """An instruction and the picture that it asks for."""

    type: str
    instruction: str
    result: Scene


def unique_objects(scene: Scene) -> list[ShapeObject]:
    """Objects that their colour and shape single out."""
    names = [item.name for item in scene.objects]
    return [item for item in scene.objects if names.count(item.name) == 1]


def replaced(scene: Scene, old: ShapeObject, *new: ShapeObject) -> Scene:
    """The scene with `old` replaced in place (or left out)."""
    return Scene(tuple(entry for item in scene.objects for entry in (new if item is old else (item,))))


def _recolour(scene: Scene, rng: np.random.Generator) -> Edit | None:
    items = unique_objects(scene)
    if not items:
        return None
    item = pick(rng, items)
    colour = pick(rng, tuple(c for c in COLOURS if c != item.colour))
    words = pick(rng, ("Make the {} {}.", "Change the colour of the {} to {}.", "Turn the {} {}."))
    changed = ShapeObject(item.shape, colour, item.size, item.x, item.y)
    return Edit("recolour", words.format(item.name, colour), replaced(scene, item, changed))


def _remove(scene: Scene, rng: np.random.Generator) -> Edit | None:
    items = unique_objects(scene)
    if not items or len(scene.objects) < 2:
        return None
    item = pick(rng, items)
    return Edit("remove", pick(rng, ("Remove the {}.", "Delete the {}.")).format(item.name), replaced(scene, item))


def _add(scene: Scene, rng: np.random.Generator) -> Edit | None:
    look = ShapeObject(pick(rng, SHAPES), pick(rng, tuple(COLOURS)), pick(rng, tuple(SIZES)))
    cells = [cell for cell in CELLS if fits(look.at(*cell_centre(cell)), scene.objects)]
    if not cells or len(scene.objects) >= MAX_OBJECTS:
        return None
    cell = pick(rng, cells)
    words = f"Add {with_article(f'{look.size} {look.name}')} {at_cell(cell)}."
    return Edit("add", words, Scene((*scene.objects, look.at(*cell_centre(cell)))))


def _move(scene: Scene, rng: np.random.Generator) -> Edit | None:
    items = unique_objects(scene)
    if not items:
        return None
    item = pick(rng, items)
    others = [other for other in scene.objects if other is not item]
    cells = [c for c in CELLS if c != cell_of(item) and fits(item.at(*cell_centre(c)), others)]
    if not cells:
        return None
    cell = pick(rng, cells)
    return Edit("move", f"Move the {item.name} {to_cell(cell)}.", replaced(scene, item, item.at(*cell_centre(cell))))


def _swap(scene: Scene, rng: np.random.Generator) -> Edit | None:
    """Exchange the places of two objects."""
    items = unique_objects(scene)
    if len(items) < 2:
        return None
    first, second = (items[i] for i in rng.permutation(len(items))[:2])
    moved = {id(first): first.at(second.x, second.y), id(second): second.at(first.x, first.y)}
    result = tuple(moved.get(id(item), item) for item in scene.objects)
    rest = [item for item in scene.objects if id(item) not in moved]
    if not all(fits(item, [*rest, *(o for o in moved.values() if o is not item)]) for item in moved.values()):
        return None
    return Edit("swap", f"Swap the {first.name} and the {second.name}.", Scene(result))


_MAKERS: dict[str, Callable[[Scene, np.random.Generator], Edit | None]] = {
    "recolour": _recolour,
    "remove": _remove,
    "add": _add,
    "move": _move,
    "swap": _swap,
}


def make_edit(scene: Scene, rng: np.random.Generator, kind: str) -> Edit | None:
    """An edit of a kind, or None where the scene allows no unambiguous one."""
    return _MAKERS[kind](scene, rng)


def sample_edit(scene: Scene, rng: np.random.Generator, split: Split = "train") -> Edit | None:
    """An edit of a random kind whose result belongs to the split, or None where twelve tries found none."""
    for _ in range(12):
        edit = make_edit(scene, rng, pick(rng, EDIT_TYPES))
        if edit is not None and scene_is_held_out(edit.result) == (split == "heldout"):
            return edit
    return None


@dataclass(frozen=True)
class Composition:
    """Pictures of one object each, an instruction about two of them, and the picture of these objects."""

    sources: tuple[Scene, ...]
    instruction: str
    result: Scene


def sample_composition(rng: np.random.Generator, split: Split = "train") -> Composition:
    """Bring the objects of two pictures together in a fixed layout; the result belongs to the split."""
    while True:
        sources = sample_free_scene(rng, 1), sample_free_scene(rng, 1)
        relation = pick(rng, (*RELATIONS, None))
        first, second = (scene.objects[0] for scene in sources)
        result = pair_layout(first, second, relation or "left of", rng)
        if scene_is_held_out(result) == (split == "heldout"):
            break
    if relation is None:
        return Composition(sources, "Put the objects of both images side by side.", result)
    words = f"Put the object of the first image {relation} the object of the second image."
    return Composition(sources, words, result)


MIN_GIVEN, MAX_GIVEN = 3, 12
"""Pictures that a choice is made from; MMCORE (figure 4) edits with more than ten."""
_ORDINALS = ("first", "second", "third", "fourth")


def sample_choice(rng: np.random.Generator, split: Split = "train", num_given: int | None = None) -> Composition:
    """Bring the objects of two out of several pictures together in a fixed layout; the result belongs to the split.

    Args:
        num_given: pictures, each of an object of another look; 3 to 12, drawn uniformly where None.
    """
    count = num_given if num_given is not None else int(rng.integers(MIN_GIVEN, MAX_GIVEN + 1))
    assert MIN_GIVEN <= count <= MAX_GIVEN, f"a choice among {count} pictures"
    while True:
        sources = _different_looks(rng, count)
        first, second = (int(place) for place in rng.permutation(count)[:2])
        relation = pick(rng, (*RELATIONS, None))
        chosen = sources[first].objects[0], sources[second].objects[0]
        result = pair_layout(*chosen, relation or "left of", rng)
        if scene_is_held_out(result) == (split == "heldout"):
            return Composition(sources, _choice_words(rng, first, second, relation), result)


def _different_looks(rng: np.random.Generator, count: int) -> tuple[Scene, ...]:
    """Pictures of one object each, no two of the same colour and shape."""
    found: dict[str, Scene] = {}
    while len(found) < count:
        scene = sample_free_scene(rng, 1)
        found.setdefault(scene.objects[0].name, scene)
    return tuple(found.values())


def _choice_words(rng: np.random.Generator, first: int, second: int, relation: str | None) -> str:
    """The instruction, which names pictures by their number, counted from 1, or the first four by their ordinal."""
    by_ordinal = max(first, second) < len(_ORDINALS) and rng.random() < 0.5
    if by_ordinal:
        a, b = (f"the {_ORDINALS[place]} image" for place in (first, second))
    else:
        a, b = (f"image {place + 1}" for place in (first, second))
    if relation is not None:
        return f"{pick(rng, ('Put', 'Draw'))} the object of {a} {relation} the object of {b}."
    if by_ordinal:
        return f"Put the objects of {a} and {b} side by side."
    return f"Put the objects of images {first + 1} and {second + 1} side by side."
