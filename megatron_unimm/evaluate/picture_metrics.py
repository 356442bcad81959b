"""How near pictures are to pictures, and what can be read off features: plain formulas.

Legend  n pictures, D numbers of a feature, K classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(true: np.ndarray, drawn: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures; 100 where they are equal."""
    error = np.mean((true.astype(np.float64) - drawn.astype(np.float64)) ** 2)
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(true: np.ndarray, drawn: np.ndarray) -> float:
    """Structural similarity of uint8 pictures (H, W, 3), the mean over places and channels (Wang et al., 2004: Gaussian
    window of 11 pixels, σ 1.5, K1 0.01, K2 0.03; places whose window is inside the picture)."""
    pair = torch.from_numpy(np.stack([true, drawn])).double().permute(0, 3, 1, 2)  # (2, 3, H, W)
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values.flatten(0, 1)[:, None], window[None, None]).squeeze(1)  # [channels, H', W']

    means, squares = mean(pair).unflatten(0, (2, 3)), mean(pair**2).unflatten(0, (2, 3))
    both = mean((pair[0] * pair[1])[None])
    variances, covariance = squares - means**2, both - means[0] * means[1]
    small, smaller = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * means[0] * means[1] + small) * (2 * covariance + smaller)
    scale = ((means**2).sum(0) + small) * (variances.sum(0) + smaller)
    return float((likeness / scale).mean())


def frechet_distance(first_nD: Tensor, second_nD: Tensor) -> float:
    """‖μ − μ'‖² + tr(Σ + Σ' − 2 (Σ Σ')^½) between features of two sets of pictures (arXiv 1706.08500)."""
    first, second = first_nD.double(), second_nD.double()
    apart = (first.mean(0) - second.mean(0)).square().sum()
    one, other = torch.cov(first.T), torch.cov(second.T)
    root = _square_root(one)
    # Σ Σ' has the eigenvalues of Σ^½ Σ' Σ^½, which is symmetric.
    mixed = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return float(apart + one.trace() + other.trace() - 2 * mixed)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def probe_accuracy(
    features_nD: Tensor, labels_n: Tensor, test_features_mD: Tensor, test_labels_m: Tensor, ridge: float = 1e-3
) -> float:
    """Share of test pictures whose class a linear map finds. It is fitted in closed form: ridge regression of one-hot
    classes on features of mean 0 and variance 1, with a constant."""
    mean, spread = features_nD.double().mean(0), features_nD.double().std(0).clamp(min=1e-8)
    known, asked = (_with_one((each.double() - mean) / spread) for each in (features_nD, test_features_mD))
    wanted = F.one_hot(labels_n).double()
    gram = known.T @ known + ridge * len(known) * torch.eye(known.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, known.T @ wanted)  # [D + 1, K]
    return float(((asked @ weights).argmax(1) == test_labels_m).double().mean())


def _with_one(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_ones(len(values), 1)], dim=1)
