"""Conversations as frames to be drawn one after another, each from its words, its visual latents and the pictures
before (MMCORE, arXiv 2604.19902, section 3.2): what a diffusion transformer with a VLM beside it learns from.

Every picture up to the last that the assistant draws is a frame. One that is drawn is there noisy, with its condition;
one that a later frame looks back at is there clean (``models/mmdit/visibility.py``). Drawn for a given picture (0), a
drawing (1) and its edit (2), with conditions c:

    text stream   [ c1 … c1 | c2 … c2 | . ]
    image stream  [ clean 0 | noisy 1 | clean 1 | noisy 2 | . ]

The VLM reads the same conversation in a row of its own, from which the conditions come.

Without ``shows_sources`` nothing is there clean, and pictures that are not drawn are no frames: each frame is a sample
of its own.

A picture may be drawn at several scales (HieraQuery, section 3.1), each from queries of its own. Then a conversation's
pictures are there once per scale, and frames of one scale see none of another: they are like those of samples of their
own. A view is a picture at a scale.

Everything random about a frame, its timestep, its noise, and what is left out of its condition, comes from the seed and
the draw alone, so that it is the same whichever rank reads it; how often something is left out goes by the step.

Legend  n frames of the row, counting those twice that are there twice; F pictures to be drawn, K scales, N queries of
        all scales, Q = F N, V words of the condition, U image tokens, U' of views (each once), L tokens of the VLM, P
        patches of its vision encoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_unimm.config.data import DataConfig, SampleKind
from megatron_unimm.config.methods import DropoutSchedule, Pathways
from megatron_unimm.config.mmdit import ImageGeneratorConfig
from megatron_unimm.config.queries import PictureScales
from megatron_unimm.data import images
from megatron_unimm.data.chat import ChatFormat
from megatron_unimm.data.conditions import ConditionStore, condition_key
from megatron_unimm.data.decode.interface import Decoder, ImageRequest
from megatron_unimm.data.drawing import joined, joined_store, picture_noise
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.features import FeatureStore, Key
from megatron_unimm.data.fetch import fetch_images
from megatron_unimm.data.images import SiglipFormat
from megatron_unimm.data.mix import Draw, draw_key
from megatron_unimm.data.packing import round_up
from megatron_unimm.data.plan import BadSample, Laid
from megatron_unimm.data.queries import (
    QueryTokens,
    packed_index,
    packed_tokens,
    query_tokens,
    read_requests,
    target_grids,
    target_size,
)
from megatron_unimm.data.sample import PackedRow, Sample, Turn
from megatron_unimm.data.sources.source import Source
from megatron_unimm.data.workers import laid_out, void
from megatron_unimm.errors import UserError
from megatron_unimm.models.mmdit.frames import Frames

UNIFORM = ("uniform", "text_uniform", "visual_uniform")
"""What is random about each view."""


@dataclass(frozen=True)
class FrameSample:
    """A conversation up to its last drawing."""

    id: str
    kind: SampleKind
    layout: QueryTokens
    image_index: tuple[int, ...]
    """Of the sample's images: its views, all of the coarsest scale first."""
    sizes: np.ndarray
    """int64 [views, 2]: rows and columns of patches of latents."""
    is_drawn: np.ndarray
    """bool [views]."""
    uniform: np.ndarray
    """float64 [views] in (0, 1): become timesteps by the stage's distribution."""
    text_uniform: np.ndarray
    """float64 [views] in [0, 1): words are left out below the rate."""
    visual_uniform: np.ndarray
    """The same for visual latents."""
    noise_seed: int
    """Of view i: noise_seed + i."""
    queries: tuple[int, ...]
    """Of each scale."""
    shows_sources: bool = True
    """Whether a view sees those before it; else all views are drawn."""
    has_words: bool = True
    """False where pictures are drawn without: then words take up no places."""
    learned: bool = True
    """False where an image is broken."""
    pixels: np.ndarray | None = None
    """float32 [U', 3 · side²] in [-1, 1]: the pixels of each image token (channel, row, column)."""
    latents: np.ndarray | None = None
    """[U', latent patch], computed beforehand, in place of pixels."""
    words: np.ndarray | None = None
    """[V, H], computed beforehand, in place of what the VLM reads; so is the next."""
    visual: np.ndarray | None = None
    """[Q, D]: visual latents."""
    target_grids: np.ndarray | None = None
    """int64 [F, 3]: patches along time, height, width of the pictures to be drawn as the vision encoder looks at them;
    None where it does not."""
    target_patches: np.ndarray | None = None
    """float32 [P, patch_dim] of these."""
    target_features: np.ndarray | None = None
    """[V', F'] of them, computed beforehand, in place of patches."""

    @property
    def num_pictures(self) -> int:
        """Of one scale."""
        return len(self.sizes) // len(self.queries)

    @property
    def entries(self) -> list[tuple[int, bool]]:
        """Views as they lie in the image stream, and whether clean."""
        views, count = range(len(self.sizes)), self.num_pictures
        drawn = [(view, False) for view in views if self.is_drawn[view]]
        clean = [(view, True) for view in views if (view + 1) % count and self.shows_sources]
        return sorted(drawn + clean)

    @property
    def num_words(self) -> np.ndarray:
        """int64 [views]: words of each view's condition."""
        counts = np.zeros(len(self.sizes), dtype=np.int64)
        if self.has_words:
            counts[self.is_drawn] = [len(index) for index in self.layout.text_index] * len(self.queries)
        return counts

    @property
    def num_queries(self) -> np.ndarray:
        """int64 [views]: queries of each view's condition."""
        return np.repeat(np.array(self.queries, dtype=np.int64), self.num_pictures) * self.is_drawn

    @property
    def num_condition(self) -> np.ndarray:
        """int64 [views]: words and visual latents."""
        return self.num_words + self.num_queries

    def __len__(self) -> int:
        image = sum(int(self.sizes[number].prod()) for number, _ in self.entries)
        return image + int(self.num_condition.sum())


@dataclass(frozen=True)
class FrameRow:
    """Conversations in a row of fixed length, one micro-batch."""

    num_text: int
    """Tokens of the text stream, padding included."""
    num_tokens: int
    """Of both streams."""
    frames: Frames
    uniform: np.ndarray
    """float64 [n]."""
    learned: np.ndarray
    """bool [n]: noisy ones of whole samples."""
    pictures: np.ndarray
    """int64 [views, 2]: rows and columns of patches of each view."""
    token_of: np.ndarray
    """int64 [U]: which of the U' each image token is."""
    noise: np.ndarray
    """float32 [U, latent patch], zeros where clean; empty on ranks that read no pictures, as are the next two."""
    pixels: np.ndarray
    latents: np.ndarray | None
    conversation: PackedRow
    """What the VLM reads."""
    query_index: np.ndarray
    """int64 [Q]: in it."""
    word_index: np.ndarray
    """int64 [V]: in it."""
    condition_order: np.ndarray
    """int64 [V + Q]: of the text stream, places among the words, then the visual latents."""
    text_kept: np.ndarray
    """bool [V]."""
    visual_kept: np.ndarray
    """bool [Q]."""
    words: np.ndarray | None = None
    """[V, H]: the VLM's last hidden states, computed beforehand; so are the next."""
    visual: np.ndarray | None = None
    """[Q, D]: its visual latents."""
    target_grids: np.ndarray | None = None
    """int64 [F, 3]: patches of pictures to be drawn, as the vision encoder looks at them; None where it does not."""
    target_patches: np.ndarray | None = None
    """float32 [P, patch_dim]; empty on ranks that read no pictures."""
    target_features: np.ndarray | None = None
    """[V', F'], computed beforehand."""
    target_of_frame: np.ndarray | None = None
    """int64 [n]: which of the F a frame is, where it is noisy."""

    @property
    def num_padding(self) -> int:
        """Tokens that belong to no sample."""
        return self.num_tokens - int(self.frames.num_condition.sum()) - int(self.frames.counts.sum())

    @property
    def num_images(self) -> int:
        """Drawn, at each scale."""
        return int((~self.frames.is_clean).sum())

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return self.conversation.sample_ids

    @property
    def kinds(self) -> tuple[SampleKind, ...]:
        return self.conversation.kinds


@dataclass(frozen=True)
class FrameWork:
    """Samples to frames; see ``data/workers.py``.

    Args:
        scales: at which pictures are drawn.
        pathways, earlier_latents, shows_sources: see ``config/methods.py``.
        with_targets: the vision encoder looks at pictures to be drawn (at ``data.generation_size``).
        stream_multiple: both streams of a row take up a multiple of this many tokens (tensor and context parallel).
        vlm_alignment, vlm_multiple: each sample of the VLM's row, and all of it, take up a multiple of so many tokens.
    """

    generator: ImageGeneratorConfig
    chat: ChatFormat
    scales: PictureScales
    sources: Mapping[str, Source]
    seed: int
    text_dropout: DropoutSchedule
    visual_dropout: DropoutSchedule
    max_frames: int
    pathways: Pathways = "both"
    earlier_latents: bool = False
    shows_sources: bool = True
    stream_multiple: int = 1
    vlm_alignment: int = 1
    vlm_multiple: int = 1
    latents: FeatureStore | None = None
    """Of pictures, computed beforehand."""
    conditions: ConditionStore | None = None
    """What the VLM says, computed beforehand."""
    with_targets: bool = False
    features: FeatureStore | None = None
    """Of the vision encoder, computed beforehand."""

    @property
    def data(self) -> DataConfig:
        return self.chat.data

    @property
    def room(self) -> int:
        """A row without what rounding up the text stream may cost."""
        return self.data.sequence_length - (self.stream_multiple - 1)

    @property
    def pixel_format(self) -> SiglipFormat:
        """Pixels of image tokens, in [-1, 1] as VAEs read them."""
        return SiglipFormat(self.generator.token_pixels)

    def draws_from(self, pathway: Pathways) -> bool:
        """Whether a pathway is there at all."""
        return self.pathways in ("both", pathway)

    # -- what a sample holds

    def lay_out(self, draw: Draw) -> Laid | BadSample:
        """Read a sample's text and the headers of its images."""
        return laid_out(self.sources, draw, lambda sample: self.frames_of_sample(sample, draw))

    def frames_of_sample(self, sample: Sample, draw: Draw) -> FrameSample:
        """The frames of a sample, as one draw has them.

        Raises:
            SampleError: it has nothing to draw, or is too long.
        """
        turns = up_to_last_drawing(sample.turns)
        if not turns:
            raise SampleError(sample.id, "has no image of the assistant, nothing to draw", "nothing to draw")
        sizes = [images.image_size(file, self.data.max_image_pixels) for file in sample.images]
        layout = query_tokens(sample.id, sample.kind, turns, sizes, self.chat, self.scales.queries)
        found = self.frames_of(layout, turns, sizes, draw_key(self.seed, draw))
        if len(found) > self.room:
            row = self.data.sequence_length
            what = f"{len(found)} tokens, but data.sequence_length {row} has room for {self.room}"
            raise SampleError(sample.id, f"{what}; raise it or lower the image sizes", "too long")
        if found.num_pictures > self.max_frames and self.shows_sources:
            what = f"{found.num_pictures} pictures, but method.max_frames is {self.max_frames}; raise it"
            raise SampleError(sample.id, what, "too many pictures")
        return found

    def frames_of(
        self,
        layout: QueryTokens,
        turns: Sequence[Turn],
        sizes: Sequence[tuple[int, int]],
        key: int,
        scales: PictureScales | None = None,
    ) -> FrameSample:
        """The frames of a conversation whose last picture is to be drawn.

        Args:
            sizes: width and height in pixels of its images.
            key: 128 bits for what is random about it.
            scales: to be drawn; None for all.
        """
        scales = scales or self.scales
        shown = [(part, turn.role == "assistant") for turn in turns for part in turn.parts if isinstance(part, int)]
        shown = [(part, drawn) for part, drawn in shown if drawn or self.shows_sources]
        pictures = [self.picture_size(sizes[index]) for index, _ in shown]
        numbers = np.random.Generator(np.random.Philox(key=key))
        count = len(shown) * len(scales.queries)
        return FrameSample(
            id=layout.tokens.id,
            kind=layout.tokens.kind,
            layout=layout,
            image_index=tuple(index for index, _ in shown) * len(scales.queries),
            sizes=np.array(
                [[int(side * share) for side in picture] for share in scales.shares for picture in pictures],
                dtype=np.int64,
            ),
            is_drawn=np.array([drawn for _, drawn in shown] * len(scales.queries), dtype=bool),
            # Not 0, where no noise would be left and some distributions have no value.
            uniform=numbers.uniform(1e-7, 1 - 1e-7, count),
            text_uniform=numbers.random(count),
            visual_uniform=numbers.random(count),
            noise_seed=int(numbers.integers(1 << 62)),
            queries=scales.queries,
            shows_sources=self.shows_sources,
            has_words=self.draws_from("text"),
            target_grids=self._target_grids(layout, sizes) if self.with_targets else None,
        )

    def picture_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of image tokens that a picture of a size in pixels (width, height) has at the finest scale.
        All other scales have whole ones too."""
        side, rule = self.generator.token_pixels, self.data.drawing_size
        assert rule is not None
        width, height = images.target_size(*size, rule, side * self.scales.multiple)
        return height // side, width // side

    def _target_grids(self, layout: QueryTokens, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        encoder, rule = self.chat.encoder, self.data.generation_size
        return target_grids([target_size(sizes[index], rule, encoder) for index in layout.drawn_index], encoder)

    def frames_to_draw(self, turns: Sequence[Turn], sizes: Sequence[tuple[int, int]], scale: int = -1) -> FrameSample:
        """A conversation's pictures as they look, and a new one behind them that is to be drawn. A model that sees the
        visual latents of earlier drawings has their frames as in training, conditions and all.

        Args:
            turns: without the new picture.
            sizes: width and height in pixels of the conversation's images, and last of what the new one's shape goes
                by.
            scale: at which it is drawn.

        Raises:
            UserError: more pictures than the model can tell apart.
        """
        turns = [*turns, Turn("assistant", (len(sizes) - 1,))]
        layout = query_tokens("drawing", "interleaved", turns, sizes, self.chat, self.scales.queries, answer=False)
        only = PictureScales((self.scales.queries[scale],), (self.scales.shares[scale],))
        found = replace(self.frames_of(layout, turns, sizes, 0, only), target_grids=None)
        last = len(found.sizes) - 1
        if last >= self.max_frames and self.shows_sources:
            what = f"are {last}, but the model tells {self.max_frames} apart, the new one included; give fewer"
            raise UserError("pictures", what)
        if self.earlier_latents:
            return found
        read = replace(layout, text_index=layout.text_index[-1:])
        found = replace(found, layout=read, is_drawn=np.arange(last + 1) == last)
        if self.shows_sources:
            return found
        own = {name: vars(found)[name][-1:] for name in ("image_index", "sizes", "is_drawn", *UNIFORM)}
        return replace(found, **own)

    def with_patches(self, sample: FrameSample, pictures: Sequence[np.ndarray]) -> FrameSample:
        """With what the VLM reads of its pictures (uint8 (H, W, 3))."""
        encoder, data, layout = self.chat.encoder, self.data, sample.layout
        parts = [np.zeros((0, encoder.patch_dim), dtype=np.float32)]
        for index, drawn, grid in zip(layout.read_index, layout.read_drawn, layout.tokens.grids, strict=True):
            height, width = int(grid[1]) * encoder.patch_size, int(grid[2]) * encoder.patch_size
            rule = data.generation_size if drawn else data.understanding_size
            pixels = images.resize(pictures[index], width, height, crop=rule.crop, filter=rule.filter)
            parts.append(images.patchify(pixels, encoder)[0])
        tokens = replace(layout.tokens, patches=np.concatenate(parts))
        return replace(sample, layout=replace(layout, tokens=tokens))

    def pictures_before(self, sample: FrameSample, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """All views of a conversation but the last, uint8 (H, W, 3), as they are drawn.

        Args:
            pictures: of the conversation, uint8 (H, W, 3).
        """
        side, rule = self.generator.token_pixels, self.data.drawing_size
        assert rule is not None
        return [
            images.resize(pictures[index], int(columns) * side, int(rows) * side, crop=rule.crop, filter=rule.filter)
            for index, (rows, columns) in zip(sample.image_index[:-1], sample.sizes[:-1], strict=True)
        ]

    # -- what its images hold

    def picture_requests(self, laid: Laid) -> list[ImageRequest]:
        """The views at the size at which they are drawn."""
        side, size = self.generator.token_pixels, self.data.drawing_size
        assert size is not None
        return [
            ImageRequest(laid.sample.images[index], int(columns) * side, int(rows) * side, size.crop, size.filter)
            for index, (rows, columns) in zip(laid.layout.image_index, laid.layout.sizes, strict=True)
        ]

    def load(self, laid: Sequence[Laid], decoder: Decoder) -> list[tuple[FrameSample, list[BadSample]]]:
        """Decode images, or look up what was computed of them; nothing is learned from a sample with a broken one."""
        asked = [self.picture_requests(each) for each in laid]
        pictures = fetch_images(asked, laid, self.latents, decoder, self.pixel_format)
        read = self.read(laid, decoder) if self.conditions is None else self._recall(laid, self.conditions)
        targets = fetch_images(
            [self.target_requests(each) for each in laid], laid, self.features, decoder, self.chat.encoder
        )
        field = "pixels" if self.latents is None else "latents"
        target_field = "target_patches" if self.features is None else "target_features"
        done = []
        for picture, target, (sample, unread) in zip(pictures, targets, read, strict=True):
            broken = [*picture.broken, *target.broken, *unread]
            loaded = {"learned": not broken, field: picture.values}
            if self.with_targets:
                loaded[target_field] = target.values
            done.append((replace(sample, **loaded), broken))
        return done

    def target_requests(self, laid: Laid) -> list[ImageRequest]:
        """Pictures to be drawn, as the vision encoder looks at them; none where it does not."""
        sample = laid.layout
        if sample.target_grids is None:
            return []
        encoder, rule = self.chat.encoder, self.data.generation_size
        return [
            ImageRequest.of_grid(laid.sample.images[index], grid, encoder, rule)
            for index, grid in zip(sample.layout.drawn_index, sample.target_grids, strict=True)
        ]

    def read(self, laid: Sequence[Laid], decoder: Decoder) -> list[tuple[FrameSample, list[BadSample]]]:
        """Decode the images that the VLM reads."""
        asked = [read_requests(each.layout.layout, each, self.chat) for each in laid]
        done = []
        for each, found in zip(laid, fetch_images(asked, laid, None, decoder, self.chat.encoder), strict=True):
            sample = each.layout
            tokens = replace(void(sample.layout.tokens), patches=found.values)
            done.append((replace(sample, layout=replace(sample.layout, tokens=tokens)), found.broken))
        return done

    def condition_key(self, laid: Laid) -> Key:
        """Of what the VLM reads of a sample."""
        layout = laid.layout.layout
        return condition_key(layout, read_requests(layout, laid, self.chat))

    def _recall(self, laid: Sequence[Laid], store: ConditionStore) -> list[tuple[FrameSample, list[BadSample]]]:
        """Look up what the VLM says."""
        done = []
        for each in laid:
            sample = each.layout
            found = store.get(self.condition_key(each), sample.layout, each)
            layout = replace(sample.layout, tokens=void(sample.layout.tokens))
            words = found.words if sample.has_words else found.words[:0]
            done.append((replace(sample, layout=layout, words=words, visual=found.visual), found.broken))
        return done

    # -- rows

    def row(self, samples: Sequence[FrameSample], step: int = 0) -> FrameRow:
        """Conditions in front, pictures behind, each stream filled up with padding."""
        # Pictures that are only drawn have none.
        has_targets = self.with_targets and all(sample.target_grids is not None for sample in samples)
        places = places_of(samples)
        frames = frames_of(samples, self.earlier_latents)
        layouts = [sample.layout for sample in samples]
        length = sum(round_up(len(layout), self.vlm_alignment) for layout in layouts)
        length = round_up(max(1, length), self.vlm_multiple)
        return FrameRow(
            num_text=round_up(int(frames.num_condition.sum()), self.stream_multiple),
            num_tokens=self.data.sequence_length,
            frames=frames,
            uniform=np.array([samples[place].uniform[number] for place, number, _ in places], dtype=np.float64),
            learned=np.array([samples[place].learned and not clean for place, _, clean in places], dtype=bool),
            pictures=np.concatenate([np.zeros((0, 2), dtype=np.int64), *(sample.sizes for sample in samples)]),
            token_of=_token_of(samples, places),
            noise=self._noise(samples, places),
            pixels=joined([sample.pixels for sample in samples], images.patch_dim(self.pixel_format)),
            latents=joined_store([sample.latents for sample in samples], self.latents),
            conversation=packed_tokens(layouts, self.chat, length, self.vlm_alignment),
            query_index=packed_index(layouts, self.vlm_alignment),
            word_index=_word_index(samples, self.vlm_alignment),
            condition_order=_condition_order(samples),
            text_kept=self._text_kept(samples, step),
            visual_kept=self._visual_kept(samples, step),
            words=joined_store([sample.words for sample in samples], self.conditions and self.conditions.words),
            visual=joined_store([sample.visual for sample in samples], self.conditions and self.conditions.visual),
            **(self._targets(samples, places) if has_targets else {}),
        )

    def _targets(self, samples: Sequence[FrameSample], places: Sequence[tuple[int, int, bool]]) -> dict[str, Any]:
        grids = [sample.target_grids for sample in samples if sample.target_grids is not None]
        starts = np.cumsum([0, *map(len, grids)])
        numbers = [sample.is_drawn[: sample.num_pictures].cumsum() - 1 for sample in samples]
        of_frame = [starts[place] + numbers[place][view % samples[place].num_pictures] for place, view, _ in places]
        return {
            "target_grids": np.concatenate([np.zeros((0, 3), dtype=np.int64), *grids]),
            "target_patches": joined([sample.target_patches for sample in samples], self.chat.encoder.patch_dim),
            "target_features": joined_store([sample.target_features for sample in samples], self.features),
            "target_of_frame": np.array(of_frame, dtype=np.int64),
        }

    def _text_kept(self, samples: Sequence[FrameSample], step: int) -> np.ndarray:
        """bool [V]."""
        rate, parts = self.text_dropout.at(step), [np.zeros(0, dtype=bool)]
        for sample in samples:
            drawn = np.flatnonzero(sample.is_drawn[: sample.num_pictures])
            kept = (sample.text_uniform[drawn] >= rate) & self.draws_from("text")
            parts.append(np.repeat(kept, sample.num_words[drawn]))
        return np.concatenate(parts)

    def _visual_kept(self, samples: Sequence[FrameSample], step: int) -> np.ndarray:
        """bool [Q]."""
        rate, parts = self.visual_dropout.at(step), [np.zeros(0, dtype=bool)]
        for sample in samples:
            # As the VLM has its queries: picture by picture, each with all its scales.
            kept = (sample.visual_uniform >= rate) & self.draws_from("visual")
            by_picture = kept.reshape(len(sample.queries), -1).T[sample.is_drawn[: sample.num_pictures]]
            parts.append(np.repeat(by_picture.reshape(-1), np.tile(sample.queries, len(by_picture))))
        return np.concatenate(parts)

    def _noise(self, samples: Sequence[FrameSample], places: Sequence[tuple[int, int, bool]]) -> np.ndarray:
        width = self.generator.mmdit.patch_dim
        parts = [np.zeros((0, width), dtype=np.float32)]
        for place, number, clean in places:
            sample = samples[place]
            if sample.pixels is None and sample.latents is None:
                continue  # a rank that reads no pictures
            count = int(sample.sizes[number].prod())
            seed = sample.noise_seed + number
            parts.append(np.zeros((count, width), np.float32) if clean else picture_noise(seed, count, width))
        return np.concatenate(parts)


def up_to_last_drawing(turns: Sequence[Turn]) -> list[Turn]:
    """Turns up to the last picture of the assistant, which they end with; none without one."""
    kept: list[Turn] = []
    for place, turn in enumerate(turns):
        drawings = [number for number, part in enumerate(turn.parts) if isinstance(part, int)]
        if turn.role == "assistant" and drawings:
            kept = [*turns[:place], replace(turn, parts=turn.parts[: drawings[-1] + 1])]
    return kept


def places_of(samples: Sequence[FrameSample]) -> list[tuple[int, int, bool]]:
    """Of each frame of a row, its sample, its view in that, and whether it is there clean."""
    return [(place, view, clean) for place, sample in enumerate(samples) for view, clean in sample.entries]


def frames_of(samples: Sequence[FrameSample], earlier_latents: bool = False) -> Frames:
    """Of a row of samples."""
    places = places_of(samples)
    count = len(places)
    conditions = [0 if clean else int(samples[place].num_condition[view]) for place, view, clean in places]
    latents = [0 if clean else int(samples[place].num_queries[view]) for place, view, clean in places]
    # Each scale counts as a sample of its own; without sources each view does.
    pictures = [sample.num_pictures if sample.shows_sources else 1 for sample in samples]
    first = np.cumsum([0, *(len(sample.sizes) // each for sample, each in zip(samples, pictures, strict=True))])
    split = [divmod(view, pictures[place]) for place, view, _ in places]
    found = [first[place] + own for (place, _, _), (own, _) in zip(places, split, strict=True)]
    return Frames(
        sizes=np.array([samples[place].sizes[view] for place, view, _ in places], dtype=np.int64).reshape(count, 2),
        num_condition=np.array(conditions, dtype=np.int64),
        sample=np.array(found, dtype=np.int64),
        number=np.array([number for _, number in split], dtype=np.int64),
        is_clean=np.array([clean for _, _, clean in places], dtype=bool),
        num_shared=np.array(latents, dtype=np.int64) if earlier_latents else None,
    )


def _token_of(samples: Sequence[FrameSample], places: Sequence[tuple[int, int, bool]]) -> np.ndarray:
    """Of each image token of the row, its place among those of all pictures: int64 [U]."""
    counts = [sample.sizes.prod(axis=1) for sample in samples]
    starts = np.cumsum([0, *(int(count.sum()) for count in counts)])
    parts = [np.zeros(0, dtype=np.int64)]
    for place, number, _ in places:
        first = int(starts[place] + counts[place][:number].sum())
        parts.append(np.arange(first, first + int(counts[place][number])))
    return np.concatenate(parts)


def _word_index(samples: Sequence[FrameSample], alignment: int) -> np.ndarray:
    starts = np.cumsum([0, *(round_up(len(sample.layout), alignment) for sample in samples)])
    shifted = [
        index + start
        for sample, start in zip(samples, starts, strict=False)
        if sample.has_words
        for index in sample.layout.text_index
    ]
    return np.concatenate([np.zeros(0, dtype=np.int64), *shifted])


def _condition_order(samples: Sequence[FrameSample]) -> np.ndarray:
    """View by view its words, then its visual latents: int64, of places among the words, then the latents."""
    drawn = [sample.is_drawn[: sample.num_pictures] for sample in samples]
    words = [sample.num_words[: sample.num_pictures][its] for sample, its in zip(samples, drawn, strict=True)]
    word, latent = 0, sum(int(each.sum()) for each in words)
    parts = [np.zeros(0, dtype=np.int64)]
    for sample, its_words, its in zip(samples, words, drawn, strict=True):
        starts, scales = word + np.cumsum([0, *its_words]), np.cumsum([0, *sample.queries])
        for scale in range(len(sample.queries)):
            for picture, count in enumerate(its_words):
                first = latent + picture * scales[-1]
                parts.append(np.arange(starts[picture], starts[picture] + count))
                parts.append(np.arange(first + scales[scale], first + scales[scale + 1]))
        word, latent = int(starts[-1]), latent + int(its.sum()) * int(scales[-1])
    return np.concatenate(parts)
