"""Dynamic Token Routing: losses and gradients against a dense mixture in plain torch, and every layout against one
rank; the layers may be on any pipeline stage."""

import json
from pathlib import Path

import pytest
import torch
from test_parallel_layouts import DEEPSTACK, SP, TOLERANCE, Layout, start_worker, worst_gradient_difference

WORKER = Path(__file__).with_name("routing_worker.py")
TP2, PP2, CP2 = (f"system.parallel.{axis}=2" for axis in ("tensor", "pipeline", "context"))
VPP2 = "system.parallel.virtual_pipeline=2"
RECOMPUTE = "system.recompute={granularity: full, num_layers: 1}"
LEVELS = (f"model.vision_encoder={DEEPSTACK}", "model.backbone.mrope_interleaved=true")
ROUTINGS: dict[str, tuple[dict, tuple[str, ...]]] = {
    "softmax": ({"temperature": 0.7}, ()),
    "top_k": ({"top_k": 2}, LEVELS),
    "some": ({"layers": [1, 3], "mode": "static"}, ()),
}
LAYOUTS = [
    Layout("pp2", 2, (PP2,), "softmax"),
    Layout("pp2_vpp2", 2, (PP2, VPP2, RECOMPUTE), "softmax"),
    Layout("tp2_sp", 2, (TP2, SP), "softmax"),
    Layout("cp2", 2, (CP2,), "softmax"),
    Layout("pp2", 2, (PP2,), "top_k"),
    Layout("pp2_vpp2", 2, (PP2, VPP2), "top_k"),
    Layout("uneven", 2, (PP2, "system.parallel.layers_per_stage=[4, 0]"), "top_k"),
    Layout("cp2", 2, (CP2,), "top_k"),
    Layout("pp2", 2, (PP2, RECOMPUTE), "some"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of the dense mixture, of one rank and of every layout, by routing."""
    root = tmp_path_factory.mktemp("routing_layouts")
    made = {of: root / of for of in ROUTINGS}

    def task(name: str, of: str, *overrides: str) -> dict:
        routing, model = ROUTINGS[of]
        return {"folder": str(made[of]), "name": name, "routing": routing, "model": model, "overrides": overrides}

    for folder in made.values():
        folder.mkdir()
    start_worker(1, [task(name, of) for of in made for name in ("init", "dense", "one_rank")], WORKER)
    start_worker(2, [task(layout.name, layout.model, *layout.overrides) for layout in LAYOUTS], WORKER)
    return made


def compare(folder: Path, reference: str, other: str) -> None:
    expected, found = (torch.tensor(json.loads((folder / f"{name}.json").read_text())) for name in (reference, other))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=1e-6)
    worst = worst_gradient_difference(folder / reference, folder / other)
    print(f"{folder.name} {other:12} losses {(found - expected).abs().max():.1e}  worst gradient {worst}")
    assert worst[0] < TOLERANCE, worst


@pytest.mark.parametrize("of", ROUTINGS)
def test_one_rank_equals_a_dense_mixture(of: str, folders: dict[str, Path]) -> None:
    compare(folders[of], "dense", "one_rank")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.model}-{layout.name}")
def test_layout_equals_one_rank(layout: Layout, folders: dict[str, Path]) -> None:
    compare(folders[layout.model], "one_rank", layout.name)
