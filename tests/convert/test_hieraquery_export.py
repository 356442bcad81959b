"""HieraQuery's export: what transformers and diffusers load computes what our model computes, our pipeline draws the
same pictures at every scale bit for bit, and an import gives the checkpoint back. What it shares with MMCORE's, the
tests of that hold."""

import filecmp
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_mmcore
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import load_file
from tiny_mmcore import ASKED, CONDITION, FLUX, MODELS, QWEN3, REPO, make_run

from megatron_unimm.checkpoint.folder import AVERAGE_PREFIX
from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.convert import export_checkpoint, import_checkpoint, verify
from megatron_unimm.data.sample import Turn
from megatron_unimm.errors import CheckpointError, UserError
from megatron_unimm.flow.guidance import classifier_free
from megatron_unimm.flow.solvers import starting_noise
from megatron_unimm.generate.frame_painter import Guided
from megatron_unimm.generate.load import load_generator
from megatron_unimm.generate.query_generator import QueryGenerator
from megatron_unimm.generate.sampling import DecodeSettings
from megatron_unimm.generate.staged import decoding_mode
from megatron_unimm.hub.folder import ExportedFolder
from megatron_unimm.hub.hieraquery import HieraQueryPipeline
from megatron_unimm.hub.mmcore import MMCorePipeline
from megatron_unimm.methods.hieraquery.model import conversation_of
from megatron_unimm.models.vae import from_patches, to_patches

VELOCITY_TOLERANCE = 1e-5
"""Of velocities of order 1; measured: 5e-7."""
SEED, NUMBER = 3, 5
SCALES = (2, 6)
"""Queries of each; the last is drawn at twice the side."""
SMALL = (
    *MODELS,
    "hieraquery.scales=[[1, 2], [2, 3]]",
    "hieraquery.connector={num_layers: 2, hidden_size: 48, num_heads: 4, num_kv_heads: 2, head_size: 12, mlp_size: 56}",
    "data.drawing_size={rule: buckets, sizes: [[64, 64], [96, 32]]}",
    "method.sampler={steps: 3, guidance_scale: 2.5}",
    "method.max_frames=4",
    "train.global_batch_size=8",
)
PLAIN = "train.ema_decay=null"
SAME_WIDTHS = (
    f"hieraquery.connector={{num_layers: 1, hidden_size: {CONDITION}, num_heads: 2, num_kv_heads: 2, head_size: 12,"
    " mlp_size: 56}",
    "hieraquery.mode=reuse",
    "method.alignment=null",
)
"""Nothing behind the connector; the vocabulary's own marks."""

Folders = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Makes a checkpoint with some overrides, and exports it; each once."""
    made: dict[tuple[str, ...], tuple[Path, Path]] = {}

    def make(*overrides: str, family: str = "qwen2_5_vl") -> tuple[Path, Path]:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("hieraquery")
            settings = [each.replace("stages.diffusion.", "") for each in overrides]
            checkpoint = make_run(folder, *settings, name="editing", family=family, method="hieraquery", small=SMALL)
            export_checkpoint(checkpoint, folder / "exported")
            made[overrides] = checkpoint, folder / "exported"
        return made[overrides]

    return make


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("qwen2_5_vl", ()), ("qwen2_5_vl", (*FLUX, *SAME_WIDTHS)), ("qwen3_vl", QWEN3)],
    ids=["sd3", "flux, reuse", "qwen3"],
)
def test_the_pipeline_draws_the_same_pictures(exported: Folders, family: str, overrides: tuple[str, ...]) -> None:
    """At all scales, from words, from one picture of another shape, and from two."""
    checkpoint, folder = exported(*overrides, family=family)
    pipeline = HieraQueryPipeline.from_pretrained(folder)
    with load_generator(checkpoint) as generator:
        torch.set_num_threads(1)
        assert isinstance(generator, QueryGenerator)
        settings = DecodeSettings(seed=SEED, sampler=generator.sampler, all_scales=True)
        for name, (prompt, pictures) in ASKED.items():
            turns = [Turn("user", (*range(len(pictures)), prompt))]
            asked = generator.prompt(turns, pictures, open_image=True, number=NUMBER)
            answer = generator.answer([asked], settings)[0].images[0]
            expected = [*answer.coarser, answer.pixels]
            found = pipeline.all_scales(prompt, pictures, seed=SEED, number=NUMBER)
            assert len(found) == len(expected) == len(SCALES)
            for scale, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
                assert ours.std() > 1, "a picture"
                np.testing.assert_array_equal(ours, theirs, err_msg=f"{name} at scale {scale}")
            assert found[0].shape[0] * 2 == found[1].shape[0]
            np.testing.assert_array_equal(pipeline(prompt, pictures, seed=SEED, number=NUMBER), found[-1])


def test_what_is_asked_changes_the_picture(exported: Folders) -> None:
    pipeline = HieraQueryPipeline.from_pretrained(exported()[1])
    prompt, pictures = ASKED["edit"]
    first = pipeline(prompt, pictures)
    others = [
        pipeline(prompt, pictures, seed=1),
        pipeline(prompt, pictures, guidance_scale=1.0),
        pipeline(prompt, [tiny_mmcore.picture(9)]),
        pipeline("Make the circle blue, please.", pictures),
    ]
    assert all(not np.array_equal(first, other) for other in others)


def test_transformer_and_vae_load_in_diffusers_and_the_vlm_in_transformers(exported: Folders) -> None:
    """Text to image needs nothing but their own forward (and the first row of the frame embedding), and what the VLM
    says nothing but its own."""
    checkpoint, folder = exported()
    with load_generator(checkpoint) as generator, decoding_mode(generator.frames.chunks):
        torch.set_num_threads(1)
        frames = generator.frames
        asked = generator.prompt([Turn("user", (ASKED["text"][0],))], open_image=True)
        drawable = frames.lay_out(generator._request(asked, []))
        guided = Guided(frames, [drawable], frames.sampler)
        noise = starting_noise(SEED, 0, 16, 16)
        expected = guided.velocity(noise[None], 0.7)[0]
        condition = guided.condition(2)
        pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        latents = frames.vae.encode(pixels).latent_dist.mode()
        row = frames.work.row([drawable.sample])
        vlm = frames.first.vlm
        batch = conversation_of(vlm, row)
        hidden = vlm.last_hidden(batch)
        inputs = vlm.query_tokens(
            vlm.backbone.embedding.word_embeddings.weight[batch.input_ids][:, None], batch.queries.index
        )
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)
    first = load_file(folder / "frame_embedding/model.safetensors")["weight"][0]
    transformer.pos_embed.register_forward_hook(lambda module, inputs, output: output + first)
    with torch.no_grad():
        parts = transformer(
            hidden_states=from_patches(noise.expand(2, -1, -1), 4, 4, 2),
            timestep=torch.full((2,), 700.0),
            encoder_hidden_states=condition.text.unflatten(0, (2, -1)),
            pooled_projections=condition.pooled,
            return_dict=False,
        )[0]
        found = classifier_free(*to_patches(parts, 2), 2.5)
        torch.testing.assert_close(found, expected, atol=VELOCITY_TOLERANCE, rtol=0)
        vae = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False)
        torch.testing.assert_close(vae.encode(pixels).latent_dist.mode(), latents, atol=0, rtol=0)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "language_model", dtype=torch.float32)
        positions = torch.from_numpy(row.conversation.position_ids)[:, None]
        said = model.get_decoder()(inputs_embeds=inputs[:, 0][None], position_ids=positions).last_hidden_state[0]
        torch.testing.assert_close(said, hidden, atol=1e-5, rtol=0)


def test_the_pipeline_needs_no_megatron_core() -> None:
    code = "import sys, megatron_unimm.hub.hieraquery; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


def test_an_import_gives_the_checkpoint_back(exported: Folders, tmp_path: Path) -> None:
    checkpoint, folder = exported(PLAIN)
    import_checkpoint(folder, tmp_path / "imported")
    report = verify(checkpoint, tmp_path / "imported")
    assert report.identical, report.differences
    assert report.tensors > 100
    before, after = read_meta(checkpoint), read_meta(tmp_path / "imported")
    for key in ("family", "architecture", "hieraquery"):
        assert after[key] == before[key], key
    export_checkpoint(tmp_path / "imported", tmp_path / "again")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert filecmp.cmpfiles(folder, tmp_path / "again", files, shallow=False)[0] == files
    assert len(files) == sum(path.is_file() for path in (tmp_path / "again").rglob("*"))
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    assert names == {
        *("transformer", "vae", "scheduler", "language_model", "query_tokens", "scale_connector", "scale_adapters"),
        *("frame_embedding", "alignment_projector"),
    }


def test_running_averages_are_written(exported: Folders) -> None:
    """Of what trains; queries do."""
    checkpoint, folder = exported()
    with Reader(checkpoint) as reader:
        for name in ("query_tokens.marks", "scale_connector.layers.0.mlp.linear_fc2.weight", "frame_embedding.weight"):
            part, tensor = name.split(".", 1)
            written = load_file(folder / part / "model.safetensors")[tensor]
            assert torch.equal(written, reader.read(AVERAGE_PREFIX + name))
            assert not torch.equal(written, reader.read(name))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (tiny_mmcore.without("scale_connector"), "has no scale_connector"),
        (tiny_mmcore.without("query_tokens"), "without query_tokens"),
        (tiny_mmcore.without("language_model"), "no language model"),
        (tiny_mmcore.cut("scale_adapters", "place"), r"scale_adapters.place is \[7, 24\], but .* \[8, 24\]"),
        (tiny_mmcore.cut("query_tokens", "marks"), r"query_tokens.marks is \[1, 2, 64\]"),
        (tiny_mmcore.dropped("scale_adapters", "inward.linear_2.bias"), r"inward.linear_2.bias \[48\] is missing"),
    ],
)
def test_damaged_folders_are_refused(
    exported: Folders, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    shutil.copytree(exported(PLAIN)[1], tmp_path / "folder")
    damage(tmp_path / "folder")
    for read in (lambda path: import_checkpoint(path, tmp_path / "imported"), HieraQueryPipeline.from_pretrained):
        with pytest.raises(CheckpointError, match=words):
            read(tmp_path / "folder")
    assert not (tmp_path / "imported").exists()


def test_what_the_pipeline_cannot_do_is_refused(exported: Folders, tmp_path: Path) -> None:
    folder = exported(PLAIN)[1]
    pipeline = HieraQueryPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match="scale: is 2, but the model has 2"):
        pipeline("Draw.", scale=2)
    with pytest.raises(UserError, match=r"image_guidance_scale: is 1.5, but .* leave it out"):
        pipeline("Draw.", image_guidance_scale=1.5)
    with pytest.raises(CheckpointError, match="no exported MMCORE: it has no pathways"):
        MMCorePipeline.from_pretrained(folder)
    # Ming-Lite-Omni exports too, for the code that comes with it.
    (tmp_path / "language_model").mkdir()
    (tmp_path / "language_model/config.json").write_text('{"model_type": "bailingmm"}')
    found = replace(ExportedFolder.open(folder, "cpu", "HieraQuery", "scale_adapters"), path=tmp_path)
    with pytest.raises(CheckpointError, match="bailingmm, which transformers has no class for"):
        found.language_model(lambda words, index: words)
