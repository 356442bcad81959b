"""Pictures to be drawn, with the images that say what to draw: what an image generator learns from.

Every sample that has an image of the assistant gives one picture, its last. The picture is read twice: at the size that
the vision encoder gives its visual tokens at (``data.generation_size``), which are the condition, and at the size that
is drawn (``data.drawing_size``). The images before it in the conversation (what an edit starts from) may join the
condition, each at the size that the language model has it at.

    row of two samples     text stream  [ A A A A | B B B B b b | . . ]     A, B: visual tokens of the pictures,
                           image stream [ A A A A A A | B B B B B B | . ]   b: of B's source, . padding

Everything random about a sample, its timestep, its noise, and whether its condition is left out, comes from the seed
and the draw alone (source, place, pass over the source), so that it is the same whichever rank reads it.

Legend  V condition tokens, U image tokens (patches of latents), P patches of the vision encoder, N condition images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_unimm.config.data import DataConfig, SampleKind
from megatron_unimm.config.mmdit import ImageGeneratorConfig
from megatron_unimm.config.model import VisionEncoderConfig
from megatron_unimm.data import images
from megatron_unimm.data.decode.interface import Decoder, ImageRequest
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.features import STORED, FeatureStore
from megatron_unimm.data.fetch import fetch_images
from megatron_unimm.data.images import SiglipFormat
from megatron_unimm.data.mix import Draw, draw_key
from megatron_unimm.data.packing import round_up
from megatron_unimm.data.plan import BadSample, Laid
from megatron_unimm.data.sample import Sample
from megatron_unimm.data.sources.source import Source
from megatron_unimm.data.workers import laid_out
from megatron_unimm.models.mmdit.frames import Frames

PICTURE_NOISE, CONDITION_NOISE = 0, 1
"""Streams of random numbers of a sample."""


@dataclass(frozen=True)
class DrawingSample:
    """One picture."""

    id: str
    kind: SampleKind
    image_index: tuple[int, ...]
    """Of the sample's images: the picture, then its sources."""
    by_assistant: tuple[bool, ...]
    """Of the same images: whether the assistant drew it."""
    grids: np.ndarray
    """int64 [N, 3]: patches along time, height, width of the same images as the vision encoder reads them."""
    picture: np.ndarray
    """int64 [2]: rows and columns of patches of latents."""
    num_condition: int
    """V."""
    uniform: float
    """In (0, 1): becomes the timestep by the stage's distribution."""
    unconditional: bool
    """The picture's own visual tokens are left out of the condition."""
    noise_seed: int
    sources_kept: bool = False
    """Then those of its sources stay, so that both halves of an edit's guidance are learned (InstructPix2Pix,
    arXiv 2211.09800, section 3.2.1)."""
    learned: bool = True
    """False where an image is broken."""
    patches: np.ndarray | None = None
    """float32 [P, patch_dim] of the condition images."""
    features: np.ndarray | None = None
    """[V, F] of them, computed beforehand, in place of patches."""
    pixels: np.ndarray | None = None
    """float32 [U, 3 · side²] in [-1, 1]: the pixels of each image token (channel, row, column)."""
    latents: np.ndarray | None = None
    """[U, latent patch] of the picture, computed beforehand, in place of pixels."""

    @property
    def num_picture(self) -> int:
        """U."""
        return int(self.picture.prod())

    def __len__(self) -> int:
        return self.num_condition + self.num_picture


@dataclass(frozen=True)
class DrawingRow:
    """Pictures in a row of fixed length, one micro-batch. Arrays of the samples are concatenated in their order."""

    num_text: int
    """Tokens of the text stream, padding included."""
    num_tokens: int
    """Of both streams."""
    num_condition: np.ndarray
    """int64 [n]: V of each sample."""
    pictures: np.ndarray
    """int64 [n, 2]: rows and columns of patches of latents."""
    uniform: np.ndarray
    """float64 [n]."""
    unconditional: np.ndarray
    """bool [n]."""
    sources_kept: np.ndarray
    """bool [n]."""
    learned: np.ndarray
    """bool [n]."""
    grids: np.ndarray
    """int64 [N, 3]."""
    is_source: np.ndarray
    """bool [N]."""
    noise: np.ndarray
    """float32 [U, latent patch]; empty on ranks that read no pictures, as are the next five."""
    patches: np.ndarray
    pixels: np.ndarray
    features: np.ndarray | None
    latents: np.ndarray | None
    condition_noise: np.ndarray | None
    """float32 [V, H], zeros at tokens of sources; None where the work adds none."""
    sample_ids: tuple[str, ...]
    kinds: tuple[SampleKind, ...]

    @property
    def frames(self) -> Frames:
        """One per sample."""
        return Frames.single(self.pictures, self.num_condition)

    @property
    def num_padding(self) -> int:
        """Tokens that belong to no sample."""
        return self.num_tokens - int(self.num_condition.sum()) - int(self.pictures.prod(axis=1).sum())

    @property
    def num_images(self) -> int:
        """Pictures drawn."""
        return len(self.pictures)


@dataclass(frozen=True)
class DrawingWork:
    """Samples to pictures with conditions; see ``data/workers.py``.

    Args:
        stream_multiple: both streams of a row take up a multiple of this many tokens (tensor and context parallel).
        with_sources: images before the picture join its condition.
        condition_dropout: share of samples whose condition is left out.
        condition_noise: the picture's own visual tokens get Gaussian noise of a standard deviation that each sample
            draws between 0 and this.
    """

    generator: ImageGeneratorConfig
    encoder: VisionEncoderConfig
    data: DataConfig
    sources: Mapping[str, Source]
    seed: int
    condition_dropout: float
    with_sources: bool
    condition_noise: float = 0.0
    stream_multiple: int = 1
    features: FeatureStore | None = None
    """Of condition images, computed beforehand."""
    latents: FeatureStore | None = None
    """Of pictures, computed beforehand."""

    @property
    def room(self) -> int:
        """A row without what rounding up the text stream may cost."""
        return self.data.sequence_length - (self.stream_multiple - 1)

    @property
    def pixel_format(self) -> SiglipFormat:
        """Pixels of image tokens, in [-1, 1] as VAEs read them."""
        return SiglipFormat(self.generator.token_pixels)

    # -- what a sample holds

    def lay_out(self, draw: Draw) -> Laid | BadSample:
        """Read the headers of a sample's images."""
        return laid_out(self.sources, draw, lambda sample: self._layout(sample, draw))

    def _layout(self, sample: Sample, draw: Draw) -> DrawingSample:
        shown = [
            (part, turn.role == "assistant") for turn in sample.turns for part in turn.parts if isinstance(part, int)
        ]
        while shown and not shown[-1][1]:
            shown.pop()  # what the user shows after the last picture
        if not shown:
            raise SampleError(sample.id, "has no image of the assistant, nothing to draw", "nothing to draw")
        chosen = [shown[-1], *(shown[:-1] if self.with_sources else ())]
        sizes = [images.image_size(sample.images[index], self.data.max_image_pixels) for index, _ in chosen]
        grids = [self._grid(size, drawn) for size, (_, drawn) in zip(sizes, chosen, strict=True)]
        assert self.data.drawing_size is not None
        side = self.generator.token_pixels
        width, height = images.target_size(*sizes[0], self.data.drawing_size, side)
        generator = np.random.Generator(np.random.Philox(key=draw_key(self.seed, draw)))
        layout = DrawingSample(
            id=sample.id,
            kind=sample.kind,
            image_index=tuple(index for index, _ in chosen),
            by_assistant=tuple(drawn for _, drawn in chosen),
            grids=np.array(grids, dtype=np.int64),
            picture=np.array([height // side, width // side], dtype=np.int64),
            num_condition=int(np.prod(grids, axis=1).sum()) // self.encoder.spatial_merge_size**2,
            # Not 0, where no noise would be left and some distributions have no value.
            uniform=float(generator.uniform(1e-7, 1 - 1e-7)),
            unconditional=bool(generator.random() < self.condition_dropout),
            noise_seed=int(generator.integers(1 << 63)),
            sources_kept=bool(generator.random() < 0.5),
        )
        if len(layout) > self.room:
            row = self.data.sequence_length
            what = f"{len(layout)} tokens, but data.sequence_length {row} has room for {self.room}"
            raise SampleError(sample.id, f"{what}; raise it or lower the image sizes", "too long")
        return layout

    def _grid(self, size: tuple[int, int], drawn: bool) -> tuple[int, int, int]:
        rule = self.data.generation_size if drawn else self.data.understanding_size
        width, height = images.target_size(*size, rule, self.encoder.token_pixels)
        return 1, height // self.encoder.patch_size, width // self.encoder.patch_size

    # -- what its images hold

    def picture_request(self, laid: Laid) -> ImageRequest:
        """The picture at the size at which it is drawn."""
        rows, columns = (int(count) for count in laid.layout.picture)
        side, size = self.generator.token_pixels, self.data.drawing_size
        assert size is not None
        file = laid.sample.images[laid.layout.image_index[0]]
        return ImageRequest(file, columns * side, rows * side, size.crop, size.filter)

    def condition_requests(self, laid: Laid) -> list[ImageRequest]:
        """The images of the condition as the vision encoder reads them."""
        layout, data = laid.layout, self.data
        return [
            ImageRequest.of_grid(
                laid.sample.images[index],
                grid,
                self.encoder,
                data.generation_size if drawn else data.understanding_size,
            )
            for index, drawn, grid in zip(layout.image_index, layout.by_assistant, layout.grids, strict=True)
        ]

    def load(self, laid: Sequence[Laid], decoder: Decoder) -> list[tuple[DrawingSample, list[BadSample]]]:
        """Decode images, or look up what was computed of them; nothing is learned from a sample with a broken one."""
        pictures = [[self.picture_request(each)] for each in laid]
        conditions = [self.condition_requests(each) for each in laid]
        pixels = fetch_images(pictures, laid, self.latents, decoder, self.pixel_format)
        patches = fetch_images(conditions, laid, self.features, decoder, self.encoder)
        done = []
        for each, picture, condition in zip(laid, pixels, patches, strict=True):
            broken = [*picture.broken, *condition.broken]
            fields = {"pixels" if self.latents is None else "latents": picture.values}
            fields["patches" if self.features is None else "features"] = condition.values
            done.append((replace(each.layout, learned=not broken, **fields), broken))
        return done

    # -- rows

    def row(self, samples: Sequence[DrawingSample], step: int = 0) -> DrawingRow:
        """Conditions in front, pictures behind, each stream filled up with padding."""
        num_condition = np.array([sample.num_condition for sample in samples], dtype=np.int64)
        loaded = bool(samples) and (samples[0].pixels is not None or samples[0].latents is not None)
        latent_dim = self.generator.mmdit.patch_dim
        noise = [picture_noise(sample.noise_seed, sample.num_picture, latent_dim) for sample in samples if loaded]
        return DrawingRow(
            num_text=round_up(int(num_condition.sum()), self.stream_multiple),
            num_tokens=self.data.sequence_length,
            num_condition=num_condition,
            pictures=np.array([sample.picture for sample in samples], dtype=np.int64).reshape(-1, 2),
            uniform=np.array([sample.uniform for sample in samples], dtype=np.float64),
            unconditional=np.array([sample.unconditional for sample in samples], dtype=bool),
            sources_kept=np.array([sample.sources_kept for sample in samples], dtype=bool),
            learned=np.array([sample.learned for sample in samples], dtype=bool),
            grids=np.concatenate([np.zeros((0, 3), dtype=np.int64), *(sample.grids for sample in samples)]),
            is_source=np.array([place > 0 for sample in samples for place in range(len(sample.grids))], dtype=bool),
            noise=np.concatenate([np.zeros((0, latent_dim), dtype=np.float32), *noise]),
            patches=joined([sample.patches for sample in samples], self.encoder.patch_dim),
            pixels=joined([sample.pixels for sample in samples], images.patch_dim(self.pixel_format)),
            features=joined_store([sample.features for sample in samples], self.features),
            latents=joined_store([sample.latents for sample in samples], self.latents),
            condition_noise=self._condition_noise(samples if loaded else []) if self.condition_noise else None,
            sample_ids=tuple(sample.id for sample in samples),
            kinds=tuple(sample.kind for sample in samples),
        )

    def _condition_noise(self, samples: Sequence[DrawingSample]) -> np.ndarray:
        width, parts = self.encoder.out_size, []
        for sample in samples:
            generator = numbers_of(sample.noise_seed, CONDITION_NOISE)
            noise = np.zeros((sample.num_condition, width), dtype=np.float32)
            own = int(sample.grids[0].prod()) // self.encoder.spatial_merge_size**2
            scale = np.float32(generator.uniform(0, self.condition_noise))
            noise[:own] = scale * generator.standard_normal((own, width), dtype=np.float32)
            parts.append(noise)
        return np.concatenate([np.zeros((0, width), dtype=np.float32), *parts])


def numbers_of(seed: int, stream: int) -> np.random.Generator:
    """A sample's random numbers of one kind."""
    return np.random.Generator(np.random.Philox(key=seed | stream << 64))


def picture_noise(seed: int, num_tokens: int, width: int) -> np.ndarray:
    """Standard normal, float32 [U, latent patch]."""
    return numbers_of(seed, PICTURE_NOISE).standard_normal((num_tokens, width), dtype=np.float32)


def joined(parts: Sequence[np.ndarray | None], width: int) -> np.ndarray:
    """One behind the other, those that are there: float32 [n, width]."""
    return np.concatenate([np.zeros((0, width), dtype=np.float32), *(part for part in parts if part is not None)])


def joined_store(parts: Sequence[np.ndarray | None], store: FeatureStore | None) -> np.ndarray | None:
    """The same of a store's rows, in its type; None without a store."""
    if store is None:
        return None
    empty = np.empty((0, store.meta.width), STORED[store.meta.dtype])
    return np.concatenate([empty, *(part for part in parts if part is not None)])
