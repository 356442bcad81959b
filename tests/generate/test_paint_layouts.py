"""Pictures at every layout against one rank, and from checkpoints of every kind."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from paint_worker import results
from PIL import Image
from tiny_checkpoint import picture, stage_config
from tiny_decoder import FLUX, PLAIN, SQUARE, difference, make_all, make_decoder, painter_of, requests

from megatron_unimm.checkpoint.manifest import find_checkpoint, read_meta
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.parallel import ParallelConfig
from megatron_unimm.errors import CheckpointError, ConfigError, UserError
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.checkpoint import generation_stage
from megatron_unimm.generate.paint import Painter, PaintRequest
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.state import sharding_metadata

TOLERANCE = 2e-5
"""Measured 2.6e-6."""
TP2, PP2, CP2 = (f"system.parallel.{axis}=2" for axis in ("tensor", "pipeline", "context"))
SP, VPP2 = "system.parallel.sequence=true", "system.parallel.virtual_pipeline=2"
RANKS = 4
"""Of all layouts, so that one start serves them; those of fewer ranks have replicas."""
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2": ("sd3", {"kind": "load", "tensor": 2}),
    "pp2": ("sd3", {"kind": "load", "pipeline": 2}),
    "cp2": ("sd3", {"kind": "load", "context": 2}),
    "live_cp2": ("sd3", {"kind": "live", "overrides": [CP2]}),
    "live_tp2_sp": ("sd3", {"kind": "live", "overrides": [TP2, SP]}),
    "live_pp2_vpp2": ("sd3", {"kind": "live", "overrides": [PP2, VPP2]}),
    "beside_pp2_vpp2": ("sd3", {"kind": "beside", "overrides": [PP2, VPP2]}),
    "flux_pp2": ("flux", {"kind": "load", "pipeline": 2}),
    "flux_tp2_cp2": ("flux", {"kind": "load", "tensor": 2, "context": 2}),
    "flux_beside_cp2": ("flux", {"kind": "beside", "overrides": [CP2]}),
    "tp2_pp2": ("sd3", {"kind": "load", "tensor": 2, "pipeline": 2}),
    "flux_live_cp2_tp2": ("flux", {"kind": "live", "overrides": [*FLUX, CP2, TP2]}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of both families, and what every layout drew with them."""
    root = tmp_path_factory.mktemp("runs")
    for family, overrides in (("sd3", ()), ("flux", FLUX)):
        make_all(root / family, *overrides)
    tasks = [{"name": name, "folder": str(root / family), **task} for name, (family, task) in LAYOUTS.items()]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [sys.executable, *launcher, str(Path(__file__).with_name("paint_worker.py")), json.dumps(tasks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {family: root / family for family in ("sd3", "flux")}


@pytest.fixture(scope="module")
def one_rank(runs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    found = {}
    for family, folder in runs.items():
        with Generator.load(folder / "run") as generator:
            assert generator.painter is not None
            found[family] = results(generator.painter)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name: str, runs: dict[str, Path], one_rank: dict[str, dict[str, Any]]) -> None:
    """On the first and on the last rank: visual tokens, latents, pictures, the VAE alone."""
    family = LAYOUTS[name][0]
    expected = one_rank[family]
    for suffix in ("", ".last"):
        found = torch.load(runs[family] / f"{name}{suffix}.pt", weights_only=True)
        print(name, suffix, float((found["latents"] - expected["latents"]).abs().max()))
        for kind in ("tokens", "latents"):
            torch.testing.assert_close(found[kind], expected[kind], rtol=TOLERANCE, atol=TOLERANCE)
        for kind in ("pictures", "round_trip"):
            for one, other in zip(found[kind], expected[kind], strict=True):
                assert difference(one.numpy(), other.numpy()) <= 1


def test_layouts_that_a_decoder_cannot_have(runs: dict[str, Path]) -> None:
    directory = find_checkpoint(runs["sd3"] / "run/decoder")
    platform, groups = setup.enter(stage_config(runs["sd3"] / "base"))
    groups = replace(groups, config=groups.config.model_copy(update={"tensor": 3}))
    try:
        with pytest.raises(ConfigError, match="tensor 3 x pipeline 1 x context 1 = 3 does not divide 1 ranks"):
            Painter.load(directory, groups, platform, "float32")
    finally:
        destroy_groups()


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_draws_with_the_running_average(runs: dict[str, Path], tmp_path: Path) -> None:
    """Every weight that trains is the average; others, and those of a stage without, are as they were saved."""
    checkpoint = find_checkpoint(runs["sd3"] / "run/decoder")
    assert read_meta(checkpoint)["average_steps"] == 0
    with painter_of(checkpoint) as painter, Reader(checkpoint) as reader:
        state = painter.chunks[0].sharded_state_dict(metadata=sharding_metadata(painter.groups))
        averaged = 0
        for tensor in state.values():
            plain, name = reader.read(tensor.key), f"optimizer.average.{tensor.key}"
            is_averaged = name in reader.tensors
            averaged += is_averaged
            expected = reader.read(name) if is_averaged else plain
            assert torch.equal(tensor.data, expected.reshape(tensor.data.shape)), tensor.key
            assert is_averaged == (not tensor.key.startswith("vae.") and "position_table" not in tensor.key), tensor.key
            assert not is_averaged or not torch.equal(expected, plain)
        assert averaged > 40
        drawn = painter.paint(requests()[:1])[0]
    with painter_of(make_decoder(tmp_path, PLAIN)) as painter:
        assert difference(painter.paint(requests()[:1])[0], drawn) > 5


def test_vae_round_trip_is_diffusers(runs: dict[str, Path]) -> None:
    """At the size that a picture is drawn at, by hand; scaling and shift take each other back."""
    with painter_of(find_checkpoint(runs["sd3"] / "run/decoder")) as decoder:
        check_round_trip(decoder)


def check_round_trip(decoder: Painter) -> None:
    assert decoder.first is not None
    vae = decoder.first.vae
    wide = np.tile(picture(3), (1, 2, 1))[:50, :100]
    for photo, size in ((picture(2), (64, 64)), (wide, (96, 48))):
        shown = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(shown).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            again = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].permute(1, 2, 0)
        wanted = ((again / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
        found = decoder.vae_round_trip([photo])[0]
        assert found.shape == (size[1], size[0], 3)
        assert np.abs(found - wanted).max() <= 1
        assert wanted.std() > 20


def test_reconstruction_is_drawn_from_the_true_tokens(runs: dict[str, Path]) -> None:
    """Those that the base model's vision encoder gives, each picture with its own number."""
    photos = [picture(0), picture(1), picture(0)]
    with Generator.load(runs["sd3"] / "run", with_targets=True) as generator:
        torch.set_num_threads(1)
        assert generator.painter is not None
        found = generator.reconstruct(photos, seed=3)
        features = generator.target_features(photos)
        asked = [PaintRequest(visual, SQUARE, number) for number, visual in enumerate(features)]
        expected = generator.painter.paint(asked, seed=3)
    assert all(difference(one, other) <= 1 for one, other in zip(found, expected, strict=True))
    assert difference(found[0], found[1]) > 5
    assert difference(found[0], found[2]) > 5


def test_a_base_model_that_has_gone(runs: dict[str, Path], tmp_path: Path) -> None:
    """It draws all the same; what needs the vision encoder says what to do."""
    decoder, model = make_decoder(tmp_path), runs["sd3"] / "run/sft"
    with Generator.load(model, decoder=decoder) as generator:
        torch.set_num_threads(1)
        assert generator.painter is not None
        assert len(generator.painter.paint(requests()[:1])) == 1
        with pytest.raises(CheckpointError, match=r"base: the base model .* is not there; give it with --base"):
            generator.reconstruct([picture(0)])
    with Generator.load(model, decoder=decoder, base=runs["sd3"] / "base") as generator:
        assert generator.reconstruct([picture(0)])[0].shape == (64, 64, 3)


def test_folders_that_are_no_decoder(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = runs["sd3"]
    for decoder in (folder / "run/sft", folder / "base", folder / "generator"):
        with pytest.raises(CheckpointError, match="is no image decoder's checkpoint; train one"):
            Generator.load(folder / "run", decoder=decoder)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        Generator.load(folder / "run", decoder=tmp_path / "nowhere")
    for model in (folder / "run/decoder", find_checkpoint(folder / "run/decoder"), folder / "generator"):
        with pytest.raises(UserError, match="is an image decoder alone; give the run's folder"):
            Generator.load(model)


def test_a_run_without_a_decoder_has_no_pixels(runs: dict[str, Path]) -> None:
    with Generator.load(runs["sd3"] / "run/sft") as generator:
        assert not generator.paints
        with pytest.raises(UserError, match=r"run/sft/.* has no image decoder beside it; .* --decoder"):
            generator.vae_round_trip([picture(0)])
    with pytest.raises(UserError, match="nothing is shared by 2 context-parallel ranks; leave --context out"):
        Generator.load(runs["sd3"] / "run/sft", context=2)


def test_a_decoder_in_another_run(runs: dict[str, Path]) -> None:
    """Given by its step, its stage or its run, which has a language model too."""
    wanted = find_checkpoint(runs["flux"] / "run/decoder")
    for named in (wanted, wanted.parent, runs["flux"] / "run/decoder", runs["flux"] / "run"):
        with Generator.load(runs["sd3"] / "run", decoder=named) as generator:
            assert generator.painter is not None
            assert generator.painter.origin == str(wanted)
            assert generator.painter.generator.mmdit.family == "flux"


def test_a_stage_of_packed_batches_generates(runs: dict[str, Path]) -> None:
    """``global_batch_rows`` and ``global_batch_size`` exclude each other, and neither matters here."""
    meta = read_meta(find_checkpoint(runs["sd3"] / "run/sft"))
    config = yaml.safe_load(meta["config"])
    config["train"] |= {"global_batch_size": None, "global_batch_rows": 3, "epochs": None, "steps": 5}
    meta["config"] = yaml.safe_dump(config)
    stage = generation_stage(meta, ParallelConfig(), world_size=2, dtype="float32", with_base=False)
    assert (stage.train.global_batch_size, stage.train.global_batch_rows) == (2, None)
