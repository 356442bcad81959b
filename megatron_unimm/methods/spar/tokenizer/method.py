"""SPAR's tokenizer as the shared loop sees it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_unimm.config.methods import SparTokenizerConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.pictures import PictureRow, PictureSample, PictureWork
from megatron_unimm.data.sizes import check_size
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.spar.tokenizer.flops import row_flops, sample_flops
from megatron_unimm.methods.spar.tokenizer.losses import OF_PICTURES, TERMS
from megatron_unimm.methods.spar.tokenizer.model import SparTokenizerModel, TokenizerBatch
from megatron_unimm.methods.vlm.batch import blank_image
from megatron_unimm.models.tokenizer.grid import CellGrids
from megatron_unimm.models.trainable import is_frozen
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.models.vision import VisionInput
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


class SparTokenizer:
    """The tokenizer for one stage: see ``methods/interface.py`` for the contract."""

    terms: tuple[str, ...] = TERMS

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> None:
        assert isinstance(stage.method, SparTokenizerConfig)
        self.stage, self.platform, self.groups = stage, platform, groups
        adversarial = stage.method.adversarial
        judged = {"adversarial": 0.0, "discriminator": 0.0}
        if adversarial is not None:
            judged = {"adversarial": adversarial.weight, "discriminator": 1.0}
        of = {**stage.method.loss_weights.model_dump(), **judged}
        self.weights: tuple[float, ...] = tuple(of[term] for term in TERMS)

    def build(self, virtual_stage: int, with_base: bool = True) -> SparTokenizerModel:
        return SparTokenizerModel(self.stage, self.platform, self.groups)

    def model_parts(self) -> dict[str, Path]:
        return {}

    def base_parts(self) -> dict[str, Path]:
        """The encoder as it was at first, where it trains."""
        if is_frozen("vision_encoder", self.stage.train.trainable):
            return {}
        return {"vision_encoder": Path(self.stage.base_checkpoint)}

    def work(self, data: DataSetup) -> PictureWork:
        """Pictures.

        Raises:
            ConfigError: a size that is no whole number of visual tokens.
        """
        encoder = self.stage.model.vision_encoder
        check_size(self.stage.data.generation_size, encoder.token_pixels, "data.generation_size")
        return PictureWork(encoder, self.stage.data, data.sources)

    def travelling_rows(self) -> int:
        """None: there is no pipeline. The schedule asks all the same."""
        return self.stage.data.sequence_length

    def counts(self, rows: Sequence[PictureRow]) -> list[int]:
        merge = self.stage.model.vision_encoder.spatial_merge_size
        cells = sum(int((row.cells(merge).prod(axis=1) * row.learned).sum()) for row in rows)
        pictures = sum(int(row.learned.sum()) for row in rows)
        return [pictures if term in OF_PICTURES else cells for term in TERMS]

    def batch(self, row: PictureRow, model: SparTokenizerModel, device: torch.device) -> TokenizerBatch:
        encoder, parallel = self.stage.model.vision_encoder, self.stage.system.parallel
        patches, grids, learned = row.patches, row.grids, row.learned
        if not len(grids):
            # Every rank's model takes part in the step; a blank picture counts for nothing.
            patches, grids = blank_image(self.stage.model)
            learned = np.zeros(1, dtype=bool)
        cells = grids[:, 1:] // encoder.spatial_merge_size
        counted = np.repeat(learned, cells.prod(axis=1)).astype(np.float32)
        return TokenizerBatch(
            images=VisionInput.build(patches, grids, encoder, device, DTYPES[self.stage.system.precision.dtype]),
            grids=CellGrids.build(cells, parallel.tensor if parallel.sequence else 1, device),
            counted=torch.from_numpy(counted).to(device, non_blocking=True),
            counted_pictures=torch.from_numpy(learned.astype(np.float32)).to(device, non_blocking=True),
        )

    def row_flops(self, row: PictureRow) -> float:
        return row_flops(row.grids, self.stage)

    def sample_flops(self, sample: PictureSample) -> float:
        return sample_flops(sample.grids, self.stage)

    def part_configs(self) -> dict[str, Any]:
        """How the tokenizer is built."""
        assert self.stage.tokenizer is not None
        return {"tokenizer": self.stage.tokenizer.model_dump(mode="json")}
