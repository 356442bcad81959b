"""What the chunks of a pipeline ask, each kind of chunk worked out once."""

from collections.abc import Hashable
from typing import Any

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace
from megatron_unimm.methods.registry import footprints_of
from megatron_unimm.models.memory import Spread


class Chunks:
    """Footprints of one stage at one layout: most chunks of a pipeline are alike."""

    def __init__(self, stage: StageConfig, spread: Spread) -> None:
        self.stage = stage
        self.spread = spread
        self._footprints = footprints_of(stage)
        self._found: dict[tuple[Hashable, int], ChunkFootprint] = {}

    def of(self, place: ChunkPlace, row: Any) -> ChunkFootprint:
        """A chunk and one row on it."""
        key = (self._footprints.alike(self.stage, place), id(row))
        if key not in self._found:
            self._found[key] = self._footprints.chunk(self.stage, self.spread, place, row)
        return self._found[key]
