"""SPAR's alignment as the shared loop sees it."""

from collections.abc import Sequence
from typing import Any

from megatron_unimm.config.methods import SparAlignmentConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.queries import QueryRow
from megatron_unimm.methods.mmcore.losses import TERMS
from megatron_unimm.methods.mmcore.method import MMCore
from megatron_unimm.methods.spar.alignment.model import SparVlm
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


class SparAlignment(MMCore):
    """The language model for one stage: see ``methods/interface.py`` for the contract."""

    terms: tuple[str, ...] = (*TERMS, "balance")

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> None:
        super().__init__(stage, platform, groups)
        assert isinstance(stage.method, SparAlignmentConfig)
        self.weights = (*self.weights, stage.method.balance_weight)

    def build(self, virtual_stage: int, with_base: bool = True) -> SparVlm:
        return SparVlm(self.stage, self.vlm, self.platform, self.groups, self.frozen, virtual_stage, with_base)

    def counts(self, rows: Sequence[QueryRow]) -> list[int]:
        """And pictures, for the balance of their queries."""
        return [*super().counts(rows), sum(len(row.query_index) for row in rows) // self.vlm.num_queries]

    def part_configs(self) -> dict[str, Any]:
        """And how layers are mixed."""
        routing = self.stage.routing
        return {**super().part_configs(), "routing": None if routing is None else routing.model_dump(mode="json")}
