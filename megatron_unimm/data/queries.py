"""Conversations in which a picture to be drawn stands as query tokens (MMCORE, arXiv 2604.19902, section 3.1.1): what a
VLM reads that predicts visual latents, and what these are aligned to.

A picture of the assistant is N queries; where the conversation goes on, it stands behind them as it looks, read like
any other. Drawn with N = 2 for two turns of the assistant (``[`` vision_start, ``q`` query, ``#`` visual token, ``]``
vision_end):

    <|im_start|> assistant \\n [ q q ] [ # # ] <|im_end|> … <|im_start|> assistant \\n [ q q ] <|im_end|>

They may be several groups, each between marks of its own (HieraQuery, section 3.1: coarse to fine), of which N is the
sum: ``[ q ] [ q q q q ]``.

Legend  L tokens, F pictures to be drawn, Q = F N queries, P patches of the teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_unimm.config.data import DataConfig, ImageSize, SampleKind
from megatron_unimm.config.model import VisionEncoderConfig
from megatron_unimm.config.queries import QueryVlmConfig, SiglipTeacher
from megatron_unimm.data import images
from megatron_unimm.data.chat import (
    ChatFormat,
    TokenSequence,
    closing_tokens,
    header_tokens,
    image_grid,
    opening_tokens,
    pieces_of,
    with_system_prompt,
)
from megatron_unimm.data.decode.interface import Decoder, ImageRequest
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.features import FeatureStore
from megatron_unimm.data.fetch import fetch_images
from megatron_unimm.data.images import PatchFormat, SiglipFormat
from megatron_unimm.data.mix import Draw
from megatron_unimm.data.packing import build_row, round_up
from megatron_unimm.data.plan import BadSample, Laid
from megatron_unimm.data.sample import PackedRow, Sample, TokenizedSample, Turn
from megatron_unimm.data.sources.source import Source
from megatron_unimm.data.workers import laid_out, void


@dataclass(frozen=True)
class QueryTokens:
    """A conversation as a VLM with queries reads it."""

    tokens: TokenizedSample
    """Its images are those that are read; none is a target."""
    read_index: tuple[int, ...]
    """Of the sample's images: those that are read, in the order in which they stand."""
    read_drawn: tuple[bool, ...]
    """Which of these the assistant drew."""
    drawn_index: tuple[int, ...]
    """Of the sample's images: those to be drawn."""
    query_index: np.ndarray
    """int64 ``[Q]``: where the queries stand."""
    text_index: tuple[np.ndarray, ...]
    """int64, of each picture to be drawn: where its words stand, those since the picture before. The system prompt,
    the same for all, is not among them."""

    def __len__(self) -> int:
        return len(self.tokens)


def query_tokens(
    sample_id: str,
    kind: SampleKind,
    turns: Sequence[Turn],
    sizes: Sequence[tuple[int, int]],
    chat: ChatFormat,
    queries: Sequence[int],
    *,
    open_picture: bool = False,
    open_answer: bool = False,
    answer: bool = True,
) -> QueryTokens:
    """Lay a conversation out.

    Args:
        sizes: width and height in pixels of its images.
        queries: of each picture to be drawn, group by group.
        open_picture: it ends with the queries of a picture that the assistant is to draw.
        open_answer: it ends where the assistant speaks next.
        answer: False makes history of it, of which nothing is learned.
    """
    chat_turns = with_system_prompt(turns, chat.data.system_prompt)
    writer = _Writer(chat, queries)
    for number, turn in enumerate(chat_turns):
        writer.add_turn(
            turn, sizes, learned=answer, is_last=number == len(chat_turns) - 1 and not (open_picture or open_answer)
        )
    if open_picture or open_answer:
        writer.open_answer()
    if open_picture:
        writer.open_picture()
    return writer.finish(sample_id, kind)


class _Writer:
    """Writes turns, and keeps account of what stands where."""

    def __init__(self, chat: ChatFormat, queries: Sequence[int]) -> None:
        self.chat = chat
        self.groups = queries
        self.sequence = TokenSequence(chat.tokenizer.token_ids, chat.encoder.spatial_merge_size)
        self.read: list[tuple[int, bool]] = []
        self.drawn: list[int] = []
        self.queries: list[np.ndarray] = []
        self.texts: list[np.ndarray] = []
        self._words: list[np.ndarray] = []

    def add_turn(self, turn: Turn, sizes: Sequence[tuple[int, int]], learned: bool, is_last: bool) -> None:
        tokenizer, by_assistant = self.chat.tokenizer, turn.role == "assistant"
        is_word = turn.role != "system"
        learned = learned and by_assistant
        self._add_words(opening_tokens(self.chat), False, is_word)
        pieces = list(pieces_of(turn, tokenizer.template))
        for place, piece in enumerate(pieces):
            if isinstance(piece, int):
                if by_assistant:
                    self._add_picture(piece, learned)
                if not (by_assistant and is_last and place == len(pieces) - 1):
                    self._add_image(piece, sizes[piece], turn.role)
            else:
                text, is_header = piece
                self._add_words(tokenizer.encode(text), learned and not is_header, is_word)
        end, between = closing_tokens(turn.role, self.chat)
        self._add_words(end, learned, is_word)
        self._add_words(between, False, is_word)

    def open_answer(self) -> None:
        self._add_words(header_tokens("assistant", self.chat), False, True)

    def open_picture(self) -> None:
        self._add_picture(-1, False)

    def finish(self, sample_id: str, kind: SampleKind) -> QueryTokens:
        none = [np.zeros(0, dtype=np.int64)]
        return QueryTokens(
            tokens=self.sequence.finish(sample_id, kind, self.chat.encoder.patch_dim),
            read_index=tuple(index for index, _ in self.read),
            read_drawn=tuple(drawn for _, drawn in self.read),
            drawn_index=tuple(self.drawn),
            query_index=np.concatenate(none + self.queries),
            text_index=tuple(self.texts),
        )

    def _add_words(self, ids: Sequence[int], learned: bool, is_word: bool) -> None:
        if is_word:
            self._words.append(np.arange(len(ids)) + len(self.sequence))
        self.sequence.add_text(ids, learned)

    def _add_picture(self, index: int, learned: bool) -> None:
        self.drawn.append(index)
        self.queries += [self.sequence.add_queries(count, learned) for count in self.groups]
        self.texts.append(np.concatenate([np.zeros(0, dtype=np.int64), *self._words]))
        self._words = []

    def _add_image(self, index: int, size: tuple[int, int], role: str) -> None:
        self.read.append((index, role == "assistant"))
        self.sequence.add_image(image_grid(size, role, self.chat), is_target=False)


@dataclass(frozen=True)
class QuerySample:
    """A conversation with what its queries are aligned to."""

    layout: QueryTokens
    target_sizes: tuple[tuple[int, int], ...]
    """Width and height in pixels that the pictures to be drawn are brought to for the teacher."""
    target_grids: np.ndarray
    """int64 ``[F, 3]``: patches along time, height, width of these. SigLIP leaves out pixels that fill no patch."""
    target_patches: np.ndarray | None = None
    """float32 ``[P, patch_dim]`` of them."""
    target_features: np.ndarray | None = None
    """``[V, F]``, computed beforehand in place of patches."""
    learned: bool = True
    """False where an image is broken."""

    @property
    def kind(self) -> SampleKind:
        return self.layout.tokens.kind

    def __len__(self) -> int:
        return len(self.layout)


@dataclass(frozen=True)
class QueryRow:
    """Conversations in a row of fixed length, one micro-batch."""

    tokens: PackedRow
    query_index: np.ndarray
    """int64 ``[Q]``."""
    learned: np.ndarray
    """bool ``[F]``."""
    target_grids: np.ndarray
    """int64 ``[F, 3]``."""
    target_patches: np.ndarray
    """float32 ``[P, patch_dim]``; empty on ranks that read no pictures."""
    target_features: np.ndarray | None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.tokens.num_tokens

    @property
    def conversation(self) -> PackedRow:
        """The tokens."""
        return self.tokens

    @property
    def num_padding(self) -> int:
        return self.tokens.num_padding

    @property
    def num_images(self) -> int:
        """Read and drawn."""
        return self.tokens.num_images + len(self.target_grids)

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return self.tokens.sample_ids

    @property
    def kinds(self) -> tuple[SampleKind, ...]:
        return self.tokens.kinds


@dataclass(frozen=True)
class QueryWork:
    """Conversations to tokens, with queries in the place of pictures to be drawn; see ``data/workers.py``."""

    chat: ChatFormat
    vlm: QueryVlmConfig
    sources: Mapping[str, Source]
    features: FeatureStore | None = None
    """Of the vision encoder, computed beforehand."""
    alignment: int = 1
    """Each sample takes up a multiple of this many tokens."""

    @property
    def data(self) -> DataConfig:
        return self.chat.data

    @property
    def room(self) -> int:
        return self.chat.data.sequence_length

    @property
    def teacher_format(self) -> PatchFormat:
        return teacher_format(self.vlm, self.chat.encoder)

    @property
    def teacher_size(self) -> ImageSize:
        return teacher_size(self.vlm, self.chat.data)

    @property
    def teacher_features(self) -> FeatureStore | None:
        """The same, where the teacher is the vision encoder."""
        return None if isinstance(self.vlm.teacher, SiglipTeacher) else self.features

    # -- what a sample holds

    def lay_out(self, draw: Draw) -> Laid | BadSample:
        """Read a sample's text and the headers of its images."""
        return laid_out(self.sources, draw, self._layout)

    def _layout(self, sample: Sample) -> QuerySample:
        layout, sizes = conversation_layout(sample, self.chat, (self.vlm.num_queries,))
        if len(layout) > self.room:
            what = f"{len(layout)} tokens, but data.sequence_length is {self.room}"
            raise SampleError(sample.id, f"{what}; raise it or lower the image sizes", "too long")
        drawn = tuple(target_size(sizes[index], self.teacher_size, self.teacher_format) for index in layout.drawn_index)
        return QuerySample(layout, drawn, target_grids(drawn, self.teacher_format))

    # -- what its images hold

    def requests(self, laid: Laid) -> list[ImageRequest]:
        """Every image that the vision encoder looks at: those that are read, and with the encoder as the teacher those
        to be drawn."""
        asked = read_requests(laid.layout.layout, laid, self.chat)
        return asked if isinstance(self.vlm.teacher, SiglipTeacher) else asked + self.target_requests(laid)

    def target_requests(self, laid: Laid) -> list[ImageRequest]:
        """Pictures to be drawn, as the teacher looks at them."""
        rule, sample = self.teacher_size, laid.layout
        return [
            ImageRequest(laid.sample.images[index], width, height, rule.crop, rule.filter)
            for index, (width, height) in zip(sample.layout.drawn_index, sample.target_sizes, strict=True)
        ]

    def load(self, laid: Sequence[Laid], decoder: Decoder) -> list[tuple[QuerySample, list[BadSample]]]:
        """Decode images, or look their features up; nothing is learned from a sample with a broken one."""
        read = fetch_images(
            [read_requests(each.layout.layout, each, self.chat) for each in laid],
            laid,
            self.features,
            decoder,
            self.chat.encoder,
        )
        targets = fetch_images(
            [self.target_requests(each) for each in laid], laid, self.teacher_features, decoder, self.teacher_format
        )
        done = []
        for each, seen, target in zip(laid, read, targets, strict=True):
            broken, sample = [*seen.broken, *target.broken], each.layout
            tokens = void(sample.layout.tokens) if broken else sample.layout.tokens
            tokens = replace(tokens, **{"patches" if self.features is None else "features": seen.values})
            field = "target_patches" if self.teacher_features is None else "target_features"
            loaded = {"layout": replace(sample.layout, tokens=tokens), "learned": not broken, field: target.values}
            done.append((replace(sample, **loaded), broken))
        return done

    def row(self, samples: Sequence[QuerySample], step: int = 0) -> QueryRow:
        """One behind the other."""
        tokens = packed_tokens([sample.layout for sample in samples], self.chat, self.room, self.alignment)
        return query_row(samples, tokens, self.alignment, images.patch_dim(self.teacher_format))


def query_row(samples: Sequence[QuerySample], tokens: PackedRow, alignment: int, patch_dim: int) -> QueryRow:
    """Samples whose tokens are packed, in one row.

    Args:
        patch_dim: numbers of one of the teacher's patches.
    """
    features = [sample.target_features for sample in samples if sample.target_features is not None]
    patches = [sample.target_patches for sample in samples if sample.target_patches is not None]
    return QueryRow(
        tokens=tokens,
        query_index=packed_index([sample.layout for sample in samples], alignment),
        learned=np.array([sample.learned for sample in samples for _ in sample.target_grids], dtype=bool),
        target_grids=np.concatenate([np.zeros((0, 3), dtype=np.int64), *(sample.target_grids for sample in samples)]),
        target_patches=np.concatenate([np.zeros((0, patch_dim), dtype=np.float32), *patches]),
        target_features=np.concatenate(features) if features else None,
    )


def teacher_format(vlm: QueryVlmConfig, encoder: VisionEncoderConfig) -> PatchFormat:
    """How pixels become patches of the teacher."""
    teacher = vlm.teacher
    return SiglipFormat.of(teacher.encoder) if isinstance(teacher, SiglipTeacher) else encoder


def teacher_size(vlm: QueryVlmConfig, data: DataConfig) -> ImageSize:
    """Of pictures as the teacher looks at them."""
    return vlm.teacher.size if isinstance(vlm.teacher, SiglipTeacher) else data.generation_size


def target_size(size: tuple[int, int], rule: ImageSize, form: PatchFormat) -> tuple[int, int]:
    """Width and height in pixels that the teacher looks at a picture in."""
    return images.target_size(*size, rule, form.patch_size * form.spatial_merge_size)


def target_grids(sizes: Sequence[tuple[int, int]], form: PatchFormat) -> np.ndarray:
    """Patches along time, height, width of pictures of these sizes: int64 ``[F, 3]``."""
    grids = [(1, height // form.patch_size, width // form.patch_size) for width, height in sizes]
    return np.array(grids, dtype=np.int64).reshape(-1, 3)


def conversation_layout(
    sample: Sample, chat: ChatFormat, queries: Sequence[int]
) -> tuple[QueryTokens, list[tuple[int, int]]]:
    """A sample laid out from its text and the headers of its images, and their sizes in pixels.

    Raises:
        SampleError: an image header cannot be read.
    """
    sizes = [images.image_size(file, chat.data.max_image_pixels) for file in sample.images]
    return query_tokens(sample.id, sample.kind, sample.turns, sizes, chat, queries), sizes


def read_requests(layout: QueryTokens, laid: Laid, chat: ChatFormat) -> list[ImageRequest]:
    """Images that are read, at the sizes of their grids."""
    return [
        ImageRequest.of_grid(
            laid.sample.images[index],
            grid,
            chat.encoder,
            chat.data.generation_size if drawn else chat.data.understanding_size,
        )
        for index, drawn, grid in zip(layout.read_index, layout.read_drawn, layout.tokens.grids, strict=True)
    ]


def packed_tokens(layouts: Sequence[QueryTokens], chat: ChatFormat, sequence_length: int, alignment: int) -> PackedRow:
    """Their tokens in one row."""
    return build_row(
        [layout.tokens for layout in layouts],
        sequence_length=sequence_length,
        alignment=alignment,
        pad_id=chat.tokenizer.token_ids.pad,
        patch_dim=chat.encoder.patch_dim,
    )


def packed_index(layouts: Sequence[QueryTokens], alignment: int) -> np.ndarray:
    """Where the queries stand in that row: int64 ``[Q]``."""
    starts = np.cumsum([0, *(round_up(len(layout), alignment) for layout in layouts)])
    shifted = [layout.query_index + start for layout, start in zip(layouts, starts, strict=False)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *shifted])
