"""SANA's linear attention (arXiv 2410.10629, section 2.2): ReLU in place of softmax, so that all keys and values of a
picture become one matrix that every query reads.

    state = Σ_keys [v; 1] relu(k)ᵀ          D + 1 by D
    output = (state relu(q)), all but its last row over the last

Its cost grows with the tokens and not with their pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_unimm.models.mmdit.attention import JointContext, JointSegments, batched

EPSILON = 1e-15


class LinearAttention(torch.nn.Module):
    """Core attention without weights, in float32 whatever comes in: sums over a picture outgrow bf16.

    Args:
        kind: which of the context's lowerings it takes.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: JointContext) -> Tensor:
        """``[t, N, D]`` each to ``[t, N * D]``, zeros at padding."""
        segments = context.lowerings[self.kind]
        assert isinstance(segments, JointSegments)
        assert segments.context_size == 1, "linear attention sees no tokens of other context ranks"
        if not segments.batches:
            return (0 * (query + key + value)).flatten(1)  # only padding
        queries = query.index_select(0, segments.query_index)
        keys, values = (heads.index_select(0, segments.key_index) for heads in (key, value))
        attended = batched(queries, keys, values, segments.batches, relu_kernel)
        return torch.zeros_like(query).index_copy(0, segments.query_index, attended).flatten(1)


def relu_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``[segments, N, q, D]`` and ``[segments, N, k, D]`` to ``[segments, N, q, D]``."""
    # Laid out for the product first, so that it and ReLU keep one and the same tensor for the backward pass.
    queries, keys = F.relu(query.float().contiguous()), F.relu(key.float().contiguous())
    values = F.pad(value.float(), (0, 1), value=1.0)  # [segments, N, k, D + 1]
    state = values.transpose(-1, -2) @ keys  # [segments, N, D + 1, D]
    read = queries @ state.transpose(-1, -2)  # [segments, N, q, D + 1]
    return (read[..., :-1] / (read[..., -1:] + EPSILON)).to(query.dtype)
