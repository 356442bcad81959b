"""The rows that a stage's steps are made of."""

from dataclasses import dataclass
from math import ceil
from typing import Any

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.typical import shares
from megatron_unimm.methods.registry import footprints_of


@dataclass(frozen=True)
class Workload:
    """One step of a stage on a number of data-parallel ranks."""

    typical: Any
    """A row as the mix fills it: what time and FLOPs are counted of."""
    heavy: dict[str, Any]
    """By kind of sample, a row of that kind alone, with images of the largest size: what memory must hold."""
    row_flops: float
    samples_per_row: int

    @classmethod
    def of(cls, stage: StageConfig) -> "Workload":
        footprints = footprints_of(stage)
        typical = footprints.typical_row(stage, pixels=False)
        kinds = shares(stage.data)
        heavy = {kind: footprints.typical_row(stage, (kind,), large=True, pixels=False) for kind in kinds}
        flops = footprints.row_flops(stage, typical)
        return cls(typical, heavy, flops, max(1, len(typical.sample_ids)))

    def rows(self, stage: StageConfig) -> int:
        """Rows that a step's samples fill."""
        if stage.train.global_batch_rows is not None:
            return stage.train.global_batch_rows
        assert stage.train.global_batch_size is not None
        return ceil(stage.train.global_batch_size / self.samples_per_row)

    def micro_batches(self, stage: StageConfig, data_size: int) -> int:
        """Rows of each data-parallel rank, empty ones included: as many on all, and with model chunks a multiple of the
        pipeline's stages."""
        parallel = stage.system.parallel
        multiple = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
        return ceil(self.rows(stage) / data_size / multiple) * multiple
