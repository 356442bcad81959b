"""Draws with HieraQuery: a picture at one of its scales, from the tokens of that scale and the pictures before at it.

Legend  N queries of a picture, n of them of the scale, V of the scale of all pictures, H hidden size of the VLM.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.methods import HieraQueryConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data import images
from megatron_unimm.data.frames import FrameRow, FrameWork
from megatron_unimm.flow.guidance import num_of_one_condition
from megatron_unimm.generate.frame_painter import Drawable, FramePainter
from megatron_unimm.methods.drawing.model import Condition
from megatron_unimm.methods.hieraquery.method import HieraQuery, frame_work
from megatron_unimm.methods.hieraquery.model import HieraQueryModel, ScaleVlm, conversation_of
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


class ScalePainter(FramePainter[HieraQueryModel]):
    """Conversations stand in a row twice where there is guidance, the second time without condition."""

    part = "hieraquery"

    @classmethod
    def build(cls, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> list[HieraQueryModel]:
        method = HieraQuery(stage, platform, groups)
        return [method.build(number, with_base=False) for number in range(groups.config.virtual_pipeline)]

    @classmethod
    def work_of(cls, stage: StageConfig, data: DataSetup) -> FrameWork:
        return frame_work(stage, data)

    @property
    def sampler(self) -> SamplerConfig:
        assert isinstance(self.stage.method, HieraQueryConfig)
        return self.stage.method.sampler

    @property
    def vlm(self) -> ScaleVlm:
        assert self.first is not None
        return self.first.vlm

    @property
    def nothing(self) -> Tensor:
        return torch.zeros(0, self.stage.model.backbone.hidden_size)

    def num_conditions(self, sampler: SamplerConfig) -> int:
        return num_of_one_condition(sampler)

    def at_drawing_size(self, picture: np.ndarray) -> np.ndarray:
        rule = self.stage.data.drawing_size
        assert rule is not None
        return images.brought_to(picture, rule, self.generator.token_pixels * self.work.scales.multiple)

    def said(self, drawables: Sequence[Drawable]) -> Tensor:
        """Tokens of the condition ``[V, C]``, each picture's of its scale."""
        assert self.first is not None
        row = self.work.row([self.work.with_patches(each.sample, each.request.pictures) for each in drawables])
        hidden = self.vlm.condition(conversation_of(self.vlm, row))  # [Q, H], of earlier pictures too
        queries = self.work.scales.queries
        counts = [len(each.sample.layout.query_index) for each in drawables]
        last = torch.cat([part[-sum(queries) :] for part in hidden.split(counts)])
        tokens = self.first.tokens(last, queries).unflatten(0, (len(drawables), -1))  # [pictures, N, C]
        bounds = np.cumsum([0, *queries])
        scales = [range(len(queries))[each.request.scale] for each in drawables]
        return torch.cat([own[bounds[scale] : bounds[scale + 1]] for own, scale in zip(tokens, scales, strict=True)])

    def condition(self, row: FrameRow, drawables: Sequence[Drawable], said: Tensor, times: int) -> Condition:
        assert self.first is not None
        frames = row.frames.tiled(times)
        frame_of_token = torch.from_numpy(np.repeat(np.arange(len(frames)), frames.num_condition)).to(self.device)
        tokens = torch.cat([said, *(torch.zeros_like(said) for _ in range(times - 1))])
        return self.first.condition(tokens, frame_of_token, len(frames))
