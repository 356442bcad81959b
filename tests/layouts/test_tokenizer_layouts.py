"""SPAR's tokenizer at every layout against one rank: same checkpoint, same pictures, fp32. The first stage over a
frozen encoder, and the second with its own encoder, the frozen original and a discriminator."""

import json
from pathlib import Path

import pytest
import torch
from test_parallel_layouts import DEEPSTACK, OVERLAP, SP, TOLERANCE, Layout, start_worker, worst_gradient_difference

from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.data.shapes import write_shapes
from megatron_unimm.methods.spar.tokenizer.losses import TERMS

TP2 = "system.parallel.tensor=2"
RECOMPUTE = "system.recompute={granularity: full, num_layers: 1}"
STAGES = {
    "frozen": ("tokenizer",),
    "adversarial": ("tokenizer_adversarial", "method.adversarial={weight: 0.5, channels: [8, 8], norm_groups: 4}"),
    "levels": ("tokenizer_adversarial", f"model.vision_encoder={DEEPSTACK}", "model.backbone.mrope_interleaved=true"),
}
"""By name, the stage and its settings."""
LAYOUTS = [
    Layout("tp2", 2, (TP2,), "adversarial"),
    Layout("tp2_sp", 2, (TP2, SP), "adversarial"),
    Layout("dp2", 2, (), "adversarial"),
    Layout("dp2_overlap", 2, (OVERLAP,), "adversarial"),
    Layout("recomputed", 1, (RECOMPUTE,), "adversarial"),
    Layout("tp2_sp_frozen", 2, (TP2, SP), "frozen"),
    Layout("dp2_frozen", 2, (OVERLAP,), "frozen"),
    Layout("tp2_sp_levels", 2, (TP2, SP), "levels"),
    Layout("tp2_sp_dp2", 4, (TP2, SP, RECOMPUTE), "adversarial"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of one rank and of every layout, by stage."""
    root = tmp_path_factory.mktemp("tokenizer_layouts")
    write_shapes(root / "data", count=120, seed=3)
    kinds = ("understanding", "text_to_image", "editing")
    data = [f"data.sources.{kind}.path={root}/data/train/{kind}.jsonl" for kind in kinds]
    sizes = "data.generation_size={rule: buckets, sizes: [[64, 64], [96, 48]]}"
    made = {name: root / name for name in STAGES}

    def task(name: str, of: str, *overrides: str) -> dict:
        stage, *settings = STAGES[of]
        settings = [*data, sizes, "data.sequence_length=64", *settings, *overrides]
        return {"folder": str(made[of]), "recipe": "spar", "stage": stage, "name": name, "overrides": settings}

    for folder in made.values():
        folder.mkdir()
    tasks = [task(name, of) for of in made for name in ("init", "one_rank")]
    alone = [task(layout.name, layout.model, *layout.overrides) for layout in LAYOUTS if layout.ranks == 1]
    start_worker(1, tasks + alone)
    for ranks in (2, 4):
        chosen = [layout for layout in LAYOUTS if layout.ranks == ranks]
        start_worker(ranks, [task(layout.name, layout.model, *layout.overrides) for layout in chosen])
    return made


def test_reference_means_something(folders: dict[str, Path]) -> None:
    """Every term is above zero where it is asked for, and every part has a gradient."""
    for of, folder in folders.items():
        first = json.loads((folder / "one_rank.json").read_text())
        losses = dict(zip(TERMS, first["steps"][0]["losses"], strict=True))
        judged = of != "frozen"
        assert min(losses[term] for term in TERMS[:5]) > 1e-4, losses
        assert (losses["discriminator"] > 0.1) == judged
        norms = dict(zip(first["modules"], first["steps"][0]["modules"], strict=True))
        assert (norms["vision_encoder"] > 1e-6) == judged
        assert norms["tokenizer"] > 1e-6
        with Reader(folder / "one_rank") as gradients:
            for key in gradients.tensors:
                # Deepstack levels are not read.
                assert gradients.read(key).any() != ("deepstack_mergers" in key), key


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_one_rank(layout: Layout, folders: dict[str, Path]) -> None:
    """Losses and gradient norms of three steps, and every tensor's gradient of the first."""
    folder = folders[layout.model]
    expected, found = (json.loads((folder / f"{name}.json").read_text()) for name in ("one_rank", layout.name))
    worst_loss = 0.0
    for number, (reference, step) in enumerate(zip(expected["steps"], found["steps"], strict=True)):
        losses, wanted = torch.tensor(step["losses"]), torch.tensor(reference["losses"])
        torch.testing.assert_close(losses, wanted, rtol=TOLERANCE, atol=1e-6, msg=f"step {number}")
        assert step["norm"] == pytest.approx(reference["norm"], rel=TOLERANCE), f"step {number}"
        worst_loss = max(worst_loss, float(((losses - wanted) / wanted.abs().clamp(min=1e-6)).abs().max()))
    worst = worst_gradient_difference(folder / "one_rank", folder / layout.name)
    print(f"{layout.name:16} losses {worst_loss:.1e}  worst gradient {worst[0]:.1e} {worst[1]}")
    assert worst[0] < TOLERANCE, worst
