"""MMCORE's VLM and its diffusion transformer at every layout against one rank: same checkpoint, same data, same noise,
fp32. Understanding, text to image and edits, some of several turns whose first pictures are read again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import worker
from test_parallel_layouts import (
    DEEPSTACK,
    OVERLAP,
    SP,
    TOLERANCE,
    Layout,
    compare_steps,
    start_worker,
    worst_gradient_difference,
)

from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.data.shapes import write_shapes
from megatron_unimm.train.feature_cache import make_cache

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
FLUX = (
    "generator.mmdit={family: flux, num_layers: 2, num_single_layers: 2, num_heads: 4, head_size: 8,"
    " rotary_axes: [2, 2, 4], latent_channels: 4, condition_size: 24, pooled_size: 12, guidance: true}"
)
DRAWN_NEW = "{pattern: 'vlm.query_tokens.*'}, {pattern: 'vlm.query_connector.*'}, {pattern: 'vlm.*', train: false}"
DRAWING = {
    "draws_sd3": ("generator.mmdit.dual_attention_layers=[0, 2]",),
    "draws_flux": (FLUX,),
    "draws_and_queries": (FLUX, f"train.trainable=[{DRAWN_NEW}, {{pattern: 'vae.*', train: false}}, {{pattern: '*'}}]"),
    "draws_moe": MODELS["moe"],
    "draws_ablated": ("method.earlier_latents=true", "method.vit_features=true"),
}
"""Of the diffusion transformer's stage: all that draws trains, and in one case queries behind the frozen backbone."""
CACHED = ("data.condition_cache=FOLDER/cache/conditions", "data.latent_cache=FOLDER/cache/latents")
"""In place of VLM and VAE; made on one rank. What it is compared with runs both."""
LAYOUTS = [
    Layout("tp2", 2, (TP2,)),
    Layout("tp2_sp", 2, (TP2, SP)),
    Layout("pp2", 2, (PP2,)),
    Layout("pp2_vpp2", 2, (PP2, VPP2)),
    Layout("cp2", 2, (CP2,)),
    Layout("dp2", 2, ()),
    Layout("dp2_overlap", 2, (OVERLAP,)),
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
    Layout("tp2", 2, (TP2,), "draws_flux"),
    Layout("tp2_sp", 2, (TP2, SP), "draws_and_queries"),
    Layout("pp2", 2, (PP2,), "draws_and_queries"),
    Layout("pp2_vpp2", 2, (PP2, VPP2), "draws_flux"),
    Layout("cp2", 2, (CP2,), "draws_and_queries"),
    Layout("dp2_overlap", 2, (OVERLAP,), "draws_flux"),
    Layout("tp2_sp_pp2", 4, (TP2, SP, PP2, FULL_RECOMPUTE), "draws_flux"),
    Layout("tp2", 2, (TP2,), "draws_sd3"),
    Layout("tp2_sp", 2, (TP2, SP), "draws_sd3"),
    Layout("pp2_vpp2", 2, (PP2, VPP2), "draws_sd3"),
    Layout("cp2", 2, (CP2,), "draws_sd3"),
    Layout("tp2_sp_pp2", 4, (TP2, SP, PP2), "draws_sd3"),
    Layout("ep2", 2, (EP2,), "draws_moe"),
    Layout("cached", 1, CACHED, "draws_sd3"),
    Layout("tp2_sp_cached", 2, (TP2, SP, *CACHED), "draws_sd3"),
    Layout("pp2_cached", 2, (PP2, *CACHED), "draws_sd3"),
    Layout("cp2_cached", 2, (CP2, CACHED[0]), "draws_sd3"),
    Layout("tp2_sp", 2, (TP2, SP), "draws_ablated"),
    Layout("pp2_vpp2", 2, (PP2, VPP2), "draws_ablated"),
    Layout("cp2", 2, (CP2,), "draws_ablated"),
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

    def task(stage: str, name: str, model: str, *overrides: str) -> dict:
        folder, read = root / model, [each for each in data if stage == "vlm" or "understanding" not in each]
        settings = [*read, "queries.num_queries=6", SEED, *(MODELS | DRAWING)[model], *overrides]
        if stage == "vlm" and model in DRAWING:  # another table of what trains
            settings = [each for each in settings if not each.startswith("train.trainable")]
        settings = [each.replace("FOLDER", str(folder)) for each in settings]
        return {"folder": str(folder), "recipe": "mmcore", "stage": stage, "name": name, "overrides": settings}

    for model in (*MODELS, *DRAWING):
        (root / model).mkdir()
    references = [task("vlm", name, model) for model in MODELS for name in ("init", "one_rank")]
    for model in DRAWING:
        references.append(task("vlm", "init", model))
        references += [task("diffusion", name, model) for name in ("init", "one_rank")]
    start_worker(1, references)
    cached = task("diffusion", "cache", "draws_sd3", "stages.diffusion.after=null")
    folder = Path(cached["folder"])
    stage = worker.stage_config(folder, cached["recipe"], cached["stage"], cached["overrides"])
    make_cache(stage, folder / "cache", run_dir=folder)
    for ranks in (1, 2, 4):
        chosen = [layout for layout in LAYOUTS if layout.ranks == ranks]
        start_worker(
            ranks, [task(stage_of(layout.model), layout.name, layout.model, *layout.overrides) for layout in chosen]
        )
    return root


def stage_of(model: str) -> str:
    return "diffusion" if model in DRAWING else "vlm"


def result(root: Path, layout: Layout) -> dict:
    return json.loads((root / layout.model / f"{layout.name}.json").read_text())


def edits_of_several_turns(root: Path) -> list[str]:
    lines = [json.loads(line) for line in (root / "data/train/editing.jsonl").read_text().splitlines()]
    return [line["id"] for line in lines if [turn["from"] for turn in line["conversations"]].count("gpt") > 1]


@pytest.mark.parametrize("model", MODELS)
def test_reference_has_everything(model: str, root: Path) -> None:
    """The comparison means something: three kinds of sample, pictures that are read again, two terms above zero, and
    gradients in every part that trains."""
    found = result(root, Layout("one_rank", 1, (), model))
    first = found["steps"][0]
    assert first["kinds"] == sorted(KINDS)
    assert any(name.endswith(each) for name in first["samples"] for each in edits_of_several_turns(root))
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


@pytest.mark.parametrize("model", DRAWING)
def test_reference_draws_three_frames(model: str, root: Path) -> None:
    """Edits of several turns (a picture that is given and two that are drawn) beside text to image, a loss, and
    gradients in every part that trains."""
    found = result(root, Layout("one_rank", 1, (), model))
    first = found["steps"][0]
    assert first["kinds"] == ["editing", "text_to_image"]
    assert any(name.endswith(each) for name in first["samples"] for each in edits_of_several_turns(root))
    assert first["losses"][0] > 0.1
    parts = {"mmdit", "pathways"} | ({"vlm"} if model == "draws_and_queries" else set())
    parts |= set() if model in ("draws_flux", "draws_and_queries") else {"frame_embedding"}
    parts |= {"vit_features"} if model == "draws_ablated" else set()
    norms = dict(zip(found["modules"], first["modules"], strict=True))
    assert {name.split(".")[0] for name, norm in norms.items() if norm > 1e-6} == parts


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.model}-{layout.name}")
def test_layout_equals_one_rank(layout: Layout, root: Path) -> None:
    """Losses and gradient norms of three steps, and every tensor's gradient of the first."""
    one_rank = replace(layout, name="one_rank")
    worst_loss = compare_steps(result(root, layout)["steps"], result(root, one_rank)["steps"])
    worst = worst_gradient_difference(root / layout.model / "one_rank", root / layout.model / layout.name)
    print(f"{layout.model:18} {layout.name:14} losses {worst_loss:.1e}  worst gradient {worst[0]:.1e} {worst[1]}")
    assert worst[0] < TOLERANCE, worst
