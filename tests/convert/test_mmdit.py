"""SD3, SD3.5 and FLUX.1 against diffusers: the same velocities and gradients at every layout, and a round trip that
loses nothing."""

import json
import math
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from mmdit_worker import build_chunks
from rich.console import Console
from safetensors.torch import load_file
from test_families import assert_same_folder, start_workers
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_unimm.checkpoint.manifest import read_manifest, read_meta
from megatron_unimm.checkpoint.store import save
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.mmdit import ImageGeneratorConfig, VaeConfig
from megatron_unimm.config.parallel import ParallelConfig, SystemConfig
from megatron_unimm.convert import autoencoder_kl, export, export_checkpoint, import_checkpoint, inspect_path, verify
from megatron_unimm.convert.families import family_named, family_of
from megatron_unimm.convert.flux import FLUX
from megatron_unimm.convert.table import Row, expand
from megatron_unimm.errors import CheckpointError, ConfigError
from megatron_unimm.models.mmdit.embedding import sincos_table
from megatron_unimm.models.mmdit.positions import flux_positions, table_index
from megatron_unimm.parallel.groups import destroy_groups, initialize_groups
from megatron_unimm.parallel.platform import select_platform
from megatron_unimm.train.state import sharding_metadata

TOLERANCE = 1e-4
"""Largest absolute difference of velocities of order 1, fp32. `pytest -s` prints what is measured (3.4e-6 at worst)."""
GRADIENT_TOLERANCE = 1e-4
"""Largest difference in a gradient, over its largest number (measured 2.7e-6)."""
WORKER = Path(__file__).with_name("mmdit_worker.py")
TP2_SP = {"tensor": 2, "sequence": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, TP2_SP),
    "pp2": (2, {"pipeline": 2}),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2": (2, {"context": 2}),
    "tp2_pp2": (4, {**TP2_SP, "pipeline": 2}),
    "cp2_tp2": (4, {**TP2_SP, "context": 2}),
}
SAVED_AT = {
    "again": {**TP2_SP, "pipeline": 2},
    "again_vpp2": {**TP2_SP, "pipeline": 2, "virtual_pipeline": 2},
}
GRIDS = np.array([[4, 6], [2, 3], [5, 5]])
"""Rows and columns of patches of each picture."""
LENGTHS = np.array([5, 3, 8])
"""Text tokens of each picture."""


@dataclass(frozen=True)
class Case:
    """A tiny transformer of a family."""

    name: str
    model: type[torch.nn.Module]
    config: dict[str, Any]

    @property
    def is_flux(self) -> bool:
        return self.model is diffusers.FluxTransformer2DModel


def sd3(name: str, **config: Any) -> Case:
    common = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 11,
    }
    return Case(name, diffusers.SD3Transformer2DModel, common | config)


def flux(name: str, **config: Any) -> Case:
    common = {
        "in_channels": 16,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": [4, 6, 6],
    }
    return Case(name, diffusers.FluxTransformer2DModel, common | config)


CASES = [
    sd3("sd3"),
    sd3("sd3_5_medium", qk_norm="rms_norm", dual_attention_layers=[0, 1]),
    sd3("sd3_5_large", qk_norm="rms_norm"),
    flux("flux_dev", num_layers=2, num_single_layers=2, guidance_embeds=True),
    # A pipeline stage with blocks of both kinds.
    flux("flux_schnell", num_layers=1, num_single_layers=3, guidance_embeds=False),
]


def random_model(case: Case) -> Any:
    return random_weights(case.model, case.config)


def random_weights(kind: Any, config: dict[str, Any]) -> Any:
    """Of such a size that velocities are of order 1 and no part is without influence."""
    torch.manual_seed(0)
    model = kind(**config).eval()
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data += 0.3 * torch.randn_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) / prod(parameter.shape[1:]) ** 0.5
    return model


def random_vae() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_row(case: Case) -> dict[str, np.ndarray]:
    """Pictures of different sizes, their patches one behind the other."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "grids": GRIDS,
        "lengths": LENGTHS,
        "condition": normal(LENGTHS.sum(), 24),
        "patches": normal(GRIDS.prod(axis=1).sum(), 16),
        "pooled": normal(len(GRIDS), 20),
        "timestep": rng.random(len(GRIDS), dtype=np.float32),
        "guidance": (1 + 4 * rng.random(len(GRIDS))).astype(np.float32),
    }


def reference_velocity(case: Case, model: Any, row: dict[str, Tensor]) -> Tensor:
    """diffusers' own, one picture at a time: ``[image tokens, patch]``."""
    areas = GRIDS.prod(axis=1).tolist()
    outputs = []
    for number, (condition, patches) in enumerate(
        zip(row["condition"].split(LENGTHS.tolist()), row["patches"].split(areas), strict=True)
    ):
        one = slice(number, number + 1)
        rows, columns = GRIDS[number]
        shared = {"encoder_hidden_states": condition[None], "pooled_projections": row["pooled"][one]}
        if case.is_flux:
            ids = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
            image_ids = torch.cat([torch.zeros(rows * columns, 1), ids.reshape(-1, 2)], dim=1)
            output = model(
                hidden_states=patches[None],
                timestep=row["timestep"][one],
                img_ids=image_ids,
                txt_ids=torch.zeros(len(condition), 3),
                guidance=row["guidance"][one] if case.config["guidance_embeds"] else None,
                **shared,
            ).sample[0]
        else:
            cut = patches.reshape(rows, columns, 4, 2, 2)
            latents = cut.permute(2, 0, 3, 1, 4).reshape(1, 4, 2 * rows, 2 * columns)
            sample = model(hidden_states=latents, timestep=1000 * row["timestep"][one], **shared).sample
            output = sample.reshape(4, rows, 2, columns, 2).permute(1, 3, 0, 2, 4).reshape(rows * columns, 16)
        outputs.append(output)
    return torch.cat(outputs)


def reference_gradients(case: Case, model: Any, row: dict[str, np.ndarray], weights: Tensor) -> dict[str, Tensor]:
    tensors = {name: torch.from_numpy(value) for name, value in row.items()}
    inputs = {name: tensors[name].requires_grad_() for name in ("condition", "patches", "pooled")}
    (reference_velocity(case, model, tensors | inputs) * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {name: tensor.grad for name, tensor in inputs.items()}


# ---------------------------------------------------------------------------------------------- folders


def pipeline_class(family: str) -> tuple[Any, dict[str, None]]:
    """The pipeline, and the parts that it is made without."""
    numbers = ["", "_2"] if family == "flux" else ["", "_2", "_3"]
    absent = {part + number: None for part in ("tokenizer", "text_encoder") for number in numbers}
    return diffusers.FluxPipeline if family == "flux" else diffusers.StableDiffusion3Pipeline, absent


def save_pipeline(case: Case, transformer: Any, vae: Any, folder: Path) -> None:
    """A pipeline's folder as diffusers writes it, with a tokenizer and a text encoder in it."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5)
    pipeline, absent = pipeline_class("flux" if case.is_flux else "sd3")
    save_with_text_encoder(pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **absent), folder)


def save_with_text_encoder(pipeline: Any, folder: Path) -> None:
    """As if it had one, and a tokenizer."""
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "text_encoder": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text('{"model_type": "clip_text_model"}')


def assert_same_pipeline(original: Path, other: Path) -> None:
    folders = ("", "transformer", "vae", "scheduler", "tokenizer", "text_encoder")
    assert {path.name for path in other.iterdir()} == {path.name for path in original.iterdir()}
    for name in folders[1:]:
        assert_same_folder(original / name, other / name)
    assert (original / "model_index.json").read_bytes() == (other / "model_index.json").read_bytes()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CASE/hf (a transformer alone, fp32), CASE/reference.npy, CASE/LAYOUT.npy and CASE/gradients.npz; CASE/pipeline
    (bf16) and its checkpoint, also saved from 4 ranks."""
    root = tmp_path_factory.mktemp("mmdit")
    tasks: list[tuple[int, dict[str, Any]]] = []
    for case in CASES:
        folder = root / case.name
        model, row = random_model(case), make_row(case)
        model.save_pretrained(folder / "hf")
        np.savez(folder / "row.npz", **row)
        with torch.no_grad():
            tensors = {name: torch.from_numpy(value) for name, value in row.items()}
            np.save(folder / "reference.npy", reference_velocity(case, model, tensors).numpy())
        np.save(folder / "weights.npy", gradient_weights().numpy())
        import_checkpoint(folder / "hf", folder / "checkpoint")
        task = {"checkpoint": str(folder / "checkpoint"), "row": str(folder / "row.npz")}
        for layout, (ranks, parallel) in LAYOUTS.items():
            tasks.append((ranks, {**task, "parallel": parallel, "to": str(folder / f"{layout}.npy")}))
        whole = {"parallel": {}, "weights": str(folder / "weights.npy"), "to": str(folder / "gradients.npz")}
        tasks.append((1, task | whole))
        save_pipeline(case, model.to(torch.bfloat16), random_vae().to(torch.bfloat16), folder / "pipeline")
        import_checkpoint(folder / "pipeline", folder / "checkpoint_bf16")
        for name, parallel in SAVED_AT.items():
            saved = {"checkpoint": str(folder / "checkpoint_bf16"), "dtype": "bfloat16", "to": str(folder / name)}
            tasks.append((4, {**saved, "parallel": parallel}))
    start_workers(tasks, WORKER)
    return root


def gradient_weights() -> Tensor:
    return torch.randn(int(GRIDS.prod(axis=1).sum()), 16, generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_velocities_are_those_of_diffusers(case: Case, layout: str, results: Path) -> None:
    reference, found = (np.load(results / case.name / f"{name}.npy") for name in ("reference", layout))
    assert 0.3 < reference.std() < 5
    assert found.shape == reference.shape
    worst = float(np.abs(found - reference).max())
    print(f"{case.name:13} {layout:9} {worst:.1e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_those_of_diffusers(case: Case, results: Path) -> None:
    """Of every weight, brought to the hub's layout by the table, and of the inputs."""
    folder = results / case.name
    expected = reference_gradients(case, random_model(case), make_row(case), gradient_weights())
    family = family_of(config := json.loads((folder / "hf" / "config.json").read_text()), case.name)
    found: dict[str, Any] = {}
    with np.load(folder / "gradients.npz") as arrays:
        for mapping in family.mappings(family.to_config(config, {}), "hub"):
            if mapping.megatron in arrays:
                parts = mapping.transform.inverse(torch.from_numpy(arrays[mapping.megatron]))
                found |= {name: part.numpy() for name, part in zip(mapping.names, parts, strict=True)}
        for name in ("condition", "patches", "pooled"):
            found[name], padding = np.split(arrays[name], [len(expected[name])])
            assert len(padding)
            assert not padding.any(), f"padding of {name} has an influence"
    assert found.keys() == expected.keys()
    assert all(found[name].shape == expected[name].shape for name in expected)
    differences = {name: np.abs(found[name] - expected[name].numpy()).max() for name in expected}
    worst, name = max((float(differences[name] / expected[name].abs().max()), name) for name in expected)
    print(f"{case.name:13} {len(expected)} gradients, worst {worst:.1e} ({name})")
    assert worst <= GRADIENT_TOLERANCE


def test_positions() -> None:
    """SD3's table and the part of it that a picture takes, as diffusers makes them; FLUX's by hand."""
    patches = diffusers.models.embeddings.PatchEmbed(
        height=16, width=16, patch_size=2, in_channels=4, embed_dim=24, pos_embed_max_size=13
    )
    table = sincos_table(24, grid=13, base_grid=8)
    torch.testing.assert_close(table, patches.pos_embed[0], rtol=0, atol=1e-6)
    for rows, columns in [(1, 1), (4, 7), (13, 6), (5, 13)]:
        index = torch.from_numpy(table_index(rows, columns, 13))
        assert torch.equal(patches.pos_embed[0][index], patches.cropped_pos_embed(2 * rows, 2 * columns)[0])
    with pytest.raises(ConfigError, match="is 13 patches per side, but a picture has 2 x 14"):
        table_index(2, 14, 13)
    assert flux_positions(2, 3, picture=1).tolist() == [[1] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_round_trip(case: Case, results: Path, tmp_path: Path) -> None:
    """Straight back, and after loading and saving at TP2 x PP2 (x VPP2)."""
    folder = results / case.name
    export_checkpoint(folder / "checkpoint", tmp_path / "alone")
    assert_same_folder(folder / "hf", tmp_path / "alone")
    for name in ("checkpoint_bf16", *SAVED_AT):
        export_checkpoint(folder / name, tmp_path / name)
        assert_same_pipeline(folder / "pipeline", tmp_path / name)
        assert verify(folder / "checkpoint_bf16", folder / name).identical
    assert verify(folder / "pipeline", tmp_path / "again").identical
    meta = read_meta(folder / "checkpoint")
    assert (meta["kind"], meta["family"]) == ("base_model", "flux" if case.is_flux else "sd3")
    assert meta["architecture"]["vae"] is None
    for part in ("transformer", "vae"):
        model = case.model if part == "transformer" else diffusers.AutoencoderKL
        loaded, expected = (
            model.from_pretrained(path / part).state_dict() for path in (tmp_path / "again", folder / "pipeline")
        )
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny pipelines as diffusers saves them."""
    root = tmp_path_factory.mktemp("pipelines")
    for case in (CASES[1], CASES[3]):
        save_pipeline(case, random_model(case), random_vae(), root / case.name)
    return {"sd3": root / "sd3_5_medium", "flux": root / "flux_dev"}


@pytest.fixture
def hf(pipelines: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the SD3 pipeline that a test may spoil."""
    return Path(shutil.copytree(pipelines["sd3"], tmp_path / "hf"))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def import_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(folder, folder.parent / "refused")
    assert not (folder.parent / "refused").exists()
    return str(caught.value)


def test_only_small_files_of_the_pipeline_are_carried(hf: Path, tmp_path: Path) -> None:
    """No weights that are not built, no code, and nothing from outside the folder."""
    import_checkpoint(hf, tmp_path / "plain")
    (hf / "text_encoder" / "model.safetensors").write_bytes(b"weights")
    (hf / "text_encoder" / "model.safetensors.index.json").write_text("{}")
    (hf / "tokenizer" / "tokenization_odd.py").write_text("raise SystemExit")
    (hf / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another precision")
    (hf / "notes").mkdir()
    (hf / "notes" / "config.json").write_text("{}")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text('{"secret": 1}')
    change_json(hf / "model_index.json", **{"../outside": ["a", "b"], "..": ["a", "b"], "/tmp": ["a", "b"]})
    import_checkpoint(hf, tmp_path / "checkpoint")
    files, plain = (
        {path.relative_to(folder / "hf").as_posix() for path in (folder / "hf").rglob("*") if path.is_file()}
        for folder in (tmp_path / "checkpoint", tmp_path / "plain")
    )
    assert (
        files
        == plain
        == {
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "tokenizer/merges.txt",
            "tokenizer/vocab.json",
            "transformer/config.json",
            "vae/config.json",
        }
    )
    assert {
        name.removeprefix("hf/") for name in read_manifest(tmp_path / "checkpoint").files if name[:3] == "hf/"
    } == files


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_pipeline_loads_without_text_encoders(
    family: str, pipelines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imported or never imported, in one file or several."""
    import_checkpoint(pipelines[family], tmp_path / "checkpoint")
    with Reader(tmp_path / "checkpoint") as reader:
        state = {key: ShardedTensor.from_rank_offsets(key, reader.read(key)) for key in reader.tensors}
    save(state, tmp_path / "ours", read_meta(tmp_path / "checkpoint")).wait()  # without files of diffusers
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 40_000)
    pipeline, absent = pipeline_class(family)
    expected = pipeline.from_pretrained(pipelines[family], **absent)
    for name in ("checkpoint", "ours"):
        folder = tmp_path / f"{name}_exported"
        export_checkpoint(tmp_path / name, folder)
        index = json.loads((folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
        count = len(set(index["weight_map"].values()))
        assert count > 3
        assert set(index["weight_map"].values()) == {
            f"diffusion_pytorch_model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
        }
        assert verify(pipelines[family], folder).identical
        loaded = pipeline.from_pretrained(folder, **absent)
        for part in ("transformer", "vae"):
            ours, theirs = loaded.components[part].state_dict(), expected.components[part].state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            assert {k: v for k, v in loaded.components[part].config.items() if k[0] != "_"} == {
                k: v for k, v in expected.components[part].config.items() if k[0] != "_"
            }
        assert isinstance(loaded.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)


def test_training_checkpoint_with_connector_and_optimizer(pipelines: dict[str, Path], tmp_path: Path) -> None:
    import_checkpoint(pipelines["sd3"], tmp_path / "base")
    with Reader(tmp_path / "base") as base:
        state = {key: ShardedTensor.from_rank_offsets(key, base.read(key)) for key in base.tensors}
    connector = {"linear.weight": torch.randn(4, 3)}
    extra = {f"connector.{name}": tensor for name, tensor in connector.items()}
    extra["optimizer.ema.mmdit.final_linear.bias"] = torch.randn(16)
    state |= {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in extra.items()}
    meta = {**read_meta(tmp_path / "base"), "connector": {"num_layers": 2}, "step": 5}
    save(state, tmp_path / "trained", meta, hf_files=tmp_path / "base" / "hf").wait()
    export_checkpoint(tmp_path / "trained", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "connector" / "config.json").read_text()) == {"num_layers": 2}
    assert torch.equal(
        load_file(tmp_path / "exported" / "connector" / "model.safetensors")["linear.weight"],
        connector["linear.weight"],
    )
    shutil.copytree(tmp_path / "exported", tmp_path / "without", ignore=shutil.ignore_patterns("connector"))
    assert_same_pipeline(pipelines["sd3"], tmp_path / "without")
    import_checkpoint(tmp_path / "exported", tmp_path / "again")
    assert read_meta(tmp_path / "again")["connector"] == {"num_layers": 2}
    assert verify(tmp_path / "again", tmp_path / "trained").identical


def test_inspect(pipelines: dict[str, Path], tmp_path: Path) -> None:
    import_checkpoint(pipelines["sd3"], tmp_path / "c")
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(inspect_path(pipelines["sd3"]))
        console.print(inspect_path(tmp_path / "c"))
    text = capture.get()
    assert "SD3Transformer2DModel" in text
    assert "transformer/transformer_blocks.{0..3}.attn.to_q.weight" in text
    assert "vae/decoder.conv_in.weight" in text
    assert "mmdit.blocks.layers.{0..3}.image.attention.linear_qkv.weight" in text
    assert "family: sd3" in text
    with pytest.raises(CheckpointError, match="is a Hugging Face folder; import it first"):
        export_checkpoint(pipelines["sd3"], tmp_path / "refused")


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"qk_norm": "layer_norm"}, "transformer/config.json: qk_norm is 'layer_norm'; only 'rms_norm'"),
        ("transformer", {"out_channels": 8}, "out_channels is 8; only 4 is built"),
        ("transformer", {"caption_projection_dim": 64}, "caption_projection_dim is 64; only 32 is built"),
        ("transformer", {"new_thing": True}, "new_thing is True; this field is unknown"),
        ("transformer", {"quantization_config": {}}, "is of a quantized model"),
        ("transformer", {"dual_attention_layers": [9]}, "do not lie in 0..3"),
        ("transformer", {"_class_name": "DiTTransformer2DModel"}, "['DiTTransformer2DModel'] cannot be converted"),
        ("vae", {"act_fn": "relu"}, "vae/config.json: act_fn is 'relu'; only 'silu' is built"),
        ("vae", {"latents_mean": [0.0]}, "latents_mean is [0.0]; only None is built"),
        ("vae", {"use_quant_conv": True}, "use_quant_conv is True, use_post_quant_conv is False"),
        ("vae", {"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types is"),
        ("vae", {"_class_name": "AutoencoderDC"}, "_class_name is 'AutoencoderDC'; only 'AutoencoderKL'"),
        ("vae", {"latent_channels": 8}, "mmdit.latent_channels 4 differs from vae.latent_channels 8"),
        ("vae", {"norm_num_groups": 3}, "no multiples of norm_groups 3"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_built(part: str, change: dict[str, Any], message: str, hf: Path) -> None:
    change_json(hf / part / "config.json", **change)
    assert message in import_error(hf)


def test_flux_configs_that_cannot_be_built(pipelines: dict[str, Path]) -> None:
    config = json.loads((pipelines["flux"] / "transformer" / "config.json").read_text())
    for change, message in {
        ("patch_size", 2): "patch_size is 2; only 1 is built",
        ("out_channels", 4): "out_channels is 4; only 16 is built",
        ("in_channels", 6): "in_channels is 6; only packed latents",
        ("axes_dims_rope", (4, 4, 4)): r"rotary_axes \[4, 4, 4\] sum to 12, head_size is 16",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            FLUX.to_config({**config, change[0]: change[1]}, {})
    model = FLUX.to_config(config, {})
    model.mmdit.patch_size = 1
    with pytest.raises(CheckpointError, match="patch_size is 1, but FluxTransformer2DModel has 2"):
        FLUX.to_hf_config(model)


def test_incomplete_pipelines(hf: Path) -> None:
    (hf / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "vae: has no safetensors file" in import_error(hf)
    (hf / "vae" / "config.json").unlink()
    assert "vae: has no config.json" in import_error(hf)
    change_json(hf / "model_index.json")
    index = json.loads((hf / "model_index.json").read_text())
    del index["transformer"]
    (hf / "model_index.json").write_text(json.dumps(index))
    assert "has no transformer; pipelines of a transformer and a vae can be converted" in import_error(hf)


@pytest.mark.parametrize("quant_conv", [True, False])
@pytest.mark.parametrize("mid_attention", [True, False])
def test_the_vae_in_all_its_forms(quant_conv: bool, mid_attention: bool) -> None:
    """Names and shapes of diffusers' class, for channels that grow, stay and shrink."""
    config = VaeConfig(
        latent_channels=3,
        block_channels=[8, 16, 16, 4],
        layers_per_block=3,
        norm_groups=4,
        mid_attention=mid_attention,
        quant_conv=quant_conv,
        scaling_factor=0.5,
    )
    hf_config = autoencoder_kl.to_hf_config(config)
    assert autoencoder_kl.to_vae_config(hf_config) == config
    assert autoencoder_kl.to_vae_config({**hf_config, "shift_factor": None}) == config
    assert hub_shapes(autoencoder_kl.rows(config)) == class_shapes(hf_config, "vae/")


# ---------------------------------------------------------------------------------------------- at full size


# Billions of parameters and of the fixed table of positions: transformer and VAE.
PUBLISHED = {"sd3_medium": 2.085, "sd3_5_medium": 2.470, "sd3_5_large": 8.146, "flux_1_dev": 11.901}
VAE_MILLIONS = 83.82
LAYERS_PER_STAGE = {
    ("sd3_5_large", 4): [10, 10, 9, 9],
    ("flux_1_dev", 4): [14, 14, 14, 15],
    ("flux_1_dev", 2): [28, 29],
}


def published(repo: Path, name: str) -> ImageGeneratorConfig:
    text = (repo / "configs" / "models" / f"{name}.yaml").read_text()
    return ImageGeneratorConfig.model_validate(yaml.safe_load(text)["generator"])


def hub_shapes(rows: list[Row]) -> dict[str, tuple[int, ...]]:
    return {name: shape for m in expand(rows) for name, shape in zip(m.names, m.shapes, strict=True)}


def class_shapes(config: dict[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that diffusers makes of a ``config.json``."""
    values = {key: value for key, value in config.items() if key != "_class_name"}
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"])(**values)
    return {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def size(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_is_the_published_model(name: str, repo: Path) -> None:
    model = published(repo, name)
    family = family_named(model.mmdit.family, name)
    config = family.to_hf_config(model)
    assert family.to_config(config, {}) == model
    parts = {part: class_shapes(config[part], f"{part}/") for part in ("transformer", "vae")}
    assert hub_shapes(list(family.rows(model, "hub"))) == parts["transformer"] | parts["vae"]
    assert size(parts["transformer"]) / 1e9 == pytest.approx(PUBLISHED[name], abs=1e-3)
    assert size(parts["vae"]) / 1e6 == pytest.approx(VAE_MILLIONS, abs=1e-2)
    alone = model.model_copy(update={"vae": None})
    assert hub_shapes(list(family.rows(alone, "hub"))) == class_shapes(family.to_hf_config(alone), "")


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_stage_builds_its_share(name: str, tensor: int, pipeline: int, repo: Path) -> None:
    """Without memory or peers: each tensor of the table is on exactly one stage, and has its shape."""
    model = published(repo, name)
    per_stage = LAYERS_PER_STAGE.get((name, pipeline))
    tensor = math.gcd(tensor, model.mmdit.num_heads)  # SD3.5 large has 38 heads
    parallel = ParallelConfig(tensor=tensor, sequence=True, pipeline=pipeline, layers_per_stage=per_stage)
    system = SystemConfig(platform="cpu", parallel=parallel)
    platform = select_platform("cpu", 1)
    found: dict[str, tuple[int, ...]] = {}
    for stage in range(pipeline):
        dist.init_process_group("fake", rank=stage * tensor, world_size=tensor * pipeline, store=FakeStore())
        groups = initialize_groups(parallel, platform, 0, host_backend="fake")
        try:
            with torch.device("meta"):
                (chunk,) = build_chunks(model, system, platform, groups)
            state = chunk.sharded_state_dict(prefix="mmdit.", metadata=sharding_metadata(groups))
        finally:
            destroy_groups()
        apply_factories(state)
        tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
        shapes = {value.key: tuple(value.global_shape) for value in tensors}
        assert not shapes.keys() & found.keys()
        found |= shapes
        blocks = [value for value in tensors if ".blocks." in value.key]
        local = sum(prod(value.local_shape) for value in blocks)
        whole = sum(prod(shapes[key]) for key in {value.key for value in blocks})
        assert local * tensor == pytest.approx(whole, rel=2e-3), "all but a few biases and norms are cut"
    rows = family_named(model.mmdit.family, name).rows(model, "hub")
    expected = {m.megatron: m.megatron_shape for m in expand(rows) if m.megatron.startswith("mmdit.")}
    assert found == expected
    config = family_named(model.mmdit.family, name).to_hf_config(model)["transformer"]
    assert size(found) == size(class_shapes(config, ""))


def test_a_recipe_takes_its_generator_from_a_file(repo: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    files = [repo / "configs" / "orion" / "qwen2_5_vl_7b.yaml", repo / "configs" / "models" / "sd3_5_medium.yaml"]
    recipe.write_text(f"base: [{', '.join(map(str, files))}]\nname: mine\n")
    assert load_recipe(recipe).stages["sft"].generator == published(repo, "sd3_5_medium")
