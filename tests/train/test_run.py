"""``unimm train`` from end to end on one rank: stages hand over, a resume is bit for bit, signals, bad input."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_orion import SMALL

from megatron_unimm.checkpoint.store import latest, save
from megatron_unimm.config.load import load_recipe, select_stage
from megatron_unimm.convert import verify
from megatron_unimm.data.shapes import write_shapes
from megatron_unimm.errors import UserError
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.feature_cache import make_cache
from megatron_unimm.train.run import train_stage
from megatron_unimm.train.state import checkpoint_folder, model_state

SETTINGS = (
    *SMALL,
    "data.sequence_length=512",
    "train.global_batch_size=8",
    "train.steps=4",
    "train.checkpoint.every_steps=2",
    "train.logging.every_steps=1",
)
Train = Callable[..., int]


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """Shapes data and a random base model's checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    write_shapes(folder / "data", count=60, seed=1)
    stage = select_stage(load_recipe(repo / "configs/orion/shapes.yaml", SETTINGS), "sft")
    platform, groups = setup.enter(stage)
    _, chunks = setup.build_model(stage, platform, groups)
    meta = {"kind": "base_model", "family": "qwen2_5_vl", "architecture": stage.model.model_dump(mode="json")}
    hf_files = folder / "hf"
    hf_files.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(repo / "tools/base_models/shapes_vlm" / name, hf_files / name)
    save(model_state(chunks, groups), folder / "base", meta, hf_files=hf_files)
    destroy_groups()
    return folder


@pytest.fixture
def overrides(world_folder: Path) -> list[str]:
    kinds = ("understanding", "text_to_image", "editing")
    data = [f"data.sources.{kind}.path={world_folder}/data/train/{kind}.jsonl" for kind in kinds]
    return [*SETTINGS, f"base_checkpoint={world_folder}/base", *data]


@pytest.fixture
def train(repo: Path, overrides: list[str]) -> Train:
    """Run a stage of the small recipe: train(stage, run_dir, *more overrides, resume=)."""

    def run(stage: str, run_dir: Path, *more: str, resume: str = "auto") -> int:
        recipe = load_recipe(repo / "configs/orion/shapes.yaml", [*overrides, *more])
        return train_stage(recipe, select_stage(recipe, stage), run_dir, resume)

    return run


def records(run_dir: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]


def test_three_stages_hand_over(train: Train, tmp_path: Path) -> None:
    """Warm-up moves the head alone; pretrain starts from it; SFT reads all three kinds."""
    for stage in ("warm_up", "pretrain", "sft"):
        assert train(stage, tmp_path) == 0
    first, last = (records(tmp_path, "warm_up")[i] for i in (0, -1))
    assert last["losses"]["mse"] < first["losses"]["mse"]
    assert first["losses"]["cross_entropy"] == first["losses"]["kl"] == 0
    assert first["module_norms"]["backbone.decoder"] == 0 < first["module_norms"]["vision_head"]
    # The head that warm-up made is what pretrain starts with, not a new one.
    assert records(tmp_path, "pretrain")[0]["losses"]["mse"] < first["losses"]["mse"]
    assert set(records(tmp_path, "sft")[-1]["draws"]) == {"understanding", "text_to_image", "editing"}
    assert min(records(tmp_path, "sft")[-1]["losses"].values()) > 0


def test_resume_is_exact(train: Train, tmp_path: Path) -> None:
    """Two more steps after a resume give the same checkpoint, bit for bit, and the same losses."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train("warm_up", straight) == 0
    assert train("pretrain", straight) == 0
    shutil.copytree(straight, resumed)
    folder = checkpoint_folder(resumed, "pretrain")
    shutil.rmtree(folder / "step_00000004")
    assert latest(folder) == folder / "step_00000002"
    assert train("pretrain", resumed) == 0
    report = verify(checkpoint_folder(straight, "pretrain") / "step_00000004", folder / "step_00000004")
    assert report.identical, report.differences[:3]
    assert report.tensors > 40
    kept = ("step", "losses", "gradient_norm", "learning_rates", "draws")
    expected, found = (
        [{key: line[key] for key in kept} for line in records(d, "pretrain")] for d in (straight, resumed)
    )
    assert found == expected


def test_signal_saves_and_asks_to_be_run_again(overrides: list[str], repo: Path, tmp_path: Path) -> None:
    """SIGTERM: the step ends, a checkpoint is committed, exit code 75."""
    command = [sys.executable, "-m", "megatron_unimm.cli", "train", str(repo / "configs/orion/shapes.yaml")]
    more = [
        "--stage",
        "warm_up",
        "--run-dir",
        str(tmp_path),
        *overrides,
        "train.steps=100000",
        "train.checkpoint.every_steps=100000",
    ]
    process = subprocess.Popen(
        [*command, *more], cwd=repo, env={**os.environ, "PYTHONPATH": str(repo)}, stderr=subprocess.PIPE
    )
    metrics = tmp_path / "warm_up" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors.decode()[-2000:]
    assert latest(checkpoint_folder(tmp_path, "warm_up")) is not None


def test_a_profile_of_some_steps(train: Train, tmp_path: Path) -> None:
    """Steps 2 and 3 of four, as a trace that says so and a table of operators; the same losses as without."""
    assert train("warm_up", tmp_path / "plain", "train.steps=4") == 0
    settings = ("train.profile.first_step=2", "train.profile.shapes=true")
    assert train("warm_up", tmp_path / "traced", "train.steps=4", *settings) == 0
    folder = tmp_path / "traced/warm_up/profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000002.rank00000.json.gz",
        "step_00000002.rank00000.txt",
    ]
    events = json.loads(gzip.decompress((folder / "step_00000002.rank00000.json.gz").read_bytes()))["traceEvents"]
    named = Counter(event.get("name") for event in events)
    assert [named[f"step {step}"] for step in (1, 2, 3, 4)] == [0, 1, 1, 0]
    assert named["aten::mm"] > 0
    # Each of the two steps updates the weights once: those that decay, and the others.
    assert named["aten::_fused_adamw_"] == 2 * 2
    assert "aten::mm" in (folder / "step_00000002.rank00000.txt").read_text()
    plain, traced = (records(tmp_path / name, "warm_up") for name in ("plain", "traced"))
    assert [record["losses"] for record in plain] == [record["losses"] for record in traced]


def test_one_bad_sample_is_counted_and_passed_over(train: Train, world_folder: Path, tmp_path: Path) -> None:
    """A malformed line and a missing image among many: training goes on and says how many."""
    lines = (world_folder / "data/train/text_to_image.jsonl").read_text().splitlines()
    missing = json.loads(lines[3]) | {"image": "images/none.png"}
    bad = world_folder / "data/train/bad.jsonl"
    bad.write_text("\n".join([*lines[:2], "{not json", json.dumps(missing), *lines[4:16]]) + "\n")
    assert train("warm_up", tmp_path, f"data.sources.text_to_image.path={bad}", "train.global_batch_size=16") == 0
    faults = records(tmp_path, "warm_up")[-1]["faults"]
    assert sum(faults.values()) >= 2
    assert len(faults) == 2


WRONG = {
    "unknown key": (("train.optimizer.beta3=0.9",), r"train\.optimizer\.beta3.*beta2"),
    "world size": (("system.parallel.tensor=2",), r"system\.parallel.*1.*2|world size"),
    "predecessor": ((), r"stage sft.*pretrain"),
    "missing data": (("data.sources.text_to_image.path=/none.jsonl",), r"/none\.jsonl"),
    "architecture": (("model.backbone.mlp_size=64",), r"model\.backbone\.mlp_size is 96 there.*64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_names_its_place(name: str, train: Train, tmp_path: Path) -> None:
    more, pattern = WRONG[name]
    stage = "sft" if name == "predecessor" else "warm_up"
    with pytest.raises(UserError, match=pattern) as caught:
        train(stage, tmp_path, *more)
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()


# --- features computed beforehand


def make_features(repo: Path, overrides: list[str], folder: Path, *more: str) -> int:
    recipe = load_recipe(repo / "configs/orion/shapes.yaml", [*overrides, *more])
    return make_cache(select_stage(recipe, "warm_up"), folder, run_dir=folder)[folder]


def test_cached_features_train_alike(repo: Path, overrides: list[str], train: Train, tmp_path: Path) -> None:
    """The same losses as with pixels, on one rank and on the two stages of a pipeline; nothing is decoded."""
    assert make_features(repo, overrides, tmp_path / "features") > 10
    assert train("warm_up", tmp_path / "pixels") == 0
    use = f"data.feature_cache={tmp_path}/features"
    assert train("warm_up", tmp_path / "cached", use) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_unimm.cli", "train", "configs/orion/shapes.yaml", "--stage", "warm_up"]
    settings = [*overrides, use, "system.parallel.pipeline=2"]
    subprocess.run(
        [*command, "--run-dir", str(tmp_path / "pipeline"), *settings], cwd=repo, check=True, capture_output=True
    )
    losses = {
        name: [record["losses"]["mse"] for record in records(tmp_path / name, "warm_up")]
        for name in ("pixels", "cached", "pipeline")
    }
    assert losses["cached"] == pytest.approx(losses["pixels"], rel=1e-5)
    assert losses["pipeline"] == pytest.approx(losses["pixels"], rel=1e-5)


def test_cached_features_must_fit(repo: Path, overrides: list[str], train: Train, tmp_path: Path) -> None:
    """Of another model, for a tower that trains, unfinished, or without an image: each says what to do."""
    features = tmp_path / "features"
    make_features(repo, overrides, features)
    use = f"data.feature_cache={features}"
    with pytest.raises(UserError, match="set, but the vision encoder trains in stage sft"):
        train("sft", tmp_path / "a", use, "stages.sft.after=null")
    destroy_groups()
    with pytest.raises(UserError, match=r"exists already; choose another name"):
        make_features(repo, overrides, features)
    meta = json.loads((features / "meta.json").read_text())
    (features / "meta.json").write_text(json.dumps({**meta, "weights": "0" * 64}))
    with pytest.raises(UserError, match="weights differs: of another model; make it again with unimm data cache"):
        train("warm_up", tmp_path / "b", use)
    destroy_groups()
    (features / "meta.json").write_text(json.dumps(meta))
    for path in features.glob("part-*.rows"):
        path.unlink()
    with pytest.raises(UserError, match=r"lacks .*\.(jpg|png) of .*; run unimm data cache again"):
        train("warm_up", tmp_path / "c", use)
    destroy_groups()
    (features / "meta.json").unlink()
    with pytest.raises(UserError, match="is no finished cache of features"):
        train("warm_up", tmp_path / "d", use)
    destroy_groups()
