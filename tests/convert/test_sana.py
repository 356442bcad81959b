"""SANA against diffusers: the same velocities and gradients at every layout, a round trip that loses nothing, and the
same latents of DC-AE."""

import json
import math
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from mmdit_worker import build_chunks
from test_families import assert_same_folder, start_workers
from test_mmdit import (
    GRIDS,
    LENGTHS,
    SAVED_AT,
    TP2_SP,
    WORKER,
    change_json,
    class_shapes,
    hub_shapes,
    import_error,
    published,
    random_weights,
    save_with_text_encoder,
    size,
)
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.checkpoint.store import save
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.mmdit import DcAeConfig, ImageGeneratorConfig
from megatron_unimm.config.parallel import ParallelConfig, SystemConfig
from megatron_unimm.convert import export_checkpoint, import_checkpoint, verify
from megatron_unimm.convert.sana import SANA
from megatron_unimm.convert.table import expand
from megatron_unimm.flow.path import interpolate, velocity
from megatron_unimm.models.vae import build_vae, decode, encode, encode_patches, to_patches
from megatron_unimm.parallel.groups import destroy_groups, initialize_groups
from megatron_unimm.parallel.platform import select_platform
from megatron_unimm.train.state import sharding_metadata

TOLERANCE = 1e-4
"""Largest absolute difference of velocities of order 1, fp32 (measured 1.2e-6)."""
GRADIENT_TOLERANCE = 1e-4
"""Largest difference in a gradient from diffusers' in float64, over its largest number (measured 1.8e-5)."""
SHORTEST_QUERY = 0.05
"""Linear attention does not see how long a query is, so that its gradient is a difference of two numbers that grow as
the query gets short. At a length of 0.002 float32 is wrong by up to 9e-5 in 200 draws of the last digits, and
diffusers' formula by the same, to the last digit; gradients are compared on rows whose queries are longer than this."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, TP2_SP),
    "pp2": (2, {"pipeline": 2}),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2_sp_pp2": (4, {**TP2_SP, "pipeline": 2}),
}
COMMON = {
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,  # narrower than the model
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 8,
}
CASES = {"published": COMMON, "biased": {**COMMON, "in_channels": 4, "out_channels": 4, "patch_size": 2}}
CASES["biased"] |= {"attention_bias": True, "mlp_ratio": 2.0}
SEEDS = {"published": 15, "biased": 39}
"""Of rows whose shortest queries are long (of 40 seeds; both 0.1)."""


def random_model(case: str) -> Any:
    return random_weights(diffusers.SanaTransformer2DModel, CASES[case])


def random_vae(**changes: Any) -> Any:
    """DC-AE with blocks of both kinds, 4 pixels to a latent."""
    torch.manual_seed(1)
    half = {"block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"], "block_out_channels": [8, 16, 16]}
    half |= {"layers_per_block": [1, 2, 1], "qkv_multiscales": [[], [], [5]]}
    fields = {f"{name}_{field}": value for name in ("encoder", "decoder") for field, value in half.items()}
    fixed = {"downsample_block_type": "conv", "upsample_block_type": "interpolate", "scaling_factor": 0.4}
    return diffusers.AutoencoderDC(**{"latent_channels": 8, "attention_head_dim": 8, **fields, **fixed, **changes})


def make_row(case: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(SEEDS[case])
    width = CASES[case]["in_channels"] * CASES[case].get("patch_size", 1) ** 2
    arrays = {"condition": (LENGTHS.sum(), 24), "patches": (GRIDS.prod(axis=1).sum(), width)}
    normal = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in arrays.items()}
    return {**normal, "grids": GRIDS, "lengths": LENGTHS, "timestep": rng.random(len(GRIDS), dtype=np.float32)}


def reference_velocity(case: str, model: Any, row: dict[str, Tensor]) -> Tensor:
    """diffusers' own, one picture at a time: ``[image tokens, patch]``."""
    channels, side = CASES[case]["in_channels"], CASES[case].get("patch_size", 1)
    outputs = []
    for number, (condition, patches) in enumerate(
        zip(row["condition"].split(LENGTHS.tolist()), row["patches"].split(GRIDS.prod(axis=1).tolist()), strict=True)
    ):
        rows, columns = GRIDS[number].tolist()
        cut = patches.reshape(rows, columns, channels, side, side)
        latents = cut.permute(2, 0, 3, 1, 4).reshape(1, channels, side * rows, side * columns)
        timestep = 1000 * row["timestep"][number : number + 1]
        sample = model(hidden_states=latents, encoder_hidden_states=condition[None], timestep=timestep).sample
        outputs.append(to_patches(sample, side)[0])
    return torch.cat(outputs)


def gradient_weights(case: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(make_row(case)["patches"].shape, generator=generator)


def save_pipeline(transformer: Any, vae: Any, folder: Path) -> None:
    """A folder as diffusers writes it, with a tokenizer and a text encoder in it."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler, "tokenizer": None, "text_encoder": None}
    save_with_text_encoder(diffusers.SanaPipeline(**parts), folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As of test_mmdit.py; CASE/pipeline of one case."""
    root = tmp_path_factory.mktemp("sana")
    tasks: list[tuple[int, dict[str, Any]]] = []
    for case in CASES:
        folder = root / case
        model, row = random_model(case), make_row(case)
        model.save_pretrained(folder / "hf")
        np.savez(folder / "row.npz", **row)
        with torch.no_grad():
            tensors = {name: torch.from_numpy(value) for name, value in row.items()}
            np.save(folder / "reference.npy", reference_velocity(case, model, tensors).numpy())
        np.save(folder / "weights.npy", gradient_weights(case).numpy())
        import_checkpoint(folder / "hf", folder / "checkpoint")
        task = {"checkpoint": str(folder / "checkpoint"), "row": str(folder / "row.npz")}
        for layout, (ranks, parallel) in LAYOUTS.items():
            tasks.append((ranks, {**task, "parallel": parallel, "to": str(folder / f"{layout}.npy")}))
        whole = {"parallel": {}, "weights": str(folder / "weights.npy"), "to": str(folder / "gradients.npz")}
        tasks.append((1, task | whole))
    folder = root / "published"
    save_pipeline(random_model("published").to(torch.bfloat16), random_vae().to(torch.bfloat16), folder / "pipeline")
    import_checkpoint(folder / "pipeline", folder / "checkpoint_bf16")
    for name, parallel in SAVED_AT.items():
        saved = {"checkpoint": str(folder / "checkpoint_bf16"), "dtype": "bfloat16", "to": str(folder / name)}
        tasks.append((4, {**saved, "parallel": parallel}))
    start_workers(tasks, WORKER)
    return root


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_velocities_are_those_of_diffusers(case: str, layout: str, results: Path) -> None:
    reference, found = (np.load(results / case / f"{name}.npy") for name in ("reference", layout))
    assert 0.3 < reference.std() < 5
    assert found.shape == reference.shape
    worst = float(np.abs(found - reference).max())
    print(f"{case:10} {layout:10} {worst:.1e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_diffusers(case: str, results: Path) -> None:
    """Of every weight, brought to the hub's layout by the table, and of the inputs."""
    folder = results / case
    model = random_model(case).double()
    lengths = query_lengths(model)
    tensors = {name: torch.from_numpy(value) for name, value in make_row(case).items()}
    inputs = {name: tensors[name].double().requires_grad_() for name in ("condition", "patches")}
    rows = tensors | inputs | {"timestep": tensors["timestep"].double()}
    (reference_velocity(case, model, rows) * gradient_weights(case)).sum().backward()
    assert min(lengths) > SHORTEST_QUERY
    expected = {name: value.grad for name, value in [*model.named_parameters(), *inputs.items()]}
    found: dict[str, Any] = {}
    with np.load(folder / "gradients.npz") as arrays:
        for mapping in SANA.mappings(SANA.to_config(json.loads((folder / "hf/config.json").read_text()), {}), "hub"):
            parts = mapping.transform.inverse(torch.from_numpy(arrays[mapping.megatron]))
            found |= {name: part.numpy() for name, part in zip(mapping.names, parts, strict=True)}
        for name in inputs:
            found[name], padding = np.split(arrays[name], [len(expected[name])])
            assert len(padding)
            assert not padding.any(), f"padding of {name} has an influence"
    assert found.keys() == expected.keys()
    differences = {name: np.abs(found[name] - expected[name].numpy()).max() for name in expected}
    # Softmax does not see what all keys share: the gradient of their bias is rounding, and is held to the queries'.
    sizes = {name: float(expected[name.replace("attn2.to_k.bias", "attn2.to_q.bias")].abs().max()) for name in expected}
    worst, name = max((float(differences[name] / sizes[name]), name) for name in expected)
    print(f"{case:10} {len(expected)} gradients, worst {worst:.1e} ({name}); shortest query {min(lengths):.2f}")
    assert worst <= GRADIENT_TOLERANCE


def query_lengths(model: Any) -> list[float]:
    """Fills up as the reference runs: of each picture and layer the length of the shortest query that is not zero, in
    what linear attention reads of it (where it is positive, and a key is)."""
    lengths: list[float] = []

    def watch(attention: Any, inputs: tuple[Tensor, ...]) -> None:
        linears = (attention.to_q, attention.to_k)
        query, key = (linear(inputs[0])[0].unflatten(1, (attention.heads, -1)).relu() for linear in linears)
        seen = (query * (key.sum(0) > 0)).norm(dim=-1)  # [tokens, heads]
        lengths.append(float(seen[seen > 0].min()))

    for block in model.transformer_blocks:
        block.attn1.register_forward_pre_hook(watch)
    return lengths


def test_drawing_goes_the_same_way() -> None:
    """A step of the pipeline's scheduler along a velocity of ours leads to the data: timesteps are 1000 t, t = 1 is
    noise, and the shift is that of t' = 3 t / (1 + 2 t)."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=1
    )
    scheduler.set_timesteps(4)
    data, noise = torch.randn(2, 1, 8, 3, 3)
    sigmas = scheduler.sigmas
    uniform = sigmas[:-1] / (3 - 2 * sigmas[:-1])
    torch.testing.assert_close(uniform[1:-1] - uniform[:-2], uniform[2:] - uniform[1:-1], rtol=0, atol=2e-3)
    torch.testing.assert_close(scheduler.timesteps.float(), 1000 * sigmas[:-1], rtol=0, atol=1)
    state = interpolate(data, noise, sigmas[0])
    for timestep in scheduler.timesteps:
        state = scheduler.step(velocity(data, noise), timestep, state).prev_sample
    torch.testing.assert_close(state, data, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------- round trips


def test_round_trip(results: Path, tmp_path: Path) -> None:
    """Straight back, and after loading and saving at TP2 x PP2 (x VPP2)."""
    for case in CASES:
        export_checkpoint(results / case / "checkpoint", tmp_path / case)
        assert_same_folder(results / case / "hf", tmp_path / case)
    folder = results / "published"
    for name in ("checkpoint_bf16", *SAVED_AT):
        export_checkpoint(folder / name, tmp_path / name)
        original, other = folder / "pipeline", tmp_path / name
        assert {path.name for path in other.iterdir()} == {path.name for path in original.iterdir()}
        for part in ("transformer", "vae", "scheduler", "tokenizer", "text_encoder"):
            assert_same_folder(original / part, other / part)
        assert (original / "model_index.json").read_bytes() == (other / "model_index.json").read_bytes()
    assert verify(folder / "pipeline", tmp_path / "again").identical
    meta = read_meta(folder / "checkpoint_bf16")
    assert (meta["family"], meta["architecture"]["vae"]["family"]) == ("sana", "dc_ae")


def test_a_pipeline_that_never_was_a_folder(results: Path, tmp_path: Path) -> None:
    source = results / "published" / "checkpoint_bf16"
    with Reader(source) as reader:
        state = {key: ShardedTensor.from_rank_offsets(key, reader.read(key)) for key in reader.tensors}
    save(state, tmp_path / "ours", read_meta(source)).wait()  # without files of diffusers
    export_checkpoint(tmp_path / "ours", tmp_path / "exported")
    loaded, expected = (
        diffusers.SanaPipeline.from_pretrained(folder, tokenizer=None, text_encoder=None)
        for folder in (tmp_path / "exported", results / "published" / "pipeline")
    )
    for part in ("transformer", "vae"):
        ours, theirs = loaded.components[part].state_dict(), expected.components[part].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.scheduler.config.flow_shift == 3.0
    assert loaded.scheduler.config.prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"qk_norm": "rms_norm_across_heads"}, "qk_norm is 'rms_norm_across_heads'; only None is built"),
        ("transformer", {"guidance_embeds": True}, "guidance_embeds is True; only False is built"),
        ("transformer", {"interpolation_scale": 1.0}, "interpolation_scale is 1.0; only None is built"),
        ("transformer", {"cross_attention_dim": 48}, "cross_attention_dim is 48; only 32 is built"),
        ("vae", {"downsample_block_type": "pixel_unshuffle"}, "downsample_block_type is 'pixel_unshuffle'"),
        ("vae", {"decoder_norm_types": ["batch_norm"] * 3}, "decoder_norm_types is"),
        ("vae", {"encoder_layers_per_block": [0, 2, 1]}, "layers: Input should be greater than 0"),
        ("vae", {"latent_channels": 4}, "mmdit.latent_channels 8 differs from vae.latent_channels 4"),
        ("vae", {"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL'; only 'AutoencoderDC'"),
    ],
)
def test_configs_that_cannot_be_built(part: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_pipeline(random_model("published"), random_vae(), tmp_path / "hf")
    change_json(tmp_path / "hf" / part / "config.json", **change)
    assert message in import_error(tmp_path / "hf")


# ---------------------------------------------------------------------------------------------- DC-AE


def test_latents_are_those_of_diffusers() -> None:
    """Without tiles, as in diffusers; of packed pictures, too."""
    vae = random_vae().eval()
    config = SANA.to_config({"transformer": transformer_config(), "vae": vae_config(vae)}, {}).vae
    assert config is not None
    assert config.pixels_per_latent == 4
    ours = build_vae(config).eval()
    ours.load_state_dict(vae.state_dict())
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 24, 40) * 2 - 1
    with torch.no_grad():
        latents = encode(ours, pictures)
        assert latents.shape == (2, 8, 6, 10)
        torch.testing.assert_close(latents, vae.encode(pictures).latent * 0.4, rtol=0, atol=0)
        torch.testing.assert_close(decode(ours, latents), vae.decode(latents / 0.4).sample, rtol=0, atol=0)
    grids = [(6, 10), (5, 3), (6, 10)]
    other = torch.rand(1, 3, 20, 12)
    pixels = torch.cat([to_patches(each, 4)[0] for each in (pictures[:1], other, pictures[1:])])
    found = encode_patches(ours, pixels, grids, 4, 1)
    with torch.no_grad():
        each = [latents[:1], encode(ours, other), latents[1:]]
    torch.testing.assert_close(found, torch.cat([to_patches(one, 1)[0] for one in each]), rtol=0, atol=1e-6)


def vae_config(vae: Any) -> dict[str, Any]:
    return {"_class_name": "AutoencoderDC", **{key: value for key, value in vae.config.items() if key[0] != "_"}}


def transformer_config() -> dict[str, Any]:
    return {"_class_name": "SanaTransformer2DModel", "patch_size": 1, "mlp_ratio": 2.5, **COMMON}


def test_the_published_vae_at_every_aspect_bucket(repo: Path) -> None:
    """Of 512 x 512 and 1024 x 1024, to latents, the longest back, too, without tiles (which would see a part of the
    picture). With fewer layers, which change no shape."""
    model = published(repo, "sana_1600m")
    config = model.vae
    assert isinstance(config, DcAeConfig)
    assert model.token_pixels == 32
    for stage in (*config.encoder, *config.decoder):
        stage.layers = 1
    with torch.device("meta"):
        vae = build_vae(config)
        vae.tiled_encode = vae.tiled_decode = None
        for bins in (ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN):
            assert len(bins) > 30
            for height, width in ((int(height), int(width)) for height, width in bins.values()):
                latents = encode(vae, torch.empty(1, 3, height, width))
                assert latents.shape == (1, 32, height // 32, width // 32)
            assert height > 3 * width
            assert decode(vae, latents).shape == (1, 3, height, width)


# ---------------------------------------------------------------------------------------------- at full size

BILLIONS, VAE_MILLIONS = 1.604, 312.25


def test_the_table_is_the_published_model(repo: Path) -> None:
    model = published(repo, "sana_1600m")
    config = SANA.to_hf_config(model)
    assert SANA.to_config(config, {}) == model
    parts = {part: class_shapes(config[part], f"{part}/") for part in ("transformer", "vae")}
    assert hub_shapes(list(SANA.rows(model, "hub"))) == parts["transformer"] | parts["vae"]
    # What config.json does not say is as diffusers' class has it, whose defaults are the published numbers.
    alone = class_shapes({"_class_name": "SanaTransformer2DModel"}, "transformer/")
    assert alone == parts["transformer"]
    assert size(parts["transformer"]) / 1e9 == pytest.approx(BILLIONS, abs=1e-3)
    assert size(parts["vae"]) / 1e6 == pytest.approx(VAE_MILLIONS, abs=1e-2)
    small = model.model_copy(update={"vae": None})
    assert hub_shapes(list(SANA.rows(small, "hub"))) == class_shapes(SANA.to_hf_config(small), "")


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 4), (10, 2)])
def test_every_stage_builds_its_share(tensor: int, pipeline: int, repo: Path) -> None:
    """Without memory or peers: each tensor of the table is on exactly one stage, and has its shape."""
    model = published(repo, "sana_1600m")
    parallel = ParallelConfig(tensor=tensor, sequence=True, pipeline=pipeline)
    system, platform = SystemConfig(platform="cpu", parallel=parallel), select_platform("cpu", 1)
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
        assert math.isclose(local * tensor, sum(prod(shapes[value.key]) for value in blocks), rel_tol=5e-3)
    rows = SANA.rows(model, "hub")
    assert found == {m.megatron: m.megatron_shape for m in expand(rows) if m.megatron.startswith("mmdit.")}


def test_a_vae_of_another_family_is_refused(repo: Path) -> None:
    text = (repo / "configs" / "models" / "sana_1600m.yaml").read_text()
    generator = yaml.safe_load(text)["generator"]
    generator["vae"] = published(repo, "sd3_medium").vae
    with pytest.raises(ValueError, match="family sana draws latents of a VAE of family dc_ae, but"):
        ImageGeneratorConfig.model_validate(generator)
