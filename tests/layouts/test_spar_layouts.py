"""SPAR's joint training at every layout against one rank: same checkpoint, same data, same noise, fp32. On one rank:
what its losses are, who learns, and that latents and conditions computed beforehand train alike."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import worker
from test_parallel_layouts import OVERLAP, SP, TOLERANCE, Layout, start_worker, worst_gradient_difference

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow
from megatron_unimm.data.shapes import write_shapes
from megatron_unimm.methods.interface import Method
from megatron_unimm.methods.spar.diffusion.model import SparBatch, SparModel
from megatron_unimm.models.tokenizer.codec import TokenizerCodec
from megatron_unimm.models.tokenizer.grid import CellGrids
from megatron_unimm.models.tokenizer.pixels import patches_of_pixels
from megatron_unimm.models.vae import decode, encode
from megatron_unimm.models.vision import VisionInput
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.feature_cache import make_cache
from megatron_unimm.train.state import Start

TP2, PP2, CP2 = (f"system.parallel.{axis}=2" for axis in ("tensor", "pipeline", "context"))
VPP2 = "system.parallel.virtual_pipeline=2"
FULL_RECOMPUTE = "system.recompute={granularity: full, num_layers: 1}"
FIXED = "train.trainable=[{pattern: 'vlm.*', train: false}, {pattern: 'vae.*', train: false}, {pattern: '*'}]"


def aligned(layer: int, teacher: str = "internal") -> str:
    return f"stages.joint.method.alignment={{layer: {layer}, projector_size: 20, teacher: {teacher}}}"


MODELS = {
    "internal": (aligned(2), "stages.joint.routing={top_k: 2}"),
    "late": (aligned(4),),
    "external": (aligned(3, "external"),),
    "fixed": (aligned(2), FIXED),
    "none": ("stages.joint.method.alignment=null", "stages.joint.routing={mode: static}"),
}
"""The layer that is aligned is on the first stage of a pipeline or on the last."""
CACHED = tuple(f"stages.joint.data.{name}_cache=FOLDER/cache/{name}s" for name in ("condition", "latent"))
LAYOUTS = [
    Layout("tp2_sp", 2, (TP2, SP), "internal"),
    Layout("pp2_vpp2", 2, (PP2, VPP2, FULL_RECOMPUTE), "internal"),
    Layout("cp2", 2, (CP2,), "internal"),
    Layout("dp2_overlap", 2, (OVERLAP,), "internal"),
    Layout("pp2", 2, (PP2,), "late"),
    Layout("pp2", 2, (PP2,), "external"),
    Layout("tp2", 2, (TP2,), "external"),
    Layout("pp2", 2, (PP2,), "none"),
    Layout("cached", 1, CACHED, "fixed"),
    Layout("pp2_cached", 2, (PP2, *CACHED), "fixed"),
]


def task_of(root: Path, name: str, model: str, *overrides: str) -> dict:
    """For the worker."""
    kinds = ("text_to_image", "editing")
    read = [f"data.sources.{kind}.path={root}/data/train/{kind}.jsonl" for kind in kinds]
    settings = [*read, "stages.joint.after=null", "train.seed=7", *MODELS[model], *overrides]
    settings = [each.replace("FOLDER", str(root / model)) for each in settings]
    return {"folder": str(root / model), "recipe": "spar", "stage": "joint", "name": name, "overrides": settings}


def stage_of(task: dict) -> StageConfig:
    return worker.stage_config(Path(task["folder"]), task["recipe"], task["stage"], task["overrides"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL/one_rank and MODEL/LAYOUT of every layout, and the data."""
    root = tmp_path_factory.mktemp("spar_joint_layouts")
    write_shapes(root / "data", count=120, seed=3)
    for model in MODELS:
        (root / model).mkdir()
    start_worker(1, [task_of(root, name, model) for model in MODELS for name in ("init", "one_rank")])
    make_cache(stage_of(task_of(root, "cache", "fixed")), root / "fixed/cache", run_dir=root / "fixed")
    for ranks in (1, 2):
        chosen = [layout for layout in LAYOUTS if layout.ranks == ranks]
        start_worker(ranks, [task_of(root, layout.name, layout.model, *layout.overrides) for layout in chosen])
    return root


def result(root: Path, layout: Layout) -> dict:
    return json.loads((root / layout.model / f"{layout.name}.json").read_text())


@pytest.mark.parametrize("model", MODELS)
def test_reference_has_everything(model: str, root: Path) -> None:
    """Losses above zero, and gradients in every part that trains and in no other."""
    found = result(root, Layout("one_rank", 1, (), model))
    first = found["steps"][0]
    assert first["kinds"] == ["editing", "text_to_image"]
    assert first["losses"][0] > 0.1
    assert model == "none" or first["losses"][-1] > 0.1  # the alignment
    norms = dict(zip(found["modules"], first["modules"], strict=True))
    parts = {"mmdit", "pathways", "frame_embedding", "vlm", "alignment_projector"}
    parts -= {"fixed": {"vlm"}, "none": {"alignment_projector"}}.get(model, set())
    assert {name.split(".")[0] for name, norm in norms.items() if norm > 1e-6} == parts


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.model}-{layout.name}")
def test_layout_equals_one_rank(layout: Layout, root: Path) -> None:
    """Losses and gradient norms of three steps, and every tensor's gradient of the first."""
    steps = zip(result(root, replace(layout, name="one_rank"))["steps"], result(root, layout)["steps"], strict=True)
    for number, (reference, step) in enumerate(steps):
        for name in ("losses", "modules"):
            found, wanted = torch.tensor(step[name]), torch.tensor(reference[name])
            torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=1e-9, msg=f"step {number}, {name}")
        assert step["norm"] == pytest.approx(reference["norm"], rel=TOLERANCE), f"step {number}"
    worst = worst_gradient_difference(root / layout.model / "one_rank", root / layout.model / layout.name)
    print(f"{layout.model:10} {layout.name:14} worst gradient {worst[0]:.1e} {worst[1]}")
    assert worst[0] < TOLERANCE, worst


# -- on one rank


class Case(NamedTuple):
    """A model and a row of its data."""

    method: Method
    model: SparModel
    row: FrameRow

    def batch(self) -> SparBatch:
        return self.method.batch(self.row, self.model, torch.device("cpu"))


@pytest.fixture(params=["internal", "external"])
def case(request: pytest.FixtureRequest, root: Path) -> Iterator[Case]:
    stage = stage_of(task_of(root, "", request.param))
    platform, groups = setup.enter(stage)
    method, chunks = setup.build_model(stage, platform, groups)
    start = Start(root / request.param / "start", resume=False)
    setup.fill(chunks, stage, method, start, groups)
    loader, _ = setup.open_data(stage, method, start, platform, groups)
    row = next(loader).rows[0]
    loader.close()
    assert isinstance(chunks[0], SparModel)
    yield Case(method, chunks[0], row)
    destroy_groups()


def test_self_alignment_is_the_cosine_to_the_teacher(case: Case) -> None:
    """1 − cos between what the projector makes of the hidden states after the layer and what the teacher has of each
    picture by itself, at the drawn picture's own tokens; nothing of it reaches the teacher."""
    model, batch = case.model, case.batch()
    told: list[torch.Tensor] = []
    hook = model.alignment_projector.register_forward_hook(lambda module, given, made: told.append(made))
    loss = model(batch)[-1]
    hook.remove()
    teacher = model.stage.method.alignment.teacher
    encoder, targets = model.stage.model.vision_encoder, case.row
    wanted = []
    cursor = 0
    for grid in targets.target_grids:
        count = int(grid.prod())
        patches = targets.target_patches[cursor : cursor + count]
        cursor += count
        images = VisionInput.build(patches, grid[None], encoder, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            seen = model.vlm.vision_encoder(images) if teacher == "external" else None
            if teacher == "internal":
                cells = CellGrids.build(grid[None, 1:] // encoder.spatial_merge_size, 1, torch.device("cpu"))
                codec = model.vae
                seen = codec.tokenizer.semantic(codec.vision_encoder(images)[:, : encoder.out_size], cells)
        wanted.append(seen[:, : encoder.out_size])
    frames = targets.frames
    drawn = [number for number, clean in enumerate(frames.is_clean) if not clean and targets.learned[number]]
    expected = torch.cat([wanted[targets.target_of_frame[number]] for number in drawn])
    (found,) = told
    assert found.shape == expected.shape
    reference = sum(1 - torch.dot(f, w) / (f.norm() * w.norm()) for f, w in zip(found, expected, strict=True))
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert not any(p.grad is not None for part in (model.vae, model.base) for p in part.parameters())
    assert model.alignment_projector[0].weight.grad.abs().sum() > 0


def test_latents_are_the_tokenizers_normalised(case: Case) -> None:
    """Of mean 0 and variance 1 by its statistics; the way back is its decoder."""
    codec = case.model.vae
    assert isinstance(codec, TokenizerCodec)
    generator = torch.Generator().manual_seed(0)
    statistics = codec.tokenizer.statistics
    statistics.mean.copy_(torch.randn(8, generator=generator))
    statistics.variance.copy_(torch.rand(8, generator=generator) + 0.5)
    pictures = torch.rand(2, 3, 32, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        latents = encode(codec, pictures)
        again = decode(codec, latents)
        alone = encode(codec, pictures[1:])
    assert latents.shape == (2, 8, 2, 4)
    assert again.shape == pictures.shape
    torch.testing.assert_close(latents[1:], alone)
    # Cells of one picture, by hand: row 0, column 1 is what the tokenizer makes of pixels 16 to 31.
    cells = pictures[0].unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(8, -1)
    grid = CellGrids.build(torch.tensor([[2, 4]]).numpy(), 1, torch.device("cpu"))
    images = VisionInput.of(patches_of_pixels(cells, codec.encoder), torch.tensor([[1, 4, 8]]).numpy(), codec.encoder)
    with torch.no_grad():
        features, taps = codec.vision_encoder.tapped(images, codec.taps)
        raw = codec.tokenizer.encode(features[:, : codec.encoder.out_size], taps, cells, grid).latents
        pixels = codec.tokenizer.decode(raw, grid)
    normalised = (raw - statistics.mean) / (statistics.variance + 1e-6).sqrt()
    torch.testing.assert_close(latents[0].flatten(1).T, normalised, rtol=1e-5, atol=1e-5)
    drawn = again[0].unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(8, -1)
    torch.testing.assert_close(drawn, pixels, rtol=1e-4, atol=1e-4)
    assert F.mse_loss(drawn, cells) > 0
