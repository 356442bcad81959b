"""FLOPs of chunks against torch's counter on the real model, and against the method's own count of a row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measure import decoder, diffusion, mmcore, orion, place_of
from small_decoder import SANA
from small_diffusion import SOME_OF_THE_VLM
from small_mmcore import FROZEN_VLM, LORA, SIGLIP
from test_memory import CONDITIONS, CONNECTOR, CP, FLUX, FULL, MING, MOE, PP, QWEN3, SD35, TP, frozen
from torch.utils.flop_counter import FlopCounterMode

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.footprint import ChunkFootprint
from megatron_unimm.methods.mmcore import flops as mmcore_flops
from megatron_unimm.methods.orion import flops as orion_flops
from megatron_unimm.methods.orion.decoder import footprint as decoder_footprint
from megatron_unimm.methods.orion.decoder.flops import load_of
from megatron_unimm.methods.orion.decoder.method import num_vectors
from megatron_unimm.methods.registry import build_method, footprints_of
from megatron_unimm.methods.vlm import footprint as vlm_footprint
from megatron_unimm.models.memory import Spread
from megatron_unimm.models.mmdit import modulation
from megatron_unimm.models.sana import feed_forward
from megatron_unimm.parallel import platform_meta
from megatron_unimm.parallel.platform_meta import META, pretend_rank
from megatron_unimm.plan.pipeline import places
from megatron_unimm.train.dry_run import build_chunk, receive


@pytest.fixture(autouse=True)
def _all_pairs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's counter sees attention as plain products, and the masked half of a causal one, too."""
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(platform_meta, "_attention", plain)
    for module in (orion_flops, mmcore_flops, vlm_footprint):
        monkeypatch.setattr(module, "causal_pairs", lambda bounds: float((np.diff(bounds) ** 2).sum()))


def counted(stage: StageConfig, row: Any, rank: int, world_size: int) -> tuple[int, int]:
    """FLOPs of a chunk's forward pass, and of forward and backward, on one rank."""
    with pretend_rank(stage.system.parallel, rank, world_size) as groups:
        method = build_method(stage, META, groups)
        chunk, _ = build_chunk(stage, method, 0)
        receive(stage, method, chunk)
        batch = method.batch(row, chunk, META.device)
        with FlopCounterMode(display=False) as counter:
            output = chunk(batch)
            forward = counter.get_total_flops()
            output.backward(torch.empty_like(output))
        return forward, counter.get_total_flops()


def planned(stage: StageConfig, row: Any, rank: int, world_size: int) -> ChunkFootprint:
    spread = Spread.of(stage.system, fused=False)
    return footprints_of(stage).chunk(stage, spread, place_of(stage, rank, world_size), row)


@pytest.mark.parametrize(
    ("overrides", "rank", "world_size"),
    [
        ((), 0, 1),
        (PP, 0, 2),
        (PP, 1, 2),
        (QWEN3, 0, 1),
        ((*QWEN3, *PP), 1, 2),
        (frozen("vision_encoder"), 0, 1),
        (MING, 0, 1),
        ((*MING, *PP), 1, 2),
    ],
)
def test_orion_chunks(overrides: tuple[str, ...], rank: int, world_size: int, repo: Path) -> None:
    stage = orion(repo, *overrides)
    row = footprints_of(stage).typical_row(stage)
    found = planned(stage, row, rank, world_size)
    forward, both = counted(stage, row, rank, world_size)
    assert found.forward.total == forward
    assert found.forward.total + found.backward.total == both


@pytest.mark.parametrize(
    ("overrides", "rank", "world_size"),
    [
        ((), 0, 1),
        (PP, 0, 2),
        ((*PP, SIGLIP), 1, 2),
        (QWEN3, 0, 1),
        (CONNECTOR, 0, 1),
        ((*CONNECTOR, *PP, FROZEN_VLM), 1, 2),
        (LORA, 0, 1),
        ((*LORA, *PP), 1, 2),
        (frozen("vision_encoder"), 0, 1),
    ],
)
def test_mmcore_chunks(overrides: tuple[str, ...], rank: int, world_size: int, repo: Path) -> None:
    stage = mmcore(repo, *overrides)
    row = footprints_of(stage).typical_row(stage)
    found = planned(stage, row, rank, world_size)
    forward, both = counted(stage, row, rank, world_size)
    assert found.forward.total == forward
    assert found.forward.total + found.backward.total == both


@pytest.mark.parametrize("overrides", [(), TP, PP, (SIGLIP, *PP), MOE, (*CONNECTOR, *PP), (*LORA, *PP)])
def test_mmcore_chunks_are_the_whole_model(overrides: tuple[str, ...], repo: Path) -> None:
    """Here nothing is computed twice, so that all chunks together are the method's count of a row."""
    stage = mmcore(repo, *overrides)
    footprints = footprints_of(stage)
    row = footprints.typical_row(stage)
    spread = Spread.of(stage.system, fused=True)
    chunks = [footprints.chunk(stage, spread, place, row) for rank in places(stage) for place in rank]
    total = sum(chunk.forward.total + chunk.backward.total for chunk in chunks)
    assert total == pytest.approx(footprints.row_flops(stage, row), rel=1e-12)


@pytest.mark.parametrize("model_of", [MOE, MING])
def test_expert_products_are_told_apart(model_of: tuple[str, ...], repo: Path) -> None:
    """Together they are exact; how much of it is experts', by weights, is too, also beside dense layers."""
    tower = ("model.vision_encoder.num_layers=1", "model.vision_encoder.full_attention_layers=[0]")
    stage = orion(repo, *model_of, *tower)
    row = footprints_of(stage).typical_row(stage)
    found = planned(stage, row, 0, 1)
    assert found.forward.total == counted(stage, row, 0, 1)[0]
    moe, model = stage.model.backbone.moe, stage.model.backbone
    assert moe is not None
    num_sparse = model.num_layers - moe.first_layer
    routed = 6 * len(row.input_ids) * model.hidden_size * moe.expert_mlp_size * moe.top_k * num_sparse
    assert found.forward.experts == pytest.approx(2 * routed)  # student and teacher


def test_recompute_adds_a_forward_pass_of_the_layers(repo: Path) -> None:
    """With a frozen tower, so that nothing else is computed twice."""
    tower = frozen("vision_encoder")
    once, twice = orion(repo, *tower), orion(repo, *tower, *FULL)
    row = footprints_of(once).typical_row(once)
    difference = counted(twice, row, 0, 1)[1] - counted(once, row, 0, 1)[1]
    assert planned(twice, row, 0, 1).again.total == difference
    assert planned(once, row, 0, 1).again.total == 0


@pytest.mark.parametrize(
    ("overrides", "rank", "world_size"),
    [
        ((), 0, 1),
        (SD35, 0, 1),
        ((*SD35, "system.parallel={pipeline: 3}"), 2, 3),
        ((*FLUX, *PP), 0, 2),
        ((*FLUX, *PP), 1, 2),
        (SANA, 0, 1),
        ((*SANA, *PP), 0, 2),
        ((*SANA, *PP), 1, 2),
    ],
)
def test_decoder_chunks(
    overrides: tuple[str, ...], rank: int, world_size: int, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without convolutions (latents computed beforehand) and the connector, which model FLOPs leave out."""
    stage = decoder(repo, "data.latent_cache=there", *overrides)
    row = footprints_of(stage).typical_row(stage)
    # A pipeline's rows have room for more vectors than pictures, and all are computed.
    load = replace(load_of(row), num_pictures=num_vectors(stage) or len(row.pictures))
    monkeypatch.setattr(decoder_footprint, "load_of", lambda row: load)
    # Gradients of modulations are summed over tokens by products, which are no products of the model.
    monkeypatch.setattr(
        modulation, "_of_vectors", lambda values, vectors: values.new_zeros(load.num_pictures, values.shape[-1])
    )
    # SANA's own convolutions are left out, too.
    monkeypatch.setattr(feed_forward, "convolve", lambda grid, weight, bias: grid * weight[:, 4] + bias)
    found = planned(stage, row, rank, world_size)
    forward, both = counted(stage, row, rank, world_size)
    inner = stage.generator.mmdit.condition_size
    tokens = 2.0 * int(row.num_condition.sum()) * inner if rank == 0 else 0.0
    first, second = tokens * stage.model.vision_encoder.out_size, tokens * inner
    assert found.forward.total + first + second == forward
    # The tower before the connector is frozen, so that its first product passes no gradient on.
    assert found.forward.total + found.backward.total + 2 * first + 3 * second == both


@pytest.mark.parametrize("overrides", [(), TP, PP, CP, MOE, (*QWEN3, *PP)])
def test_chunks_are_the_whole_model(overrides: tuple[str, ...], repo: Path) -> None:
    """All chunks together are the method's count of a row (which MFU comes from), but for what it leaves out: the last
    stage's tower, and the tower's work on every context rank."""
    stage = orion(repo, *overrides)
    footprints = footprints_of(stage)
    row = footprints.typical_row(stage)
    spread = Spread.of(stage.system, fused=True)
    chunks = [footprints.chunk(stage, spread, place, row) for rank in places(stage) for place in rank]
    total = sum(chunk.forward.total + chunk.backward.total for chunk in chunks)
    model = footprints.row_flops(stage, row)
    tower = orion_flops.vision_work
    extra = 0.0
    encoder = stage.model.vision_encoder
    if len(chunks) > 1:
        extra = sum(work.cost(False, False) for work in tower(encoder, row.grids[row.is_target]))
    if stage.system.parallel.context == 2:
        embedding, rest = tower(encoder, row.grids[~row.is_target])
        extra = embedding.cost(True, False) + rest.cost(True, True)
        extra += sum(work.cost(False, False) for work in tower(encoder, row.grids))
    assert total == pytest.approx(model + extra, rel=1e-12)


@pytest.mark.parametrize("model", [FLUX, SANA], ids=["flux", "sana"])
def test_decoder_chunks_are_the_whole_model(model: tuple[str, ...], repo: Path) -> None:
    stage = decoder(repo, *model, *PP)
    footprints = footprints_of(stage)
    row = footprints.typical_row(stage)
    spread = Spread.of(stage.system, fused=True)
    chunks = [footprints.chunk(stage, spread, place, row) for rank in places(stage) for place in rank]
    total = sum(chunk.forward.total + chunk.backward.total for chunk in chunks)
    assert total == pytest.approx(footprints.row_flops(stage, row), rel=1e-12)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        FLUX,
        (*FLUX, *PP),
        (*SD35, *TP),
        MOE,
        (*CONNECTOR, SOME_OF_THE_VLM),
        (*CONNECTOR, *LORA[:1]),
        (*FLUX, *PP, CONDITIONS),
    ],
)
def test_diffusion_chunks_are_the_whole_model(overrides: tuple[str, ...], repo: Path) -> None:
    """VLM and diffusion transformer; the method's count of a row is compared with torch's in
    ``tests/train/test_mmcore_diffusion.py``."""
    stage = diffusion(repo, *overrides)
    footprints = footprints_of(stage)
    row = footprints.typical_row(stage)
    spread = Spread.of(stage.system, fused=True)
    chunks = [footprints.chunk(stage, spread, place, row) for rank in places(stage) for place in rank]
    total = sum(chunk.forward.total + chunk.backward.total for chunk in chunks)
    assert total == pytest.approx(footprints.row_flops(stage, row), rel=1e-12)
