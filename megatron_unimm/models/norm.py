"""Normalisation for the torch layers."""

import torch
from megatron.core.transformer import TransformerConfig


class SequenceParallelNorm:
    """torch's RMSNorm or LayerNorm, with its parameters marked for the gradient sum over tensor-parallel ranks under
    sequence parallelism.

    Megatron-Core's WrappedTorchNorm refuses sequence parallelism.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> torch.nn.Module:
        norm = (torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm)(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
