"""Weights and activations of every kind of part, layout and recompute, against the real model: its parameters, what
autograd saves, and what Megatron-Core's wrapper and optimizer allocate."""

from pathlib import Path

import pytest
import torch
from measure import Peak, decoder, diffusion, kept_bytes, mmcore, orion, place_of, storage_bytes
from small_decoder import SANA
from small_diffusion import SOME_OF_THE_VLM
from small_mmcore import FROZEN_VLM, LORA, SIGLIP

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.registry import build_method, footprints_of
from megatron_unimm.models.memory import Spread
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.parallel.platform_meta import META, pretend_rank
from megatron_unimm.plan.memory import optimizer_bytes, static_memory
from megatron_unimm.train import setup
from megatron_unimm.train.dry_run import build_chunk, receive
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel

TP = ("system.parallel.tensor=2", "system.parallel.sequence=true")
PP = ("system.parallel.pipeline=2",)
CP = ("system.parallel.context=2",)
EP = ("system.parallel.expert=2",)
FULL = ("system.recompute.granularity=full",)
BF16 = ("system.precision.dtype=bfloat16",)
MOE = ("model.backbone.moe={num_experts: 8, top_k: 2, expert_mlp_size: 48, shared_expert_size: 32}",)
QWEN3 = (
    "model.vision_encoder={family: qwen3, num_layers: 3, hidden_size: 32, num_heads: 4, mlp_size: 48, patch_size: 8,"
    " out_size: 64, num_position_embeddings: 16, deepstack_layers: [0, 1]}",
    "model.backbone.qk_norm=true",
    "model.backbone.qkv_bias=false",
)
MING = (
    "model.backbone.moe={num_experts: 8, top_k: 2, expert_mlp_size: 48, shared_expert_size: 32, first_layer: 1,"
    " gates: [image, audio]}",
    "model.backbone.normalize_output=true",
    "model.vision_encoder.projector={in_size: 96}",
)
SD35 = (
    "generator.mmdit.num_layers=3",
    "generator.mmdit.dual_attention_layers=[0]",
    "generator.mmdit.qk_norm=true",
)
FLUX = (
    "generator.mmdit={family: flux, num_layers: 2, num_single_layers: 2, num_heads: 2, head_size: 16,"
    " rotary_axes: [4, 6, 6], latent_channels: 4, condition_size: 24, pooled_size: 12, guidance: true}",
)


def selective(*modules: str) -> tuple[str, ...]:
    return ("system.recompute.granularity=selective", f"system.recompute.modules=[{','.join(modules)}]")


def frozen(*parts: str) -> tuple[str, ...]:
    rules = [f"{{pattern: '{part}.*', train: false}}" for part in parts] + ["{pattern: '*'}"]
    return (f"train.trainable=[{', '.join(rules)}]",)


ORION = {
    "all": ((), 0, 1),
    "without teacher": (("method.loss_weights.kl=0",), 0, 1),
    "tensor": (TP, 0, 2),
    "tensor without sequence": (TP[:1], 1, 2),
    "first of two": (PP, 0, 2),
    "last of two": (PP, 1, 2),
    "last of two, tied": ((*PP, "model.backbone.tie_embeddings=true"), 1, 2),
    "context": (CP, 0, 2),
    "full recompute": (FULL, 0, 1),
    "recompute attention": (selective("core_attn"), 0, 1),
    "recompute MLP": (selective("mlp"), 0, 1),
    "experts": (MOE, 0, 1),
    "experts, recompute": ((*MOE, *selective("moe")), 0, 1),
    "expert parallel": ((*MOE, *EP, *TP), 0, 2),
    "expert tensor parallel": ((*MOE, *TP, "system.parallel.expert_tensor=2"), 0, 2),
    "gates and projector": (MING, 0, 1),
    "gates and projector, expert parallel": ((*MING, *EP, *TP), 0, 2),
    "gates, recompute": ((*MING, *selective("moe")), 0, 1),
    "Qwen3-VL": (QWEN3, 0, 1),
    "Qwen3-VL, tied, tensor": ((*QWEN3, *TP, "model.backbone.tie_embeddings=true"), 0, 2),
    "Qwen3-VL, recompute attention": ((*QWEN3, *selective("core_attn")), 0, 1),
    "bf16": (BF16, 0, 1),
    "bf16, Qwen3-VL, last of two": ((*BF16, *QWEN3, *PP), 1, 2),
    "linear head": (("method.vision_head.kind=linear",), 0, 1),
    "Q-Former head": (("method.vision_head={kind: q_former, num_heads: 4}",), 0, 1),
    "head alone": (("train.trainable=[{pattern: 'vision_head.*'}, {pattern: '*', train: false}]",), 0, 1),
    "frozen tower": (frozen("vision_encoder"), 0, 1),
    "frozen backbone": (frozen("backbone"), 0, 1),
    "cached features": (("data.feature_cache=somewhere", *frozen("vision_encoder")), 0, 1),
    "cached features, last of two": (("data.feature_cache=somewhere", *frozen("vision_encoder"), *PP), 1, 2),
}
DECODER = {
    "SD3": ((), 0, 1),
    "SD3, context": (CP, 0, 2),
    "SD3.5": (SD35, 0, 1),
    "FLUX": (FLUX, 0, 1),
    "FLUX, tensor": ((*FLUX, *TP), 0, 2),
    "FLUX, first of two": ((*FLUX, *PP), 0, 2),
    "FLUX, last of two": ((*FLUX, *PP), 1, 2),
    "FLUX, full recompute": ((*FLUX, *FULL), 0, 1),
    "FLUX, recompute": ((*FLUX, *selective("core_attn", "mlp")), 0, 1),
    "SANA": (SANA, 0, 1),
    "SANA, bf16": ((*SANA, *BF16), 0, 1),
    "SANA, tensor": ((*SANA, *TP), 0, 2),
    "SANA, first of two": ((*SANA, *PP), 0, 2),
    "SANA, last of two": ((*SANA, *PP), 1, 2),
    "SANA, full recompute": ((*SANA, *FULL), 0, 1),
    "SANA, recompute": ((*SANA, *selective("core_attn", "mlp")), 0, 1),
}

# Two heads of 64 in the connector.
WIDE = (
    "model.vision_encoder.out_size=128",
    "model.backbone.hidden_size=128",
    "model.backbone.head_size=32",
    "model.backbone.mrope_sections=[4,6,6]",
)
CONNECTOR = (*WIDE, "queries.connector.num_layers=2", "queries.num_queries=16")
MMCORE = {
    "all": ((), 0, 1),
    "SigLIP": ((SIGLIP,), 0, 1),
    "SigLIP, last of two": ((*PP, SIGLIP), 1, 2),
    "64 queries, linear": (("queries.num_queries=64", "queries.connector.projection=linear"), 0, 1),
    "tensor": (TP, 0, 2),
    "first of two": (PP, 0, 2),
    "last of two": (PP, 1, 2),
    "context": (CP, 0, 2),
    "full recompute": (FULL, 0, 1),
    "experts": (MOE, 0, 1),
    "expert parallel": ((*MOE, *EP, *TP), 0, 2),
    "Qwen3-VL": (QWEN3, 0, 1),
    "Qwen3-VL, first of two": ((*QWEN3, *PP), 0, 2),
    "bf16": (BF16, 0, 1),
    "connector": (CONNECTOR, 0, 1),
    "connector, tensor": ((*CONNECTOR, *TP), 1, 2),
    "connector, context": ((*CONNECTOR, *CP), 0, 2),
    "connector, bf16": ((*CONNECTOR, *BF16), 0, 1),
    "frozen VLM": ((*CONNECTOR, FROZEN_VLM), 0, 1),
    "frozen VLM, last of two": ((*CONNECTOR, FROZEN_VLM, *PP), 1, 2),
    "adapters": (LORA, 0, 1),
    "adapters, tensor": ((*LORA, *TP), 1, 2),
    "adapters, last of two": ((*LORA, *PP), 1, 2),
    "adapters of some": ((*LORA, "queries.lora={rank: 8, modules: [linear_proj, layers.1.*.linear_fc1]}"), 0, 1),
    "adapters of experts": ((*LORA, *MOE), 0, 1),
    "adapters, bf16, recompute": ((*LORA, *BF16, *FULL), 0, 1),
    "frozen tower": (frozen("vision_encoder"), 0, 1),
    "cached features": (("data.feature_cache=somewhere", *frozen("vision_encoder")), 0, 1),
    "cached features, SigLIP, last": (("data.feature_cache=somewhere", *frozen("vision_encoder"), SIGLIP, *PP), 1, 2),
    "connector alone": ((*CONNECTOR, *frozen("vision_encoder", "backbone", "query_tokens")), 0, 1),
}

CONDITIONS = "data.condition_cache=somewhere"
DIFFUSION = {
    "SD3": ((), 0, 1),
    "SD3, tensor": (TP, 1, 2),
    "SD3, context": (CP, 0, 2),
    "SD3.5, first of two": ((*SD35, "generator.mmdit.num_layers=4", *PP), 0, 2),
    "SD3.5, last of two": ((*SD35, "generator.mmdit.num_layers=4", *PP), 1, 2),
    "FLUX": (FLUX, 0, 1),
    "FLUX, bf16": ((*FLUX, *BF16), 0, 1),
    "FLUX, full recompute": ((*FLUX, *FULL), 0, 1),
    "FLUX, first of two": ((*FLUX, *PP, *TP), 0, 4),
    "FLUX, experts": ((*FLUX, *MOE, *EP, *TP), 0, 2),
    "Qwen3-VL": (QWEN3, 0, 1),
    "SigLIP": ((SIGLIP,), 0, 1),
    "connector": (CONNECTOR, 0, 1),
    "queries train": ((*CONNECTOR, SOME_OF_THE_VLM), 0, 1),
    "latents made": (("data.latent_cache=somewhere",), 0, 1),
    "conditions made": ((CONDITIONS,), 0, 1),
    "conditions made, tensor": ((CONDITIONS, *TP), 1, 2),
    "conditions made, first of two": ((*FLUX, CONDITIONS, *PP), 0, 2),
    "conditions made, last of two": ((*FLUX, CONDITIONS, *PP), 1, 2),
}


@pytest.mark.parametrize("case", DIFFUSION)
def test_diffusion(case: str, repo: Path) -> None:
    overrides, rank, world_size = DIFFUSION[case]
    check_chunk(diffusion(repo, *overrides), rank, world_size)


@pytest.mark.parametrize("case", ORION)
def test_orion(case: str, repo: Path) -> None:
    overrides, rank, world_size = ORION[case]
    check_chunk(orion(repo, *overrides), rank, world_size)


@pytest.mark.parametrize("case", MMCORE)
def test_mmcore(case: str, repo: Path) -> None:
    overrides, rank, world_size = MMCORE[case]
    check_chunk(mmcore(repo, *overrides), rank, world_size)


@pytest.mark.parametrize("case", DECODER)
def test_decoder(case: str, repo: Path) -> None:
    overrides, rank, world_size = DECODER[case]
    check_chunk(decoder(repo, *overrides), rank, world_size)


def check_chunk(stage: StageConfig, rank: int, world_size: int) -> None:
    """Weights are exact. Activations are within a tenth; measured: 1.7 %, but 3 to 6 % with context parallelism, whose
    ranks do not have the same positions, and 8 % under full recompute of tiny blocks, whose other arguments count, and
    of torch's bf16 norms on a later stage, which keep fp32 copies in place of what was received."""
    footprints = footprints_of(stage)
    row = footprints.typical_row(stage)
    place = place_of(stage, rank, world_size)
    found = footprints.chunk(stage, Spread.of(stage.system, fused=False), place, row)
    with pretend_rank(stage.system.parallel, rank, world_size) as groups:
        method = build_method(stage, META, groups)
        chunk, _ = build_chunk(stage, method, 0)
        sizes = {True: 0, False: 0}
        for parameter in chunk.parameters():
            sizes[parameter.requires_grad] += parameter.numel()
        companions = sum(parameter.numel() for parameter in chunk.base.parameters())
        receive(stage, method, chunk)
        batch = method.batch(row, chunk, META.device)
        kept, _ = kept_bytes(chunk, batch)
    assert (found.trained.total, found.frozen.total) == (sizes[True], sizes[False])
    assert found.companions.total == companions
    # What was sent is held by the schedule, not by autograd.
    assert found.all_kept.bytes - found.kept["sent"].bytes == pytest.approx(kept, rel=0.1)
    assert found.inputs == pytest.approx(storage_bytes(batch), rel=0.15)


@pytest.mark.parametrize("case", ["all", "full recompute", "experts", "gates and projector"])
def test_measured_on_the_cpu(case: str, repo: Path) -> None:
    """The same on real tensors, where tokens choose their experts themselves."""
    check_measured(orion(repo, *ORION[case][0]))


@pytest.mark.parametrize("case", ["all", "SigLIP", "connector", "adapters"])
def test_mmcore_measured_on_the_cpu(case: str, repo: Path) -> None:
    check_measured(mmcore(repo, *MMCORE[case][0]))


def check_measured(stage: StageConfig) -> None:
    footprints = footprints_of(stage)
    row = footprints.typical_row(stage)
    platform, groups = setup.enter(stage)
    try:
        method, (chunk,) = setup.build_model(stage, platform, groups)
        kept, output = kept_bytes(chunk, method.batch(row, chunk, platform.device))
        assert torch.isfinite(output).all()
    finally:
        destroy_groups()
    found = footprints.chunk(stage, Spread.of(stage.system, fused=False), place_of(stage, 0, 1), row)
    assert found.all_kept.bytes == pytest.approx(kept, rel=0.1)


LARGER = (
    "model.backbone.hidden_size=128",
    "model.backbone.head_size=32",
    "model.backbone.mrope_sections=[4,6,6]",
    "model.vision_encoder.out_size=128",
    "model.backbone.num_layers=3",
    "model.backbone.vocab_size=2048",
    "data.sequence_length=1024",
)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (LARGER, 1),
        ((*LARGER, *BF16), 1),
        ((*LARGER, *BF16, *FULL), 1),
        ((*LARGER, *BF16, *TP), 2),
        ((*LARGER, "method.loss_weights.kl=0"), 1),
        ((*LARGER, *FULL, "method.loss_weights.kl=0"), 1),
    ],
)
def test_peak_of_a_micro_batch(overrides: tuple[str, ...], world_size: int, repo: Path) -> None:
    """What is kept, what is there besides while a loss or a layer is worked on, and the largest gradient are together
    no less than what is ever there at once, and not much more: measured 0.97 to 1.29 times."""
    stage = orion(repo, *overrides)
    footprints = footprints_of(stage)
    row = footprints.typical_row(stage)
    found = footprints.chunk(stage, Spread.of(stage.system, fused=False), place_of(stage, 0, world_size), row)
    with pretend_rank(stage.system.parallel, 0, world_size) as groups:
        method = build_method(stage, META, groups)
        chunk, _ = build_chunk(stage, method, 0)
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                # As the wrapper does, which adds it to its buffer.
                parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        batch = method.batch(row, chunk, META.device)
        with Peak([*chunk.parameters(), *chunk.buffers(), batch]) as peak:
            chunk(batch).sum().backward()
    itemsize = 2 if BF16[0] in overrides else 4
    planned = found.all_kept.bytes + found.all_kept.again + found.largest_weight * itemsize
    assert 0.97 * peak.most <= planned <= 1.4 * peak.most


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [((*BF16, *TP), 8), ((*BF16, *PP, *TP), 8), ((*MOE, *EP, *BF16), 4), ((*TP, "train.ema_decay=0.9"), 4)],
)
def test_wrapper_and_optimizer(overrides: tuple[str, ...], world_size: int, repo: Path) -> None:
    """Gradient buffers and the optimizer's shards as Megatron-Core lays them out, up to its padding."""
    stage = orion(repo, *overrides)
    footprints = footprints_of(stage)
    chunk_plan = footprints.chunk(
        stage, Spread.of(stage.system, fused=False), place_of(stage, 0, world_size), footprints.typical_row(stage)
    )
    planned = static_memory(stage, [chunk_plan], world_size)
    with pretend_rank(stage.system.parallel, 0, world_size) as groups:
        chunk, _ = build_chunk(stage, build_method(stage, META, groups), 0)
        wrapped = wrap_data_parallel([chunk], stage, groups)
        optimizer = build_optimizer(wrapped, stage, groups)
        buffers = [*wrapped[0].buffers, *wrapped[0].expert_parallel_buffers]
        gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
        weights = sum(buffer.param_data.nbytes for buffer in buffers)
        shards = sum(
            tensor.numel()
            for part in optimizer.chained_optimizers
            if not part.is_stub_optimizer
            for group in part.optimizer.param_groups
            for tensor in group["params"]
        )
    frozen_weights = planned["weights"] - chunk_plan.trained.total * (2 if BF16[0] in overrides else 4)
    assert weights == pytest.approx(planned["weights"] - frozen_weights, rel=0.01)
    assert gradients == pytest.approx(planned["gradients"], rel=0.01)
    # The first rank has its share and what others' padding leaves it.
    assert shards * optimizer_bytes(stage) == pytest.approx(planned["optimizer"], rel=0.05)
