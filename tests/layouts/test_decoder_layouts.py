"""The image decoder's training at every layout against one rank: same checkpoint, same data, same noise, fp32. SD3 with
its variants, FLUX, and SANA."""

import json
from pathlib import Path

import pytest
from small_decoder import SANA
from test_parallel_layouts import (
    FULL_RECOMPUTE,
    OVERLAP,
    SP,
    TOLERANCE,
    Layout,
    compare_steps,
    start_worker,
    worst_gradient_difference,
)

from megatron_unimm.data.shapes import write_shapes

TP2, PP2, CP2 = (f"system.parallel.{axis}=2" for axis in ("tensor", "pipeline", "context"))
VPP2 = "system.parallel.virtual_pipeline=2"
SELECTIVE = "system.recompute={granularity: selective, modules: [core_attn, mlp]}"
FLUX = (
    "generator.mmdit={family: flux, num_layers: 2, num_single_layers: 2, num_heads: 4, head_size: 8,"
    " rotary_axes: [2, 2, 4], latent_channels: 4, condition_size: 24, pooled_size: 12, guidance: true}"
)
MODELS = {
    "sd3": ("generator.mmdit.qk_norm=false",),
    "dual": ("generator.mmdit.dual_attention_layers=[0, 2]",),
    "flux": (FLUX,),
    "sana": SANA,
}
LAYOUTS = [
    Layout("tp2", 2, (TP2,), "flux"),
    Layout("tp2_sp", 2, (TP2, SP), "flux"),
    Layout("pp2", 2, (PP2,), "flux"),
    Layout("pp2_vpp2", 2, (PP2, VPP2), "flux"),
    Layout("cp2", 2, (CP2,), "flux"),
    Layout("dp2", 2, (), "flux"),
    Layout("dp2_overlap", 2, (OVERLAP,), "flux"),
    Layout("recomputed", 1, (FULL_RECOMPUTE,), "flux"),
    Layout("tp2_sp_pp2", 4, (TP2, SP, PP2, FULL_RECOMPUTE), "flux"),
    Layout("tp2_sp_cp2", 4, (TP2, SP, CP2, SELECTIVE), "flux"),
    Layout("sd3_tp2_sp", 2, (TP2, SP), "sd3"),
    Layout("sd3_pp2_vpp2", 2, (PP2, VPP2), "sd3"),
    Layout("dual_tp2_sp", 2, (TP2, SP), "dual"),
    Layout("dual_cp2", 2, (CP2,), "dual"),
    Layout("dual_pp2", 2, (PP2, SELECTIVE), "dual"),
    Layout("dual_tp2_sp_pp2", 4, (TP2, SP, PP2), "dual"),
    Layout("sana_recomputed", 1, (SELECTIVE,), "sana"),
    Layout("sana_tp2", 2, (TP2,), "sana"),
    Layout("sana_tp2_sp", 2, (TP2, SP), "sana"),
    Layout("sana_pp2", 2, (PP2, SELECTIVE), "sana"),
    Layout("sana_pp2_vpp2", 2, (PP2, VPP2), "sana"),
    Layout("sana_dp2", 2, (OVERLAP,), "sana"),
    Layout("sana_tp2_sp_pp2", 4, (TP2, SP, PP2, FULL_RECOMPUTE), "sana"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of one rank and of every layout, by model."""
    root = tmp_path_factory.mktemp("decoder_layouts")
    write_shapes(root / "data", count=120, seed=3)
    data = [f"data.sources.{kind}.path={root}/data/train/{kind}.jsonl" for kind in ("text_to_image", "editing")]
    sizes = "data.drawing_size={rule: buckets, sizes: [[64, 64], [96, 48]]}"
    made = {model: root / model for model in MODELS}

    def task(stage: str, name: str, model: str, *overrides: str) -> dict:
        settings = [*data, sizes, *MODELS[model], *overrides] if stage == "decoder" else [*overrides]
        return {"folder": str(made[model]), "stage": stage, "name": name, "overrides": settings}

    for folder in made.values():
        folder.mkdir()
    tasks = [
        task(stage, name, model)
        for model in made
        for stage, name in (("sft", "init"), ("decoder", "init"), ("decoder", "one_rank"))
    ]
    alone = [layout for layout in LAYOUTS if layout.ranks == 1]
    start_worker(1, tasks + [task("decoder", layout.name, layout.model, *layout.overrides) for layout in alone])
    for ranks in (2, 4):
        chosen = [layout for layout in LAYOUTS if layout.ranks == ranks]
        start_worker(ranks, [task("decoder", layout.name, layout.model, *layout.overrides) for layout in chosen])
    return made


def test_reference_means_something(folders: dict[str, Path]) -> None:
    """Both kinds of sample, a loss, and gradients in connector and transformer."""
    for folder in folders.values():
        first = json.loads((folder / "one_rank.json").read_text())
        assert first["steps"][0]["kinds"] == ["editing", "text_to_image"]
        assert first["steps"][0]["losses"][0] > 0.1
        norms = dict(zip(first["modules"], first["steps"][0]["modules"], strict=True))
        assert min(norms["connector"], norms["mmdit"]) > 1e-6


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_one_rank(layout: Layout, folders: dict[str, Path]) -> None:
    """Losses (by timestep too) and gradient norms of three steps, and every tensor's gradient of the first."""
    folder = folders[layout.model]
    expected, found = (json.loads((folder / f"{name}.json").read_text()) for name in ("one_rank", layout.name))
    worst_loss = compare_steps(found["steps"], expected["steps"], ["losses"])
    worst = worst_gradient_difference(folder / "one_rank", folder / layout.name)
    print(f"{layout.name:16} losses {worst_loss:.1e}  worst gradient {worst[0]:.1e} {worst[1]}")
    assert worst[0] < TOLERANCE, worst
