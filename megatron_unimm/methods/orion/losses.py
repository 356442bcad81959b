"""The objective of ORION, eq. 1-4.

Every term is a sum over positions; counts are summed over micro-batches and ranks, and each term is divided by its
own count once per step (``train/step.py``). N_text and N_vision of the paper are therefore those of the whole global
batch, however it is packed or spread. Eq. 1, the cross entropy of text, is ``VlmModel.text_loss``.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_unimm.parallel.vocabulary import kl_divergence

TERMS = ("cross_entropy", "mse", "kl")
"""Names and order of the loss terms."""


def image_generation_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Eq. 2, the sum: Σ_j ‖f(h_j) − v_{j+1}‖² over the positions whose next token is visual.

    The paper writes a squared norm and calls it mean squared error; as in its ancestor Nexus-Gen the square is
    averaged over the H coordinates of a token, so that λ_MSE = 1 does not depend on the width.

    Args:
        predicted, target: ``[n, H]``; the target is detached.
    """
    return (predicted.float() - target.detach().float()).square().mean(dim=-1).sum()


def representation_consistency_loss(teacher_logits: Tensor, student_logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Eq. 3, the sum: Σ_j D_KL(p_teacher(w | h_j) ‖ p_student(w | h_j)) over the same positions as eq. 2.

    Args:
        teacher_logits, student_logits: ``[n, vocab / tensor]``.
    """
    return kl_divergence(teacher_logits, student_logits, group).sum()


def stack_terms(ce: Tensor, mse: Tensor, kl: Tensor) -> Tensor:
    """Float32 ``[3]`` in the order of :data:`TERMS`."""
    return torch.stack([ce.float(), mse.float(), kl.float()])
