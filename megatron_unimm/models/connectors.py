"""Between what a language model says of an image and what an image generator is conditioned on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_unimm.config.methods import ConnectorConfig


class VisualTokenConnector(nn.Module):
    """Visual tokens to the tokens of an MMDiT's condition: Linear, LayerNorm, ReLU, Linear, LayerNorm (the adapter of
    Nexus-Gen's generation decoder, arXiv 2504.21356). Whole on every rank.

    The pooled condition, there the CLIP vector of the empty prompt, is a weight here: one vector for all pictures, in
    transformers that have one.
    Visual tokens of source images are told from those of the picture by a vector that is added to them.

    Legend  V visual tokens, H their width, C that of the condition.
    """

    def __init__(self, model: ConnectorConfig, visual_size: int, condition_size: int, pooled_size: int) -> None:
        super().__init__()
        inner = model.hidden_size or condition_size
        self.linear_1 = nn.Linear(visual_size, inner)
        self.norm_1 = nn.LayerNorm(inner)
        self.linear_2 = nn.Linear(inner, condition_size)
        self.norm_2 = nn.LayerNorm(condition_size)
        self.pooled = nn.Parameter(torch.zeros(pooled_size)) if pooled_size else None
        self.has_sources = model.sources
        if model.sources:
            self.source = nn.Parameter(torch.zeros(condition_size))

    def forward(self, visual_VH: Tensor, is_source_V: Tensor | None = None) -> Tensor:
        """``[V, C]``.

        Args:
            is_source_V: ``[V]``, 1 where a token is of a source image; only where the connector takes them.
        """
        hidden = F.relu(self.norm_1(self.linear_1(visual_VH)))  # [V, inner]
        condition = self.norm_2(self.linear_2(hidden))  # [V, C]
        if self.has_sources:
            assert is_source_V is not None
            condition = condition + is_source_V[:, None].to(condition.dtype) * self.source
        return condition
