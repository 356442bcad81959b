"""What sees what in an MMDiT row: the tokens of a row described in one table, and the rule of each kind of attention.

A row has two streams, one laid behind the other: ``[text stream of all samples | image stream of all samples]``, in all
T = T_text + T_image tokens. A sample may hold several frames (the images of an interleaved document).

- ``joint``: every token of a sample sees every token of the sample.
- ``image``: the same, among the tokens of the image stream only (the second attention of SD3.5).
- ``block_causal``: teacher forcing over all frames in one pass (MMCORE section 3.2, figure 6). Each frame is there
  twice: noisy, to be denoised, and clean, to be looked back at; conditions are its text and visual latents.
- ``image_block_causal``: the same, among the tokens of the image stream only. Plain ``image`` would show noisy tokens
  the clean ones of their own frame.
- ``cross``: tokens of the image stream see those of the text stream, of their own frame (SANA).

``block_causal`` on two frames, row sees column; c condition, n noisy, x clean, the digit is the frame:

         c0 c1 n0 x0 n1 x1
    c0  [[1  0  1  0  0  0]
    c1   [0  1  0  1  1  0]
    n0   [1  0  1  0  0  0]
    x0   [0  0  0  1  0  0]
    n1   [0  1  0  1  1  0]
    x1   [0  0  0  1  0  1]]

A condition may not see the clean tokens of its own frame: the noisy tokens, which see the condition, would read from it
the image that they are to find. A clean token may not see conditions, not even its own frame's: later frames, which see
the clean token, would see through it the visual latents of earlier frames, which the paper keeps out of the context.

What the paper compares with, a context with the visual latents of earlier frames in it, is a role of these tokens,
``SHARED``: the noisy tokens and conditions of later frames see them. Such a token carries its own frame: the noisy
tokens, its other conditions, and the clean frames before it, that is a blurred view of what later frames see clean
anyway. Still nothing of a frame's own clean tokens, or of those of later frames, reaches its noisy ones; clean tokens
see no shared ones either.

Padding sees nothing and is seen by nothing, whatever the kind.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

IMAGE_KINDS = ("image", "image_block_causal")
BLOCK_CAUSAL_KINDS = ("block_causal", "image_block_causal")
CROSS = "cross"
KINDS = ("joint", "image", *BLOCK_CAUSAL_KINDS, CROSS)


class Role(IntEnum):
    """What a token is to its frame."""

    CONDITION = 0
    NOISY = 1
    CLEAN = 2
    PADDING = 3
    SHARED = 4
    """A condition that later frames see too."""


class Traits(NamedTuple):
    """All that the rules ask about tokens; numpy arrays or tensors of one shape, the rules using only the operators
    that both have."""

    sample: Any
    frame: Any
    is_clean: Any
    """bool, as all that follow. Not the role: torch.compile takes a tensor to differ from every member of an enum."""
    is_shared: Any
    is_padding: Any
    in_image: Any
    """Of the image stream?"""

    def at(self, index: Any) -> "Traits":
        """Of the tokens of an index array, in its shape."""
        return Traits(*(values[index] for values in self))


@dataclass(frozen=True)
class TokenTable:
    """The tokens of one row."""

    sample: np.ndarray
    """int64 ``[T]``"""
    frame: np.ndarray
    """int64 ``[T]``, counts up inside a sample"""
    role: np.ndarray
    """int64 ``[T]``, see :class:`Role`"""
    num_text: int
    """The first ``num_text`` tokens are the text stream."""

    def __post_init__(self) -> None:
        assert self.sample.shape == self.frame.shape == self.role.shape == (len(self.sample),)
        assert 0 <= self.num_text <= len(self.sample)

    def __len__(self) -> int:
        return len(self.sample)

    def image_stream(self) -> "TokenTable":
        """The table of the image stream alone."""
        rest = slice(self.num_text, None)
        return TokenTable(self.sample[rest], self.frame[rest], self.role[rest], num_text=0)

    def traits(self) -> Traits:
        """Of every token: ``[T]`` each."""
        is_clean, is_shared, is_padding = (self.role == role for role in (Role.CLEAN, Role.SHARED, Role.PADDING))
        return Traits(self.sample, self.frame, is_clean, is_shared, is_padding, np.arange(len(self)) >= self.num_text)


def sees(kind: str, query: Traits, key: Traits) -> Any:
    """The rule of each kind, for traits that broadcast against each other; numpy or torch.

    This is the one place where it is written: every kernel's lowering comes from here.
    """
    assert kind in KINDS, f"{kind} is none of {KINDS}"
    seen = (query.sample == key.sample) & ~query.is_padding & ~key.is_padding
    if kind in IMAGE_KINDS:
        seen = seen & query.in_image & key.in_image
    if kind == CROSS:
        seen = seen & query.in_image & ~key.in_image & (query.frame == key.frame)
    if kind in BLOCK_CAUSAL_KINDS:
        earlier, same_frame = key.frame < query.frame, key.frame == query.frame
        to_clean = earlier | (same_frame & query.is_clean)
        to_others = (same_frame | (earlier & key.is_shared)) & ~query.is_clean
        seen = seen & ((key.is_clean & to_clean) | (~key.is_clean & to_others))
    return seen


def visible(table: TokenTable, kind: str, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool ``[q, k]``: does token ``queries[i]`` see token ``keys[j]``? Both are indices into the row."""
    traits = table.traits()
    return sees(kind, traits.at(queries[:, None]), traits.at(keys[None, :]))


def local_index(table: TokenTable, rank: int, size: int) -> np.ndarray:
    """Tokens of the row that one context rank holds, in its order: a contiguous slice of the text stream and one of the
    image stream. int64 ``[T / size]``."""
    parts = []
    for start, stop in ((0, table.num_text), (table.num_text, len(table))):
        share, rest = divmod(stop - start, size)
        assert rest == 0, f"a stream of {stop - start} tokens cannot be split over {size} context ranks"
        parts.append(np.arange(start + rank * share, start + (rank + 1) * share))
    return np.concatenate(parts)
