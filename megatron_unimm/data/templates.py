"""Wraps captions and edit instructions in requests: polite, direct, or a question (ORION, appendix A.2)."""

import hashlib

import numpy as np

# The three styles; the slot is an article-like phrase ("a red circle") or an instruction ("make the circle blue").
IMAGE_TEMPLATES: tuple[tuple[str, ...], ...] = (
    (
        "I'd like to see a picture of {}.",
        "Please draw {} for me.",
        "I would love an image that shows {}.",
        "Kindly create an illustration of {}.",
        "It would be great to have an image of {}.",
        "If you don't mind, paint {}.",
    ),
    (
        "Generate an image of {}.",
        "Draw {}.",
        "Create a picture showing {}.",
        "Render {}.",
        "Show me {}.",
        "Make an image with {}.",
    ),
    (
        "Can you produce a picture of {}?",
        "Could you draw {}?",
        "Would you make an image of {}?",
        "What would {} look like?",
        "May I see an image of {}?",
        "Are you able to paint {}?",
    ),
)
EDIT_TEMPLATES: tuple[tuple[str, ...], ...] = (
    (
        "Please {}.",
        "I'd like you to {}.",
        "It would be great if you could {}.",
        "In this picture, kindly {}.",
    ),
    (
        "{}.",
        "Edit the image: {}.",
        "Change this picture: {}.",
        "Take this image and {}.",
    ),
    (
        "Can you {}?",
        "Could you edit this image and {}?",
        "Would you {}?",
        "Is it possible for you to {}?",
    ),
)
# Words that lose their capital inside a sentence; a name such as "Paris" keeps it.
ARTICLES = ("a", "an", "the", "some", "several", "many", "there")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LEADING_WORDS = frozenset(ARTICLES + NUMBERS)


def template_rng(seed: int, sample_id: str, epoch: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: the same on every rank and at every layout."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{sample_id}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def fill_template(caption: str, rng: np.random.Generator) -> str:
    """A request for an image of what the caption describes."""
    slot = caption.strip().rstrip(".").rstrip()
    first = slot.split(" ", 1)[0]
    if first.lower() in LEADING_WORDS:
        slot = first.lower() + slot[len(first) :]
    return _pick(IMAGE_TEMPLATES, rng).format(slot)


def fill_edit_template(instruction: str, rng: np.random.Generator) -> str:
    """A request to change an image; the instruction is an imperative ("make the circle blue")."""
    slot = instruction.strip().rstrip(".").rstrip()
    text = _pick(EDIT_TEMPLATES, rng).format(slot[:1].lower() + slot[1:])
    return text[:1].upper() + text[1:]


def _pick(templates: tuple[tuple[str, ...], ...], rng: np.random.Generator) -> str:
    """Draws the style first, so that each has the same share whatever its number of templates."""
    style = templates[rng.integers(len(templates))]
    return style[rng.integers(len(style))]
