"""On a GPU: bf16 and FP8 layers against fp32, and that a step trains.

NOT YET RUN ON A GPU; the tolerances are guesses, to be replaced by measured errors with a margin. Run these and the
benchmark in one go with tools/gpu_checks.sh.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_layers import (
    BY_NAME,
    REFERENCE,
    SMALL_MODEL,
    VARIANTS,
    Variant,
    compare,
    losses_and_gradients,
    mixed_row,
    stage_config,
    text_row,
)
from megatron.core.transformer.enums import AttnMaskType

from megatron_unimm.models.attention import PackedAttention
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.step import TrainStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BF16_LOSS, BF16_GRADIENT = 1e-2, 5e-2
"""Relative. bf16 has 8 bits, 0.4 % per rounding; a smaller model with torch layers on CPU is at 5e-4 and 5e-3."""
FP8_LOSS, FP8_GRADIENT = 5e-2, 3e-1
"""Relative. e4m3 has 4 bits: 6 % per rounding, much of which averages out in sums."""


@pytest.fixture(scope="module")
def gpu() -> Iterator[tuple[Platform, ParallelGroups]]:
    yield setup.enter(stage_config(SMALL_MODEL, REFERENCE))
    destroy_groups()


@pytest.fixture(scope="module")
def reference(gpu: tuple[Platform, ParallelGroups]) -> dict[str, Any]:
    return losses_and_gradients(stage_config(SMALL_MODEL, REFERENCE), *gpu, None)


def needs(variant: Variant, platform: Platform) -> None:
    if lacking := variant.lacking(platform):
        pytest.skip(f"{variant.name}: {lacking}")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_losses_and_gradients(
    variant: Variant, gpu: tuple[Platform, ParallelGroups], reference: dict[str, Any]
) -> None:
    """The same weights, the same row; every tensor has a finite gradient."""
    needs(variant, gpu[0])
    found = losses_and_gradients(stage_config(SMALL_MODEL, variant), *gpu, reference["weights"])
    assert all(gradient.isfinite().all() for gradient in found["gradients"].values())
    errors = compare(found, reference)
    fp8 = variant.recipe is not None
    assert errors["loss_relative"] < (FP8_LOSS if fp8 else BF16_LOSS), errors
    assert errors["gradient_relative"] < (FP8_GRADIENT if fp8 else BF16_GRADIENT), errors


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_training_lowers_the_loss(variant: Variant, gpu: tuple[Platform, ParallelGroups]) -> None:
    """Twenty steps on one row, none skipped."""
    platform, groups = gpu
    needs(variant, platform)
    stage = stage_config(SMALL_MODEL, variant)
    method, chunks = setup.build_model(stage, platform, groups)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    step = TrainStep(stage, method, wrapped, build_optimizer(wrapped, stage, groups), platform, groups)
    row = mixed_row(stage)
    losses = torch.stack([step.run([row], 3e-4).losses for _ in range(20)]).cpu()
    assert losses.isfinite().all()
    assert losses[-1, 0] < 0.8 * losses[0, 0]
    assert step.guard.skipped == 0


def test_fused_attention_equals_torch(gpu: tuple[Platform, ParallelGroups]) -> None:
    """Transformer Engine's packed attention against torch's, with grouped keys: output and gradients."""
    platform, groups = gpu
    variant = BY_NAME["TE bf16"]
    needs(variant, platform)
    stage = stage_config(SMALL_MODEL, variant)
    method, (model,) = setup.build_model(stage, platform, groups)
    attention = model.backbone.decoder.layers[0].self_attention.core_attention
    assert isinstance(attention, PackedAttention)
    assert attention.fused is not None
    context = method.batch(text_row(stage), model, platform.device).context
    length, backbone = stage.data.sequence_length, stage.model.backbone
    generator = torch.Generator(platform.device).manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        shape = (length, count, backbone.head_size)
        return torch.randn(shape, generator=generator, device=platform.device, dtype=torch.bfloat16).requires_grad_()

    inputs = [draw(backbone.num_heads), draw(backbone.num_kv_heads), draw(backbone.num_kv_heads)]
    shape = (length, backbone.num_heads * backbone.head_size)
    weight = torch.randn(shape, generator=generator, device=platform.device)
    outputs = []
    for kernel in (attention.fused, None):
        attention.fused = kernel
        output = attention(*inputs, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=context)
        gradients = torch.autograd.grad((output.reshape(length, -1).float() * weight).sum(), inputs)
        outputs.append([output.reshape(length, -1), *gradients])
    for ours, torchs in zip(*outputs, strict=True):
        error = (ours.float() - torchs.float()).norm() / torchs.float().norm()
        assert error < 1e-2
