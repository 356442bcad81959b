"""Autoregressive decoding of answers in which text and images alternate.

Legend  B sequences, n of them at a step, V visual tokens of an image, H hidden size.

What follows a token (ORION, figure 2): text follows text and the end of an image, by the text head; after
``vision_start`` the vision head gives the first visual token, which is the next input as it is, and so on until the
image's grid is full; then ``vision_end`` is put in, whatever the text head says. Drawn for an image of 2 visual tokens
(``[`` vision_start, ``#`` visual token, ``]`` vision_end)::

    input     A  [  #1 #2 ]  B
    follows   [  #1 #2 ]  B  ...
    by        t  v  v  -  t
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.model import ModelConfig, TokenIds
from megatron_unimm.data.chat import image_positions
from megatron_unimm.data.sample import TokenizedSample
from megatron_unimm.errors import ConfigError
from megatron_unimm.generate.cache import SequenceCache
from megatron_unimm.generate.sampling import DecodeSettings, Sampler
from megatron_unimm.generate.staged import StagedModel, Step


@dataclass(frozen=True)
class Prompt:
    """A conversation up to where the answer begins."""

    tokens: TokenizedSample
    """Of ``data.chat.prompt_tokens``. If it ends with vision_start, the answer begins with an image."""
    grid: np.ndarray
    """int64 ``[3]``: patches along time, height, width of the images to be generated."""
    number: int = 0
    """Fixes the random numbers, together with the seed."""
    given: dict[int, Tensor] = field(default_factory=dict)
    """Visual tokens ``[V, H]`` of images of the conversation that were generated before, by their place among its
    images. Their patches are not looked at."""
    pictures: tuple["np.ndarray | GeneratedImage", ...] = ()
    """The conversation's images in their order: what an edit goes by."""


@dataclass(frozen=True)
class GeneratedImage:
    """An image as the model made it."""

    visual_tokens: Tensor
    """``[V, H]``."""
    grid: np.ndarray
    """int64 ``[3]``: patches along time, height, width."""
    pixels: np.ndarray | None = None
    """uint8 (H, W, 3), where the model has an image decoder."""
    coarser: tuple[np.ndarray, ...] = ()
    """The same at the model's coarser scales, coarsest first, where they were asked for."""


@dataclass(frozen=True)
class Answer:
    """What a model said, the same on every rank of its layout."""

    token_ids: list[int]
    """Everything that was generated: text, and the special tokens of images and of the end."""
    text: str
    """The text alone."""
    parts: tuple[str | int, ...]
    """Text and images (by their place in ``images``) in their order."""
    images: tuple[GeneratedImage, ...]
    complete: bool
    """Whether it ended by itself, and not at the limit."""


class Follows(Enum):
    """What follows a sequence's last input."""

    TEXT = 0
    VISUAL = 1
    IMAGE_END = 2


class Stream:
    """One sequence on its way: what it has said so far, and its next input."""

    def __init__(
        self, prompt: Prompt, token_ids: TokenIds, merge: int, settings: DecodeSettings, stop_before_image: bool = False
    ) -> None:
        self.ids: list[int] = []
        self.opened = False
        """It stopped where an image would begin."""
        self._stop_before_image = stop_before_image
        self.images: list[GeneratedImage] = []
        self.follows = Follows.TEXT
        self.finished = False
        self.complete = False
        self.input_id = int(prompt.tokens.input_ids[-1])
        self.position = prompt.tokens.position_ids[:, -1]
        self._next_position = int(prompt.tokens.position_ids.max()) + 1
        self._token_ids, self._merge, self._settings, self._grid = token_ids, merge, settings, prompt.grid
        self._visual: list[Tensor] = []
        self._visual_positions = np.empty((3, 0), dtype=np.int64)
        if self.input_id == token_ids.vision_start:
            self._open_image()

    def take_text(self, token: int) -> None:
        """The text head's token."""
        self._put(token)
        if token in (self._token_ids.im_end, self._token_ids.pad):
            self.finished = self.complete = True
        elif token == self._token_ids.vision_start and self._stop_before_image:
            self.ids.pop()
            self.opened = self.finished = self.complete = True
        elif token == self._token_ids.vision_start:
            self._open_image()
        else:
            self._stop_at_limit()

    def take_visual(self, visual_H: Tensor) -> None:
        """The vision head's token."""
        self.ids.append(self._token_ids.image_pad)
        self.input_id, self.position = self._token_ids.image_pad, self._visual_positions[:, len(self._visual)]
        self._visual.append(visual_H)
        if len(self._visual) == self._visual_positions.shape[1]:
            self.follows = Follows.IMAGE_END

    def end_image(self) -> None:
        """After the last visual token."""
        self.images.append(GeneratedImage(torch.stack(self._visual), self._grid))
        self._next_position = int(self._visual_positions.max()) + 1
        self._put(self._token_ids.vision_end)
        self.follows = Follows.TEXT
        if self._settings.stop_after_image:
            self.finished = self.complete = True
        self._stop_at_limit()

    def _put(self, token: int) -> None:
        self.ids.append(token)
        self.input_id, self.position = token, np.full(3, self._next_position, dtype=np.int64)
        self._next_position += 1

    def _open_image(self) -> None:
        self._visual = []
        self._visual_positions = image_positions(self._next_position, self._grid, self._merge)
        self.follows = Follows.VISUAL

    def _stop_at_limit(self) -> None:
        self.finished = self.finished or len(self.ids) >= self._settings.max_new_tokens


def decode(
    staged: StagedModel,
    prompts: Sequence[Prompt],
    settings: DecodeSettings,
    max_length: int,
    stop_before_image: bool = False,
) -> list[Stream]:
    """Answer prompts as one batch; called on every rank of the layout. Run it in ``staged.decoding_mode``.

    Args:
        max_length: the longest sequence that the model's positions allow.
        stop_before_image: end an answer where an image would begin.

    Raises:
        ConfigError: a prompt and its answer may become longer than that.
    """
    streams = [
        Stream(
            prompt, staged.model.token_ids, staged.model.vision_encoder.spatial_merge_size, settings, stop_before_image
        )
        for prompt in prompts
    ]
    cache = SequenceCache(len(prompts), _room(prompts, settings, staged.model, max_length), staged.device)
    sampler = Sampler(settings, [prompt.number for prompt in prompts])
    forbidden = _forbidden(staged.model.token_ids, settings)
    active = list(range(len(streams)))
    hidden = staged.run(_prompt_step(prompts), _prompt_visual(staged, prompts), cache)  # [B, H] or None
    while active:
        visual = _follow(staged, [streams[i] for i in active], active, hidden, sampler, forbidden)
        kept = [place for place, i in enumerate(active) if not streams[i].finished]
        if len(kept) < len(active):
            cache.keep(kept)
            active = [active[place] for place in kept]
        if active:
            step = _next_step([streams[i] for i in active], staged.model.token_ids.image_pad)
            hidden = staged.run(step, visual if len(step.visual_index) else None, cache)
    return streams


def _follow(
    staged: StagedModel,
    streams: Sequence[Stream],
    rows: Sequence[int],
    hidden: Tensor | None,
    sampler: Sampler,
    forbidden: Sequence[int],
) -> Tensor | None:
    """Give every stream what follows its last input; returns the visual tokens ``[n, H]`` among that, in order."""
    by_kind = {kind: [place for place, stream in enumerate(streams) if stream.follows is kind] for kind in Follows}
    text, drawing = by_kind[Follows.TEXT], by_kind[Follows.VISUAL]
    if text:
        tokens = None
        if hidden is not None:
            logits = staged.logits(hidden[text])
            logits[:, list(forbidden)] = float("-inf")
            tokens = sampler.choose(logits, [rows[place] for place in text])
        for place, token in zip(text, staged.share_tokens(tokens, len(text)), strict=True):
            streams[place].take_text(token)
    visual = None
    if drawing:
        visual = staged.share_visual(hidden[drawing] if hidden is not None else None, len(drawing))
        for place, visual_H in zip(drawing, visual, strict=True):
            streams[place].take_visual(visual_H)
    for place in by_kind[Follows.IMAGE_END]:
        streams[place].end_image()
    return visual


def _next_step(streams: Sequence[Stream], image_pad: int) -> Step:
    input_ids = np.array([stream.input_id for stream in streams], dtype=np.int64)
    return Step(
        counts=[1] * len(streams),
        input_ids=input_ids,
        position_ids=np.stack([stream.position for stream in streams], axis=1),
        visual_index=np.flatnonzero(input_ids == image_pad),
    )


def _prompt_step(prompts: Sequence[Prompt]) -> Step:
    counts = [len(prompt.tokens) for prompt in prompts]
    starts = np.cumsum([0, *counts[:-1]])
    return Step(
        counts=counts,
        input_ids=np.concatenate([prompt.tokens.input_ids for prompt in prompts]),
        position_ids=np.concatenate([prompt.tokens.position_ids for prompt in prompts], axis=1),
        visual_index=np.concatenate(
            [prompt.tokens.visual_index + start for prompt, start in zip(prompts, starts, strict=True)]
        ),
    )


def _prompt_visual(staged: StagedModel, prompts: Sequence[Prompt]) -> Tensor | None:
    """Features ``[V, F]`` of the images of all prompts, on the first stage: of generated ones the visual tokens as they
    were made, and nothing else."""
    visual = staged.see([prompt.tokens for prompt in prompts])
    if visual is None:
        return None
    merge = staged.model.vision_encoder.spatial_merge_size**2
    start = 0
    for prompt in prompts:
        for number, grid in enumerate(prompt.tokens.grids):
            stop = start + int(grid.prod()) // merge
            if number in prompt.given:
                visual[start:stop, : staged.hidden_size] = prompt.given[number].to(visual)
                visual[start:stop, staged.hidden_size :] = 0
            start = stop
    return visual


def _forbidden(token_ids: TokenIds, settings: DecodeSettings) -> list[int]:
    """What the text head may not say: tokens that come only with an image, and images where there may be none."""
    return [token_ids.image_pad, token_ids.vision_end] + ([] if settings.images else [token_ids.vision_start])


def _room(prompts: Sequence[Prompt], settings: DecodeSettings, model: ModelConfig, max_length: int) -> int:
    """Tokens of the longest sequence that may come about: an image may begin just before the limit."""
    merge = model.vision_encoder.spatial_merge_size**2
    image = max(int(prompt.grid.prod()) // merge for prompt in prompts) + 2
    longest = max(len(prompt.tokens) for prompt in prompts)
    room = longest + settings.max_new_tokens + image
    if room > max_length:
        raise ConfigError(
            "max_new_tokens",
            f"a prompt of {longest} tokens, {settings.max_new_tokens} new ones and an image of {image} make {room}, "
            f"but the model has positions for {max_length}; shorten the conversation or lower max_new_tokens",
        )
    return room
