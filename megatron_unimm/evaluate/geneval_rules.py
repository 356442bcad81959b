"""GenEval's rules: from a detector's boxes to right or wrong (Ghosh et al., 2023, arXiv 2310.11513, section 3 and its
released evaluation).

Any detector will do; the paper's is Mask2Former with a Swin-S backbone, its colours come from CLIP ViT-L/14. Boxes are
(x0, y0, x1, y1) in pixels, y grows downwards.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six tasks; the overall score is the mean over them, not over images."""
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Rules:
    """The published thresholds."""

    min_score: float = 0.3
    """A box counts where its score is above this ..."""
    min_score_counting: float = 0.9
    """... or above this for the task ``counting``."""
    max_objects: int = 16
    """Of a class, those with the highest scores."""
    nms_iou: float = 1.0
    """A box that overlaps a better one of its class by this much is dropped; 1 drops none."""
    position_slack: float = 0.1
    """Share of both boxes' extents by which centres must be apart before they count as apart."""


PUBLISHED = Rules()


@dataclass(frozen=True)
class Box:
    """An object that the detector found."""

    class_name: str
    score: float
    corners: tuple[float, float, float, float]
    colour: str | None = None
    """The most likely one; None where nobody looked."""


@dataclass(frozen=True)
class Group:
    """An entry of ``include`` or ``exclude``."""

    class_name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None
    """(relation, index): in that relation to the objects of the included group with that index, an earlier one."""


@dataclass(frozen=True)
class Task:
    """A line of GenEval's metadata."""

    tag: str
    prompt: str
    include: tuple[Group, ...]
    exclude: tuple[Group, ...]
    metadata: dict[str, Any]
    """The line as it was read."""


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows what its task asks for."""

    correct: bool
    reasons: tuple[str, ...]
    """What is wrong."""
    objects: dict[str, list[Box]]
    """What counted, by class, the surest first."""


def counted_objects(boxes: Sequence[Box], tag: str, rules: Rules = PUBLISHED) -> dict[str, list[Box]]:
    """The boxes that count, by class, the surest first: above the score of the task, then at most so many of a class,
    then none that overlaps a better one too much."""
    min_score = rules.min_score_counting if tag == "counting" else rules.min_score
    found: dict[str, list[Box]] = {}
    for box in sorted(boxes, key=lambda box: -box.score):
        if box.score > min_score and len(found.setdefault(box.class_name, [])) < rules.max_objects:
            found[box.class_name].append(box)
    return {name: _without_overlaps(group, rules.nms_iou) for name, group in found.items()}


def _without_overlaps(boxes: Sequence[Box], limit: float) -> list[Box]:
    kept: list[Box] = []
    for box in boxes:
        if limit >= 1 or all(overlap(box.corners, better.corners) < limit for better in kept):
            kept.append(box)
    return kept


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes; as in GenEval the last pixel belongs to a box, hence the ones."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return common / (area(*a) + area(*b) - common)


def relations(a: Sequence[float], b: Sequence[float], slack: float = PUBLISHED.position_slack) -> set[str]:
    """How box ``a`` stands to box ``b``; two relations at once where it stands diagonally, none where it is too near.

    Along each axis the distance of the centres is shortened by ``slack`` times the sum of the extents, down to zero. A
    relation holds where what is left is more than half of the distance between the centres.
    """
    box_a, box_b = (np.asarray(box, dtype=np.float64).reshape(2, 2) for box in (a, b))  # [corner, (x, y)]
    offset = box_a.mean(axis=0) - box_b.mean(axis=0)
    extents = np.abs(box_a[1] - box_a[0]) + np.abs(box_b[1] - box_b[0])
    left = np.sign(offset) * np.maximum(np.abs(offset) - slack * extents, 0)
    if np.all(np.abs(left) < 1e-3):
        return set()
    x, y = left / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, is_so in holds.items() if is_so}


def judge(task: Task, boxes: Sequence[Box], rules: Rules = PUBLISHED) -> Verdict:
    """Judge an image by its boxes.

    Every included group takes the surest boxes of its class, as many as it counts. All of them must have its colour,
    and stand in its relation to each of those that the earlier group took. An excluded group must not be reached.
    """
    objects = counted_objects(boxes, task.tag, rules)
    reasons: list[str] = []
    taken: list[list[Box] | None] = []  # None where a group was not met
    for group in task.include:
        mine = objects.get(group.class_name, [])[: group.count]
        wrong = _wrong(group, mine, taken, rules)
        taken.append(None if wrong else mine)
        reasons += [wrong] if wrong else []
    for group in task.exclude:
        number = len(objects.get(group.class_name, []))
        if number >= group.count:
            reasons.append(f"expected {group.class_name}<{group.count}, found {number}")
    return Verdict(not reasons, tuple(reasons), objects)


def _wrong(group: Group, mine: Sequence[Box], taken: Sequence[list[Box] | None], rules: Rules) -> str:
    """What keeps a group from being met by its boxes; empty where nothing does."""
    name = group.class_name
    if len(mine) < group.count:
        return f"expected {name}>={group.count}, found {len(mine)}"
    if group.colour is not None:
        number = sum(box.colour == group.colour for box in mine)
        if number < group.count:
            seen = ", ".join(sorted({str(box.colour) for box in mine}))
            return f"expected {group.colour} {name}>={group.count}, found {number}; and {seen}"
    if group.position is not None:
        relation, index = group.position
        others = taken[index]
        if others is None:
            return f"no target for {name} to be {relation}"
        for box in mine:
            for other in others:
                found = relations(box.corners, other.corners, rules.position_slack)
                if relation not in found:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(found)) or 'no relation'}"
    return ""


def summary(results: Sequence[tuple[str, bool]]) -> dict[str, float]:
    """Scores of (tag, correct) of all images: overall, the mean over the tags that occur, and each tag's mean over its
    images."""
    by_tag: dict[str, list[bool]] = {}
    for tag, correct in results:
        by_tag.setdefault(tag, []).append(correct)
    means = {tag: float(np.mean(by_tag[tag])) for tag in TAGS if tag in by_tag}
    return {"overall": float(np.mean(list(means.values())))} | means


# -- reading -----------------------------------------------------------------------------------------------------------


def task_from_metadata(line: Any) -> Task:
    """Read a line of GenEval's metadata.

    Raises:
        ValueError: what is wrong with it.
    """
    _require(isinstance(line, dict), "must be an object with tag, prompt and include")
    tag, prompt = line.get("tag"), line.get("prompt")
    _require(tag in TAGS, f"tag {tag!r} is none of {', '.join(TAGS)}")
    _require(isinstance(prompt, str) and bool(prompt.strip()), f"prompt {prompt!r} must be a text")
    include = [_group(entry, f"include[{n}]", n) for n, entry in enumerate(_list(line, "include"))]
    _require(bool(include), "include must name at least one object")
    exclude = [_group(entry, f"exclude[{n}]", 0) for n, entry in enumerate(_list(line, "exclude"))]
    return Task(tag, prompt, tuple(include), tuple(exclude), line)


def _list(line: Mapping[str, Any], name: str) -> list[Any]:
    entries = line.get(name, [])
    _require(isinstance(entries, list), f"{name} must be a list")
    return entries


def _group(entry: Any, where: str, num_earlier: int) -> Group:
    _require(isinstance(entry, dict), f"{where} must be an object with class and count")
    name, count, colour, position = (entry.get(key) for key in ("class", "count", "color", "position"))
    _require(isinstance(name, str) and bool(name), f"{where}.class {name!r} must be a name")
    _require(isinstance(count, int) and count >= 1, f"{where}.count {count!r} must be a whole number from 1")
    _require(colour is None or isinstance(colour, str), f"{where}.color {colour!r} must be a name")
    if position is None:
        return Group(name, count, colour)
    fits = (
        isinstance(position, list)
        and len(position) == 2
        and position[0] in RELATIONS
        and isinstance(position[1], int)
        and 0 <= position[1] < num_earlier
    )
    _require(
        fits,
        f"{where}.position {position!r} must be [one of {', '.join(RELATIONS)}; the index of an earlier entry, "
        f"below {num_earlier}]",
    )
    return Group(name, count, colour, (position[0], position[1]))


def box_from_dict(entry: Any) -> Box:
    """Read a detected object: class, score, box [x0, y0, x1, y1], and color, a name or scores by name.

    Raises:
        ValueError: what is wrong with it.
    """
    _require(isinstance(entry, dict), "must be an object with class, score, box and perhaps color")
    name, score, corners, colour = (entry.get(key) for key in ("class", "score", "box", "color"))
    _require(isinstance(name, str) and bool(name), f"class {name!r} must be a name")
    _require(_is_number(score) and 0 <= score <= 1, f"score {score!r} must be a number from 0 to 1")
    _require(
        isinstance(corners, list) and len(corners) == 4 and all(_is_number(number) for number in corners),
        f"box {corners!r} must be four numbers [x0, y0, x1, y1]",
    )
    x0, y0, x1, y1 = (float(number) for number in corners)
    _require(x0 <= x1 and y0 <= y1, f"box {corners!r} must have x0 <= x1 and y0 <= y1; is it x, y, width, height?")
    return Box(name, float(score), (x0, y0, x1, y1), _colour(colour))


def _colour(given: Any) -> str | None:
    if given is None or isinstance(given, str):
        return given
    _require(
        isinstance(given, dict) and bool(given) and all(_is_number(score) for score in given.values()),
        f"color {given!r} must be a name or scores by name",
    )
    return max(given, key=lambda name: given[name])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
