"""The connector between a language model's queries and a diffusion transformer (HieraQuery, section 4.2), tensor
parallel.

Legend  Q queries of pictures, picture by picture, coarse to fine; H' width of the connector.
"""

from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_unimm.config.hieraquery import LanguageConnectorConfig
from megatron_unimm.models.attention import PackedContext, Segments
from megatron_unimm.models.rotary import inverse_frequencies
from megatron_unimm.models.specs import block_spec, layer_spec


class ScaleConnector(TransformerBlock):
    """Layers of a language model, in both directions: the queries of one scale of one picture see one another. Tensor
    parallel.

    Args:
        config: see ``language_connector_transformer_config``.
    """

    def __init__(
        self, model: LanguageConnectorConfig, config: TransformerConfig, backend: str, groups: ProcessGroupCollection
    ) -> None:
        layers = [layer_spec(backend, causal=False) for _ in range(model.num_layers)]
        super().__init__(config, block_spec(backend, layers), pg_collection=groups)
        self.model = model

    def refine(self, hidden_QH: Tensor, queries: Sequence[int]) -> Tensor:
        """``[Q, H']``, of as many pictures as there are; positions count up in each scale.

        Args:
            queries: of each scale.
        """
        if not len(hidden_QH):
            # Its weights, and what comes before it, take part in every step: one token stands for none.
            return self.refine(hidden_QH.new_zeros(1, hidden_QH.shape[1]), (1,))[:0] + hidden_QH
        lengths = np.tile(np.array(queries), len(hidden_QH) // sum(queries))
        device = hidden_QH.device
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device)
        frequencies = inverse_frequencies(self.model.head_size, self.model.rope_theta, device)
        context = PackedContext.with_angles(
            positions[:, None].float() * frequencies,
            hidden_QH.dtype,
            segments={"full": Segments.build(np.cumsum([0, *lengths]), causal=False, device=device)},
        )
        return self(hidden_QH[:, None], attention_mask=None, packed_seq_params=context)[:, 0]
