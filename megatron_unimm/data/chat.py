"""Turns conversations into token sequences: ChatML as Qwen2.5-VL's chat template writes it, labels, and positions.

``<|im_start|>user\\n … <|im_end|>\\n<|im_start|>assistant\\n … <|im_end|>\\n``; an image stands as
``<|vision_start|>``, one ``<|image_pad|>`` per visual token, ``<|vision_end|>``. What an assistant turn says is
learned. Drawn for the turn ``A<image>`` with an image of 2 visual tokens (``[`` vision_start, ``#`` image_pad,
``]`` vision_end), where v marks the positions whose hidden state predicts a visual token::

    input    <|im_start|>  assistant  \\n  A  [  #  #  ]           <|im_end|>  \\n
    label    -             -          A   [  -  -  ]  <|im_end|>  -           -
    target                                   v  v

Ming-Lite-Omni writes ``<role>HUMAN</role> … <role>ASSISTANT</role> … <|endoftext|>``, where only the last is a token of
its own; an image stands as ``<image>``, one ``<imagePatch>`` per visual token, ``</image>`` and a line break. What it
does with a system prompt its makers do not say: leave ``data.system_prompt`` empty. :data:`TEMPLATES` has both.

Legend  L tokens, N images, V visual tokens, P patches.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatron_unimm.config.data import DataConfig, SampleKind
from megatron_unimm.config.model import ModelConfig, TokenIds, VisionEncoderConfig
from megatron_unimm.data import images
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.sample import IGNORED_LABEL, Sample, TokenizedSample, Turn
from megatron_unimm.errors import ConfigError

SPECIAL_TOKENS = {
    "pad": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
}
"""Text of each special token of ChatML, by its field in TokenIds."""


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written. Conversations know the roles system, user and assistant."""

    special_tokens: Mapping[str, str]
    """Text of each special token, by its field in TokenIds."""
    headers: Mapping[str, str]
    """What a turn begins with, by role."""
    opened: bool
    """Whether ``im_start`` comes before that."""
    closed: frozenset[str]
    """Roles whose turns end with ``im_end``."""
    after_turn: str
    """Text between turns."""
    after_image: str
    """Text behind an image that is read."""


ROLES = ("system", "user", "assistant")
TEMPLATES = {
    "chatml": ChatTemplate(
        special_tokens=SPECIAL_TOKENS,
        headers={role: f"{role}\n" for role in ROLES},
        opened=True,
        closed=frozenset(ROLES),
        after_turn="\n",
        after_image="",
    ),
    "ming": ChatTemplate(
        special_tokens={
            "pad": "<|endoftext|>",
            "im_start": "<|endoftext|>",  # there is none
            "im_end": "<|endoftext|>",
            "vision_start": "<image>",
            "vision_end": "</image>",
            "image_pad": "<imagePatch>",
        },
        headers={
            "system": "<role>SYSTEM</role>",
            "user": "<role>HUMAN</role>",
            "assistant": "<role>ASSISTANT</role>",
        },
        opened=False,
        closed=frozenset(["assistant"]),
        after_turn="",
        after_image="\n",
    ),
}
"""By ``model.chat_template``."""


class ChatTokenizer:
    """A Hugging Face tokenizer that never reads special tokens out of text: who writes ``<|im_end|>`` gets its
    characters.

    Safe to use from several threads.

    Raises:
        ConfigError: the folder holds no fast tokenizer, or its special tokens or size differ from the model's.
    """

    def __init__(self, folder: str | Path, model: ModelConfig) -> None:
        if not Path(folder).is_dir():
            raise ConfigError(
                "data.tokenizer", f"no such folder: {folder}; give the folder of a Hugging Face tokenizer"
            )
        try:
            loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError("data.tokenizer", f"{folder} holds no tokenizer that can be loaded ({error})") from error
        if not loaded.is_fast:
            raise ConfigError(
                "data.tokenizer", f"{folder} has no tokenizer.json; save the fast version of the tokenizer there"
            )
        self.token_ids = model.token_ids
        self.template = TEMPLATES[model.chat_template]
        # Used without transformers' wrapper, which changes the tokenizer's settings at each call, for all threads.
        self._backend: Tokenizer = copy.deepcopy(loaded.backend_tokenizer)
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._check(str(folder), model)

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text; no special token is added or recognised."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _check(self, folder: str, model: ModelConfig) -> None:
        for field, expected in model.token_ids.model_dump().items():
            text = self.template.special_tokens[field]
            where, found = f"model.token_ids.{field}", self._backend.token_to_id(text)
            if found != expected:
                raise ConfigError(
                    where, f"is {expected}, but {text} is {found} in the tokenizer {folder}; make them agree"
                )
            if expected in self.encode(text):
                raise ConfigError(
                    where, f"{text} in a text would be read as the token itself; mark it as special in {folder}"
                )
        size, rows = self._backend.get_vocab_size(with_added_tokens=True), model.backbone.vocab_size
        if size > rows:
            raise ConfigError("model.backbone.vocab_size", f"is {rows}, but the tokenizer {folder} has {size} tokens")


@dataclass(frozen=True)
class ChatFormat:
    """All that decides how a conversation becomes tokens."""

    tokenizer: ChatTokenizer
    encoder: VisionEncoderConfig
    data: DataConfig


def layout_sample(sample: Sample, chat: ChatFormat) -> TokenizedSample:
    """Tokenises a sample from its text and the headers of its images. ``patches`` is left empty, [0, patch_dim].

    Raises:
        SampleError: an image header cannot be read, or the sample is longer than ``data.sequence_length``.
    """
    sizes = [images.image_size(file, chat.data.max_image_pixels) for file in sample.images]
    turns = with_system_prompt(sample.turns, chat.data.system_prompt)
    layout = _layout(sample.id, sample.kind, turns, sizes, chat)
    if len(layout) > chat.data.sequence_length:
        what = f"{len(layout)} tokens, but data.sequence_length is {chat.data.sequence_length}"
        raise SampleError(sample.id, f"{what}; raise it or lower the image sizes", "too long")
    return layout


def prompt_tokens(
    turns: Sequence[Turn], pictures: Sequence[np.ndarray], chat: ChatFormat, *, open_image: bool = False
) -> TokenizedSample:
    """Tokenises a conversation up to where the assistant speaks next. Nothing is learned and nothing is a target.

    Args:
        turns: the conversation so far, without the answer.
        pictures: uint8 (H, W, 3) images that the turns refer to; those of assistant turns are sized as generated ones.
        open_image: end with ``<|vision_start|>``, so that the answer begins with an image.
    """
    sizes = [(picture.shape[1], picture.shape[0]) for picture in pictures]
    layout = _layout(
        "prompt", "understanding", with_system_prompt(turns, chat.data.system_prompt), sizes, chat, answer=False
    )
    tail = header_tokens("assistant", chat) + [chat.tokenizer.token_ids.vision_start] * open_image
    tail_positions = np.arange(len(tail)) + layout.position_ids.max(initial=-1) + 1
    drawn = {part for turn in turns if turn.role == "assistant" for part in turn.parts if isinstance(part, int)}
    patches = []
    for index, grid in zip(image_order(turns), layout.grids, strict=True):
        height, width = int(grid[1]) * chat.encoder.patch_size, int(grid[2]) * chat.encoder.patch_size
        # As training sizes it, so that a prompt looks as its samples did.
        size = chat.data.generation_size if index in drawn else chat.data.understanding_size
        pixels = images.resize(pictures[index], width, height, crop=size.crop, filter=size.filter)
        patches.append(images.patchify(pixels, chat.encoder)[0])
    return replace(
        layout,
        input_ids=np.concatenate([layout.input_ids, tail]).astype(np.int64),
        labels=np.full(len(layout) + len(tail), IGNORED_LABEL, dtype=np.int64),
        position_ids=np.concatenate([layout.position_ids, np.tile(tail_positions, (3, 1))], axis=1),
        patches=concat_patches(patches, chat.encoder),
    )


def image_order(turns: Sequence[Turn]) -> list[int]:
    """Indices into the images of a conversation, in the order in which the turns show them."""
    return [part for turn in turns for part in turn.parts if isinstance(part, int)]


def image_positions(start: int, grid: np.ndarray, merge: int) -> np.ndarray:
    """Multimodal positions of the visual tokens of one image: int64 [3, V], each axis counting from ``start``.

    Text after the image goes on at their maximum + 1.
    """
    time, height, width = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
    return np.indices((time, height, width), dtype=np.int64).reshape(3, -1) + start


def concat_patches(patches: Sequence[np.ndarray], encoder: VisionEncoderConfig) -> np.ndarray:
    """Joins the patches of several images, possibly none: float32 [P, patch_dim]."""
    return np.concatenate([np.zeros((0, encoder.patch_dim), dtype=np.float32), *patches])


def with_system_prompt(turns: Sequence[Turn], system_prompt: str) -> Sequence[Turn]:
    """As the template does: the default system prompt, unless the conversation brings its own. An empty prompt adds
    none."""
    if not system_prompt or (turns and turns[0].role == "system"):
        return turns
    return (Turn(role="system", parts=(system_prompt,)), *turns)


def header_tokens(role: str, chat: ChatFormat) -> list[int]:
    """What an answer follows."""
    return [*opening_tokens(chat), *chat.tokenizer.encode(chat.tokenizer.template.headers[role])]


def opening_tokens(chat: ChatFormat) -> list[int]:
    """What stands before a turn's header."""
    return [chat.tokenizer.token_ids.im_start] if chat.tokenizer.template.opened else []


def closing_tokens(role: str, chat: ChatFormat) -> tuple[list[int], list[int]]:
    """What ends a turn, which is learned of an assistant's, and what stands between it and the next."""
    template = chat.tokenizer.template
    end = [chat.tokenizer.token_ids.im_end] if role in template.closed else []
    return end, chat.tokenizer.encode(template.after_turn)


class TokenSequence:
    """A token sequence that grows piece by piece."""

    def __init__(self, token_ids: TokenIds, merge: int) -> None:
        self._token_ids = token_ids
        self._merge = merge
        self._next_position = 0
        self._ids: list[int] = []
        self._learned: list[bool] = []
        self._positions: list[np.ndarray] = []
        self._grids: list[np.ndarray] = []
        self._is_target: list[bool] = []
        self._visual_index: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._ids)

    def add_text(self, ids: Sequence[int], learned: bool) -> None:
        """Tokens one behind the other."""
        self._ids.extend(ids)
        self._learned.extend([learned] * len(ids))
        self._positions.append(np.tile(np.arange(len(ids)) + self._next_position, (3, 1)))
        self._next_position += len(ids)

    def add_image(self, grid: np.ndarray, is_target: bool) -> None:
        """An image as its visual tokens, between its two marks."""
        self.add_text([self._token_ids.vision_start], learned=is_target)
        positions = image_positions(self._next_position, grid, self._merge)
        num_visual = positions.shape[1]
        self._visual_index.append(np.arange(num_visual) + len(self._ids))
        self._ids.extend([self._token_ids.image_pad] * num_visual)
        self._learned.extend([False] * num_visual)  # Regressed, not classified.
        self._positions.append(positions)
        self._next_position = int(positions.max()) + 1
        self._grids.append(grid)
        self._is_target.append(is_target)
        self.add_text([self._token_ids.vision_end], learned=is_target)

    def add_queries(self, count: int, learned: bool) -> np.ndarray:
        """A picture as ``count`` queries between an image's marks; returns where they stand, int64 [count]. That a
        picture begins is learned; that it ends is not the model's choice. Queries count on as text does."""
        self.add_text([self._token_ids.vision_start], learned)
        index = np.arange(count) + len(self._ids)
        self.add_text([self._token_ids.image_pad] * count, learned=False)
        self.add_text([self._token_ids.vision_end], learned=False)
        return index

    def finish(self, sample_id: str, kind: SampleKind, patch_dim: int) -> TokenizedSample:
        """The sample, with no patches yet."""
        ids = np.array(self._ids, dtype=np.int64)
        labels = np.full(len(ids), IGNORED_LABEL, dtype=np.int64)
        labels[:-1] = np.where(self._learned[1:], ids[1:], IGNORED_LABEL)
        visual_index = np.concatenate([np.zeros(0, dtype=np.int64), *self._visual_index])
        lengths = [len(index) for index in self._visual_index]
        target_index = np.flatnonzero(np.repeat(np.array(self._is_target, dtype=bool), lengths))
        return TokenizedSample(
            id=sample_id,
            kind=kind,
            input_ids=ids,
            labels=labels,
            position_ids=np.concatenate([np.zeros((3, 0), dtype=np.int64), *self._positions], axis=1),
            patches=np.zeros((0, patch_dim), dtype=np.float32),
            grids=np.array(self._grids, dtype=np.int64).reshape(-1, 3),
            is_target=np.array(self._is_target, dtype=bool),
            visual_index=visual_index,
            predict_index=visual_index[target_index] - 1,
            target_index=target_index,
        )


def _layout(
    sample_id: str,
    kind: SampleKind,
    turns: Sequence[Turn],
    sizes: Sequence[tuple[int, int]],
    chat: ChatFormat,
    answer: bool = True,
) -> TokenizedSample:
    """Lays out all turns. Without ``answer``, assistant turns are history: nothing of them is learned."""
    token_ids, encode, template = chat.tokenizer.token_ids, chat.tokenizer.encode, chat.tokenizer.template
    sequence = TokenSequence(token_ids, chat.encoder.spatial_merge_size)
    for turn in turns:
        learned = answer and turn.role == "assistant"
        sequence.add_text(opening_tokens(chat), learned=False)
        for piece in pieces_of(turn, template):
            if isinstance(piece, int):
                sequence.add_image(image_grid(sizes[piece], turn.role, chat), is_target=learned)
            else:
                text, is_header = piece
                sequence.add_text(encode(text), learned=learned and not is_header)
        end, between = closing_tokens(turn.role, chat)
        sequence.add_text(end, learned)
        sequence.add_text(between, learned=False)
    return sequence.finish(sample_id, kind, chat.encoder.patch_dim)


def pieces_of(turn: Turn, template: ChatTemplate) -> Iterator[tuple[str, bool] | int]:
    """What stands between the marks of a turn: (text, is header) that is tokenised in one go, or an image's index.

    The header is tokenised together with the text behind it, as the template does, except for the assistant: there the
    prompt ends with the header when generating, so what is learned must be tokenised apart from it.
    """
    text, is_header = template.headers[turn.role], True
    after_image = "" if turn.role == "assistant" else template.after_image
    if turn.role == "assistant":
        yield text, True
        text, is_header = "", False
    for part in turn.parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield text, is_header
        yield part
        text, is_header = after_image, False
    if text:
        yield text, is_header


def image_grid(size: tuple[int, int], role: str, chat: ChatFormat) -> np.ndarray:
    """Patches along time, height, width: int64 [3]. Images of the assistant have the generation size."""
    side_limits = chat.data.generation_size if role == "assistant" else chat.data.understanding_size
    width, height = images.target_size(*size, side_limits, chat.encoder.token_pixels)
    return np.array([1, height // chat.encoder.patch_size, width // chat.encoder.patch_size], dtype=np.int64)
