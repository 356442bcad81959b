"""What MMCORE's VLM learns, eq. 1 and 2 (arXiv 2604.19902, section 3.1.1).

Every term is a sum over positions; counts are summed over micro-batches and ranks, and each term is divided by its own
count once per step (``train/step.py``). Eq. 2 is the weighted sum of the terms there: λ_t L_llm + λ_a L_vis. Eq. 1's
mean over the N queries of a picture is one over all queries of the global batch, so that every picture counts the same.
"""

import torch
from torch import Tensor

TERMS = ("llm", "vis")
"""Names and order of the loss terms."""


def stack_terms(llm: Tensor, vis: Tensor) -> Tensor:
    """Float32 ``[2]`` in the order of :data:`TERMS`."""
    return torch.stack([llm.float(), vis.float()])
