"""SPAR's language model in its alignment (figure 3): MMCORE's, whose visual latents are read off a mixture of layers.

    words, images, queries ─► layer 0 ─► … ─► layer L ─► text head ─► L_llm
                                 └──────┬────────┘
                              router of each token ─► (at the queries) connector ─► visual latents ─► L_vis

Layout: as ``methods/vlm/model.py``, with the mixture under the rows (``models/backbone/routing.py``).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_unimm.methods.mmcore.batch import MMCoreBatch
from megatron_unimm.methods.mmcore.model import MMCoreVlm
from megatron_unimm.models.backbone.routing import balance_loss, routing_weights


class SparVlm(MMCoreVlm):
    """One pipeline stage."""

    routing_observer: Callable[[Tensor], None] | None = None
    """Where it is set, each forward pass hands it the weights ``[q, L]`` of this rank's queries, see
    ``methods/interface.py``."""

    def states(self, rows_r1H: Tensor) -> tuple[Tensor, Tensor]:
        if self.backbone.routing is None:
            return super().states(rows_r1H)
        hidden, mixture = self.backbone.mixture(rows_r1H)
        return self.backbone.gather(hidden)[:, 0], self.backbone.gather(mixture.mixed[:, None])[:, 0]

    def condition_states(self, rows_r1H: Tensor) -> tuple[Tensor, Tensor]:
        """ "Each token" that pictures are drawn from mixes layers by itself: words as queries do."""
        mixed = self.states(rows_r1H)[1]
        return mixed, mixed

    def _losses(self, rows_r1H: Tensor, batch: MMCoreBatch) -> Tensor:
        """And the balance of the routers over the queries of each picture, float32 ``[3]``."""
        found = super()._losses(rows_r1H, batch)
        routing = self.stage.routing
        if routing is None:
            return torch.cat([found, found.new_zeros(1)])
        logits = self.backbone.gather(self.backbone.mixture(rows_r1H)[1].logits[:, None])[:, 0]
        chosen = logits.index_select(0, batch.queries.local_index)  # [q, L]
        if self.routing_observer is not None:
            self.routing_observer(routing_weights(chosen.detach(), routing.top_k))
        queries, each = batch.queries, self.vlm.num_queries
        balance = balance_loss(
            chosen, queries.rows // each, len(queries.index) // each, routing.top_k, self.groups.collection.cp
        )
        return torch.cat([found, balance[None]])
