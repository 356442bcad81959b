"""Rows as a stage's data would fill them, made without any data: what a dry run computes with and a plan counts.

How long samples are cannot be known before the data is there. The figures below are ours; what is sized by the recipe
(images, rows) is as the recipe has it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from megatron_unimm.config.data import DataConfig, ImageSize, SampleKind
from megatron_unimm.config.model import ModelConfig, VisionEncoderConfig
from megatron_unimm.config.queries import QueryVlmConfig, SiglipTeacher
from megatron_unimm.data import images
from megatron_unimm.data.chat import TEMPLATES, ChatFormat, ChatTokenizer, TokenSequence, image_positions
from megatron_unimm.data.drawing import DrawingRow, DrawingSample, DrawingWork
from megatron_unimm.data.frames import FrameRow, FrameSample, FrameWork
from megatron_unimm.data.packing import build_row, round_up
from megatron_unimm.data.pictures import PictureRow, PictureSample, PictureWork
from megatron_unimm.data.queries import (
    QueryRow,
    QuerySample,
    QueryTokens,
    query_row,
    target_grids,
    target_size,
    teacher_format,
    teacher_size,
)
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow, TokenizedSample, Turn
from megatron_unimm.data.workers import void
from megatron_unimm.errors import ConfigError

SizedT = TypeVar("SizedT", bound=Sized)

PHOTO = (640, 480)
"""Width and height in pixels of an image that is read, before it is sized (COCO's, which LLaVA's data is built on)."""
LARGE_PHOTO = (4096, 4096)
"""One that every rule brings to its largest size."""
DRAWN = (1024, 1024)
"""Of an image that is drawn (FLUX's and SD3's own size)."""


@dataclass(frozen=True)
class Shape:
    """What a sample of a kind holds."""

    asked: int
    """Tokens of the user, template included."""
    answered: int
    """Tokens of the assistant, all learned."""
    read: int
    """Images that are read."""
    drawn: int
    """Images that the assistant draws."""


SHAPES: dict[SampleKind, Shape] = {
    "understanding": Shape(asked=70, answered=130, read=1, drawn=0),
    "text_to_image": Shape(asked=90, answered=4, read=0, drawn=1),
    "editing": Shape(asked=50, answered=4, read=1, drawn=1),
    "reconstruction": Shape(asked=30, answered=4, read=1, drawn=1),
    "interleaved": Shape(asked=60, answered=400, read=2, drawn=2),
}


def shares(data: DataConfig, kinds: Sequence[SampleKind] | None = None) -> dict[SampleKind, float]:
    """How often each kind is drawn; only of ``kinds`` where they are given.

    Raises:
        ConfigError: no source has a weight.
    """
    weights: dict[SampleKind, float] = {}
    for source in data.sources.values():
        if source.weight > 0 and (kinds is None or source.kind in kinds):
            weights[source.kind] = weights.get(source.kind, 0.0) + source.weight
    if not weights:
        raise ConfigError("data.sources", "no source with a weight above 0; give the stage one")
    total = sum(weights.values())
    return {kind: weight / total for kind, weight in weights.items()}


def conversation_row(
    mix: Mapping[SampleKind, float],
    model: ModelConfig,
    data: DataConfig,
    alignment: int = 1,
    photo: tuple[int, int] = PHOTO,
    pixels: bool = True,
) -> PackedRow:
    """A row of conversations, filled with kinds in the proportions of ``mix`` until the next one finds no room; where
    ``data.packing`` is off, with one.

    Args:
        alignment: each sample takes up a multiple of this many tokens.
        photo: width and height of the images that are read.
        pixels: False leaves patches ``[P, 0]``, where only their number matters.
    """
    width = model.vision_encoder.patch_dim if pixels else 0
    samples = _filled(mix, data, alignment, lambda kind, room: _conversation(kind, model, data, photo, width, room))
    return _packed(samples, model, data, alignment, width)


def query_conversation_row(
    mix: Mapping[SampleKind, float],
    model: ModelConfig,
    vlm: QueryVlmConfig,
    data: DataConfig,
    alignment: int = 1,
    photo: tuple[int, int] = PHOTO,
    pixels: bool = True,
) -> QueryRow:
    """Likewise, with queries in the place of pictures to be drawn; of several in a sample, all but the last are read
    again."""
    samples = _filled(
        mix, data, alignment, lambda kind, room: _query_conversation(kind, model, vlm, data, photo, pixels, room)
    )
    encoder = model.vision_encoder
    width, teacher_width = (images.patch_dim(form) if pixels else 0 for form in (encoder, teacher_format(vlm, encoder)))
    tokens = _packed([sample.layout.tokens for sample in samples], model, data, alignment, width)
    return query_row(samples, tokens, alignment, teacher_width)


def drawing_row(
    mix: Mapping[SampleKind, float], work: DrawingWork, photo: tuple[int, int] = PHOTO, pixels: bool = True
) -> DrawingRow:
    """A row of pictures with their conditions, likewise; without pixels it has no noise either."""
    samples: list[DrawingSample] = []
    for number, kind in enumerate(_in_proportion(mix)):
        sample = _drawing(f"{kind}-{number}", kind, work, photo, pixels)
        # What rounding up the text stream may cost is left free, as the loader does.
        if sum(map(len, samples)) + len(sample) > work.room:
            break
        samples.append(sample)
        if not work.data.packing:
            break
    row, data = work.row(samples), work.data
    # Computed beforehand, they would come from a store.
    found = {"features": data.feature_cache, "latents": data.latent_cache}
    stored = {name: [vars(sample)[name] for sample in samples] for name, folder in found.items() if folder and pixels}
    return replace(row, **{name: np.concatenate(values) for name, values in stored.items()})


def frame_row(
    mix: Mapping[SampleKind, float],
    work: FrameWork,
    widths: tuple[int, int],
    photo: tuple[int, int] = PHOTO,
    pixels: bool = True,
) -> FrameRow:
    """A row of frames with their conditions, likewise; what is read is a frame as well.

    Args:
        widths: of words and visual latents, where they come from a cache.
    """
    drawn: dict[SampleKind, float] = {kind: share for kind, share in mix.items() if SHAPES[kind].drawn}
    samples = _filled(drawn, work.data, 1, lambda kind, _: _frames(kind, work, photo, pixels), work.room)
    row = work.row([sample for sample in samples if sample.num_pictures <= work.max_frames])
    if not pixels:
        return row
    # Computed beforehand, they would come from a store.
    shapes: dict[str, tuple[int, int]] = {}
    if work.data.latent_cache:
        shapes["latents"] = int(row.pictures.prod(axis=1).sum()), work.generator.mmdit.patch_dim
    if work.data.condition_cache:
        shapes |= {"words": (len(row.word_index), widths[0]), "visual": (len(row.query_index), widths[1])}
    return replace(row, **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


def picture_row(
    mix: Mapping[SampleKind, float], encoder: VisionEncoderConfig, data: DataConfig, pixels: bool = True
) -> PictureRow:
    """A row of pictures alone, likewise; all have the size of those that are drawn."""
    grid = _grid(DRAWN, data.generation_size, encoder)

    def make(kind: SampleKind, room: int | None) -> PictureSample:
        grids = np.array([grid] * (SHAPES[kind].read + SHAPES[kind].drawn), dtype=np.int64)
        cells = int(grids.prod(axis=1).sum()) // encoder.spatial_merge_size**2
        return PictureSample(kind, kind, grids, cells, patches=_patches(grids, encoder, pixels) if pixels else None)

    return PictureWork(encoder, data, {}).row(_filled(mix, data, 1, make))


class _Wordless(ChatTokenizer):
    """Knows the special tokens, and no words."""

    def __init__(self, model: ModelConfig) -> None:
        self.token_ids = model.token_ids
        self.template = TEMPLATES[model.chat_template]

    def encode(self, text: str) -> list[int]:
        raise AssertionError(f"nothing is read here, but {text}")


def wordless_chat(model: ModelConfig, data: DataConfig) -> ChatFormat:
    """For work whose samples are made here."""
    return ChatFormat(_Wordless(model), model.vision_encoder, data)


def _filled(
    mix: Mapping[SampleKind, float],
    data: DataConfig,
    alignment: int,
    make: Callable[[SampleKind, int | None], SizedT],
    room: int | None = None,
) -> list[SizedT]:
    """Samples of conversations until the next one finds no room, or one.

    Args:
        make: from a kind, and for the first the tokens that it must not exceed.
        room: tokens of them; the whole row if left out.
    """
    samples: list[SizedT] = []
    room = data.sequence_length if room is None else room
    for kind in _in_proportion(mix):
        sample = make(kind, room if not samples else None)
        room -= round_up(len(sample), alignment)
        if room < 0:
            break
        samples.append(sample)
        if not data.packing:
            break
    return samples


def _packed(
    samples: Sequence[TokenizedSample], model: ModelConfig, data: DataConfig, alignment: int, patch_width: int
) -> PackedRow:
    return build_row(
        samples,
        sequence_length=data.sequence_length,
        alignment=alignment,
        pad_id=model.token_ids.pad,
        patch_dim=patch_width,
    )


def _in_proportion(mix: Mapping[SampleKind, float]) -> Iterator[SampleKind]:
    """Kinds without end: always the one that is furthest behind its share."""
    drawn = dict.fromkeys(mix, 0)
    while True:
        kind = max(mix, key=lambda kind: mix[kind] / (drawn[kind] + 1))
        drawn[kind] += 1
        yield kind


def _conversation(
    kind: SampleKind, model: ModelConfig, data: DataConfig, photo: tuple[int, int], patch_width: int, room: int | None
) -> TokenizedSample:
    """The user's words and images, then the assistant's.

    Args:
        patch_width: numbers of a patch.
        room: images that are read are made smaller until the sample has no more tokens than this.
    """
    shape, encoder = SHAPES[kind], model.vision_encoder
    read = _grid(photo, data.understanding_size, encoder)
    drawn = _grid(DRAWN, data.generation_size, encoder)
    grids = np.array([read] * shape.read + [drawn] * shape.drawn, dtype=np.int64).reshape(-1, 3)
    is_target = np.arange(len(grids)) >= shape.read
    sizes = grids.prod(axis=1) // encoder.spatial_merge_size**2
    # Text of the user, each image between its two marks, text of the assistant.
    length = shape.asked + int((sizes + 2).sum()) + shape.answered
    if room is not None and length > room and min(photo) > 1:
        return _conversation(kind, model, data, (photo[0] // 2, photo[1] // 2), patch_width, room)
    ends = shape.asked + np.cumsum(sizes + 2) - 1
    visual = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    visual_index = np.concatenate([np.zeros(0, dtype=np.int64), *visual])
    target_index = np.flatnonzero(np.repeat(is_target, sizes))
    input_ids = np.zeros(length, dtype=np.int64)
    input_ids[visual_index] = model.token_ids.image_pad
    labels = np.full(length, IGNORED_LABEL)
    labels[length - shape.answered - 1 : -1] = 0
    position_ids = np.tile(np.arange(length), (3, 1))
    for grid, index in zip(grids, visual, strict=True):
        position_ids[:, index] = image_positions(int(index[0]), grid, encoder.spatial_merge_size)
    return TokenizedSample(
        id=kind,
        kind=kind,
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        patches=np.zeros((int(grids.prod(axis=1).sum()), patch_width), dtype=np.float32),
        grids=grids,
        is_target=is_target,
        visual_index=visual_index,
        predict_index=visual_index[target_index] - 1,
        target_index=target_index,
        features=_features(int(sizes.sum()), model) if data.feature_cache else None,
    )


def _query_tokens(
    kind: SampleKind, chat: ChatFormat, groups: Sequence[int], photo: tuple[int, int], closing: bool
) -> QueryTokens:
    """The user's words and images, then the assistant's: each picture as queries, read again but for the last, and as
    many words behind each. Without patches.

    Args:
        groups: queries of a picture.
        closing: with the words behind the last.
    """
    shape, encoder, data = SHAPES[kind], chat.encoder, chat.data
    read, drawn = (_grid(*each, encoder) for each in ((photo, data.understanding_size), (DRAWN, data.generation_size)))
    again = max(0, shape.drawn - 1)
    sequence = TokenSequence(chat.tokenizer.token_ids, encoder.spatial_merge_size)
    sequence.add_text([0] * shape.asked, learned=False)
    words, queries = [np.arange(shape.asked)], [np.zeros(0, dtype=np.int64)]
    for _ in range(shape.read):
        sequence.add_image(np.array(read), is_target=False)
    for number in range(shape.drawn):
        queries += [sequence.add_queries(count, learned=True) for count in groups]
        if number < again:
            sequence.add_image(np.array(drawn), is_target=False)
            words.append(np.arange(shape.answered // shape.drawn) + len(sequence))
            sequence.add_text([0] * len(words[-1]), learned=True)
    if closing:
        sequence.add_text([0] * (shape.answered - sum(map(len, words[1:]))), learned=True)
    return QueryTokens(
        tokens=sequence.finish(kind, kind, encoder.patch_dim),
        read_index=tuple(range(shape.read + again)),
        read_drawn=(False,) * shape.read + (True,) * again,
        drawn_index=tuple(range(shape.read, shape.read + shape.drawn)),
        query_index=np.concatenate(queries),
        text_index=tuple(words[: shape.drawn]),
    )


def _query_conversation(
    kind: SampleKind,
    model: ModelConfig,
    vlm: QueryVlmConfig,
    data: DataConfig,
    photo: tuple[int, int],
    pixels: bool,
    room: int | None,
) -> QuerySample:
    """A conversation with queries, and its pictures as the teacher looks at them."""
    layout = _query_tokens(kind, wordless_chat(model, data), vlm.scales.queries, photo, closing=True)
    if room is not None and len(layout) > room and min(photo) > 1:
        return _query_conversation(kind, model, vlm, data, (photo[0] // 2, photo[1] // 2), pixels, room)
    tokens, encoder, form = layout.tokens, model.vision_encoder, teacher_format(vlm, model.vision_encoder)
    sizes = (target_size(DRAWN, teacher_size(vlm, data), form),) * SHAPES[kind].drawn
    grids = target_grids(sizes, form)
    has_cache = bool(data.feature_cache) and pixels
    by_cache = has_cache and not isinstance(vlm.teacher, SiglipTeacher)
    loaded = replace(
        tokens,
        patches=_patches(tokens.grids, encoder, pixels),
        features=_features(len(tokens.visual_index), model) if has_cache else None,
    )
    return QuerySample(
        layout=replace(layout, tokens=loaded),
        target_sizes=sizes,
        target_grids=grids,
        target_patches=None if by_cache else _patches(grids, form, pixels),
        target_features=_features(int(grids.prod(axis=1).sum()) // encoder.spatial_merge_size**2, model)
        if by_cache
        else None,
    )


def _frames(kind: SampleKind, work: FrameWork, photo: tuple[int, int], pixels: bool) -> FrameSample:
    """A conversation up to its last picture."""
    shape = SHAPES[kind]
    layout = _query_tokens(kind, work.chat, work.scales.queries, photo, closing=False)
    tokens = void(layout.tokens)
    if pixels and not work.data.condition_cache:
        tokens = replace(tokens, patches=_patches(tokens.grids, work.chat.encoder, pixels))
    every = tuple(range(shape.read + shape.drawn))
    turns = [Turn("user", every[: shape.read]), Turn("assistant", every[shape.read :])]
    sizes = [photo] * shape.read + [DRAWN] * shape.drawn
    sample = work.frames_of(replace(layout, tokens=tokens), turns, sizes, key=0)
    if not pixels:
        return sample
    count = int(sample.sizes.prod(axis=1).sum())
    sample = replace(sample, pixels=np.zeros((count, images.patch_dim(work.pixel_format)), dtype=np.float32))
    if sample.target_grids is None:
        return sample
    return replace(sample, target_patches=_patches(sample.target_grids, work.chat.encoder, pixels))


def _patches(grids: np.ndarray, form: images.PatchFormat, pixels: bool) -> np.ndarray:
    width = images.patch_dim(form) if pixels else 0
    return np.zeros((int(grids.prod(axis=1).sum()), width), dtype=np.float32)


def _drawing(name: str, kind: SampleKind, work: DrawingWork, photo: tuple[int, int], pixels: bool) -> DrawingSample:
    """One picture; its condition is the picture, and for edits the image that it starts from."""
    encoder, data, generator = work.encoder, work.data, work.generator
    grids = [_grid(DRAWN, data.generation_size, encoder)]
    if kind == "editing" and work.with_sources:
        grids.append(_grid(photo, data.understanding_size, encoder))
    assert data.drawing_size is not None
    side = generator.token_pixels
    width, height = images.target_size(*DRAWN, data.drawing_size, side)
    picture = np.array([height // side, width // side], dtype=np.int64)
    whole = np.array(grids, dtype=np.int64)
    num_patches, num_picture = int(whole.prod(axis=1).sum()), int(picture.prod())
    num_condition = num_patches // encoder.spatial_merge_size**2
    has_features, has_latents = (bool(folder) and pixels for folder in (data.feature_cache, data.latent_cache))
    return DrawingSample(
        id=name,
        kind=kind,
        image_index=tuple(range(len(grids))),
        by_assistant=(True,) + (False,) * (len(grids) - 1),
        grids=whole,
        picture=picture,
        num_condition=num_condition,
        uniform=0.5,
        unconditional=False,
        noise_seed=0,
        patches=np.zeros((num_patches, encoder.patch_dim), dtype=np.float32) if pixels else None,
        features=np.zeros((num_condition, encoder.out_size), np.float32) if has_features else None,
        pixels=np.zeros((num_picture, images.patch_dim(work.pixel_format)), dtype=np.float32) if pixels else None,
        latents=np.zeros((num_picture, generator.mmdit.patch_dim), np.float32) if has_latents else None,
    )


def _features(num_tokens: int, model: ModelConfig) -> np.ndarray:
    encoder = model.vision_encoder
    return np.zeros((num_tokens, encoder.out_size * (1 + len(encoder.deepstack_layers))), dtype=np.float32)


def _grid(size: tuple[int, int], rule: ImageSize, encoder: VisionEncoderConfig) -> tuple[int, int, int]:
    """Patches along time, height and width."""
    width, height = images.target_size(*size, rule, encoder.token_pixels)
    return 1, height // encoder.patch_size, width // encoder.patch_size
