"""HieraQuery's stages at every layout against one rank: same checkpoint, same data, same noise, fp32; and the same
losses of conditions, latents and features that were computed beforehand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import worker
from small_hieraquery import SANA
from test_parallel_layouts import OVERLAP, SP, TOLERANCE, Layout, start_worker, worst_gradient_difference

from megatron_unimm.data.shapes import write_shapes
from megatron_unimm.train.feature_cache import make_cache

TP2, PP2, CP2, EP2 = (f"system.parallel.{axis}=2" for axis in ("tensor", "pipeline", "context", "expert"))
VPP2 = "system.parallel.virtual_pipeline=2"
FULL_RECOMPUTE = "system.recompute={granularity: full, num_layers: 1}"
FLUX = (
    "generator.mmdit={family: flux, num_layers: 2, num_single_layers: 2, num_heads: 4, head_size: 8,"
    " rotary_axes: [2, 2, 4], latent_channels: 4, condition_size: 24, pooled_size: 12, guidance: true}"
)
EXPERTS = "model.backbone.moe={num_experts: 4, top_k: 2, expert_mlp_size: 48, gates: [image]}"
FIXED = "train.trainable=[{pattern: 'vlm.*', train: false}, {pattern: 'vae.*', train: false}, {pattern: '*'}]"


def aligned(stage: str, layer: int) -> str:
    return f"stages.{stage}.method.alignment={{layer: {layer}, projector_size: 20}}"


MODELS = {
    "editing": (aligned("editing", 3),),
    "text_to_image": (aligned("text_to_image", 1),),
    "reconstruction": (aligned("reconstruction", 4), "hieraquery.mode=reuse"),
    "experts": (aligned("editing", 2), EXPERTS),
    "flux": (aligned("editing", 3), FLUX),
    "fixed": (aligned("editing", 3), FIXED),
    "sana": (aligned("editing", 3), *SANA),
}
"""The alignment sits inside the first chunk or the last, at its end, or at the very end."""
CACHED = tuple(
    f"data.{name}_cache=FOLDER/cache/{folder}"
    for name, folder in (("condition", "conditions"), ("latent", "latents"), ("feature", "features"))
)
"""In place of VLM, VAE and vision encoder; made on one rank. What it is compared with runs them."""
LAYOUTS = [
    Layout("tp2", 2, (TP2,), "editing"),
    Layout("tp2_sp", 2, (TP2, SP), "editing"),
    Layout("pp2", 2, (PP2,), "editing"),
    Layout("pp2_vpp2", 2, (PP2, VPP2, FULL_RECOMPUTE), "editing"),
    Layout("cp2", 2, (CP2,), "editing"),
    Layout("dp2_overlap", 2, (OVERLAP,), "editing"),
    Layout("tp2_sp_pp2", 4, (TP2, SP, PP2, FULL_RECOMPUTE), "editing"),
    Layout("pp2_cp2", 4, (PP2, CP2), "editing"),
    Layout("tp2_sp", 2, (TP2, SP), "text_to_image"),
    Layout("pp2", 2, (PP2,), "text_to_image"),
    Layout("cp2", 2, (CP2,), "text_to_image"),
    Layout("tp2_sp", 2, (TP2, SP), "reconstruction"),
    Layout("pp2", 2, (PP2,), "reconstruction"),
    Layout("cp2", 2, (CP2,), "reconstruction"),
    Layout("ep2", 2, (EP2,), "experts"),
    Layout("ep2_tp2_sp", 2, (EP2, TP2, SP), "experts"),
    Layout("pp2_experts", 2, (PP2,), "experts"),
    Layout("tp2_sp", 2, (TP2, SP), "flux"),
    Layout("pp2_vpp2", 2, (PP2, VPP2), "flux"),
    Layout("tp2_sp", 2, (TP2, SP), "sana"),
    Layout("pp2_vpp2", 2, (PP2, VPP2), "sana"),
    Layout("cached", 1, CACHED, "fixed"),
    Layout("tp2_sp_cached", 2, (TP2, SP, *CACHED), "fixed"),
    Layout("pp2_cached", 2, (PP2, *CACHED), "fixed"),
    Layout("cp2_cached", 2, (CP2, *CACHED), "fixed"),
]


def stage_of(model: str) -> str:
    return model if model in ("text_to_image", "reconstruction") else "editing"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL/one_rank and MODEL/LAYOUT of every layout, and the data."""
    root = tmp_path_factory.mktemp("hieraquery_layouts")
    write_shapes(root / "data", count=120, seed=3)
    data = root / "data/train"
    paths = {"text_to_image": "text_to_image.jsonl", "editing": "editing.jsonl", "reconstruction": "images"}

    def task(name: str, model: str, *overrides: str) -> dict:
        folder, stage = root / model, stage_of(model)
        kinds = ["text_to_image", "editing"] if stage == "editing" else [stage]
        read = [f"stages.{stage}.data.sources.{kind}.path={data}/{paths[kind]}" for kind in kinds]
        settings = [*read, f"stages.{stage}.after=null", "train.seed=7", *MODELS[model], *overrides]
        settings = [each.replace("FOLDER", str(folder)) for each in settings]
        return {"folder": str(folder), "recipe": "hieraquery", "stage": stage, "name": name, "overrides": settings}

    for model in MODELS:
        (root / model).mkdir()
    start_worker(1, [task(name, model) for model in MODELS for name in ("init", "one_rank")])
    cached = task("cache", "fixed")
    folder = Path(cached["folder"])
    stage = worker.stage_config(folder, cached["recipe"], cached["stage"], cached["overrides"])
    make_cache(stage, folder / "cache", run_dir=folder)
    for ranks in (1, 2, 4):
        chosen = [layout for layout in LAYOUTS if layout.ranks == ranks]
        start_worker(ranks, [task(layout.name, layout.model, *layout.overrides) for layout in chosen])
    return root


def result(root: Path, layout: Layout) -> dict:
    return json.loads((root / layout.model / f"{layout.name}.json").read_text())


@pytest.mark.parametrize("model", MODELS)
def test_reference_has_everything(model: str, root: Path) -> None:
    """Two losses above zero, and gradients in every part that trains."""
    found = result(root, Layout("one_rank", 1, (), model))
    first = found["steps"][0]
    kinds = ["editing", "text_to_image"] if stage_of(model) == "editing" else [model]
    assert first["kinds"] == kinds
    assert min(first["losses"][0], first["losses"][-1]) > 0.1
    norms = dict(zip(found["modules"], first["modules"], strict=True))
    parts = {"mmdit", "scale_connector", "scale_adapters", "alignment_projector", "vlm", "frame_embedding"}
    parts -= {"fixed": {"vlm"}, "flux": {"frame_embedding"}, "sana": {"frame_embedding"}}.get(model, set())
    assert {name.split(".")[0] for name, norm in norms.items() if norm > 1e-6} == parts


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.model}-{layout.name}")
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
        worst_loss = max(worst_loss, *(abs(found - wanted) / max(wanted, 1e-9) for found, wanted in pairs))
    worst = worst_gradient_difference(root / layout.model / "one_rank", root / layout.model / layout.name)
    print(f"{layout.model:18} {layout.name:14} losses {worst_loss:.1e}  worst gradient {worst[0]:.1e} {worst[1]}")
    assert worst[0] < TOLERANCE, worst
