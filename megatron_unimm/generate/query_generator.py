"""A VLM that answers in words, and a diffusion transformer behind it in pictures: MMCORE and HieraQuery.

An answer may begin with words, and ends with its first picture; conversations of many pictures go on turn by turn. The
VLM is whole on the first pipeline stage, which tells the others what it said.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.parallel import ParallelConfig
from megatron_unimm.data.queries import query_tokens
from megatron_unimm.data.sample import TokenizedSample, Turn
from megatron_unimm.data.sizes import new_size
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.checkpoint import drawing_stage
from megatron_unimm.generate.decode import Answer, GeneratedImage, Prompt, decode
from megatron_unimm.generate.frame_painter import FramePainter, FrameRequest
from megatron_unimm.generate.pathway_painter import PathwayPainter
from megatron_unimm.generate.sampling import DecodeSettings
from megatron_unimm.generate.scale_painter import ScalePainter
from megatron_unimm.generate.staged import StagedModel, decoding_mode
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.parallel.platform import select_platform
from megatron_unimm.train import setup

T = TypeVar("T")
PAINTERS: tuple[type[FramePainter[Any]], ...] = (PathwayPainter, ScalePainter)


def painter_of(described: Collection[str]) -> type[FramePainter[Any]]:
    """What draws with a checkpoint whose meta describes these parts."""
    return next(painter for painter in PAINTERS if painter.part in described)


def draws_frames(described: Collection[str]) -> bool:
    """Whether a checkpoint whose meta describes these parts is of a VLM with a diffusion transformer behind it."""
    return any(painter.part in described for painter in PAINTERS)


@dataclass(frozen=True)
class QueryPrompt(Prompt):
    """A conversation without its answer."""

    turns: tuple[Turn, ...] = ()
    pixels: tuple[np.ndarray, ...] = ()
    """uint8 (H, W, 3): what the integer parts of the turns count into."""
    opens: bool = False
    """The answer is a picture."""


class QueryGenerator(Generator):
    """See :class:`~megatron_unimm.generate.api.Generator`: the same on a VLM with query tokens.

    Args:
        frames: what draws, and has the VLM.
    """

    def __init__(self, frames: FramePainter[Any]) -> None:
        self.frames = frames
        self.stage = frames.stage
        self.groups = frames.groups
        self.chat = frames.work.chat
        self.origin = frames.origin
        self.draws = True
        self.painter = None
        self.chunks = []
        vlm = frames.vlm if frames.first is not None else None
        dtype = DTYPES[self.stage.system.precision.dtype]
        alone = self.groups.without_pipeline()
        self._words = None if vlm is None else StagedModel([vlm], self.stage.model, alone, frames.device, dtype)

    @classmethod
    def open(cls, directory: Path, tensor: int = 1, pipeline: int = 1, context: int = 1) -> "QueryGenerator":
        """Build a checkpoint's model on the ranks that torchrun or srun started (one without them) and fill it.

        Raises:
            CheckpointError: it is damaged or foreign.
            ConfigError: a layout that the model cannot have.
        """
        # Numbers below float32 are slow on a CPU and save nothing there.
        dtype = None if select_platform().is_gpu else "float32"
        parallel, meta = ParallelConfig(tensor=tensor, pipeline=pipeline, context=context), read_meta(directory)
        platform, groups = setup.enter(drawing_stage(meta, parallel, setup.world_size(), dtype))
        try:
            return cls(painter_of(meta).load(directory, groups, platform, dtype))
        except BaseException:
            destroy_groups()
            raise

    @property
    def paints(self) -> bool:
        return True

    @property
    def reconstructs(self) -> bool:
        return self.frames.has_teacher

    @property
    def num_scales(self) -> int:
        return len(self.frames.work.scales.queries)

    @property
    def sampler(self) -> SamplerConfig:
        return self.frames.sampler

    @property
    def drawn_by(self) -> str:
        return self.origin

    # -- prompts

    def prompt(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[np.ndarray | GeneratedImage] = (),
        *,
        open_image: bool = False,
        number: int = 0,
    ) -> QueryPrompt:
        pixels = tuple(_pixels(picture) for picture in pictures)
        sizes = [(picture.shape[1], picture.shape[0]) for picture in pixels]
        layout = query_tokens(
            "prompt",
            "interleaved",
            turns,
            sizes,
            self.chat,
            self.frames.work.scales.queries,
            open_answer=True,
            answer=False,
        )
        shown = [pixels[part] for turn in turns for part in turn.parts if isinstance(part, int)]
        like = (shown[-1].shape[1], shown[-1].shape[0]) if shown else None
        width, height = new_size(like, self.chat.data.generation_size, self.chat.encoder.token_pixels)
        side = self.chat.encoder.patch_size
        return QueryPrompt(
            tokens=layout.tokens,
            grid=np.array([1, height // side, width // side], dtype=np.int64),
            number=number,
            pictures=tuple(pictures),
            turns=tuple(turns),
            pixels=pixels,
            opens=open_image,
        )

    # -- answers

    def answer(self, prompts: Sequence[Prompt], settings: DecodeSettings, batch_size: int = 64) -> list[Answer]:
        asked = [prompt for prompt in prompts if isinstance(prompt, QueryPrompt)]
        assert len(asked) == len(prompts), "prompts of this generator"
        words = self._answer_in_words(asked, settings, batch_size)
        drawing = [place for place, (_, opens, _) in enumerate(words) if opens]
        pictures: dict[int, tuple[np.ndarray, ...]] = {}
        if settings.pixels and drawing:
            requests = [self._request(asked[place], words[place][0]) for place in drawing]
            count = len(self.frames.work.scales.queries)
            scales = range(count) if settings.all_scales else (count - 1,)
            each = [replace(request, scale=scale) for request in requests for scale in scales]
            drawn = self.frames.paint(each, settings.sampler, settings.seed)
            pictures = {
                place: tuple(drawn[number * len(scales) : (number + 1) * len(scales)])
                for number, place in enumerate(drawing)
            }
        return [
            self._finish(prompt, *said, pictures.get(i, ()))
            for i, (prompt, said) in enumerate(zip(asked, words, strict=True))
        ]

    def _answer_in_words(
        self, prompts: Sequence[QueryPrompt], settings: DecodeSettings, batch_size: int
    ) -> list[tuple[list[int], bool, bool]]:
        """Of each prompt: what is said, whether a picture follows, and whether it ended by itself."""
        found: dict[int, tuple[list[int], bool, bool]] = {
            place: ([], True, True) for place, prompt in enumerate(prompts) if prompt.opens
        }
        # Prompts of like length share a batch: the cache pads all to the longest.
        order = sorted(set(range(len(prompts))) - found.keys(), key=lambda place: len(prompts[place].tokens))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            loaded = [replace(prompts[place], tokens=self._with_patches(prompts[place])) for place in places]
            said = self._on_first(lambda loaded=loaded: self._decode(loaded, settings))
            found |= dict(zip(places, said, strict=True))
        return [found[place] for place in range(len(prompts))]

    def _decode(self, prompts: Sequence[QueryPrompt], settings: DecodeSettings) -> list[tuple[list[int], bool, bool]]:
        assert self._words is not None
        limit = self.stage.model.backbone.max_position
        with decoding_mode(self.frames.chunks):
            streams = decode(self._words, prompts, settings, limit, stop_before_image=True)
        return [(stream.ids, stream.opened, stream.complete) for stream in streams]

    def _with_patches(self, prompt: QueryPrompt) -> TokenizedSample:
        sample = self.frames.lay_out(self._request(prompt, [])).sample
        return replace(
            prompt.tokens, patches=self.frames.work.with_patches(sample, prompt.pixels).layout.tokens.patches
        )

    def _request(self, prompt: QueryPrompt, said: Sequence[int]) -> FrameRequest:
        text = self.chat.tokenizer.decode(list(said), skip_special_tokens=True)
        turns = (*prompt.turns, Turn("assistant", (text,))) if text else prompt.turns
        side = self.chat.encoder.patch_size
        size = int(prompt.grid[2]) * side, int(prompt.grid[1]) * side
        return FrameRequest(turns, prompt.pixels, size, prompt.number)

    def _finish(
        self, prompt: QueryPrompt, said: list[int], opens: bool, complete: bool, pixels: tuple[np.ndarray, ...]
    ) -> Answer:
        """
        Args:
            pixels: at each scale that was drawn, the finest last.
        """
        text = self.chat.tokenizer.decode(said, skip_special_tokens=True)
        parts: tuple[str | int, ...] = (text,) if text else ()
        if not opens:
            return Answer(said, text, parts, (), complete)
        finest = pixels[-1] if pixels else None
        picture = GeneratedImage(self.frames.nothing, prompt.grid, finest, pixels[:-1])
        return Answer(said, text, (*parts, 0), (picture,), True)

    def _on_first(self, find: Callable[[], T]) -> T:
        """What the first pipeline stage finds, on all."""
        group = self.groups.collection.pp
        found = [find() if self.frames.first is not None else None]
        if group.size() > 1:
            dist.broadcast_object_list(found, src=dist.get_global_rank(group, 0), group=group)
        result = found[0]
        assert result is not None
        return result

    # -- parts on their own

    def reconstruct(
        self, pictures: Sequence[np.ndarray], sampler: SamplerConfig | None = None, seed: int = 0
    ) -> list[np.ndarray]:
        """What the diffusion transformer makes of true visual latents of pictures (uint8 (H, W, 3)) without words, on
        every rank.

        Raises:
            CheckpointError: the base model, whose vision encoder makes these, is not there.
        """
        latents = self.frames.teacher_latents(pictures)
        requests = [
            FrameRequest((), (), (picture.shape[1], picture.shape[0]), number, latents=own)
            for number, (picture, own) in enumerate(zip(pictures, latents, strict=True))
        ]
        return self.frames.paint(requests, sampler, seed)

    def vae_round_trip(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.frames.vae_round_trip(pictures)

    def target_features(self, pictures: Sequence[np.ndarray], batch_size: int = 64) -> list[Tensor]:
        """Visual latents ``[N, D]`` as eq. 1 aligns them, on every rank."""
        return self.frames.teacher_latents(pictures)


def _pixels(picture: np.ndarray | GeneratedImage) -> np.ndarray:
    if not isinstance(picture, GeneratedImage):
        return picture
    assert picture.pixels is not None, "a picture of this model has pixels"
    return picture.pixels
