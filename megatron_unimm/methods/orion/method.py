"""ORION as the shared loop sees it."""

from collections.abc import Sequence

import torch

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow
from megatron_unimm.methods.orion.batch import OrionBatch, build_batch
from megatron_unimm.methods.orion.losses import TERMS
from megatron_unimm.methods.orion.model import FrozenParts, OrionModel
from megatron_unimm.models.backbone.deepstack import travelling_levels
from megatron_unimm.models.trainable import is_frozen
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


class Orion:
    """ORION for one stage: see ``methods/interface.py`` for the contract."""

    terms: tuple[str, ...] = TERMS
    weights: tuple[float, ...]

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> None:
        self.stage = stage
        self.platform = platform
        self.groups = groups
        weights = stage.method.loss_weights
        self.weights = (weights.cross_entropy, weights.mse, weights.kl)
        rules = stage.train.trainable
        self.frozen = FrozenParts(
            vision_encoder=is_frozen("vision_encoder", rules), backbone=is_frozen("backbone", rules)
        )

    def build(self, virtual_stage: int, with_base: bool = True) -> OrionModel:
        return OrionModel(self.stage, self.platform, self.groups, self.frozen, virtual_stage, with_base)

    def batch(self, row: PackedRow, model: OrionModel, device: torch.device) -> OrionBatch:
        return build_batch(row, self.stage.model, model.role(), device, DTYPES[self.stage.system.precision.dtype])

    def counts(self, rows: Sequence[PackedRow]) -> list[int]:
        """N_text, and N_vision for both terms at visual positions."""
        text = sum(int((row.labels != IGNORED_LABEL).sum()) for row in rows)
        vision = sum(len(row.predict_index) for row in rows)
        return [text, vision, vision]

    def streams(self) -> int:
        models = 2 if self.stage.method.loss_weights.kl > 0 else 1
        return models * (1 + travelling_levels(self.stage.model, self.stage.system.parallel))
