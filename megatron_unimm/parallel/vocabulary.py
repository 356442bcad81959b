"""Losses over a vocabulary that is cut over tensor-parallel ranks, without ever gathering logits."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood per position, float32 ``[n]``, over Megatron-Core's tensor-parallel group (its
    function takes no other).

    Args:
        logits: ``[n, vocab / tensor]``, this rank's part.
        labels: int64 ``[n]``, the same on all tensor-parallel ranks.
    """
    return vocab_parallel_cross_entropy(logits[:, None].float(), labels[:, None])[:, 0]


def kl_divergence(teacher_logits: Tensor, student_logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """D_KL(teacher ‖ student) per position, float32 ``[n]``; gradient flows to the student only.

    Args:
        teacher_logits, student_logits: ``[n, vocab / tensor]``, this rank's part.
    """
    return _VocabularyParallelKl.apply(student_logits, teacher_logits.detach(), group)


class _VocabularyParallelKl(torch.autograd.Function):
    """With log p = x − log Z, and Z summed over ranks: KL = Σ_w p_t(w) (log p_t(w) − log p_s(w)); dKL/dx_s = p_s − p_t.

    Two all-reduces of ``[2, n]``: the largest logit of each model, then its sum of exponentials; a third of ``[n]``
    for the sum over w.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        both = torch.stack([student.float(), teacher.float()])  # [2, n, vocab / tensor]
        largest = both.amax(dim=-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        both -= largest[..., None]
        total = both.exp().sum(dim=-1)
        dist.all_reduce(total, group=group)
        log_student, log_teacher = both - total.log()[..., None]
        teacher_probability = log_teacher.exp()
        divergence = (teacher_probability * (log_teacher - log_student)).sum(dim=-1)
        dist.all_reduce(divergence, group=group)
        ctx.save_for_backward(log_student.exp_().sub_(teacher_probability).to(student.dtype))
        return divergence

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (difference,) = ctx.saved_tensors
        return (difference * gradient[:, None]).to(difference.dtype), None, None
