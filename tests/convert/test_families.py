"""Every family against transformers: the same logits at every layout, and a round trip that loses nothing."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_unimm.convert import export_checkpoint, import_checkpoint, verify
from megatron_unimm.data.chat import image_positions

TOLERANCE = 2e-4
"""Largest absolute difference of logits of order 1, fp32. `pytest -s` prints what is measured (3.6e-5 at worst)."""
WORKER = Path(__file__).with_name("layout_worker.py")
IMAGE, START, END = 90, 91, 92
GRIDS = np.array([[1, 4, 6], [1, 10, 4], [1, 2, 2]])
MERGE = 2

TP2 = {"tensor": 2}
TP2_SP = {"tensor": 2, "sequence": True}
PP2 = {"pipeline": 2}
TP2_PP2 = {"tensor": 2, "pipeline": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp2_sp": (2, TP2_SP),
    "pp2": (2, PP2),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2_pp2": (4, TP2_PP2),
}
MOE_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, TP2_SP),
    "pp2": (2, PP2),
    "ep2": (2, {"expert": 2}),
    "etp2": (2, {**TP2_SP, "expert_tensor": 2}),
    "tp2_pp2": (4, {**TP2_SP, "pipeline": 2}),
    "ep2_tp2": (4, {**TP2_SP, "expert": 2}),
}


@dataclass(frozen=True)
class Case:
    """A tiny model of a family."""

    name: str
    model: type
    config: transformers.PreTrainedConfig
    layouts: dict[str, tuple[int, dict[str, Any]]]

    @property
    def is_moe(self) -> bool:
        return self.layouts is MOE_LAYOUTS


TOKENS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}
TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {"depth": 4, "hidden_size": 32, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 64}


def qwen2_5(*, tied: bool) -> Case:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**VISION, "fullatt_block_indexes": [1, 3]},
        tie_word_embeddings=tied,
        **TOKENS,
    )
    name = "qwen2_5_vl_tied" if tied else "qwen2_5_vl"
    return Case(name, transformers.Qwen2_5_VLForConditionalGeneration, config, LAYOUTS)


QWEN3_TEXT = {
    **TEXT,
    "head_dim": 24,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [6, 3, 3],
        "rope_theta": 5e6,
        "mrope_interleaved": True,
    },
}
# Three levels for four layers: with two stages one level travels, with four chunks two do.
QWEN3_VISION = {**VISION, "patch_size": 8, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1, 2]}


def qwen3(*, tied: bool) -> Case:
    config = transformers.Qwen3VLConfig(
        text_config=QWEN3_TEXT, vision_config=QWEN3_VISION, tie_word_embeddings=tied, **TOKENS
    )
    name = "qwen3_vl_tied" if tied else "qwen3_vl"
    return Case(name, transformers.Qwen3VLForConditionalGeneration, config, LAYOUTS)


def qwen3_moe() -> Case:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**QWEN3_TEXT, **moe}, vision_config=QWEN3_VISION, tie_word_embeddings=False, **TOKENS
    )
    return Case("qwen3_vl_moe", transformers.Qwen3VLMoeForConditionalGeneration, config, MOE_LAYOUTS)


CASES = [qwen2_5(tied=False), qwen2_5(tied=True), qwen3(tied=False), qwen3(tied=True), qwen3_moe()]


def random_model(case: Case) -> torch.nn.Module:
    """Weights of such a size that logits are of order 1 and no part is without influence."""
    torch.manual_seed(0)
    model = case.model(case.config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif "embed" not in name:
            parameter.data = torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5
        else:
            parameter.data = torch.randn_like(parameter) * 0.5
    if case.config.tie_word_embeddings:
        model.tie_weights()
    return model


def make_sample(patch: int) -> dict[str, np.ndarray]:
    """Text with three images of different sizes in it, every position with a label. ``patch``: its side in pixels."""
    rng = np.random.default_rng(0)
    ids, positions, visual = [], [], []
    place = start = 0

    def text(tokens: list[int]) -> None:
        nonlocal place, start
        ids.extend(tokens)
        positions.append(np.tile(np.arange(len(tokens)) + start, (3, 1)))
        place, start = place + len(tokens), start + len(tokens)

    for grid in GRIDS:
        text([*rng.integers(3, 80, 5).tolist(), START])
        seen = image_positions(start, grid, MERGE)
        ids.extend([IMAGE] * seen.shape[1])
        positions.append(seen)
        visual.append(place + np.arange(seen.shape[1]))
        place, start = place + seen.shape[1], int(seen.max()) + 1
        text([END, *rng.integers(3, 80, 4).tolist()])
    none = np.empty(0, dtype=np.int64)
    return {
        "input_ids": np.array(ids),
        "labels": np.zeros(len(ids), dtype=np.int64),
        "position_ids": np.concatenate(positions, axis=1),
        "patches": rng.standard_normal((GRIDS.prod(axis=1).sum(), 6 * patch**2)).astype(np.float32),
        "grids": GRIDS,
        "is_target": np.zeros(len(GRIDS), dtype=bool),
        "visual_index": np.concatenate(visual),
        "predict_index": none,
        "target_index": none,
    }


def reference_logits(model: torch.nn.Module, sample: dict[str, np.ndarray]) -> Tensor:
    """transformers' own, which works out the positions itself."""
    ids = torch.from_numpy(sample["input_ids"])[None]
    with torch.no_grad():
        return model(
            input_ids=ids,
            pixel_values=torch.from_numpy(sample["patches"]),
            image_grid_thw=torch.from_numpy(sample["grids"]),
            mm_token_type_ids=(ids == IMAGE).int(),
        ).logits[0]


def start_workers(tasks: list[tuple[int, dict[str, Any]]], worker: Path = WORKER) -> None:
    """Each task on as many ranks as it says; one start for all that agree."""
    for ranks in sorted({ranks for ranks, _ in tasks}):
        plan = json.dumps([task for wanted, task in tasks if wanted == ranks])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run([*command, str(worker), plan], capture_output=True, text=True, timeout=600, check=False)
        errors = [line for line in done.stderr.splitlines() if line.startswith("[rank") or "rror" in line]
        assert done.returncode == 0, "\n".join(errors[-30:])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAMILY/hf, FAMILY/reference.npy, and FAMILY/LAYOUT.npy; FAMILY/hf_bf16 and its checkpoint saved from 4 ranks."""
    root = tmp_path_factory.mktemp("families")
    tasks: list[tuple[int, dict[str, Any]]] = []
    for case in CASES:
        folder = root / case.name
        model, sample = random_model(case), make_sample(case.config.vision_config.patch_size)
        model.save_pretrained(folder / "hf")
        np.savez(folder / "sample.npz", **sample)
        np.save(folder / "reference.npy", reference_logits(model, sample).numpy())
        import_checkpoint(folder / "hf", folder / "checkpoint")
        length = -(-len(sample["input_ids"]) // 8) * 8
        for name, (ranks, parallel) in case.layouts.items():
            to = str(folder / f"{name}.npy")
            task = {"checkpoint": str(folder / "checkpoint"), "parallel": parallel, "to": to, "length": length}
            tasks.append((ranks, {**task, "row": str(folder / "sample.npz")}))
        model.to(torch.bfloat16).save_pretrained(folder / "hf_bf16")
        (folder / "hf_bf16" / "tokenizer.json").write_text('{"added_tokens": []}')
        import_checkpoint(folder / "hf_bf16", folder / "checkpoint_bf16")
        parallel = {"tensor": 2, "pipeline": 2, "sequence": case.is_moe, "expert": 2 if case.is_moe else 1}
        again = {"checkpoint": str(folder / "checkpoint_bf16"), "to": str(folder / "again"), "dtype": "bfloat16"}
        tasks.append((4, {**again, "parallel": parallel}))
    start_workers(tasks)
    return root


@pytest.mark.parametrize(
    ("case", "layout"),
    [(case, layout) for case in CASES for layout in case.layouts],
    ids=lambda x: getattr(x, "name", x),
)
def test_logits_are_those_of_transformers(case: Case, layout: str, results: Path) -> None:
    reference, found = (np.load(results / case.name / f"{name}.npy") for name in ("reference", layout))
    assert 0.5 < reference.std() < 5
    worst = float(np.abs(found - reference).max())
    print(f"{case.name:16} {layout:10} {worst:.1e}")
    assert worst <= TOLERANCE


def assert_same_folder(original: Path, other: Path) -> None:
    """Every file byte for byte, but for how tensors are spread over safetensors files."""
    ours, theirs = (
        {path.name: path.read_bytes() for path in folder.iterdir() if "safetensors" not in path.name}
        for folder in (original, other)
    )
    assert ours == theirs
    left, right = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (original, other)
    )
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_round_trip(case: Case, results: Path, tmp_path: Path) -> None:
    """Straight back, and after loading and saving at TP2 x PP2 (x EP2)."""
    folder = results / case.name
    for name in ("checkpoint_bf16", "again"):
        export_checkpoint(folder / name, tmp_path / name)
        assert_same_folder(folder / "hf_bf16", tmp_path / name)
    assert verify(folder / "checkpoint_bf16", folder / "again").identical
    loaded = case.model.from_pretrained(tmp_path / "again", dtype=torch.float32)
    expected = case.model.from_pretrained(folder / "hf_bf16", dtype=torch.float32)
    for (name, left), right in zip(loaded.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_experts_as_the_hub_stores_them(results: Path, tmp_path: Path) -> None:
    """Input first: the same checkpoint, and it goes back as it came."""
    folder = results / "qwen3_vl_moe"
    hub = tmp_path / "hub"
    hub.mkdir()
    for path in (folder / "hf").iterdir():
        (hub / path.name).write_bytes(path.read_bytes())
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in load_file(hub / "model.safetensors").items()
    }
    save_file(tensors, hub / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(hub, tmp_path / "checkpoint")
    assert verify(tmp_path / "checkpoint", folder / "checkpoint").identical
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_folder(hub, tmp_path / "back")
    assert verify(hub, folder / "hf").identical


# ---------------------------------------------------------------------------------------------- SigLIP


SIGLIP_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
SIGLIP_TEXT = {**SIGLIP_VISION, "vocab_size": 50, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}
SIGLIP_SIZES = {"siglip": [(40, 40), (24, 56)], "siglip2": [(40, 40), (24, 56), (16, 16)]}
"""Of images in pixels; patches of 8, learned positions for 5 by 5."""


def siglip_model(kind: str, *, whole: bool) -> torch.nn.Module:
    torch.manual_seed(1)
    size = {"image_size": 40} if kind == "siglip" else {"num_patches": 25}
    vision = {**SIGLIP_VISION, "patch_size": 8, **size}
    t = transformers
    classes: tuple[Any, Any, Any] = (t.SiglipConfig, t.SiglipModel, t.SiglipVisionModel)
    if kind == "siglip2":
        classes = (t.Siglip2Config, t.Siglip2Model, t.Siglip2VisionModel)
    config = classes[0](text_config=SIGLIP_TEXT, vision_config=vision)
    model = classes[1](config) if whole else classes[2](config.vision_config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def siglip_images(kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=generator) for size in SIGLIP_SIZES[kind]]


def siglip_reference(kind: str, tower: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        if kind == "siglip":
            output = tower(image[None], interpolate_pos_encoding=True)
        else:
            rows, columns = image.shape[1] // 8, image.shape[2] // 8
            patches = image.reshape(3, rows, 8, columns, 8).permute(1, 3, 2, 4, 0).reshape(1, rows * columns, -1)
            output = tower(patches, torch.ones(1, rows * columns), torch.tensor([[rows, columns]]))
    return output.last_hidden_state[0], output.pooler_output[0]


@pytest.fixture(scope="module")
def siglip_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND/hf, KIND/checkpoint and KIND/RANKS.npz."""
    root = tmp_path_factory.mktemp("siglip")
    tasks: list[tuple[int, dict[str, Any]]] = []
    for kind in SIGLIP_SIZES:
        folder = root / kind
        siglip_model(kind, whole=True).save_pretrained(folder / "hf")
        import_checkpoint(folder / "hf", folder / "checkpoint")
        np.savez(folder / "images.npz", *[image.numpy() for image in siglip_images(kind)])
        for ranks in (1, 2):
            task = {"checkpoint": str(folder / "checkpoint"), "images": str(folder / "images.npz")}
            tasks.append((ranks, {**task, "parallel": {"tensor": ranks}, "to": str(folder / f"{ranks}.npz")}))
    start_workers(tasks)
    return root


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", SIGLIP_SIZES)
def test_siglip_features_are_those_of_transformers(kind: str, ranks: int, siglip_results: Path) -> None:
    tower = siglip_model(kind, whole=True).vision_model
    expected = [siglip_reference(kind, tower, image) for image in siglip_images(kind)]
    found = np.load(siglip_results / kind / f"{ranks}.npz")
    features, pooled = torch.cat([each for each, _ in expected]).numpy(), torch.stack([each for _, each in expected])
    worst = float(np.abs(found["features"] - features).max()), float(np.abs(found["pooled"] - pooled.numpy()).max())
    print(f"{kind:8} {ranks} ranks: features {worst[0]:.1e}, pooled {worst[1]:.1e}")
    assert features.std() > 0.5
    assert max(worst) <= TOLERANCE


@pytest.mark.parametrize("whole", [True, False], ids=["with text tower", "vision tower alone"])
@pytest.mark.parametrize("kind", SIGLIP_SIZES)
def test_siglip_round_trip(kind: str, whole: bool, tmp_path: Path) -> None:
    siglip_model(kind, whole=whole).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_folder(tmp_path / "hf", tmp_path / "back")
