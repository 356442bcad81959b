"""What a Shapes picture contains: objects on a square canvas, and where they may stand.

Units: every coordinate and extent is a fraction of the canvas side (0 = left or top edge, 1 = right or bottom edge), so
a scene can be drawn at any size. The numbers are written as pixels of the 64-pixel default canvas divided by 64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Split = Literal["train", "heldout"]

CANVAS = 64
"""Default side of the canvas in pixels."""
BACKGROUND = (235, 235, 235)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 50, 47),
    "orange": (245, 130, 32),
    "yellow": (240, 200, 20),
    "green": (60, 160, 60),
    "blue": (45, 100, 220),
    "purple": (140, 70, 180),
    "pink": (240, 130, 180),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, float] = {"small": 6 / 64, "large": 10 / 64}
"""Half of the side of an object's bounding box."""
CROSS_ARM = 0.36
"""Half width of a cross's arm, as a share of its half extent."""
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

BORDER = 2 / 64
"""Least distance from an object to the edge of the canvas."""
GAP = 3 / 64
"""Least distance between the bounding boxes of two objects."""
JITTER = 1 / 64
"""Largest displacement along each axis that a caption-fixed layout allows."""
CLEAR_RATIO = 1.5
"""A relation is clear to the eye where the larger offset is at least this many times the smaller one."""
MAX_OBJECTS = 5

CELLS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
"""Names of the 3 x 3 places, in reading order."""
CELL_CENTRES = (13 / 64, 32 / 64, 51 / 64)
"""Centres of the places along one axis."""


@dataclass(frozen=True)
class ShapeObject:
    """One object; (x, y) is the centre of its bounding box."""

    shape: str
    colour: str
    size: str
    x: float = 0.5
    y: float = 0.5

    @property
    def extent(self) -> float:
        """Half of the side of the bounding box."""
        return SIZES[self.size]

    @property
    def name(self) -> str:
        """Colour and shape, e.g. ``red circle``."""
        return f"{self.colour} {self.shape}"

    def at(self, x: float, y: float) -> "ShapeObject":
        """The same object with its centre elsewhere."""
        return ShapeObject(self.shape, self.colour, self.size, x, y)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; positions rounded to 1e-4 of the side."""
        return {
            "shape": self.shape,
            "colour": self.colour,
            "size": self.size,
            "x": round(self.x, 4),
            "y": round(self.y, 4),
        }


@dataclass(frozen=True)
class Scene:
    """A picture: objects that neither overlap nor touch the border."""

    objects: tuple[ShapeObject, ...]

    def to_list(self) -> list[dict[str, Any]]:
        """Plain JSON types, the inverse of `scene_from_list`."""
        return [item.to_dict() for item in self.objects]


def scene_from_list(items: Sequence[dict[str, Any]]) -> Scene:
    """Read what `Scene.to_list` wrote.

    Raises:
        ValueError: an unknown shape, colour or size.
    """
    objects = tuple(ShapeObject(i["shape"], i["colour"], i["size"], float(i["x"]), float(i["y"])) for i in items)
    for item in objects:
        if item.shape not in SHAPES or item.colour not in COLOURS or item.size not in SIZES:
            raise ValueError(f"no such object in the Shapes world: {item}")
    return Scene(objects)


def direction(a: ShapeObject, b: ShapeObject) -> str:
    """Which of the four relations describes best where `a` stands as seen from `b`."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def clear_direction(a: ShapeObject, b: ShapeObject) -> str | None:
    """Like `direction`, or None where the two stand too diagonally for a fair question."""
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    if max(dx, dy) < CLEAR_RATIO * min(dx, dy):
        return None
    return direction(a, b)


def cell_of(item: ShapeObject) -> str:
    """Name of the 3 x 3 place that holds the centre of `item`."""
    return CELLS[3 * min(int(item.y * 3), 2) + min(int(item.x * 3), 2)]


def cell_centre(cell: str) -> tuple[float, float]:
    """Centre (x, y) of a named place."""
    row, column = divmod(CELLS.index(cell), 3)
    return CELL_CENTRES[column], CELL_CENTRES[row]


def fits(item: ShapeObject, others: Sequence[ShapeObject]) -> bool:
    """Whether `item` keeps its distance from the border and from `others`."""
    reach = BORDER + item.extent
    if not (reach <= item.x <= 1 - reach and reach <= item.y <= 1 - reach):
        return False
    return all(
        max(abs(item.x - other.x), abs(item.y - other.y)) >= item.extent + other.extent + GAP for other in others
    )


def pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    """A uniformly drawn item (much faster than `Generator.choice`)."""
    return items[int(rng.integers(len(items)))]


def _sample_look(rng: np.random.Generator, before: Sequence[ShapeObject]) -> tuple[str, str, str]:
    """Shape, colour and size; often repeats those before it, so that counts and unique names are both common."""
    shape, colour = pick(rng, SHAPES), pick(rng, tuple(COLOURS))
    if before:
        repeat_shape, repeat_colour = rng.random(2) < 0.3
        shape = pick(rng, before).shape if repeat_shape else shape
        colour = pick(rng, before).colour if repeat_colour else colour
    return shape, colour, pick(rng, tuple(SIZES))


def _place(rng: np.random.Generator, look: tuple[str, str, str], before: Sequence[ShapeObject]) -> ShapeObject | None:
    """A free place for an object, or None where twenty tries found none."""
    reach = BORDER + SIZES[look[2]]
    for x, y in (reach + (1 - 2 * reach) * rng.random((20, 2))).tolist():
        item = ShapeObject(*look, x, y)
        if fits(item, before):
            return item
    return None


def sample_free_scene(rng: np.random.Generator, num_objects: int | None = None) -> Scene:
    """Objects of random looks at random places.

    Args:
        rng: source of all randomness.
        num_objects: how many (1 to 5); drawn uniformly where None. A crowded canvas may end up with fewer.
    """
    wanted = num_objects if num_objects is not None else int(rng.integers(1, MAX_OBJECTS + 1))
    if not 1 <= wanted <= MAX_OBJECTS:
        raise ValueError(f"a scene holds 1 to {MAX_OBJECTS} objects, not {wanted}")
    objects: list[ShapeObject] = []
    for _ in range(wanted):
        item = _place(rng, _sample_look(rng, objects), objects)
        if item is not None:
            objects.append(item)
    return Scene(tuple(objects))


NEAR, MIDDLE, FAR = 18 / 64, 32 / 64, 46 / 64
PAIR_PLACES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "left of": ((NEAR, MIDDLE), (FAR, MIDDLE)),
    "right of": ((FAR, MIDDLE), (NEAR, MIDDLE)),
    "above": ((MIDDLE, NEAR), (MIDDLE, FAR)),
    "below": ((MIDDLE, FAR), (MIDDLE, NEAR)),
}
"""Where the first and the second object of a relation stand."""
COUNT_PLACES: tuple[tuple[tuple[float, float], ...], ...] = (
    ((MIDDLE, MIDDLE),),
    ((NEAR, MIDDLE), (FAR, MIDDLE)),
    ((NEAR, NEAR), (FAR, NEAR), (MIDDLE, FAR)),
    ((NEAR, NEAR), (FAR, NEAR), (NEAR, FAR), (FAR, FAR)),
)
"""Where one to four equal objects stand."""


def jittered(objects: Sequence[ShapeObject], rng: np.random.Generator | None) -> Scene:
    """The objects as a scene, each moved by at most `JITTER` along each axis (not at all without a generator)."""
    if rng is None:
        return Scene(tuple(objects))
    shifts = rng.uniform(-JITTER, JITTER, (len(objects), 2)).tolist()
    return Scene(tuple(o.at(o.x + dx, o.y + dy) for o, (dx, dy) in zip(objects, shifts, strict=True)))


def pair_layout(a: ShapeObject, b: ShapeObject, relation: str, rng: np.random.Generator | None = None) -> Scene:
    """The fixed layout of "`a` `relation` `b`"."""
    place_a, place_b = PAIR_PLACES[relation]
    return jittered([a.at(*place_a), b.at(*place_b)], rng)


def count_layout(item: ShapeObject, count: int, rng: np.random.Generator | None = None) -> Scene:
    """The fixed layout of one to four equal objects.

    Raises:
        ValueError: another count.
    """
    if not 1 <= count <= len(COUNT_PLACES):
        raise ValueError(f"fixed patterns exist for 1 to {len(COUNT_PLACES)} objects, not {count}")
    return jittered([item.at(*place) for place in COUNT_PLACES[count - 1]], rng)
