"""MMCORE's VLM stage at every layout against one rank: same checkpoint, same data, fp32. Understanding, text to image
and edits, some of several turns whose first pictures are read again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_parallel_layouts import DEEPSTACK, SP, TOLERANCE, Layout, start_worker, worst_gradient_difference

from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.data.shapes import write_shapes

TP2, PP2, CP2, EP2 = (f"system.parallel.{axis}=2" for axis in ("tensor", "pipeline", "context", "expert"))
VPP2 = "system.parallel.virtual_pipeline=2"
FULL_RECOMPUTE = "system.recompute={granularity: full, num_layers: 1}"
KINDS = {"understanding": 2.0, "text_to_image": 6.0, "editing": 4.0}
# Two heads of 64 in the connector.
WIDE = ("model.vision_encoder.out_size=128", "model.backbone.hidden_size=128")
# A frozen vision encoder is its own teacher, so it must be the base's.
SAME = ("base_checkpoint=FOLDER/start",)
NEW = "{pattern: 'query_tokens.*'}, {pattern: 'query_connector.*'}, {pattern: '*', train: false}"
SIGLIP = (
    "queries.teacher={family: siglip, checkpoint: FOLDER/siglip, size: {rule: square, side: 44}, encoder: {"
    "family: siglip, num_layers: 2, hidden_size: 24, num_heads: 2, mlp_size: 40, patch_size: 8,"
    " num_position_embeddings: 25, pooling_head: false}}"
)
MODELS = {
    "dense": (),
    "moe": ("model.backbone.moe={num_experts: 4, top_k: 2, expert_mlp_size: 48}",),
    "levels": (f"model.vision_encoder={DEEPSTACK}", "model.backbone.mrope_interleaved=true"),
    "connector": (*WIDE, "queries.connector.num_layers=2", SIGLIP),
    "frozen": (*WIDE, *SAME, "queries.connector={num_layers: 3, projection: linear}", f"train.trainable=[{NEW}]"),
    "lora": (*SAME, "queries.lora={rank: 4}", f"train.trainable=[{{pattern: 'backbone.*lora_*'}}, {NEW}]"),
}
LAYOUTS = [
    Layout("tp2", 2, (TP2,)),
    Layout("tp2_sp", 2, (TP2, SP)),
    Layout("pp2", 2, (PP2,)),
    Layout("pp2_vpp2", 2, (PP2, VPP2)),
    Layout("cp2", 2, (CP2,)),
    Layout("dp2", 2, ()),
    Layout("dp2_overlap", 2, ("system.overlap={grad_reduce: true, param_gather: true}",)),
    Layout("tp2_sp_pp2", 4, (TP2, SP, PP2, FULL_RECOMPUTE)),
    Layout("ep2", 2, (EP2,), "moe"),
    Layout("tp2_sp_levels", 2, (TP2, SP), "levels"),
    Layout("tp2_connector", 2, (TP2,), "connector"),
    Layout("cp2_connector", 2, (CP2,), "connector"),
    Layout("pp2_connector", 2, (PP2, FULL_RECOMPUTE), "connector"),
    Layout("tp2_sp_frozen", 2, (TP2, SP), "frozen"),
    Layout("pp2_frozen", 2, (PP2,), "frozen"),
    Layout("cp2_frozen", 2, (CP2,), "frozen"),
    Layout("tp2_sp_lora", 2, (TP2, SP), "lora"),
    Layout("pp2_lora", 2, (PP2,), "lora"),
]
SEED = "train.seed=7"
"""So that the first step has an edit of several turns."""
TRAINED = {
    "frozen": {"query_tokens", "query_connector"},
    "lora": {"backbone", "query_tokens", "query_connector"},
}
"""Parts that have gradients, where it is not all of them."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL/one_rank and MODEL/LAYOUT of every layout, and the data."""
    root = tmp_path_factory.mktemp("mmcore_layouts")
    write_shapes(root / "data", count=120, seed=3)
    data = ["data.sources.interleaved=null"]
    for kind, weight in KINDS.items():
        data += [f"data.sources.{kind}.path={root}/data/train/{kind}.jsonl", f"data.sources.{kind}.weight={weight}"]

    def task(name: str, model: str, *overrides: str) -> dict:
        folder = root / model
        settings = [*data, "queries.num_queries=6", SEED, *MODELS[model], *overrides]
        settings = [each.replace("FOLDER", str(folder)) for each in settings]
        return {"folder": str(folder), "recipe": "mmcore", "stage": "vlm", "name": name, "overrides": settings}

    for model in MODELS:
        (root / model).mkdir()
    start_worker(1, [task(name, model) for model in MODELS for name in ("init", "one_rank")])
    for ranks in (2, 4):
        chosen = [layout for layout in LAYOUTS if layout.ranks == ranks]
        start_worker(ranks, [task(layout.name, layout.model, *layout.overrides) for layout in chosen])
    return root


def result(root: Path, layout: Layout) -> dict:
    return json.loads((root / layout.model / f"{layout.name}.json").read_text())


@pytest.mark.parametrize("model", MODELS)
def test_reference_has_everything(model: str, root: Path) -> None:
    """The comparison means something: three kinds of sample, pictures that are read again, two terms above zero, and
    gradients in every part that trains."""
    found = result(root, Layout("one_rank", 1, (), model))
    first = found["steps"][0]
    assert first["kinds"] == sorted(KINDS)
    lines = [json.loads(line) for line in (root / "data/train/editing.jsonl").read_text().splitlines()]
    several = [line["id"] for line in lines if [turn["from"] for turn in line["conversations"]].count("gpt") > 1]
    assert any(name.endswith(each) for name in first["samples"] for each in several)
    assert min(first["losses"]) > 0.1
    norms = dict(zip(found["modules"], first["modules"], strict=True))
    parts = TRAINED.get(model, {"vision_encoder", "backbone", "query_tokens", "query_connector"})
    assert {name.split(".")[0] for name, norm in norms.items() if norm > 1e-6} == parts
    small = [name for name, norm in norms.items() if norm <= 1e-6]
    assert all(name.startswith(("vision_encoder", "backbone")) and norms[name] == 0 for name in small)
    assert not small or model in TRAINED
    with Reader(root / model / "one_rank") as gradients:
        names = list(gradients.tensors)
        assert all(("lora" in name) == name.startswith("backbone") for name in names) or model != "lora"
        layers = {name for name in names if name.startswith("query_connector.layers")}
        assert bool(layers) == (model in ("connector", "frozen"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_one_rank(layout: Layout, root: Path) -> None:
    """Losses and gradient norms of three steps, and every tensor's gradient of the first."""
    one_rank = replace(layout, name="one_rank")
    worst_loss = 0.0
    steps = zip(result(root, one_rank)["steps"], result(root, layout)["steps"], strict=True)
    for number, (reference, step) in enumerate(steps):
        for name in ("losses", "modules"):
            found, wanted = torch.tensor(step[name]), torch.tensor(reference[name])
            torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=1e-9, msg=f"step {number}, {name}")
        assert step["norm"] == pytest.approx(reference["norm"], rel=TOLERANCE), f"step {number}"
        pairs = zip(step["losses"], reference["losses"], strict=True)
        worst_loss = max(worst_loss, *(abs(found - wanted) / wanted for found, wanted in pairs))
    worst = worst_gradient_difference(root / layout.model / "one_rank", root / layout.model / layout.name)
    print(f"{layout.name:14} losses {worst_loss:.1e}  worst gradient {worst[0]:.1e} {worst[1]}")
    assert worst[0] < TOLERANCE, worst
