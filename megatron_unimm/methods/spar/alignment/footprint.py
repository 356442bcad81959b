"""What SPAR's alignment asks of a rank; see ``methods/footprint.py``. Beside MMCORE's: routers, and per mixed layer
what adding its states keeps, each of t H numbers: the state normalised, the sum so far and what is added, in fp32, and
in the computing dtype what travels, with the levels that travel along. Not measured."""

from collections.abc import Hashable

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.queries import QueryRow
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace
from megatron_unimm.methods.mmcore.footprint import MMCoreFootprints, QueryChunk, QueryLoad, teacher_of
from megatron_unimm.models.backbone.routing import ROUTER_MARK
from megatron_unimm.models.memory import FLOAT, Kept, Spread, Weights
from megatron_unimm.models.trainable import matching_rule


class AlignmentFootprints(MMCoreFootprints):
    """See :class:`~megatron_unimm.methods.footprint.Footprints`."""

    def alike(self, stage: StageConfig, place: ChunkPlace) -> Hashable:
        routing = stage.routing
        mixed = [] if routing is None else routing.mixed(stage.model.backbone.num_layers)
        return super().alike(stage, place), len([layer for layer in mixed if layer in place.layers])

    def chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: QueryRow) -> ChunkFootprint:
        return RoutedChunk(stage, spread, place, QueryLoad.of_row(row, stage), teacher_of(stage, place)).footprint()


class RoutedChunk(QueryChunk):
    """One chunk of one stage, and one row."""

    @property
    def _mixed_here(self) -> int:
        """Layers of this chunk that are mixed."""
        routing = self.stage.routing
        if routing is None:
            return 0
        return len([layer for layer in routing.mixed(self.backbone.num_layers) if layer in self.place.layers])

    def parts(self) -> list[tuple[Weights, bool]]:
        routing, hidden = self.stage.routing, self.backbone.hidden_size
        each = 1 + hidden * (routing is not None and routing.mode == "dynamic")
        rule = matching_rule(f"{self.prefix}backbone.{ROUTER_MARK}", self.stage.train.trainable)
        return [*super().parts(), (Weights(self._mixed_here * each), rule is not None and rule.train)]

    def _layers_kept(self) -> Kept:
        kept, routing = super()._layers_kept(), self.stage.routing
        if routing is None:
            return kept
        tokens, levels = self.spread.between(self.load.tokens), len(self.encoder.deepstack_layers)
        numbers = 3 * FLOAT + ((routing.top_k or 1) + levels) * self.spread.itemsize
        return kept + Kept(self._mixed_here * tokens * self.backbone.hidden_size * numbers)
