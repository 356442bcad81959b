"""MMCORE's export: what transformers and diffusers load computes what our model computes, our pipeline draws the same
pictures bit for bit, and an import gives the checkpoint back."""

import filecmp
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny_mmcore
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from rich.console import Console
from safetensors.torch import load_file
from tiny_mmcore import (
    ASKED,
    CONNECTOR,
    DUAL,
    FLUX,
    LORA,
    PLAIN,
    POLICY,
    QWEN3,
    cut,
    dropped,
    make_run,
    picture,
    without,
)

from megatron_unimm.checkpoint.folder import AVERAGE_PREFIX
from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.convert import export_checkpoint, import_checkpoint, inspect_path, verify
from megatron_unimm.convert.adapters import find_adapters
from megatron_unimm.data.sample import Turn
from megatron_unimm.errors import CheckpointError, UserError
from megatron_unimm.flow.guidance import two_condition
from megatron_unimm.flow.solvers import starting_noise
from megatron_unimm.generate.frame_painter import Guided
from megatron_unimm.generate.load import load_generator
from megatron_unimm.generate.query_generator import QueryGenerator
from megatron_unimm.generate.sampling import DecodeSettings
from megatron_unimm.generate.staged import decoding_mode
from megatron_unimm.hub.mmcore import MMCorePipeline
from megatron_unimm.methods.vlm.queries import build_condition_batch
from megatron_unimm.models.vae import from_patches, to_patches

VELOCITY_TOLERANCE = 1e-5
"""Of velocities of order 1; measured: 2e-6."""
LOGIT_TOLERANCE = 1e-5
"""Of logits of order 1; measured: 2e-6."""
MERGED_TOLERANCE = 2
"""Grey levels. Adapters in the weights round otherwise than beside them; measured: 1."""
SEED, NUMBER = 3, 5

Folders = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Makes a checkpoint with some overrides, and exports it; each once."""
    made: dict[tuple, tuple[Path, Path]] = {}

    def make(*overrides: str, **options: str) -> tuple[Path, Path]:
        key = (overrides, tuple(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("mmcore")
            checkpoint = make_run(folder, *overrides, **options)
            export_checkpoint(checkpoint, folder / "exported")
            made[key] = checkpoint, folder / "exported"
        return made[key]

    return make


@contextmanager
def generator_of(checkpoint: Path) -> Iterator[QueryGenerator]:
    with load_generator(checkpoint) as generator:
        torch.set_num_threads(1)
        assert isinstance(generator, QueryGenerator)
        yield generator


def drawn(checkpoint: Path) -> dict[str, np.ndarray]:
    """What ``unimm generate`` makes of each prompt, asked alone."""
    found = {}
    with generator_of(checkpoint) as generator:
        settings = DecodeSettings(seed=SEED, sampler=generator.sampler)
        for name, (prompt, pictures) in ASKED.items():
            turns = [Turn("user", (*range(len(pictures)), prompt))]
            asked = generator.prompt(turns, pictures, open_image=True, number=NUMBER)
            found[name] = generator.answer([asked], settings)[0].images[0].pixels
    return found


# ---------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("family", "overrides", "stage"),
    [
        ("qwen2_5_vl", (), "diffusion"),
        ("qwen2_5_vl", (DUAL,), "diffusion"),
        ("qwen2_5_vl", FLUX, "diffusion"),
        ("qwen2_5_vl", CONNECTOR, "diffusion"),
        ("qwen3_vl", QWEN3, "diffusion"),
        ("qwen2_5_vl", POLICY, "policy"),
    ],
    ids=["sd3", "sd3.5", "flux", "connector", "qwen3", "policy"],
)
def test_the_pipeline_draws_the_same_pictures(
    exported: Folders, family: str, overrides: tuple[str, ...], stage: str
) -> None:
    checkpoint, folder = exported(*overrides, family=family, name=stage)
    expected = drawn(checkpoint)
    pipeline = MMCorePipeline.from_pretrained(folder)
    for name, (prompt, pictures) in ASKED.items():
        found = pipeline(prompt, pictures, seed=SEED, number=NUMBER)
        assert found.std() > 1, "a picture"
        np.testing.assert_array_equal(found, expected[name], err_msg=name)
    assert expected["wide"].shape == (48, 96, 3)


def test_settings_and_what_is_asked_change_the_picture(exported: Folders) -> None:
    pipeline = MMCorePipeline.from_pretrained(exported()[1])
    prompt, pictures = ASKED["edit"]
    first = pipeline(prompt, pictures)
    others = [
        pipeline(prompt, pictures, seed=1),
        pipeline(prompt, pictures, number=1),
        pipeline(prompt, pictures, steps=4),
        pipeline(prompt, pictures, guidance_scale=1.0, image_guidance_scale=1.0),
        pipeline(prompt, [picture(9)]),
        pipeline("Make the circle blue, please.", pictures),
    ]
    assert all(not np.array_equal(first, other) for other in others)
    np.testing.assert_array_equal(first, pipeline(prompt, pictures))


def test_adapters_are_in_the_weights(exported: Folders, tmp_path: Path) -> None:
    checkpoint, folder = exported(LORA, PLAIN)
    with Reader(checkpoint) as reader:
        adapters = find_adapters(reader.tensors, read_meta(checkpoint), "")
        assert len(adapters) == 2 * 4  # two layers of four linears
        name = "backbone.decoder.layers.1.self_attention.linear_proj.weight"
        adapter = adapters[name]
        weight, lora_a, lora_b = (reader.read(key).double() for key in (name, adapter.lora_a, adapter.lora_b))
        written = load_file(folder / "language_model/model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    torch.testing.assert_close(written.double(), weight + 6 / 4 * lora_b @ lora_a, atol=1e-6, rtol=0)
    assert (written.double() - weight).abs().max() > 0.01
    assert json.loads((folder / "query_tokens/config.json").read_text())["lora"] is None
    expected, pipeline = drawn(checkpoint), MMCorePipeline.from_pretrained(folder)
    for case, (prompt, pictures) in ASKED.items():
        found = pipeline(prompt, pictures, seed=SEED, number=NUMBER)
        assert np.abs(found.astype(int) - expected[case]).max() <= MERGED_TOLERANCE
    import_checkpoint(folder, tmp_path / "imported")
    assert not any("lora" in key for key in Reader(tmp_path / "imported").tensors)


# ---------------------------------------------------------------------------------------------- libraries


def test_the_vlm_loads_in_transformers(exported: Folders) -> None:
    checkpoint, folder = exported()
    with generator_of(checkpoint) as generator, decoding_mode(generator.frames.chunks):
        frames = generator.frames
        asked = generator.prompt([Turn("user", (ASKED["text"][0],))], open_image=True)
        row = frames.work.row([frames.lay_out(generator._request(asked, [])).sample])
        vlm = frames.first.vlm
        batch = build_condition_batch(row.conversation, row.query_index, frames.stage.model, vlm.role())
        expected = vlm.text_logits(vlm.condition(batch)[0])
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "language_model", dtype=torch.float32)
    queries = load_file(folder / "query_tokens/model.safetensors")["weight"]
    with torch.no_grad():
        inputs = model.get_input_embeddings()(batch.input_ids).index_copy(0, batch.queries.index, queries)
        positions = torch.from_numpy(row.conversation.position_ids)[:, None]
        found = model(inputs_embeds=inputs[None], position_ids=positions).logits[0]
    torch.testing.assert_close(found, expected, atol=LOGIT_TOLERANCE, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "language_model")
    assert tokenizer.decode(batch.input_ids).startswith("<|im_start|>system")


@pytest.mark.parametrize("overrides", [(), (DUAL,), FLUX], ids=["sd3", "sd3.5", "flux"])
def test_transformer_and_vae_load_in_diffusers(exported: Folders, overrides: tuple[str, ...]) -> None:
    """Text to image needs nothing but their own forward (and the first row of the frame embedding)."""
    checkpoint, folder = exported(*overrides)
    with generator_of(checkpoint) as generator, decoding_mode(generator.frames.chunks):
        frames = generator.frames
        asked = generator.prompt([Turn("user", (ASKED["text"][0],))], open_image=True)
        guided = Guided(frames, [frames.lay_out(generator._request(asked, []))], frames.sampler)
        noise = starting_noise(SEED, 0, 16, 16)
        expected = guided.velocity(noise[None], 0.7)[0]
        condition = guided.condition(3).text.unflatten(0, (3, -1))  # [3, V + Q, C]
        pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        latents = frames.vae.encode(pixels).latent_dist.mode()
        decoded = frames.vae.decode(latents).sample
    pathways = load_file(folder / "pathways/model.safetensors")
    arguments = dict(
        encoder_hidden_states=condition,
        pooled_projections=pathways["pooled"].expand(3, -1),
        return_dict=False,
    )
    with torch.no_grad():
        if overrides == FLUX:
            rows, columns = np.indices((4, 4)).reshape(2, -1)
            positions = torch.from_numpy(np.stack([rows * 0, rows, columns], 1))
            transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)
            parts = transformer(
                hidden_states=noise.expand(3, -1, -1),
                timestep=torch.full((3,), 0.7),
                guidance=torch.full((3,), 2.5),
                img_ids=positions,
                txt_ids=torch.zeros(condition.shape[1], 3),
                **arguments,
            )[0]
        else:
            transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)
            first = load_file(folder / "frame_embedding/model.safetensors")["weight"][0]
            transformer.pos_embed.register_forward_hook(lambda module, inputs, output: output + first)
            state = from_patches(noise.expand(3, -1, -1), 4, 4, 2)
            parts = to_patches(transformer(hidden_states=state, timestep=torch.full((3,), 700.0), **arguments)[0], 2)
        found = two_condition(parts[2], parts[1], parts[0], image_scale=1.5, text_scale=2.5)
        torch.testing.assert_close(found, expected, atol=VELOCITY_TOLERANCE, rtol=0)
        vae = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False)
        torch.testing.assert_close(vae.encode(pixels).latent_dist.mode(), latents, atol=0, rtol=0)
        torch.testing.assert_close(vae.decode(latents).sample, decoded, atol=0, rtol=0)


def test_the_pipeline_needs_no_megatron_core() -> None:
    code = "import sys, megatron_unimm.hub.mmcore; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tiny_mmcore.REPO, check=False).returncode == 0


# ---------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("overrides", [(PLAIN,), (PLAIN, *FLUX)], ids=["sd3", "flux"])
def test_an_import_gives_the_checkpoint_back(exported: Folders, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    checkpoint, folder = exported(*overrides)
    import_checkpoint(folder, tmp_path / "imported")
    report = verify(checkpoint, tmp_path / "imported")
    assert report.identical, report.differences
    assert report.tensors > 100
    assert verify(folder, tmp_path / "imported").identical
    before, after = read_meta(checkpoint), read_meta(tmp_path / "imported")
    for key in ("family", "architecture", "queries"):
        assert after[key] == before[key], key
    assert {key: after["language_model"][key] for key in ("family", "architecture")} == before["language_model"]
    export_checkpoint(tmp_path / "imported", tmp_path / "again")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert filecmp.cmpfiles(folder, tmp_path / "again", files, shallow=False)[0] == files
    assert len(files) == sum(path.is_file() for path in (tmp_path / "again").rglob("*"))


def test_running_averages_are_written(exported: Folders) -> None:
    checkpoint, folder = exported()
    with Reader(checkpoint) as reader:
        names = ["pathways.text.linear_1.weight", "frame_embedding.weight"]
        for name in names:
            part, tensor = name.split(".", 1)
            written = load_file(folder / part / "model.safetensors")[tensor]
            assert torch.equal(written, reader.read(AVERAGE_PREFIX + name))
            assert not torch.equal(written, reader.read(name))
        # The VLM does not train here and has none.
        written = load_file(folder / "query_tokens/model.safetensors")["weight"]
        assert torch.equal(written, reader.read("query_tokens.weight"))


def test_inspect_shows_both_models(exported: Folders, tmp_path: Path) -> None:
    import_checkpoint(exported()[1], tmp_path / "imported")
    for path, names in {
        exported()[1]: ["transformer/", "vae/", "language_model/", "pathways/", "frame_embedding/", "query_connector/"],
        tmp_path / "imported": ["mmdit.", "vae.", "backbone.", "vision_encoder.", "pathways.", "language_model:"],
    }.items():
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(inspect_path(path))
        text = console.export_text()
        assert all(name in text for name in names), text


def test_a_vlm_alone(exported: Folders, tmp_path: Path) -> None:
    checkpoint, folder = exported(*CONNECTOR, name="vlm")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"query_tokens", "query_connector"}
    transformers.AutoModelForImageTextToText.from_pretrained(folder)
    import_checkpoint(folder, tmp_path / "imported")
    assert verify(checkpoint, tmp_path / "imported").identical
    with pytest.raises(CheckpointError, match="no language model beside"):
        MMCorePipeline.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("query_connector"), "has no query_connector"),
        (without("query_tokens"), "without query_tokens"),
        (without("language_model"), "no language model"),
        (without("frame_embedding"), "has no frame_embedding"),
        (cut("pathways", "place"), r"pathways.place is \[5, 24\], but .* \[6, 24\]"),
        (cut("query_tokens", "weight"), r"query_tokens.weight is \[5, 64\]"),
        (dropped("pathways", "text.linear_2.bias"), r"pathways.text.linear_2.bias \[24\] is missing"),
        (dropped("language_model", "model.norm.weight"), "model.norm.weight"),
    ],
)
def test_damaged_folders_are_refused(
    exported: Folders, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    shutil.copytree(exported(PLAIN)[1], tmp_path / "folder")
    damage(tmp_path / "folder")
    for read in (lambda path: import_checkpoint(path, tmp_path / "imported"), MMCorePipeline.from_pretrained):
        with pytest.raises(CheckpointError, match=words):
            read(tmp_path / "folder")
    assert not (tmp_path / "imported").exists()


def test_an_image_generator_alone_is_refused(exported: Folders, tmp_path: Path) -> None:
    shutil.copytree(exported(PLAIN)[1], tmp_path / "folder")
    for part in ("language_model", "query_tokens", "query_connector", "pathways", "frame_embedding"):
        shutil.rmtree(tmp_path / "folder" / part)
    import_checkpoint(tmp_path / "folder", tmp_path / "imported")
    assert "language_model" not in read_meta(tmp_path / "imported")
    with pytest.raises(CheckpointError, match="no language model beside"):
        MMCorePipeline.from_pretrained(tmp_path / "folder")


@pytest.mark.parametrize("setting", ["pathways=visual", "earlier_latents=true", "vit_features=true"])
def test_ablations_are_refused(tmp_path: Path, setting: str) -> None:
    """What is exported would draw otherwise than the checkpoint."""
    checkpoint = make_run(tmp_path, f"stages.diffusion.method.{setting}", PLAIN)
    with pytest.raises(CheckpointError, match=f"was trained with method.{setting.split('=')[0]}"):
        export_checkpoint(checkpoint, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_half_an_adapter_is_refused() -> None:
    meta = {"queries": {"lora": {"rank": 4, "alpha": 6.0}}}
    linear = "backbone.decoder.layers.0.mlp.linear_fc1"
    with pytest.raises(CheckpointError, match=rf"no tensor {linear}.lora_b.weight"):
        find_adapters([f"{linear}.weight", f"{linear}.lora_a.weight"], meta, "somewhere")
    of_mmdit = {"config": "{method: {lora: {rank: 2, alpha: 3.0}}}"}
    keys = [f"mmdit.blocks.layers.0.image.mlp.linear_fc1.{end}weight" for end in ("", "lora_a.", "lora_b.")]
    assert find_adapters(keys, of_mmdit, "somewhere")[keys[0]].alpha == 3.0
    assert find_adapters(keys, {}, "somewhere") == {}


@pytest.mark.parametrize(
    ("prompt", "pictures", "words"),
    [
        ("", [], "is empty"),
        ("Draw.", [picture(0).astype(np.float32)], r"pictures\[0\]: is float32"),
        ("Draw.", [picture(0)[..., 0]], r"\[64, 64\]; give uint8"),
        ("Draw.", [picture(0)] * 4, "are 4, but the model tells 4 apart"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    exported: Folders, prompt: str, pictures: list[np.ndarray], words: str
) -> None:
    pipeline = MMCorePipeline.from_pretrained(exported(PLAIN)[1])
    with pytest.raises(UserError, match=words):
        pipeline(prompt, pictures)
