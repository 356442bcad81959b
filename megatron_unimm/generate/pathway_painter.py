"""Draws with MMCORE: a picture from its words, its visual latents and the pictures before.

Legend  U image tokens of a row, V words and Q visual latents of all pictures, N of one, C width of the condition, k
        conditions that a guided velocity is made of.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.methods import MMCoreDrawing, PathwayDiffusionConfig
from megatron_unimm.config.queries import QueryVlmConfig, VisionEncoderTeacher
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data import images
from megatron_unimm.data.frames import FrameRow, FrameWork
from megatron_unimm.errors import CheckpointError
from megatron_unimm.flow.guidance import num_conditions
from megatron_unimm.generate.frame_painter import Drawable, FramePainter
from megatron_unimm.generate.staged import decoding_mode
from megatron_unimm.methods.drawing.model import Condition
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.diffusion.method import feature_places, frame_work
from megatron_unimm.methods.mmcore.diffusion.model import MMCoreDiffusionModel, condition_of, conversation_of
from megatron_unimm.methods.mmcore.model import MMCoreVlm
from megatron_unimm.methods.registry import build_method
from megatron_unimm.models.queries import pooled_to_grid
from megatron_unimm.models.vision import VisionInput, VisionTower
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


class Said(NamedTuple):
    """What the VLM says of conversations."""

    words: Tensor
    """``[V, H]``: hidden states."""
    latents: Tensor
    """``[Q, D]``."""
    image: Tensor | None
    """``[U, H]``, of a model that adds something to image tokens."""


class PathwayPainter(FramePainter[MMCoreDiffusionModel]):
    """Conversations stand in a row k times, once per condition:

    1   [ words and visual latents ]
    2   [ words and visual latents | visual latents ]
    3   [ words and visual latents | visual latents | neither ]

    The pictures before are there in each. A model that sees the visual latents of earlier drawings
    (``method.earlier_latents``) has these drawings in its row as in training, with their conditions and the noise all
    gone: at t = 0, as they look.
    """

    part = "pathways"
    has_teacher = True

    @classmethod
    def build(cls, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> list[MMCoreDiffusionModel]:
        method = build_method(stage, platform, groups)
        built = [method.build(number, with_base=False) for number in range(groups.config.virtual_pipeline)]
        chunks = [chunk for chunk in built if isinstance(chunk, MMCoreDiffusionModel)]
        assert len(chunks) == len(built)
        return chunks

    @classmethod
    def work_of(cls, stage: StageConfig, data: DataSetup) -> FrameWork:
        return frame_work(stage, data)

    @classmethod
    def add_base(cls, chunks: Sequence[MMCoreDiffusionModel], stage: StageConfig) -> dict[str, Path]:
        """The base model's vision encoder, which the VLM was aligned to."""
        assert stage.queries is not None
        base_dir = Path(stage.base_checkpoint)
        is_teacher = isinstance(stage.queries.teacher, VisionEncoderTeacher)
        if not (is_teacher and stage.base_checkpoint and base_dir.is_dir()):
            return {}
        if chunks[0].pre_process:
            chunks[0].base.vision_encoder = chunks[0].vlm.new_tower()
        return {"vision_encoder": base_dir}

    @property
    def config(self) -> MMCoreDrawing:
        """The stage's method."""
        assert isinstance(self.stage.method, MMCoreDrawing)
        return self.stage.method

    @property
    def queries(self) -> QueryVlmConfig:
        """How the VLM is asked for pictures."""
        assert self.stage.queries is not None
        return self.stage.queries

    @property
    def sampler(self) -> SamplerConfig:
        return self.config.sampler

    @property
    def vlm(self) -> MMCoreVlm:
        assert self.first is not None
        return self.first.vlm

    def num_conditions(self, sampler: SamplerConfig) -> int:
        return num_conditions(sampler)

    @property
    def nothing(self) -> Tensor:
        return torch.zeros(0, self.queries.latent_size(self.stage.model))

    def said(self, drawables: Sequence[Drawable]) -> Said:
        work = self.work
        row = work.row([work.with_patches(each.sample, each.request.pictures) for each in drawables])
        words, latents = condition_of(self.vlm, row)
        counts = [len(each.sample.layout.query_index) for each in drawables]
        chosen = [
            part[-each.num_latents :] if each.request.latents is None else each.request.latents.to(part)
            for part, each in zip(latents.split(counts), drawables, strict=True)
        ]
        return Said(words, torch.cat(chosen), self._image_condition(row))

    def _image_condition(self, row: FrameRow) -> Tensor | None:
        assert self.first is not None
        if not (isinstance(self.config, PathwayDiffusionConfig) and self.config.vit_features):
            return None
        places = feature_places(row, self.stage, self.device)
        return self.first.image_condition(conversation_of(self.first.vlm, row), places)

    def condition(self, row: FrameRow, drawables: Sequence[Drawable], said: Said, times: int) -> Condition:
        assert self.first is not None
        is_spoken = np.repeat(
            [each.request.latents is None for each in drawables], [each.num_words for each in drawables]
        )
        spoken, order = (torch.from_numpy(each).to(self.device) for each in (is_spoken, row.condition_order))
        shown = torch.full((len(said.latents),), self.work.draws_from("visual"), device=self.device)
        text = self.first.pathways.guided(said.words, spoken, said.latents, shown, order, times)
        return Condition(text, None if said.image is None else said.image.repeat(times, 1))

    def teacher_latents(self, pictures: Sequence[np.ndarray]) -> list[Tensor]:
        """What the visual latents ``[N, D]`` of pictures (uint8 (H, W, 3)) would be if the VLM knew them: features of
        the base model's vision encoder, pooled, on every rank.

        Raises:
            CheckpointError: that is not there, or the VLM was aligned to another teacher.
        """
        vlm = self.queries
        if not isinstance(vlm.teacher, VisionEncoderTeacher):
            raise CheckpointError(self.origin, f"was aligned to {vlm.teacher.family}, which is no part of it")
        if not self.base_parts:
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
            features = tower(seen)[:, : self.queries.latent_size(self.stage.model)]
        merge = encoder.spatial_merge_size
        sizes = [(rows // merge, columns // merge) for _, rows, columns in grids]
        return pooled_to_grid(features, sizes, self.queries.grid)
