"""MMCORE's VLM as the shared loop sees it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_unimm.config.methods import VisualLatentsConfig
from megatron_unimm.config.queries import SiglipTeacher
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.queries import QueryRow, QuerySample, QueryWork
from megatron_unimm.data.sample import IGNORED_LABEL
from megatron_unimm.data.sizes import smallest_area
from megatron_unimm.errors import ConfigError
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.batch import MMCoreBatch, build_batch
from megatron_unimm.methods.mmcore.flops import row_flops, sample_flops
from megatron_unimm.methods.mmcore.losses import TERMS
from megatron_unimm.methods.mmcore.model import MMCoreVlm
from megatron_unimm.methods.vlm.layout import alignment, travelling_rows
from megatron_unimm.methods.vlm.queries import frozen_parts
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


class MMCore:
    """The VLM for one stage: see ``methods/interface.py`` for the contract."""

    terms: tuple[str, ...] = TERMS
    weights: tuple[float, ...]

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> None:
        assert isinstance(stage.method, VisualLatentsConfig)
        assert stage.queries is not None
        self.stage = stage
        self.vlm = stage.queries
        self.platform = platform
        self.groups = groups
        self.weights = (stage.method.loss_weights.llm, stage.method.loss_weights.vis)
        self.frozen = frozen_parts(stage)

    def build(self, virtual_stage: int, with_base: bool = True) -> MMCoreVlm:
        return MMCoreVlm(self.stage, self.vlm, self.platform, self.groups, self.frozen, virtual_stage, with_base)

    def batch(self, row: QueryRow, model: MMCoreVlm, device: torch.device) -> MMCoreBatch:
        return build_batch(row, self.stage.model, self.vlm, replace(model.role(), device=device))

    def counts(self, rows: Sequence[QueryRow]) -> list[int]:
        """Positions whose next token is text, and queries that are aligned."""
        text = sum(int((row.tokens.labels != IGNORED_LABEL).sum()) for row in rows)
        return [text, sum(int(row.learned.sum()) for row in rows) * self.vlm.num_queries]

    def travelling_rows(self) -> int:
        return travelling_rows(self.stage)

    def base_parts(self) -> dict[str, Path]:
        """The teacher."""
        parts = {"vision_encoder": Path(self.stage.base_checkpoint)}
        if isinstance(self.vlm.teacher, SiglipTeacher):
            parts["siglip"] = Path(self.vlm.teacher.checkpoint)
        return parts

    def model_parts(self) -> dict[str, Path]:
        return {}

    def work(self, data: DataSetup) -> QueryWork:
        """Conversations with queries.

        Raises:
            ConfigError: pictures that are smaller than one of the teacher's patches.
        """
        teacher = self.vlm.teacher
        if isinstance(teacher, SiglipTeacher) and not smallest_area(teacher.size, teacher.encoder.patch_size):
            side = teacher.encoder.patch_size
            raise ConfigError(
                "queries.teacher.size",
                f"makes pictures smaller than a patch, which is {side} x {side} pixels; raise it",
            )
        return QueryWork(data.chat(), self.vlm, data.sources, data.features, alignment(self.stage))

    def row_flops(self, row: QueryRow) -> float:
        return row_flops(row, self.stage)

    def sample_flops(self, sample: QuerySample) -> float:
        return sample_flops(sample, self.stage)

    def part_configs(self) -> dict[str, Any]:
        """How queries and connector are built, for exports."""
        return {"queries": self.vlm.model_dump(mode="json")}
