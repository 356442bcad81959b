"""SPAR's alignment at every layout against one rank: same checkpoint, same data, fp32. Routers with everything behind
them, and alone in a frozen language model."""

import json
from pathlib import Path

import pytest
import torch
from test_parallel_layouts import SP, TOLERANCE, Layout, start_worker, worst_gradient_difference

from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.data.shapes import write_shapes

TP2, PP2, CP2 = (f"system.parallel.{axis}=2" for axis in ("tensor", "pipeline", "context"))
RECOMPUTE = "system.recompute={granularity: full, num_layers: 1}"
BALANCE = "stages.alignment.method.balance_weight=0.5"
MODELS = {
    "all": (
        "stages.alignment.routing={top_k: 2}",
        BALANCE,
        "stages.alignment.method.loss_weights.llm=1",
        "train.trainable=[{pattern: '*'}]",
    ),
    "routers": ("stages.alignment.routing={layers: [0, 2, 3], temperature: 0.5}", BALANCE),
    "last": ("stages.alignment.routing=null", "train.trainable=[{pattern: 'query_*'}, {pattern: '*', train: false}]"),
}
LAYOUTS = [
    Layout("tp2_sp", 2, (TP2, SP), "all"),
    Layout("pp2", 2, (PP2, RECOMPUTE), "all"),
    Layout("cp2", 2, (CP2,), "all"),
    Layout("pp2", 2, (PP2,), "routers"),
    Layout("cp2", 2, (CP2,), "routers"),
    Layout("pp2", 2, (PP2,), "last"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of one rank and of every layout, by model."""
    root = tmp_path_factory.mktemp("spar_layouts")
    write_shapes(root / "data", count=120, seed=3)
    data = [f"data.sources.{kind}.path={root}/data/train/{kind}.jsonl" for kind in ("text_to_image", "editing")]
    made = {model: root / model for model in MODELS}

    def task(name: str, of: str, *overrides: str) -> dict:
        # A frozen vision encoder is its own teacher, so it must be the base's.
        settings = [*data, "data.sequence_length=512", f"base_checkpoint={made[of]}/start", *MODELS[of], *overrides]
        return {"folder": str(made[of]), "recipe": "spar", "stage": "alignment", "name": name, "overrides": settings}

    for folder in made.values():
        folder.mkdir()
    start_worker(1, [task(name, of) for of in made for name in ("init", "one_rank")])
    start_worker(2, [task(layout.name, layout.model, *layout.overrides) for layout in LAYOUTS])
    return made


def test_reference_means_something(folders: dict[str, Path]) -> None:
    for of, folder in folders.items():
        first = json.loads((folder / "one_rank.json").read_text())
        _, vis, balance = first["steps"][0]["losses"]
        assert vis > 0.1
        assert (balance >= 1) == (of != "last")
        with Reader(folder / "one_rank") as gradients:
            routers = [key for key in gradients.tensors if "layer_router.weight" in key]
            assert len(routers) == {"all": 4, "routers": 3, "last": 0}[of]
            assert all(gradients.read(key).norm() > 1e-6 for key in routers)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.model}-{layout.name}")
def test_layout_equals_one_rank(layout: Layout, folders: dict[str, Path]) -> None:
    """Losses and gradient norms of three steps, and every tensor's gradient of the first."""
    folder = folders[layout.model]
    expected, found = (json.loads((folder / f"{name}.json").read_text()) for name in ("one_rank", layout.name))
    for number, (reference, step) in enumerate(zip(expected["steps"], found["steps"], strict=True)):
        losses, wanted = torch.tensor(step["losses"]), torch.tensor(reference["losses"])
        torch.testing.assert_close(losses, wanted, rtol=TOLERANCE, atol=1e-9, msg=f"step {number}")
        assert step["norm"] == pytest.approx(reference["norm"], rel=TOLERANCE), f"step {number}"
    worst = worst_gradient_difference(folder / "one_rank", folder / layout.name)
    print(f"{layout.model:8} {layout.name:8} worst gradient {worst[0]:.1e} {worst[1]}")
    assert worst[0] < TOLERANCE, worst
