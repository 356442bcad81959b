"""Guidance against its algebra."""

import pytest
import torch
from torch import Tensor

from megatron_unimm.flow.guidance import classifier_free, guided_at, renormalised, two_condition
from megatron_unimm.flow.path import data_from_velocity


def velocities(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_classifier_free() -> None:
    conditional, unconditional = velocities(2)
    close(classifier_free(conditional, unconditional, 1.0), conditional)
    close(classifier_free(conditional, unconditional, 0.0), unconditional)
    close(classifier_free(conditional, unconditional, 4.0), 4 * conditional - 3 * unconditional)


def test_two_conditions() -> None:
    nothing, image, both = velocities(3)
    close(two_condition(nothing, image, both, image_scale=1.0, text_scale=1.0), both)
    close(two_condition(nothing, image, both, image_scale=0.0, text_scale=0.0), nothing)
    close(two_condition(nothing, image, both, image_scale=1.0, text_scale=7.5), classifier_free(both, image, 7.5))
    close(two_condition(nothing, image, both, image_scale=1.5, text_scale=0.0), classifier_free(image, nothing, 1.5))
    close(
        two_condition(nothing, image, both, image_scale=1.5, text_scale=7.5),
        (1 - 1.5) * nothing + (1.5 - 7.5) * image + 7.5 * both,
    )


def test_guiding_velocities_is_guiding_data() -> None:
    x_t, conditional, unconditional = velocities(3)
    data = [data_from_velocity(x_t, v, 0.6) for v in (conditional, unconditional)]
    guided = classifier_free(conditional, unconditional, 5.0)
    close(data_from_velocity(x_t, guided, 0.6), classifier_free(*data, 5.0))


def test_renormalised_shortens_and_never_lengthens() -> None:
    guided, conditional = velocities(2)
    factor = torch.tensor([10.0, 0.1, 1000.0], dtype=torch.float64)[:, None, None, None]
    guided = guided / guided.flatten(1).norm(dim=1)[:, None, None, None]
    conditional = conditional / conditional.flatten(1).norm(dim=1)[:, None, None, None]
    found = renormalised(factor * guided, conditional, minimum=0.01)
    # Lengths 10, 0.1 and 1000 against 1: to the conditional length; left alone; to the hundredth that is the minimum.
    expected = guided * torch.tensor([1.0, 0.1, 10.0], dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(renormalised(guided, conditional, minimum=1.0), guided, rtol=0, atol=0)


def test_renormalised_keeps_samples_apart_and_the_type() -> None:
    guided, conditional = velocities(2)
    alone = torch.cat([renormalised(4 * g[None], c[None], 0.0) for g, c in zip(guided, conditional, strict=True)])
    close(renormalised(4 * guided, conditional, 0.0), alone)
    zero = torch.zeros(1, 4, dtype=torch.bfloat16)
    found = renormalised(zero, zero, 0.0)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, zero), "no NaN of 0 / 0"


@pytest.mark.parametrize(("t", "on"), [(1.0, True), (0.7, True), (0.4, False), (0.39, False), (0.0, False)])
def test_interval_of_bagel(t: float, on: bool) -> None:
    assert guided_at(t, (0.4, 1.0)) is on
    assert guided_at(t, (0.0, 1.0)) is (t > 0)
