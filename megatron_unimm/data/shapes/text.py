"""Words of the Shapes world: names of objects, captions of scenes, and the ways in which people ask for a picture."""

from collections.abc import Sequence

import numpy as np

from megatron_unimm.data.shapes.scene import Scene, ShapeObject, cell_of, clear_direction, pick

NUMBERS = ("zero", "one", "two", "three", "four", "five")
IMAGE_MARK = "<image>"

PROMPT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "polite": (
        "I'd like to see a drawing of {}.",
        "Please draw {} for me.",
        "I would love a picture of {}, please.",
        "Please make an image of {}.",
    ),
    "command": (
        "Generate an image of {}.",
        "Draw {}.",
        "Create a picture of {}.",
        "Show {}.",
    ),
    "question": (
        "Can you produce a picture of {}?",
        "Could you draw {}?",
        "Can you make an image of {}?",
        "Would you show me {}?",
    ),
    "bare": ("{}",),
}
"""The three styles of prompts of ORION's appendix A.2, and the caption alone, as GenEval asks."""

BRIEF_REQUESTS = ("Describe the image briefly.", "What is in the image?", "Give a short caption.")
DETAILED_REQUESTS = ("Describe the image in detail.", "What is where in the image?")


def with_article(words: str) -> str:
    """``red circle`` -> ``a red circle``, ``orange circle`` -> ``an orange circle``."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(word: str) -> str:
    """Plural of a shape's name."""
    return f"{word}es" if word.endswith("s") else f"{word}s"


def counted(words: str, count: int) -> str:
    """``one circle``, ``three circles``."""
    return f"{NUMBERS[count]} {words if count == 1 else plural(words)}"


def joined(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def request(caption: str, rng: np.random.Generator) -> str:
    """Ask for a picture of `caption` in one of the three styles."""
    style = pick(rng, tuple(PROMPT_TEMPLATES))
    return pick(rng, PROMPT_TEMPLATES[style]).format(caption)


def at_cell(cell: str) -> str:
    """``at the top left``, ``in the centre``."""
    return f"in the {cell}" if cell == "centre" else f"at the {cell}"


def to_cell(cell: str) -> str:
    """``to the top left``."""
    return f"to the {cell}"


def reading_order(scene: Scene) -> list[ShapeObject]:
    """Objects by rows of the 3 x 3 places, then from left to right."""
    return sorted(scene.objects, key=lambda o: (min(int(o.y * 3), 2), o.x))


def detailed_caption(scene: Scene) -> str:
    """Every object with its size and place: ``a large red circle at the left and a small red cross in the centre``."""
    return joined([f"{with_article(f'{o.size} {o.name}')} {at_cell(cell_of(o))}" for o in reading_order(scene)])


def brief_caption(scene: Scene) -> str:
    """The caption that a text-to-image prompt would use.

    Two objects of different look that stand diagonally get the detailed caption: "a and b" promises side by side.
    """
    objects = reading_order(scene)
    groups: dict[str, int] = {}
    for item in objects:
        groups[item.name] = groups.get(item.name, 0) + 1
    if len(objects) == 2 and len(groups) == 2:
        relation = clear_direction(objects[0], objects[1])
        if relation is None:
            return detailed_caption(scene)
        return f"{with_article(objects[0].name)} {relation} {with_article(objects[1].name)}"
    return joined([with_article(name) if count == 1 else counted(name, count) for name, count in groups.items()])
