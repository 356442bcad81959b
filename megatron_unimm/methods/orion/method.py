"""ORION as the shared loop sees it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_unimm.config.methods import OrionConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow, TokenizedSample
from megatron_unimm.data.workers import ConversationWork
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.orion.batch import OrionBatch, build_batch
from megatron_unimm.methods.orion.flops import frozen_parts, row_flops, sample_flops
from megatron_unimm.methods.orion.losses import TERMS
from megatron_unimm.methods.orion.model import OrionModel
from megatron_unimm.methods.vlm import layout
from megatron_unimm.methods.vlm.model import FrozenParts
from megatron_unimm.models.trainable import is_frozen
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


class Orion:
    """ORION for one stage: see ``methods/interface.py`` for the contract."""

    terms: tuple[str, ...] = TERMS
    weights: tuple[float, ...]

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> None:
        assert isinstance(stage.method, OrionConfig)
        self.stage = stage
        self.config = stage.method
        self.platform = platform
        self.groups = groups
        weights = self.config.loss_weights
        self.weights = (weights.cross_entropy, weights.mse, weights.kl)
        rules = stage.train.trainable
        self.frozen = FrozenParts(
            vision_encoder=is_frozen("vision_encoder", rules), backbone=is_frozen("backbone", rules)
        )
        self._frozen_parts = frozen_parts(stage)

    def build(self, virtual_stage: int, with_base: bool = True) -> OrionModel:
        return OrionModel(self.stage, self.platform, self.groups, self.frozen, virtual_stage, with_base)

    def batch(self, row: PackedRow, model: OrionModel, device: torch.device) -> OrionBatch:
        return build_batch(row, self.stage.model, replace(model.role(), device=device), self.config.token_noise)

    def counts(self, rows: Sequence[PackedRow]) -> list[int]:
        """N_text, and N_vision for both terms at visual positions."""
        text = sum(int((row.labels != IGNORED_LABEL).sum()) for row in rows)
        vision = sum(len(row.predict_index) for row in rows)
        return [text, vision, vision]

    def travelling_rows(self) -> int:
        return travelling_rows(self.stage)

    def base_parts(self) -> dict[str, Path]:
        """Teacher and target tower are the base model's."""
        base = Path(self.stage.base_checkpoint)
        return {"backbone": base, "vision_encoder": base}

    def model_parts(self) -> dict[str, Path]:
        return {}

    def work(self, data: DataSetup) -> ConversationWork:
        """Conversations as tokens."""
        return ConversationWork(
            data.chat(), data.sources, data.features, layout.alignment(self.stage), self.stage.train.seed
        )

    def row_flops(self, row: PackedRow) -> float:
        return row_flops(row, self.stage, self._frozen_parts)

    def sample_flops(self, sample: TokenizedSample) -> float:
        return sample_flops(sample, self.stage, self._frozen_parts)

    def part_configs(self) -> dict[str, Any]:
        """How the head is built, for exports."""
        return {"vision_head": self.config.vision_head.model_dump(mode="json")}


def travelling_rows(stage: StageConfig) -> int:
    """The student's, and the teacher's beside them."""
    assert isinstance(stage.method, OrionConfig)
    return layout.travelling_rows(stage) * (2 if stage.method.loss_weights.kl > 0 else 1)
