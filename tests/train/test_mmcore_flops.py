"""Model FLOPs of MMCORE's VLM against torch's own counter on the real model."""

from pathlib import Path

import numpy as np
import pytest
from small_mmcore import FROZEN_VLM, LORA, SIGLIP, make_rows, make_sample, make_samples, small_stage
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.mmcore import flops as mmcore_flops
from megatron_unimm.methods.mmcore.flops import row_flops
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup

ROOM = "data.sequence_length=256"
LAYERS = "queries.connector.num_layers=2"
MOE = "model.backbone.moe={num_experts: 4, top_k: 2, expert_mlp_size: 48, shared_expert_size: 32}"


def frozen(*parts: str) -> str:
    return f"train.trainable=[{', '.join(f'{{pattern: {part!r}, train: false}}' for part in parts)}, {{pattern: '*'}}]"


CASES: dict[str, tuple[str, ...]] = {
    "all train": (),
    "SigLIP": (SIGLIP,),
    "linear projection": ("queries.connector.projection=linear",),
    "connector": (LAYERS,),
    "frozen VLM": (FROZEN_VLM, LAYERS),
    "frozen tower": (frozen("vision_encoder.*"),),
    "frozen backbone": (frozen("backbone.*"),),
    "frozen connector": (frozen("query_connector.*"), LAYERS),
    "connector alone": (frozen("vision_encoder.*", "backbone.*", "query_tokens.*"), LAYERS),
    "projection alone": (frozen("vision_encoder.*", "backbone.*", "query_tokens.*"),),
    "experts": (MOE,),
    "adapters": LORA,
    "adapters of attention": (*LORA, "queries.lora.modules=[linear_qkv, layers.1.*.linear_proj]"),
    "adapters of experts": (*LORA, MOE),
}


def counted(stage: StageConfig, row: object, world: tuple[Platform, ParallelGroups]) -> int:
    """torch's counter; the plain kernel is counted as the products that it consists of, the fused one on CPU not at
    all."""
    method, (model,) = setup.build_model(stage, *world)
    batch = method.batch(row, model, world[0].device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CASES)
def test_equals_torch_counter(case: str, repo: Path, world: tuple[Platform, ParallelGroups], monkeypatch) -> None:
    """Exactly, but for two things that torch's counter sees and a model needs not: the masked half of causal attention,
    and the gradient of a frozen router's weight (Megatron-Core's computes it regardless)."""
    stage = small_stage(repo, ROOM, *CASES[case])
    (row,) = make_rows(make_samples(stage), stage)
    found = counted(stage, row, world)
    monkeypatch.setattr(mmcore_flops, "causal_pairs", lambda bounds: float((np.diff(bounds) ** 2).sum()))
    expected = row_flops(row, stage)
    if case == "adapters of experts":
        backbone = stage.model.backbone
        expected += 2 * row.num_tokens * backbone.hidden_size * backbone.moe.num_experts * backbone.num_layers
    assert found == expected


def test_row_without_pictures_costs_no_teacher_and_no_connector(repo: Path) -> None:
    stage = small_stage(repo, ROOM, LAYERS)
    words = make_sample(stage, "words", ("asks", 5), ("answers", 9))
    (row,) = make_rows([words], stage)
    other = small_stage(repo, ROOM, SIGLIP)
    assert row_flops(row, stage) == row_flops(row, other)
