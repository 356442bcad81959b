"""Alignment to features of a frozen vision encoder, which several methods have."""

import torch.nn.functional as F
from torch import Tensor


def cosine_loss(found_qD: Tensor, target_qD: Tensor) -> Tensor:
    """The sum Σ_i (1 − f_iᵀ v_i / ‖f_i‖ ‖v_i‖), a scalar: MMCORE's eq. 1 (arXiv 2604.19902) with f = F_θ(Q), and up to
    the constant REPA's loss (arXiv 2410.06940, eq. 8), which HieraQuery takes.

    Args:
        target_qD: v, detached.
    """
    return cosine_distances(found_qD, target_qD).sum()


def cosine_distances(found_nD: Tensor, target_nD: Tensor) -> Tensor:
    """1 − cos of each, float32 ``[n]``; the target learns nothing."""
    return 1 - F.cosine_similarity(found_nD.float(), target_nD.detach().float(), dim=-1)
