"""Reads a picture back: which objects it holds, and whether they are what a prompt asked for.

Legend  H, W pixels of the image; C colours of the palette.
Method  A pixel of an anti-aliased object lies on the line from the background to the object's colour. So each pixel is
        given the colour whose line is nearest, and counts as covered where it has come at least half way. Connected
        covered pixels of one colour are an object. Its area and centroid fix, for each shape, one outline of that
        shape; the outline that fits best names the shape. Nothing here needs sharp edges, so it also holds after JPEG,
        noise and a VAE round trip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_unimm.data.shapes.prompts import PROMPT_KINDS, Prompt, Requirement
from megatron_unimm.data.shapes.scene import (
    BACKGROUND,
    COLOURS,
    CROSS_ARM,
    SHAPES,
    SIZES,
    Scene,
    ShapeObject,
    direction,
)

COVERED = 0.5
"""Share of the way from the background to a colour from which a pixel counts as covered."""
MIN_AREA = 0.007
"""Smaller specks, as a share of the canvas, are not objects. The smallest object (a small triangle) covers 0.0176."""
AREA_PER_EXTENT = {
    "circle": np.pi,
    "square": 4.0,
    "triangle": 2.0,
    "cross": 4 * (2 * CROSS_ARM - CROSS_ARM**2),
}
"""Area of a shape of half extent 1."""
CENTROID_BELOW = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "cross": 0.0}
"""How far the centroid lies below the middle of the bounding box, in half extents."""
SIZE_LIMIT = (SIZES["small"] * SIZES["large"]) ** 0.5

_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)  # [C, 3]
_LINES = _PALETTE - np.array(BACKGROUND, dtype=np.float32)  # [C, 3] from the background to each colour
_TO_LUMA = np.array([[0.299, 0.587, 0.114], [-0.068, -0.132, 0.2], [0.2, -0.168, -0.032]], dtype=np.float32)
"""RGB to luma and 0.4 of the chroma: outlines are read mostly in luma, because JPEG halves the resolution of chroma."""
_NUDGES = np.array(
    [(y, x, r) for y in (-0.6, 0, 0.6) for x in (-0.6, 0, 0.6) for r in (0.93, 1.0, 1.07)],
    dtype=np.float32,
)
"""Corrections (y, x in pixels, factor of the extent) that are tried when an outline is fitted."""
MARGIN = 1
"""Pixels around a component that still belong to it: its anti-aliased rim, where it is less than half covered."""


def _colour_map(pixels: np.ndarray) -> np.ndarray:
    """Index of the colour that covers each pixel, -1 for background; uint8 [H, W, 3] -> int [H, W]."""
    offset = pixels.reshape(-1, 3).astype(np.float32) - np.array(BACKGROUND, dtype=np.float32)
    lengths = (_LINES**2).sum(1)
    share = np.clip(offset @ _LINES.T / lengths, 0.0, 1.0)  # [H*W, C]
    distance = (offset**2).sum(1, keepdims=True) - 2 * share * (offset @ _LINES.T) + share**2 * lengths
    nearest = distance.argmin(1)
    covered = share[np.arange(len(nearest)), nearest] >= COVERED
    return np.where(covered, nearest, -1).reshape(pixels.shape[:2])


def _smoothed(colours: np.ndarray) -> np.ndarray:
    """Give each pixel the most frequent value around it (3 x 3, its own counting one and a half); int [H, W]."""
    height, width = colours.shape
    present = np.unique(colours)
    padded = np.pad(colours, 1, mode="edge")
    votes = np.empty((len(present), height, width), dtype=np.float32)
    for row, value in enumerate(present):
        same = (padded == value).astype(np.float32)
        columns = same[:-2] + same[1:-1] + same[2:]
        votes[row] = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 0.5 * same[1:-1, 1:-1]
    return present[votes.argmax(0)]


def _runs(colours: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Horizontal runs (row, start, stop, colour) of equal, covered pixels, in reading order."""
    height, width = colours.shape
    change = np.ones((height, width + 1), dtype=bool)
    change[:, 1:-1] = colours[:, 1:] != colours[:, :-1]
    rows, edges = np.nonzero(change)
    runs = []
    for row, start, next_row, stop in zip(rows[:-1], edges[:-1], rows[1:], edges[1:], strict=True):
        if row == next_row and colours[row, start] >= 0:
            runs.append((int(row), int(start), int(stop), int(colours[row, start])))
    return runs


def _components(colours: np.ndarray) -> list[list[tuple[int, int, int, int]]]:
    """Runs grouped into 4-connected components of one colour (union-find over overlapping runs of adjacent rows)."""
    runs = _runs(colours)
    parent = list(range(len(runs)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    first_above = 0
    for index, (row, start, stop, colour) in enumerate(runs):
        while runs[first_above][0] < row - 1:
            first_above += 1
        for above in range(first_above, index):
            above_row, above_start, above_stop, above_colour = runs[above]
            if above_row == row:
                break
            if above_colour == colour and above_start < stop and start < above_stop:
                parent[root(above)] = root(index)
    groups: dict[int, list[tuple[int, int, int, int]]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(root(index), []).append(run)
    return list(groups.values())


def _outline(shape: str, dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Anti-aliased coverage (0 to 1) of a shape of half extent r, at offsets (dx, dy) from the middle of its box.

    All in pixels; the arguments broadcast. One minus the distance to the nearest edge, clipped, is the coverage of a
    pixel that a straight edge cuts, near enough.
    """
    if shape == "circle":
        inside = r - np.sqrt(dx**2 + dy**2)
    elif shape == "square":
        inside = r - np.maximum(abs(dx), abs(dy))
    elif shape == "triangle":
        inside = np.minimum(r - dy, (dy + r - 2 * abs(dx)) / np.sqrt(5.0))
    else:
        low, high = np.minimum(abs(dx), abs(dy)), np.maximum(abs(dx), abs(dy))
        inside = np.minimum(r - high, CROSS_ARM * r - low)
    return np.clip(inside + 0.5, 0.0, 1.0)


def _coverage(pixels: np.ndarray, colour: int) -> np.ndarray:
    """How far each pixel has come from the background to a colour, 0 to 1; uint8 [H, W, 3] -> float [H, W]."""
    line = _TO_LUMA @ _LINES[colour]
    offset = (pixels.astype(np.float32) - np.array(BACKGROUND, dtype=np.float32)) @ _TO_LUMA.T
    return np.clip(offset @ line / (line @ line), 0.0, 1.0)


def _classify(coverage: np.ndarray) -> tuple[str, float, float, float]:
    """Shape, middle (x, y) and half extent, in pixels, of the one object in a crop; float [H, W]."""
    area = float(coverage.sum())
    rows, columns = np.arange(coverage.shape[0]) + 0.5, np.arange(coverage.shape[1]) + 0.5
    centre_x, centre_y = float(coverage.sum(0) @ columns) / area, float(coverage.sum(1) @ rows) / area
    best = ("", np.inf, 0.0, 0.0, 0.0)
    for shape in SHAPES:
        r = float(np.sqrt(area / AREA_PER_EXTENT[shape]))
        y = centre_y - CENTROID_BELOW[shape] * r + _NUDGES[:, 0]  # [T] tries
        x = centre_x + _NUDGES[:, 1]
        dx, dy = columns[None, None, :] - x[:, None, None], rows[None, :, None] - y[:, None, None]
        errors = ((_outline(shape, dx, dy, r * _NUDGES[:, 2, None, None]) - coverage) ** 2).sum((1, 2))
        least = int(errors.argmin())
        if errors[least] < best[1]:
            best = (shape, float(errors[least]), float(x[least]), float(y[least]), r * float(_NUDGES[least, 2]))
    return best[0], best[2], best[3], best[4]


def find_objects(image: Image.Image | np.ndarray) -> Scene:
    """The objects that a picture shows, largest first. Their places and sizes are measured.

    Args:
        image: RGB, square, any side; as an array uint8 [H, W, 3].
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    side = pixels.shape[0]
    names = tuple(COLOURS)
    found: list[tuple[int, ShapeObject]] = []
    for runs in _components(_smoothed(_colour_map(pixels))):
        area = sum(stop - start for _, start, stop, _ in runs)
        if area < MIN_AREA * side * side:
            continue
        top, bottom = min(run[0] for run in runs), max(run[0] for run in runs)
        left, right = min(run[1] for run in runs), max(run[2] for run in runs)
        top, left = max(top - MARGIN, 0), max(left - MARGIN, 0)
        crop = pixels[top : bottom + 1 + MARGIN, left : right + MARGIN]
        shape, x, y, r = _classify(_coverage(crop, runs[0][3]))
        x, y = x + left, y + top
        size = "small" if r / side < SIZE_LIMIT else "large"
        found.append((area, ShapeObject(shape, names[runs[0][3]], size, x / side, y / side)))
    found.sort(key=lambda entry: -entry[0])
    return Scene(tuple(item for _, item in found))


def _meets(item: ShapeObject, wanted: Requirement) -> bool:
    return item.shape == wanted.shape and wanted.colour in (None, item.colour) and wanted.size in (None, item.size)


def _assignments(objects: Sequence[ShapeObject], prompt: Prompt) -> list[list[list[ShapeObject]]]:
    """Every way to deal out all objects to the one or two requirements such that each gets what it asks for."""
    first = prompt.include[0]
    if len(prompt.include) == 1:
        whole = len(objects) == first.count and all(_meets(item, first) for item in objects)
        return [[list(objects)]] if whole else []
    second = prompt.include[1]
    if len(objects) != 2:
        return []
    return [[[a], [b]] for a, b in (objects, objects[::-1]) if _meets(a, first) and _meets(b, second)]


def _placed(groups: Sequence[Sequence[ShapeObject]], prompt: Prompt) -> bool:
    for wanted, group in zip(prompt.include, groups, strict=True):
        if wanted.position is not None:
            relation, other = wanted.position
            if not all(direction(a, b) == relation for a in group for b in groups[other]):
                return False
    return True


def scene_satisfies(prompt: Prompt, scene: Scene) -> bool:
    """Whether a scene holds what the prompt asks for, where it asks for it, and nothing else."""
    return any(_placed(groups, prompt) for groups in _assignments(scene.objects, prompt))


def is_correct(prompt: Prompt, image: Image.Image | np.ndarray) -> bool:
    """Whether a picture shows what the prompt asks for."""
    return scene_satisfies(prompt, find_objects(image))


def shows_scene(scene: Scene, image: Image.Image | np.ndarray, tolerance: float = 4 / 64) -> bool:
    """Whether a picture shows exactly these objects, each of its size and within `tolerance` of its place.

    The tolerance holds along both axes, in shares of the side. This judges edits, which fix the result.
    """
    rest = list(find_objects(image).objects)
    if len(rest) != len(scene.objects):
        return False
    for wanted in scene.objects:
        matches = [
            item
            for item in rest
            if (item.name, item.size) == (wanted.name, wanted.size)
            and max(abs(item.x - wanted.x), abs(item.y - wanted.y)) <= tolerance
        ]
        if not matches:
            return False
        rest.remove(matches[0])
    return True


@dataclass(frozen=True)
class Score:
    """Share of right pictures by kind; `overall` is the mean over the kinds that occur."""

    by_kind: dict[str, float]
    counts: dict[str, int]

    @property
    def overall(self) -> float:
        return sum(self.by_kind.values()) / len(self.by_kind)


def score(prompts: Sequence[Prompt], images: Sequence[Image.Image | np.ndarray]) -> Score:
    """Judge one picture for each prompt.

    Raises:
        ValueError: numbers of prompts and pictures differ, or there are none.
    """
    if len(prompts) != len(images) or not prompts:
        raise ValueError(f"one picture for each prompt, please: {len(prompts)} prompts, {len(images)} pictures")
    right: dict[str, list[bool]] = {}
    for prompt, image in zip(prompts, images, strict=True):
        right.setdefault(prompt.kind, []).append(is_correct(prompt, image))
    kinds = [kind for kind in PROMPT_KINDS if kind in right]
    return Score({k: sum(right[k]) / len(right[k]) for k in kinds}, {k: len(right[k]) for k in kinds})
