"""Draws the frames of conversations with MMCORE: a picture from its words, its visual latents and the pictures before.

Legend  n pictures, each the last frame of its conversation; U image tokens of a row, u of one picture, F values of a
        patch of latents, V words and Q visual latents of all pictures, C width of the condition, k conditions that a
        guided velocity is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.checkpoint.folder import HF_FOLDER, LANGUAGE_MODEL
from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.layout import check_layout, stream_multiple
from megatron_unimm.config.methods import MMCoreDiffusionConfig, MMCoreDrawing
from megatron_unimm.config.queries import VisionEncoderTeacher
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data import images
from megatron_unimm.data.chat import ChatFormat, ChatTokenizer
from megatron_unimm.data.frames import FrameRow, FrameSample, FrameWork
from megatron_unimm.data.packing import round_up
from megatron_unimm.data.sample import Turn
from megatron_unimm.errors import CheckpointError
from megatron_unimm.flow.guidance import num_conditions
from megatron_unimm.flow.guided import FrameState, GuidedFrames, GuidedRow
from megatron_unimm.flow.solvers import solve, starting_noise
from megatron_unimm.flow.timesteps import timestep_grid
from megatron_unimm.generate.checkpoint import drawing_stage
from megatron_unimm.generate.painter import PICTURES_AT_A_TIME, BasePainter
from megatron_unimm.generate.staged import decoding_mode
from megatron_unimm.methods.drawing.model import Condition
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.diffusion.method import MMCoreDiffusion, feature_places, frame_work
from megatron_unimm.methods.mmcore.diffusion.model import MMCoreDiffusionModel, condition_of, conversation_of
from megatron_unimm.models.mmdit.canvas import Canvas
from megatron_unimm.models.queries import pooled_to_grid
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.models.vae import picture_patches
from megatron_unimm.models.vision import VisionInput, VisionTower
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train.state import load_average, load_base


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
        return int(self.sample.is_drawn.sum()) * self.sample.num_queries


class FramePainter(BasePainter):
    """Every method is called on all ranks of a layout with the same arguments.

    Args:
        chunks: this rank's chunks, in the order in which hidden states pass them.
        work: how conversations become frames, without any source.
        has_teacher: the base model's vision encoder is among the first stage's frozen companions.
    """

    def __init__(
        self,
        chunks: Sequence[MMCoreDiffusionModel],
        stage: StageConfig,
        groups: ParallelGroups,
        platform: Platform,
        work: FrameWork,
        *,
        origin: str,
        has_teacher: bool = False,
    ) -> None:
        super().__init__(chunks, stage, groups, platform, origin=origin)
        assert isinstance(stage.method, MMCoreDrawing)
        self.config = stage.method
        self.chunks = chunks
        self.work = work
        self.first = chunks[0] if chunks[0].pre_process else None
        """The chunk with the VLM and the pathways, on the ranks of the first stage."""
        self.has_teacher = has_teacher

    @classmethod
    def load(
        cls, directory: Path, groups: ParallelGroups, platform: Platform, dtype: Literal["float32"] | None
    ) -> "FramePainter":
        """Build a checkpoint's model at the layout of ``groups``, with the running average of its weights where there
        is one.

        Args:
            dtype: None for the checkpoint's own.

        Raises:
            CheckpointError: it is not of MMCORE's diffusion transformer, or damaged.
            ConfigError: a layout that the model cannot have.
        """
        meta = read_meta(directory)
        if "pathways" not in meta or "config" not in meta:
            raise CheckpointError(str(directory), "holds no diffusion transformer of MMCORE")
        stage = drawing_stage(meta, groups.config, groups.world_size, dtype)
        check_layout(stage, groups.world_size)
        tokenizer = ChatTokenizer(stage.data.tokenizer or directory / HF_FOLDER / LANGUAGE_MODEL, stage.model)
        chat = ChatFormat(tokenizer, stage.model.vision_encoder, stage.data)
        assert stage.queries is not None
        method = MMCoreDiffusion(stage, platform, groups)
        kind = DTYPES[stage.system.precision.dtype]
        chunks = [method.build(number) for number in range(groups.config.virtual_pipeline)]
        base_dir = Path(stage.base_checkpoint)
        is_teacher = isinstance(stage.queries.teacher, VisionEncoderTeacher)
        has_teacher = is_teacher and bool(stage.base_checkpoint) and base_dir.is_dir()
        if has_teacher and chunks[0].pre_process:
            chunks[0].base.vision_encoder = chunks[0].vlm.new_tower()
        chunks = [chunk.to(platform.device, kind) for chunk in chunks]
        load_average(chunks, directory, groups)
        if has_teacher:
            load_base(chunks, {"vision_encoder": base_dir}, groups)
        work = frame_work(stage, DataSetup({}, lambda: chat))
        return cls(chunks, stage, groups, platform, work, origin=str(directory), has_teacher=has_teacher)

    def paint(
        self, requests: Sequence[FrameRequest], sampler: SamplerConfig | None = None, seed: int = 0
    ) -> list[np.ndarray]:
        """Pictures uint8 (H, W, 3) in the order of the requests, on every rank. They depend on seed and numbers, and
        not on which requests share a batch.

        Args:
            sampler: None for the recipe's.
        """
        sampler = sampler or self.config.sampler
        drawables = [self.lay_out(request) for request in requests]
        done: dict[int, np.ndarray] = {}
        by_size: dict[tuple[int, int], list[int]] = {}
        for place, drawable in enumerate(drawables):
            rows, columns = (int(count) for count in drawable.sample.sizes[-1])
            by_size.setdefault((rows, columns), []).append(place)
        side = self.generator.token_pixels
        for (rows, columns), places in by_size.items():
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
        return Drawable(self.work.frames_to_draw(request.turns, [*sizes, request.size]), request)

    @property
    def nothing(self) -> Tensor:
        """``[0, D]``: the visual latents of a picture that goes on as pixels."""
        return torch.zeros(0, self.work.vlm.latent_size(self.stage.model))

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

    def conditions(self, drawables: Sequence[Drawable]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states of the words ``[V, H]``, visual latents ``[Q, D]``, and what is added to image tokens, on the
        first stage."""
        assert self.first is not None
        vlm, work = self.first.vlm, self.work
        row = work.row([work.with_patches(each.sample, each.request.pictures) for each in drawables])
        words, latents = condition_of(vlm, row)
        counts = [len(each.sample.layout.query_index) for each in drawables]
        chosen = [
            part[-each.num_latents :] if each.request.latents is None else each.request.latents.to(part)
            for part, each in zip(latents.split(counts), drawables, strict=True)
        ]
        return words, torch.cat(chosen), self._image_condition(row)

    def _image_condition(self, row: FrameRow) -> Tensor | None:
        assert self.first is not None
        if not (isinstance(self.config, MMCoreDiffusionConfig) and self.config.vit_features):
            return None
        places = feature_places(row, self.stage, self.device)
        return self.first.image_condition(conversation_of(self.first.vlm, row), places)

    def clean_latents(self, drawables: Sequence[Drawable]) -> Tensor:
        """Patches of latents ``[U', F]`` of the pictures before, conversation by conversation (first stage)."""
        assert self.vae is not None
        mmdit = self.generator.mmdit
        pictures = [
            self.at_drawing_size(each.request.pictures[index])
            for each in drawables
            for index in each.sample.image_index[:-1]
        ]
        return picture_patches(self.vae, pictures, mmdit.patch_size, mmdit.patch_dim, self.dtype, self.device)

    def teacher_latents(self, pictures: Sequence[np.ndarray]) -> list[Tensor]:
        """What the visual latents ``[N, D]`` of pictures (uint8 (H, W, 3)) would be if the VLM knew them: features of
        the base model's vision encoder, pooled, on every rank.

        Raises:
            CheckpointError: that is not there, or the VLM was aligned to another teacher.
        """
        vlm = self.work.vlm
        if not isinstance(vlm.teacher, VisionEncoderTeacher):
            raise CheckpointError(self.origin, f"was aligned to {vlm.teacher.family}, which is no part of it")
        if not self.has_teacher:
            what = "the base model whose vision encoder its visual latents were aligned to is not there"
            raise CheckpointError(self.stage.base_checkpoint or "base_checkpoint", what)
        size = vlm.latent_size(self.stage.model)
        found = torch.empty(len(pictures) * vlm.num_queries, size, dtype=self.dtype, device=self.device)
        if self.first is not None:
            found = self._pooled(pictures).to(self.dtype).contiguous()
        self.link.broadcast(found, stage=0)
        return list(found.split(vlm.num_queries))

    def _pooled(self, pictures: Sequence[np.ndarray]) -> Tensor:
        assert self.first is not None
        encoder, rule = self.stage.model.vision_encoder, self.work.data.generation_size
        side = encoder.patch_size
        patches, grids = [], []
        for picture in pictures:
            cut = images.brought_to(picture, rule, encoder.token_pixels)
            patches.append(images.patchify(cut, encoder)[0])
            grids.append((1, cut.shape[0] // side, cut.shape[1] // side))
        with decoding_mode(self.chunks):
            seen = VisionInput.build(np.concatenate(patches), np.array(grids), encoder, self.device, self.dtype)
            tower = self.first.base.vision_encoder
            assert isinstance(tower, VisionTower)
            features = tower(seen)[:, : self.work.vlm.latent_size(self.stage.model)]
        merge = encoder.spatial_merge_size
        sizes = [(rows // merge, columns // merge) for _, rows, columns in grids]
        return pooled_to_grid(features, sizes, self.work.vlm.grid)


class Guided(GuidedFrames):
    """The guided velocity of pictures of one size. Conversations stand in a row k times, once per condition:

    1   [ words and visual latents ]
    2   [ words and visual latents | visual latents ]
    3   [ words and visual latents | visual latents | neither ]

    The pictures before are there in each. A model that sees the visual latents of earlier drawings
    (``method.earlier_latents``) has these drawings in its row as in training, with their conditions and the noise all
    gone: at t = 0, as they look.
    """

    def __init__(self, painter: FramePainter, drawables: Sequence[Drawable], sampler: SamplerConfig) -> None:
        self.painter = painter
        self.row = painter.work.row([each.sample for each in drawables])
        self.spoken = np.repeat(
            [each.request.latents is None for each in drawables], [each.num_words for each in drawables]
        )
        words = latents = clean = image = None
        if painter.first is not None:
            words, latents, image = painter.conditions(drawables)
            clean = painter.clean_latents(drawables)
        self.words, self.latents, self.clean = words, latents, clean
        """What the first stage has of the conversations: ``[V, H]``, ``[Q, D]``, ``[U', F]``."""
        self.image = image
        """``[U, H]`` on the first stage of a model that adds something to image tokens."""
        super().__init__(self._lay, num_conditions(sampler), sampler)

    def condition(self, times: int) -> Condition:
        """``times`` that of the conversations, on the first stage."""
        first, device = self.painter.first, self.painter.device
        assert first is not None
        assert self.words is not None
        assert self.latents is not None
        spoken, order = (torch.from_numpy(each).to(device) for each in (self.spoken, self.row.condition_order))
        shown = torch.full((len(self.latents),), self.painter.work.draws_from("visual"), device=device)
        text = first.pathways.guided(self.words, spoken, self.latents, shown, order, times)
        return Condition(text, None if self.image is None else self.image.repeat(times, 1))

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
