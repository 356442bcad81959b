"""Features brought near those of a frozen encoder, by the cosine between them (REPA, arXiv 2410.06940, section 3.2;
MMCORE, arXiv 2604.19902, eq. 1)."""

import torch.nn.functional as F
from torch import Tensor


def cosine_distances(found_nD: Tensor, wanted_nD: Tensor) -> Tensor:
    """1 − cos of each, float32 ``[n]``; what is wanted learns nothing."""
    return 1 - F.cosine_similarity(found_nD.float(), wanted_nD.detach().float(), dim=-1)
