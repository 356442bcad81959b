"""MMCORE's answers to conversations of many pictures at every layout against one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoder import difference

# Behind this folder, which has modules of the same names.
CONVERT = Path(__file__).parents[1] / "convert"
sys.path.append(str(CONVERT))

from frame_worker import GIVEN, results  # noqa: E402
from tiny_mmcore import FLUX, make_run, picture  # noqa: E402

from megatron_unimm.data.sample import Turn  # noqa: E402
from megatron_unimm.errors import UserError  # noqa: E402
from megatron_unimm.generate.load import load_generator  # noqa: E402
from megatron_unimm.generate.query_generator import QueryGenerator  # noqa: E402
from megatron_unimm.generate.sampling import DecodeSettings  # noqa: E402

pytestmark = pytest.mark.slow
TOLERANCE = 2e-5
"""Measured 1.3e-6."""
RANKS = 4
"""Of all layouts, so that one start serves them; those of fewer ranks have replicas."""
MANY = f"stages.diffusion.method.max_frames={GIVEN + 1}"
MODELS = {
    "sd3": (),
    "flux": FLUX,
    "experts": ("model.backbone.moe={num_experts: 4, top_k: 2, expert_mlp_size: 48}",),
}
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "tp2": ("sd3", {"tensor": 2}),
    "pp2": ("sd3", {"pipeline": 2}),
    "cp2": ("sd3", {"context": 2}),
    "tp2_cp2": ("sd3", {"tensor": 2, "context": 2}),
    "flux_cp2": ("flux", {"context": 2}),
    "flux_pp2_cp2": ("flux", {"pipeline": 2, "context": 2}),
    "experts_tp2_cp2": ("experts", {"tensor": 2, "context": 2}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each model, and what every layout answered with them."""
    root = tmp_path_factory.mktemp("frames")
    for name, overrides in MODELS.items():
        make_run(root / name, MANY, *overrides)
    tasks = [{"name": name, "folder": str(root / model), "layout": layout} for name, (model, layout) in LAYOUTS.items()]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [sys.executable, *launcher, str(Path(__file__).with_name("frame_worker.py")), json.dumps(tasks)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CONVERT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.fixture(scope="module")
def one_rank(runs: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name in MODELS:
        with load_generator(runs / name / "run") as generator:
            assert isinstance(generator, QueryGenerator)
            found[name] = results(generator)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name: str, runs: Path, one_rank: dict[str, dict[str, Any]]) -> None:
    """On the first and on the last rank: latents, pictures, words."""
    model, _ = LAYOUTS[name]
    expected = one_rank[model]
    for suffix in ("", ".last"):
        found = torch.load(runs / model / f"{name}{suffix}.pt", weights_only=True)
        print(name, suffix, float((found["latents"] - expected["latents"]).abs().max()))
        torch.testing.assert_close(found["latents"], expected["latents"], rtol=TOLERANCE, atol=TOLERANCE)
        for one, other in zip(found["pictures"], expected["pictures"], strict=True):
            assert difference(one.numpy(), other.numpy()) <= 1
        assert found["ids"] == expected["ids"]


def test_every_picture_counts(runs: Path) -> None:
    """The comparison means something: what is drawn of many depends on the first and on the last of them."""
    with load_generator(runs / "sd3" / "run") as generator:
        torch.set_num_threads(1)
        settings = DecodeSettings(seed=5, sampler=generator.sampler)
        given = [picture(number) for number in range(GIVEN)]
        turns = [Turn("user", (*range(GIVEN), "All of them in one, please."))]
        first, last = [picture(20), *given[1:]], [*given[:-1], picture(20)]
        asked = [generator.prompt(turns, pictures, open_image=True) for pictures in (given, first, last)]
        one, *others = [answer.images[0].pixels for answer in generator.answer(asked, settings)]
        assert all(difference(one, other) > 1 for other in others)
        turns = [Turn("user", (*range(GIVEN + 1), "And this."))]
        asked = generator.prompt(turns, [*given, picture(20)], open_image=True)
        with pytest.raises(UserError, match=r"pictures: are 13, but the model tells 13 apart, .* give fewer"):
            generator.answer([asked], settings)
