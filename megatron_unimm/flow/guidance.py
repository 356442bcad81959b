"""Classifier-free guidance of velocities ``[n, ...]``, n samples.

Data and noise predictions are affine in the velocity at fixed x_t and t, with weights that guidance keeps (they sum
to 1), so guiding velocities is guiding either of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.errors import UserError


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """v(∅) + s (v(c) - v(∅)) (arXiv 2207.12598, with s = 1 + w). 1 gives the conditional velocity."""
    return unconditional + scale * (conditional - unconditional)


def two_condition(
    unconditional: Tensor, image: Tensor, image_and_text: Tensor, *, image_scale: float, text_scale: float
) -> Tensor:
    """v(∅, ∅) + s_I (v(I, ∅) - v(∅, ∅)) + s_T (v(I, T) - v(I, ∅)): InstructPix2Pix (arXiv 2211.09800, equation 3).

    Both scales 1 give v(I, T); image_scale 1 alone is :func:`classifier_free` of the text with the image kept.
    """
    return unconditional + image_scale * (image - unconditional) + text_scale * (image_and_text - image)


def renormalised(guided: Tensor, conditional: Tensor, minimum: float) -> Tensor:
    """BAGEL's global renormalisation (arXiv 2505.14683): a guided velocity that is longer than the conditional one is
    shortened to its length, but to no less than ``minimum`` of its own. Never lengthened.

    Lengths are over everything of a sample, in float32 at least.
    """
    dtype = torch.promote_types(guided.dtype, torch.float32)
    dims = tuple(range(1, guided.ndim))
    wanted = torch.linalg.vector_norm(conditional, dim=dims, keepdim=True, dtype=dtype)
    length = torch.linalg.vector_norm(guided, dim=dims, keepdim=True, dtype=dtype)
    # The epsilon, BAGEL's, keeps 0 / 0 from being NaN.
    return guided * (wanted / (length + 1e-8)).clamp(minimum, 1.0).to(guided.dtype)


def guided_at(t: float, interval: tuple[float, float]) -> bool:
    """Whether guidance is on at t: low < t <= high (arXiv 2404.07724; the ends as in BAGEL). Where it is off, only the
    conditional velocity need be computed."""
    low, high = interval
    return low < t <= high


def num_conditions(sampler: SamplerConfig) -> int:
    """Velocities that :func:`combined` makes one of, where words and visual latents are left out one after the
    other."""
    if sampler.image_guidance_scale != 1.0:
        return 3
    return 1 if sampler.guidance_scale == 1.0 else 2


def num_of_one_condition(sampler: SamplerConfig) -> int:
    """The same where there is one condition, and the pictures before are there with and without it (HieraQuery).

    Raises:
        UserError: a scale for these pictures is asked for.
    """
    if sampler.image_guidance_scale != 1.0:
        what = (
            f"is {sampler.image_guidance_scale:g}, but this model never learned to draw an edit without the pictures "
            "before it, so that there is nothing to guide away from; leave it out (guidance_scale is that of all that "
            "the language model says)"
        )
        raise UserError("image_guidance_scale", what)
    return 1 if sampler.guidance_scale == 1.0 else 2


def combined(parts: Sequence[Tensor], sampler: SamplerConfig) -> Tensor:
    """The guided velocity of what a sampler asks for, from the fully conditioned one and those with less: none, one
    (:func:`classifier_free`), or two, the less conditioned last (:func:`two_condition`); then :func:`renormalised`."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        guided = classifier_free(parts[0], parts[1], sampler.guidance_scale)
    else:
        guided = two_condition(
            unconditional=parts[2],
            image=parts[1],
            image_and_text=parts[0],
            image_scale=sampler.image_guidance_scale,
            text_scale=sampler.guidance_scale,
        )
    if sampler.guidance_renorm_min is None:
        return guided
    return renormalised(guided, parts[0], sampler.guidance_renorm_min)
