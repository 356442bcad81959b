"""Draws the frames of conversations: a picture from what a VLM says of it, and the pictures before.

Legend  n pictures, each the last frame of its conversation; U image tokens of a row, u of one picture, F values of a
        patch of latents, V words and Q visual latents of all pictures, C width of the condition, k conditions that a
        guided velocity is made of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.checkpoint.folder import HF_FOLDER, LANGUAGE_MODEL
from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.layout import check_layout, stream_multiple
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.chat import ChatFormat, ChatTokenizer
from megatron_unimm.data.frames import FrameRow, FrameSample, FrameWork
from megatron_unimm.data.packing import round_up
from megatron_unimm.data.sample import Turn
from megatron_unimm.errors import CheckpointError, UserError
from megatron_unimm.flow.guided import FrameState, GuidedFrames, GuidedRow
from megatron_unimm.flow.solvers import solve, starting_noise
from megatron_unimm.flow.timesteps import timestep_grid
from megatron_unimm.generate.checkpoint import drawing_stage
from megatron_unimm.generate.painter import PICTURES_AT_A_TIME, BasePainter
from megatron_unimm.generate.staged import decoding_mode
from megatron_unimm.methods.drawing.model import Condition, DrawingModel
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.vlm.queries import QueryVlm
from megatron_unimm.models.mmdit.canvas import Canvas
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.models.vae import picture_patches
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train.state import load_average, load_base

ChunkT = TypeVar("ChunkT", bound=DrawingModel)


@dataclass(frozen=True)
class FrameRequest:
    """A picture to be drawn as the assistant's answer to a conversation."""

    turns: tuple[Turn, ...]
    """Their integer parts count into ``pictures``."""
    pictures: tuple[np.ndarray, ...]
    """uint8 (H, W, 3)."""
    size: tuple[int, int]
    """Width and height in pixels that the new picture's shape goes by."""
    number: int = 0
    """With the seed, fixes the noise."""
    latents: Tensor | None = None
    """``[N, D]``: visual latents in place of what the VLM says; then the words are left out."""
    scale: int = -1
    """At which of the model's scales it is drawn; the last is the finest."""


@dataclass(frozen=True)
class Drawable:
    """A request, laid out."""

    sample: FrameSample
    request: FrameRequest

    @property
    def tokens(self) -> int:
        """u."""
        return int(self.sample.sizes[-1].prod())

    @property
    def num_words(self) -> int:
        """V of this one."""
        return int(self.sample.num_words.sum())

    @property
    def num_latents(self) -> int:
        """Q of this one."""
        return int(self.sample.num_queries.sum())


class FramePainter(BasePainter, Generic[ChunkT]):
    """Every method is called on all ranks of a layout with the same arguments.

    Args:
        chunks: this rank's chunks, in the order in which hidden states pass them.
        work: how conversations become frames, without any source.
        base_parts: the chunks' frozen companions, and the checkpoint of each.
    """

    def __init__(
        self,
        chunks: Sequence[ChunkT],
        stage: StageConfig,
        groups: ParallelGroups,
        platform: Platform,
        work: FrameWork,
        *,
        origin: str,
        base_parts: Mapping[str, Path] | None = None,
    ) -> None:
        super().__init__(chunks, stage, groups, platform, origin=origin)
        self.chunks = chunks
        self.base_parts = base_parts or {}
        self.work = work
        self.first = chunks[0] if chunks[0].pre_process else None
        """The chunk with the VLM and what makes the condition, on the ranks of the first stage."""

    @classmethod
    def load(
        cls, directory: Path, groups: ParallelGroups, platform: Platform, dtype: Literal["float32"] | None
    ) -> Self:
        """Build a checkpoint's model at the layout of ``groups``, with the running average of its weights where there
        is one.

        Args:
            dtype: None for the checkpoint's own.

        Raises:
            CheckpointError: it is of another method, or damaged.
            ConfigError: a layout that the model cannot have.
        """
        meta = read_meta(directory)
        if cls.part not in meta or "config" not in meta:
            raise CheckpointError(str(directory), f"holds no diffusion transformer with {cls.part}")
        stage = drawing_stage(meta, groups.config, groups.world_size, dtype)
        check_layout(stage, groups.world_size)
        tokenizer = ChatTokenizer(stage.data.tokenizer or directory / HF_FOLDER / LANGUAGE_MODEL, stage.model)
        chat = ChatFormat(tokenizer, stage.model.vision_encoder, stage.data)
        chunks = cls.build(stage, platform, groups)
        base_parts = cls.add_base(chunks, stage)
        chunks = [chunk.to(platform.device, DTYPES[stage.system.precision.dtype]) for chunk in chunks]
        load_average(chunks, directory, groups)
        if base_parts:
            load_base(chunks, base_parts, groups)
        work = cls.work_of(stage, DataSetup({}, lambda: chat))
        return cls(chunks, stage, groups, platform, work, origin=str(directory), base_parts=base_parts)

    # -- a method's own

    part: ClassVar[str]
    """What the meta of its checkpoints describes."""
    has_teacher: ClassVar[bool] = False
    """Whether :meth:`teacher_latents` knows what the model should say of a picture."""

    @classmethod
    def build(cls, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> list[ChunkT]:
        """This rank's chunks."""
        raise NotImplementedError

    @classmethod
    def work_of(cls, stage: StageConfig, data: DataSetup) -> FrameWork:
        """How conversations become frames."""
        raise NotImplementedError

    @classmethod
    def add_base(cls, chunks: Sequence[ChunkT], stage: StageConfig) -> dict[str, Path]:
        """Frozen companions that drawing can use where they are there, added to the chunks, and the checkpoint of
        each."""
        return {}

    @property
    def sampler(self) -> SamplerConfig:
        """How pictures are drawn unless the command says otherwise."""
        raise NotImplementedError

    @property
    def vlm(self) -> QueryVlm:
        """On the first stage."""
        raise NotImplementedError

    def num_conditions(self, sampler: SamplerConfig) -> int:
        """Velocities that a guided one is made of.

        Raises:
            UserError: guidance by something that the model does not have.
        """
        raise NotImplementedError

    def said(self, drawables: Sequence[Drawable]) -> Any:
        """What the VLM says of conversations, on the first stage."""
        raise NotImplementedError

    def condition(self, row: FrameRow, drawables: Sequence[Drawable], said: Any, times: int) -> Condition:
        """``times`` that of the conversations, each less conditioned than the one before, on the first stage."""
        raise NotImplementedError

    @property
    def nothing(self) -> Tensor:
        """``[0, D]``: the visual latents of a picture that goes on as pixels."""
        raise NotImplementedError

    def teacher_latents(self, pictures: Sequence[np.ndarray]) -> list[Tensor]:
        """What the model would say of pictures (uint8 (H, W, 3)) if it knew them, on every rank.

        Raises:
            UserError: it has no such thing.
        """
        what = "says what to draw at query tokens that nothing but drawing teaches; there is nothing true to draw from"
        raise UserError(self.origin, what)

    # -- pictures

    def paint(
        self, requests: Sequence[FrameRequest], sampler: SamplerConfig | None = None, seed: int = 0
    ) -> list[np.ndarray]:
        """Pictures uint8 (H, W, 3) in the order of the requests, on every rank. They depend on seed and numbers, and
        not on which requests share a batch.

        Args:
            sampler: None for the recipe's.

        Raises:
            UserError: as :meth:`lay_out` and :meth:`num_conditions`.
        """
        sampler = sampler or self.sampler
        self.num_conditions(sampler)  # what cannot be guided is refused before anything is worked out
        drawables = [self.lay_out(request) for request in requests]
        done: dict[int, np.ndarray] = {}
        by_size: dict[tuple[int, int, int], list[int]] = {}
        for place, drawable in enumerate(drawables):
            rows, columns = (int(count) for count in drawable.sample.sizes[-1])
            by_size.setdefault((rows, columns, drawable.request.scale), []).append(place)
        side = self.generator.token_pixels
        for (rows, columns, _), places in by_size.items():
            for start in range(0, len(places), PICTURES_AT_A_TIME):
                chosen = places[start : start + PICTURES_AT_A_TIME]
                latents = self.latents([drawables[place] for place in chosen], sampler, seed)
                pictures = self.pictures(latents, (columns * side, rows * side))
                done |= dict(zip(chosen, pictures, strict=True))
        return [done[place] for place in range(len(requests))]

    def lay_out(self, request: FrameRequest) -> Drawable:
        """The frames of a conversation that ends with the picture to be drawn.

        Raises:
            UserError: the conversation has more pictures than the model can tell apart.
        """
        sizes = [(picture.shape[1], picture.shape[0]) for picture in request.pictures]
        return Drawable(self.work.frames_to_draw(request.turns, [*sizes, request.size], request.scale), request)

    # -- drawing

    def latents(self, drawables: Sequence[Drawable], sampler: SamplerConfig, seed: int) -> Tensor:
        """Latents of pictures of one size, as patches ``[n, u, F]``, on every rank."""
        width = self.generator.mmdit.patch_dim
        noise = torch.stack([starting_noise(seed, each.request.number, each.tokens, width) for each in drawables])
        grid = timestep_grid(sampler.steps, sampler.shift, drawables[0].tokens, sampler.spacing)
        with decoding_mode(self.chunks):
            guided = Guided(self, drawables, sampler)
            # The state stays in float32: many small steps would be lost in bfloat16.
            return solve(guided.velocity, noise.to(self.device), grid.tolist(), sampler.solver)

    def clean_latents(self, drawables: Sequence[Drawable]) -> Tensor:
        """Patches of latents ``[U', F]`` of the pictures before, conversation by conversation (first stage)."""
        assert self.vae is not None
        mmdit = self.generator.mmdit
        pictures = [
            picture for each in drawables for picture in self.work.pictures_before(each.sample, each.request.pictures)
        ]
        return picture_patches(self.vae, pictures, mmdit.patch_size, mmdit.patch_dim, self.dtype, self.device)


class Guided(GuidedFrames):
    """The guided velocity of pictures of one size. Conversations stand in a row k times, once per condition, with the
    pictures before in each."""

    def __init__(self, painter: "FramePainter[Any]", drawables: Sequence[Drawable], sampler: SamplerConfig) -> None:
        self.painter = painter
        self.drawables = drawables
        self.row = painter.work.row([each.sample for each in drawables])
        self.said = self.clean = None
        """What the first stage has of the conversations: words of the VLM, and ``[U', F]`` of the pictures before."""
        if painter.first is not None:
            self.said, self.clean = painter.said(drawables), painter.clean_latents(drawables)
        super().__init__(self._lay, painter.num_conditions(sampler), sampler)

    def condition(self, times: int) -> Condition:
        """``times`` that of the conversations, on the first stage."""
        return self.painter.condition(self.row, self.drawables, self.said, times)

    def _lay(self, times: int) -> GuidedRow:
        painter, frames = self.painter, self.row.frames.tiled(times)
        multiple = stream_multiple(painter.stage)
        num_text = round_up(int(frames.num_condition.sum()), multiple)
        num_image = round_up(int(frames.counts.sum()), multiple)
        place = painter.chunks[0].place(None)
        canvas = Canvas.build(frames, num_text, num_text + num_image, painter.generator, place)
        clean = None if self.clean is None else self.clean.repeat(times, 1)
        state = FrameState.build(frames, clean, painter.generator.mmdit.patch_dim, painter.device)
        condition = None if painter.first is None else self.condition(times)
        return GuidedRow(state, partial(painter.run, canvas, condition))
