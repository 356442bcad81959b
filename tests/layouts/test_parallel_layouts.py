"""Every layout against one rank: same checkpoint, same data, fp32. ORION's SFT stage with its three kinds of sample
in the batch."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.data.shapes import write_shapes

TOLERANCE = 1e-4
"""Relative, of losses and norms, and of each gradient's norm. Measured worst case: see the table that `pytest -s`
prints."""
ROUTER_GAP = 3e-6
"""Of logits. Tensor parallelism moves them by 7e-7 at most (measured), and a token that is nearer than that to a tie
between its last expert and the next gets the other one: data and weights are such that none is."""
WORKER = Path(__file__).with_name("worker.py")
# Three levels for four layers: one travels between two stages, two between four chunks.
DEEPSTACK = (
    "{family: qwen3, num_layers: 4, hidden_size: 32, num_heads: 4, mlp_size: 48, patch_size: 8, out_size: 64,"
    " num_position_embeddings: 36, deepstack_layers: [0, 1, 3]}"
)
MODELS = {
    "dense": (),
    "moe": ("model.backbone.moe={num_experts: 4, top_k: 2, expert_mlp_size: 48}",),
    "deepstack": (f"model.vision_encoder={DEEPSTACK}", "model.backbone.mrope_interleaved=true"),
    "gates": (
        "model.backbone.moe={num_experts: 4, top_k: 2, expert_mlp_size: 48, shared_expert_size: 32, first_layer: 1,"
        " gates: [image, audio]}",
        "model.backbone.normalize_output=true",
        "model.backbone.positions=sequential",
        "model.vision_encoder.projector={in_size: 40}",
    ),
}
SP = "system.parallel.sequence=true"
OVERLAP = "system.overlap={grad_reduce: true, param_gather: true}"
FULL_RECOMPUTE = "system.recompute={granularity: full, num_layers: 1}"
MOE_RECOMPUTE = "system.recompute={granularity: selective, modules: [moe]}"


@dataclass(frozen=True)
class Layout:
    name: str
    ranks: int
    overrides: tuple[str, ...]
    model: str = "dense"


LAYOUTS = [
    Layout("tp2", 2, ("system.parallel.tensor=2",)),
    Layout("tp2_sp", 2, ("system.parallel.tensor=2", "system.parallel.sequence=true")),
    Layout("pp2", 2, ("system.parallel.pipeline=2",)),
    Layout("pp2_vpp2", 2, ("system.parallel.pipeline=2", "system.parallel.virtual_pipeline=2")),
    Layout("cp2", 2, ("system.parallel.context=2",)),
    Layout("dp2", 2, ()),
    Layout("dp2_overlap", 2, (OVERLAP,)),
    Layout(
        "tp2_sp_pp2", 4, ("system.parallel.tensor=2", "system.parallel.sequence=true", "system.parallel.pipeline=2")
    ),
    Layout("pp2_vpp2_dp2_overlap", 4, ("system.parallel={pipeline: 2, virtual_pipeline: 2}", OVERLAP)),
    Layout("ep2", 2, ("system.parallel.expert=2",), model="moe"),
    Layout("ep2_overlap", 2, ("system.parallel.expert=2", OVERLAP), model="moe"),
    Layout(
        "ep2_tp2",
        4,
        ("system.parallel.expert=2", "system.parallel.tensor=2", "system.parallel.sequence=true"),
        model="moe",
    ),
    Layout("ep2_gates", 2, ("system.parallel.expert=2", OVERLAP), model="gates"),
    # Several micro-batches are under way when one is computed again.
    Layout("pp2_gates", 2, ("system.parallel.pipeline=2", MOE_RECOMPUTE), model="gates"),
    Layout("cp2_gates", 2, ("system.parallel.context=2", FULL_RECOMPUTE), model="gates"),
    Layout(
        "ep2_tp2_gates",
        4,
        ("system.parallel.expert=2", "system.parallel.tensor=2", SP),
        model="gates",
    ),
    Layout("tp2_sp_levels", 2, ("system.parallel.tensor=2", SP), model="deepstack"),
    Layout("cp2_levels", 2, ("system.parallel.context=2",), model="deepstack"),
    Layout("pp2_vpp2_levels", 2, ("system.parallel.pipeline=2", "system.parallel.virtual_pipeline=2"), "deepstack"),
    Layout("recomputed_levels", 1, (FULL_RECOMPUTE,), model="deepstack"),
    Layout(
        "tp2_sp_pp2_levels",
        4,
        ("system.parallel.tensor=2", SP, "system.parallel.pipeline=2", FULL_RECOMPUTE),
        model="deepstack",
    ),
]


def start_worker(ranks: int, tasks: list[dict], worker: Path = WORKER) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        str(worker),
        json.dumps(tasks),
    ]
    # This checkout, wherever the package is installed from, and the helpers of tests/train.
    helpers = {"PYTHONPATH": os.pathsep.join([str(WORKER.parents[2]), str(WORKER.parents[1] / "train")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=os.environ | helpers)
    errors = [line for line in done.stderr.splitlines() if line.startswith("[rank") or "rror" in line]
    assert done.returncode == 0, "\n".join(errors[-30:])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of one rank and of every layout, by model."""
    root = tmp_path_factory.mktemp("layouts")
    write_shapes(root / "data", count=120, seed=5)  # of 3 to 6, the one farthest from ties of routers: 1.9e-5
    data = [
        f"data.sources.{kind}.path={root}/data/train/{kind}.jsonl"
        for kind in ("understanding", "text_to_image", "editing")
    ]
    made = {model: root / model for model in MODELS}

    def task(name: str, model: str, *overrides: str) -> dict:
        return {
            "folder": str(made[model]),
            "stage": "sft",
            "name": name,
            "overrides": [*data, *MODELS[model], *overrides],
        }

    for folder in made.values():
        folder.mkdir()
    start_worker(1, [task(name, model) for model in made for name in ("init", "one_rank")])
    for ranks in sorted({layout.ranks for layout in LAYOUTS}):
        start_worker(
            ranks, [task(layout.name, layout.model, *layout.overrides) for layout in LAYOUTS if layout.ranks == ranks]
        )
    return made


def test_reference_has_every_kind(folders: dict[str, Path]) -> None:
    """The comparison means something: three kinds of sample, three loss terms above zero, gradients in every part."""
    for folder in folders.values():
        first = json.loads((folder / "one_rank.json").read_text())["steps"][0]
        assert first["kinds"] == ["editing", "text_to_image", "understanding"]
        assert min(first["losses"]) > 1e-4
        assert min(first["modules"]) > 1e-6
    with Reader(folders["deepstack"] / "one_rank") as gradients:
        for level in range(3):
            key = f"vision_encoder.deepstack_mergers.{level}.linear_fc2.weight"
            assert gradients.read(key).norm() > 1e-6, "every level reaches the loss"
    with Reader(folders["gates"] / "one_rank") as gradients:
        for layer in range(1, 4):
            router = f"backbone.decoder.layers.{layer}.mlp.router"
            assert gradients.read(f"{router}.weight").norm() > 1e-6
            assert gradients.read(f"{router}.image_weight").norm() > 1e-6
            assert not gradients.read(f"{router}.audio_weight").any(), "nothing is audio"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_one_rank(layout: Layout, folders: dict[str, Path]) -> None:
    """Losses and gradient norms of three steps, and every tensor's gradient of the first."""
    folder = folders[layout.model]
    expected, found = (json.loads((folder / f"{name}.json").read_text()) for name in ("one_rank", layout.name))
    worst_loss = compare_steps(found["steps"], expected["steps"])
    worst = worst_gradient_difference(folder / "one_rank", folder / layout.name)
    print(f"{layout.name:12} losses {worst_loss:.1e}  worst gradient {worst[0]:.1e} {worst[1]}")
    assert worst[0] < TOLERANCE, worst


def compare_steps(found: list[dict], expected: list[dict], names: Sequence[str] = ("losses", "modules")) -> float:
    """Every step's figures of these names and gradient norm are those of one rank; the largest relative difference of a
    loss."""
    worst = 0.0
    for number, (step, reference) in enumerate(zip(found, expected, strict=True)):
        gap = reference["router_gap"]
        assert gap is None or gap > ROUTER_GAP, f"step {number}: a token is {gap:.1e} from a tie between experts"
        for name in names:
            assert_close(step[name], reference[name], f"step {number}, {name}")
        assert_close(step["norm"], reference["norm"], f"step {number}, norm")
        pairs = zip(np.ravel(step["losses"]), np.ravel(reference["losses"]), strict=True)
        worst = max(worst, *(abs(a - b) / max(b, 1e-9) for a, b in pairs))
    return worst


def assert_close(found: float | list, wanted: float | list, where: str) -> None:
    def message(differences: str) -> str:
        return f"{where}: {found}, one rank: {wanted}\n{differences}"

    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=TOLERANCE, atol=1e-9, msg=message)


def worst_gradient_difference(reference: Path, other: Path) -> tuple[float, str]:
    """Largest ‖g − g'‖ / ‖g‖ over tensors; the bias of keys is left to an absolute bound, since its true gradient is
    zero."""
    worst = (0.0, "")
    with Reader(reference) as expected, Reader(other) as found:
        assert expected.tensors.keys() == found.tensors.keys()
        total = sum(expected.read(key).double().square().sum() for key in expected.tensors).sqrt()
        for key in expected.tensors:
            gradient, theirs = expected.read(key).double(), found.read(key).double()
            norm = max(gradient.norm().item(), 1e-6 * total.item())
            worst = max(worst, ((gradient - theirs).norm().item() / norm, key))
    return worst
