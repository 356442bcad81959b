"""Model FLOPs against torch's own counter on the real model, and closed forms."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_orion import make_row, small_stage
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_unimm.config.load import load_recipe
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow
from megatron_unimm.methods.orion import flops as orion_flops
from megatron_unimm.methods.orion.flops import frozen_parts, row_flops
from megatron_unimm.models import flops
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.flops import peak_tflops, stage_peak_tflops

ALL = "[{pattern: '*'}]"
HEAD = "[{pattern: 'vision_head.*'}, {pattern: '*', train: false}]"
NO_TOWER = "[{pattern: 'vision_encoder.*', train: false}, {pattern: '*'}]"
TOWER_AND_HEAD = "[{pattern: 'backbone.*', train: false}, {pattern: '*'}]"
WITHOUT_KL = "method.loss_weights.kl=0"
MOE = "model.backbone.moe={num_experts: 4, top_k: 2, expert_mlp_size: 48, shared_expert_size: 32}"
CASES = {
    "all train": (ALL,),
    "without teacher": (ALL, WITHOUT_KL),
    "frozen tower": (NO_TOWER,),
    "frozen backbone": (TOWER_AND_HEAD,),
    "head alone": (HEAD, WITHOUT_KL, "method.loss_weights.cross_entropy=0"),
    "linear head": (ALL, "method.vision_head.kind=linear"),
    "q-former head": (ALL, "method.vision_head={kind: q_former, num_layers: 2, num_heads: 4}"),
    "experts": (ALL, MOE),
}


def without_images(row: PackedRow) -> PackedRow:
    return replace(row, grids=row.grids[:0], is_target=row.is_target[:0], predict_index=row.predict_index[:0])


@pytest.mark.parametrize("case", CASES)
def test_equals_torch_counter(case: str, repo: Path, world: tuple[Platform, ParallelGroups], monkeypatch) -> None:
    """Exactly, but for two things that torch's counter sees and a model needs not: the masked half of causal attention,
    and the gradient for the input of the vision head's first product in a stage where nothing before it trains
    (Megatron-Core's linear computes it regardless).
    """
    trainable, *overrides = CASES[case]
    stage = small_stage(repo, f"train.trainable={trainable}", *overrides)
    platform, groups = world
    row = make_row(stage)
    method, (model,) = setup.build_model(stage, platform, groups)
    batch = method.batch(row, model, platform.device)
    # The plain kernel is counted as the products that it consists of; the fused one on CPU is not counted at all.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch).sum().backward()

    monkeypatch.setattr(orion_flops, "causal_pairs", lambda bounds: float((np.diff(bounds) ** 2).sum()))
    expected = row_flops(row, stage, frozen_parts(stage))
    if case == "head alone":
        hidden = stage.model.backbone.hidden_size
        expected += 2 * len(row.predict_index) * hidden * hidden * stage.method.vision_head.expansion
    assert counter.get_total_flops() == expected


def test_causal_pairs_counts_the_mask() -> None:
    lengths = [3, 1, 5]
    mask = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths))
    assert flops.causal_pairs((0, 3, 4, 9)) == mask.sum()


def test_known_answer_of_a_7b_row(repo: Path) -> None:
    """Text only, all positions labelled, one sample: 6 FLOPs per weight and token, 12 L N D per pair of the mask."""
    stage = load_recipe(repo / "configs/orion/qwen2_5_vl_7b.yaml").stages["sft"]
    length = 8192
    text = {"input_ids": np.zeros(length, np.int64), "labels": np.zeros(length, np.int64)}
    row = replace(without_images(make_row(small_stage(repo))), **text, segment_bounds=(0, length))
    weights = 28 * (3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944) + 3584 * 152064
    attention = 12 * 28 * 28 * 128 * length * (length + 1) / 2
    assert row_flops(row, stage, frozenset()) == 6 * weights * length + attention


def test_row_without_images_costs_no_teacher_and_no_tower(repo: Path) -> None:
    stage = small_stage(repo)
    row = without_images(make_row(stage))
    backbone = stage.model.backbone
    num_labels = int((row.labels != IGNORED_LABEL).sum())
    decoder = flops.decoder_work(backbone, 128, flops.causal_pairs(row.segment_bounds))
    expected = (decoder + flops.logits_work(backbone, num_labels)).cost(trains=True, passes_gradient=True)
    assert row_flops(row, stage, frozenset()) == expected


@pytest.mark.parametrize(
    ("name", "fp8", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", False, 989.4),
        ("NVIDIA H100 80GB HBM3", True, 1978.8),
        ("NVIDIA H100 PCIe", False, 756.5),
        ("NVIDIA H200", False, 989.4),
        ("NVIDIA GH200 480GB", False, 989.4),
        ("NVIDIA H20", False, 148.0),
        ("NVIDIA A100-SXM4-80GB", False, 312.0),
        ("NVIDIA B200", False, 2250.0),
        ("NVIDIA GB200", True, 5000.0),
        ("CPU, 2 threads", False, None),
    ],
)
def test_peak_by_name(name: str, fp8: bool, peak: float | None) -> None:
    assert peak_tflops(name, fp8) == peak


def test_stage_peak(repo: Path) -> None:
    """What the config says wins; fp32 has no peak in the table."""
    assert stage_peak_tflops(small_stage(repo, "train.logging.peak_tflops=7"), "NVIDIA H100 80GB HBM3") == 7
    assert stage_peak_tflops(small_stage(repo), "NVIDIA H100 80GB HBM3") is None
    bf16 = small_stage(repo, "system.precision.dtype=bfloat16")
    assert stage_peak_tflops(bf16, "NVIDIA H100 80GB HBM3") == 989.4
