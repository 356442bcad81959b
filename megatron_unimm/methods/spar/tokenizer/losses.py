"""What SPAR's tokenizer learns. Every term is a sum, over cells or pictures; each is divided by its count in the global
batch once per step (``train/step.py``).

    pixels        |x̂ − x| and (x̂ − x)², averaged over the pixels of a cell
    perceptual    of each feature of a frozen encoder: ‖φ(x̂) / ‖φ(x̂)‖ − φ(x) / ‖φ(x)‖‖², averaged over the patches of a
                  cell and over features (LPIPS, arXiv 1801.03924, eq. 1, without its learned weights)
    semantic,     1 − cos between what the semantic stream has, or what is read out of the latents, and the visual
    latent        tokens of the encoder as it was at first
    adversarial   − D(x̂), and for the discriminator the hinge ½ (max(0, 1 − D(x)) + max(0, 1 + D(x̂))), averaged over
                  the patches of a picture

Legend  V cells, m features of a cell side by side, F numbers of a cell's pixels, B pictures of one size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TERMS = ("l1", "l2", "perceptual", "semantic", "latent", "adversarial", "discriminator")
"""Names and order of the loss terms."""
OF_PICTURES = ("adversarial", "discriminator")
"""Those that are counted by pictures; the others by cells."""


def pixel_losses(drawn_VF: Tensor, true_VF: Tensor, counted_V: Tensor) -> Tensor:
    """L1 and L2, float32 ``[2]``."""
    error = drawn_VF.float() - true_VF.float()
    return torch.stack([(error.abs().mean(1) * counted_V).sum(), (error.square().mean(1) * counted_V).sum()])


def feature_distance(drawn: list[Tensor], true: list[Tensor], counted_V: Tensor) -> Tensor:
    """The perceptual term; features are ``[V, m, D]``."""
    distances = [
        (F.normalize(found.float(), dim=-1) - F.normalize(wanted.float(), dim=-1)).square().sum(-1).mean(1)
        for found, wanted in zip(drawn, true, strict=True)
    ]
    return (torch.stack(distances).mean(0) * counted_V).sum()


def hinge_loss(real_BP: Tensor, drawn_BP: Tensor) -> Tensor:
    """Of each picture ``[B]``, from logits of its patches."""
    real, drawn = F.relu(1 - real_BP.float()), F.relu(1 + drawn_BP.float())
    return 0.5 * (real.mean(1) + drawn.mean(1))


def adaptive_weight(pixels: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """How much more the mean pixel losses move the decoder's last layer than the mean adversarial one does (VQGAN,
    eq. 7, with its bounds); a number that nothing learns of."""
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm() for loss in (pixels, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()
