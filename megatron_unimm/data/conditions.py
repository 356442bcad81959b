"""What a frozen VLM says of conversations, computed beforehand: its last hidden states at the words of each picture to
be drawn, and its visual latents at the queries of each. Neither its images are decoded then, nor is it run.

A folder holds two caches as of ``data/features.py``, since the two are of different widths::

    words/      hidden states [V, H] of all words of a conversation, picture by picture
    visual/     visual latents [Q, D], likewise

Keys are hashes of what the VLM reads, so that a conversation that changes is not found.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_unimm.data.decode.interface import ImageRequest
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.features import STORED, FeatureStore, Key, image_key, key_of
from megatron_unimm.data.plan import BadSample, Laid
from megatron_unimm.data.queries import QueryTokens
from megatron_unimm.errors import DataError

WORDS, VISUAL = "words", "visual"
"""Folders of the two."""


def condition_key(layout: QueryTokens, read: Sequence[ImageRequest]) -> Key:
    """128 bits that stand for a conversation as the VLM reads it: tokens and their positions, where its queries and the
    words of each picture stand, and the images that are read at their sizes."""
    digest = hashlib.blake2b(digest_size=16)
    for numbers in (layout.tokens.input_ids, layout.tokens.position_ids, layout.query_index, *layout.text_index):
        digest.update(repr(numbers.shape).encode())
        digest.update(np.ascontiguousarray(numbers, dtype="<i8").data)
    for request in read:
        digest.update(repr(image_key(request)).encode())
    return key_of(digest)


@dataclass(frozen=True)
class Condition:
    """What the VLM says of one conversation, in the type of its store; zeros where an image that it reads is broken."""

    words: np.ndarray
    """``[V, H]``."""
    visual: np.ndarray
    """``[Q, D]``."""
    broken: list[BadSample]


class ConditionStore:
    """Looks conditions up.

    Raises:
        DataError: the folder is no finished cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.words = FeatureStore(folder / WORDS)
        self.visual = FeatureStore(folder / VISUAL)

    def get(self, key: Key, layout: QueryTokens, laid: Laid) -> Condition:
        """Of the conversation that ``laid`` holds, laid out as ``layout``.

        Raises:
            DataError: it is not there.
        """
        words, visual = self.words.get(key), self.visual.get(key)
        if words is None or visual is None:
            what = f"lacks {laid.where}, or has it as it was before; run unimm data cache again"
            raise DataError(str(self.folder), what)
        broken = []
        if not len(visual):  # The cache's maker could not decode an image of it.
            error = SampleError(laid.where, "has an image that could not be decoded", "unreadable image")
            broken.append(BadSample(laid.draw.source, error))
            words = _zeros(sum(map(len, layout.text_index)), self.words)
            visual = _zeros(len(layout.query_index), self.visual)
        return Condition(words, visual, broken)


def _zeros(count: int, store: FeatureStore) -> np.ndarray:
    return np.zeros((count, store.meta.width), STORED[store.meta.dtype])
