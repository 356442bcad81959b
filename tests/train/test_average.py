"""The running average of the weights: its closed form, skipped steps, and its way through checkpoints."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_decoder import (
    SMALL_DECODER,
    World,
    decoder_step,
    make_picture,
    row_of,
    shake,
    small_decoder,
    small_recipe,
    write_world,
)

from megatron_unimm.checkpoint.folder import AVERAGE_PREFIX
from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.load import select_stage
from megatron_unimm.convert import export_checkpoint
from megatron_unimm.errors import CheckpointError
from megatron_unimm.train import setup
from megatron_unimm.train.average import WeightAverage
from megatron_unimm.train.run import train_stage
from megatron_unimm.train.state import Checkpointer, Start, checkpoint_folder, load_average
from megatron_unimm.train.step import TrainStep

DECAY = 0.28
"""Over what the first two steps take, 2/11 and 3/12, and under the third's, 4/13."""
STEPS = 4
SETTINGS = (
    f"train.ema_decay={DECAY}",
    f"train.steps={STEPS}",
    "train.checkpoint={every_steps: 1, keep_last: 10, asynchronous: false}",
    "train.logging={every_steps: 1, pictures_every_steps: null}",
)


def decay_of(step: int) -> float:
    """In the n-th step, from 1."""
    return min(DECAY, (1 + step) / (10 + step))


@pytest.fixture(scope="module")
def overrides(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*write_world(repo, tmp_path_factory.mktemp("average")), *SETTINGS]


@pytest.fixture(scope="module")
def two_ranks(repo: Path, overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of each step of a run on two data-parallel ranks."""
    run_dir = tmp_path_factory.mktemp("two_ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_unimm.cli", "train", "configs/orion/shapes.yaml", "--stage", "decoder"]
    done = subprocess.run(
        [*command, "--run-dir", str(run_dir), *SMALL_DECODER, *overrides],
        cwd=repo,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return checkpoint_folder(run_dir, "decoder")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    with Reader(directory) as reader:
        return {key: reader.read(key) for key in reader.tensors}


def averages(directory: Path) -> dict[str, torch.Tensor]:
    """By the parameter's name."""
    found = tensors(directory).items()
    return {key.removeprefix(AVERAGE_PREFIX): value for key, value in found if key.startswith(AVERAGE_PREFIX)}


def weights(step: TrainStep) -> dict[str, torch.Tensor]:
    """Of what trains."""
    named = step.chunks[0].module.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named if parameter.requires_grad}


# -- on one rank, step by step


def test_closed_form_and_skipped_steps(repo: Path, world: World) -> None:
    """ā = Π d_i w_0 + Σ (1 − d_i) Π d_j w_i over the steps that were taken; a step left out changes neither the average
    nor how far the decay has warmed up."""
    stage = small_decoder(repo, f"train.ema_decay={DECAY}")
    step = decoder_step(stage, world)
    assert step.average is not None
    good = row_of(stage, [make_picture(stage, name) for name in ("a", "b")], world)
    bad = replace(good, pixels=np.full_like(good.pixels, np.nan))
    history = [torch.cat([weight.flatten().double() for weight in step.average.weights])]
    for number, row in enumerate((good, bad, good, good, bad, good)):
        before = [average.clone() for average in step.average.average]
        result = step.run([row], 1e-2)
        assert result.skip.item() == float(row is bad), number
        if row is bad:
            assert all(torch.equal(a, b) for a, b in zip(step.average.average, before, strict=True))
        else:
            history.append(torch.cat([weight.flatten().double() for weight in step.average.weights]))
    assert step.average.steps.item() == len(history) - 1 == STEPS
    shares = [1.0, *(1 - decay_of(n) for n in range(1, STEPS + 1))]
    left = [np.prod([decay_of(n) for n in range(number + 1, STEPS + 1)]) for number in range(STEPS + 1)]
    assert sum(s * rest for s, rest in zip(shares, left, strict=True)) == pytest.approx(1)
    expected = sum(s * rest * weight for s, rest, weight in zip(shares, left, history, strict=True))
    found = torch.cat([average.flatten().double() for average in step.average.average])
    assert (history[-1] - history[0]).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_average_of_bf16_weights_keeps_what_they_lose(repo: Path, world: World) -> None:
    """It averages the fp32 master weights: steps too small for bfloat16 move it."""
    stage = small_decoder(repo, "train.ema_decay=0.5", "system.precision.dtype=bfloat16")
    step = decoder_step(stage, world)
    assert step.average is not None
    row = row_of(stage, [make_picture(stage, "a", grids=[(4, 4), (4, 4)])], world)
    before = weights(step)["mmdit.final_linear.weight"]
    start = [average.clone() for average in step.average.average]
    step.run([row], 1e-6)
    assert {weight.dtype for weight in step.average.weights} == {torch.float32}
    large = before.abs() > 1e-3
    assert torch.equal(weights(step)["mmdit.final_linear.weight"][large], before[large])
    moved = [(average - old).abs().max() for average, old in zip(step.average.average, start, strict=True)]
    assert sum(distance == 0 for distance in moved) <= 1  # nothing reads what the text of the last block asks for
    assert max(moved) < 1e-5


class FrozenStage:
    """What the optimizer is to a stage of a pipeline in which nothing trains: groups without parameters."""

    chained_optimizers = ()

    def sharded_state_dict(self, model_state: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {"groups": ["empty"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"groups": ["empty"]}


def test_a_rank_on_which_nothing_trains(repo: Path, overrides: list[str], world: World, tmp_path: Path) -> None:
    """It may be the first rank, the one that saves how many steps there were."""
    step = decoder_step(small_decoder(repo, *overrides), world)
    averages = [WeightAverage(FrozenStage(), DECAY, torch.device("cpu")) for _ in range(2)]
    first, second = (
        Checkpointer(step.stage, step.method, tmp_path, step.chunks, FrozenStage(), average, step.groups, None)
        for average in averages
    )
    for skip in (0.0, 1.0, 0.0):
        averages[0].update(torch.tensor(skip))
    second.restore(first.save(3, {}, asynchronous=False))
    assert averages[1].steps.item() == averages[0].steps.item() == 2


# -- over ranks and checkpoints


def test_two_ranks_follow_the_closed_form(repo: Path, overrides: list[str], two_ranks: Path) -> None:
    """From the weights that the steps' checkpoints hold; the run began with the image generator's."""
    first = tensors(two_ranks / "step_00000001")
    begun = tensors(Path(small_decoder(repo, *overrides).generator_checkpoint))
    trained = {key for key in first if key.startswith(("mmdit.", "connector."))} - {
        "mmdit.latent_embedder.position_table"
    }
    assert set(averages(two_ranks / "step_00000001")) == trained
    average = {key: begun[key].double() for key in trained if key in begun}  # the connector begins anew
    assert len(average) > 30
    moved = 0.0
    for number in range(1, STEPS + 1):
        directory = two_ranks / f"step_{number:08d}"
        assert read_meta(directory)["average_steps"] == number
        plain, found = tensors(directory), averages(directory)
        for key, value in average.items():
            value += (1 - decay_of(number)) * (plain[key].double() - value)
            torch.testing.assert_close(found[key].double(), value, rtol=0, atol=1e-6, msg=key)
            moved = max(moved, float((plain[key] - found[key]).abs().max()))
    assert moved > 1e-4


def restored(repo: Path, overrides: list[str], directory: Path, run_dir: Path, world: World) -> Checkpointer:
    """One rank's job, filled with a checkpoint."""
    stage = small_decoder(repo, *overrides)
    step = decoder_step(stage, world, seed=5)
    setup.fill([step.chunks[0].module], stage, step.method, Start(directory, resume=True), step.groups)
    checkpointer = Checkpointer(
        stage, step.method, run_dir, step.chunks, step.optimizer, step.average, step.groups, None
    )
    checkpointer.restore(directory)
    return checkpointer


def test_two_ranks_to_one_and_back_to_a_checkpoint(
    repo: Path, overrides: list[str], two_ranks: Path, world: World, tmp_path: Path
) -> None:
    """Read on one rank and written again, every tensor is bit for bit what it was: weights, moments, averages."""
    directory = two_ranks / f"step_{STEPS:08d}"
    checkpointer = restored(repo, overrides, directory, tmp_path, world)
    assert checkpointer.average is not None
    assert checkpointer.average.steps.item() == STEPS
    again = checkpointer.save(STEPS, {}, asynchronous=False)
    expected, found = tensors(directory), tensors(again)
    assert set(found) == set(expected)
    assert any(key.startswith("optimizer.state.exp_avg.") for key in found)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert read_meta(again)["average_steps"] == STEPS
    moment = "mmdit.final_linear.weight"
    assert not torch.equal(found[AVERAGE_PREFIX + moment], found[f"optimizer.state.exp_avg.{moment}"])


def test_a_resumed_run_goes_on_averaging(repo: Path, overrides: list[str], two_ranks: Path, world: World) -> None:
    """The next step on one rank moves the restored average by its own closed form, at the decay that it had reached."""
    directory = two_ranks / "step_00000001"
    stage = small_decoder(repo, *overrides)
    step = decoder_step(stage, world, seed=5)
    assert step.average is not None
    setup.fill([step.chunks[0].module], stage, step.method, Start(directory, resume=True), step.groups)
    Checkpointer(stage, step.method, directory, step.chunks, step.optimizer, step.average, step.groups, None).restore(
        directory
    )
    before = [average.clone() for average in step.average.average]
    step.run([row_of(stage, [make_picture(stage, "a")], world)], 1e-2)
    for average, old, weight in zip(step.average.average, before, step.average.weights, strict=True):
        torch.testing.assert_close(average, old + (1 - decay_of(2)) * (weight - old), rtol=0, atol=1e-6)


def test_load_average_gives_the_averages(repo: Path, overrides: list[str], two_ranks: Path, world: World) -> None:
    """Weights that train come from the average, frozen ones and buffers as they are; without an average all do."""
    platform, groups = world
    directory = two_ranks / f"step_{STEPS:08d}"
    plain, averaged = tensors(directory), averages(directory)
    generator = Path(small_decoder(repo, *overrides).generator_checkpoint)
    _, (chunk,) = setup.build_model(small_decoder(repo, *overrides), platform, groups)
    shake([chunk], seed=9)
    load_average([chunk], directory, groups)
    kinds = {True: 0, False: 0}
    for name, value in chunk.state_dict().items():
        if value is None or name.startswith("base.") or name.endswith("_extra_state"):
            continue
        kinds[name in averaged] += 1
        assert torch.equal(value, averaged.get(name, plain[name])), name
        assert name.startswith(("vae.", "mmdit.latent_embedder.position_table")) == (name not in averaged), name
    assert min(kinds.values()) > 10
    assert not torch.equal(averaged["connector.linear_1.weight"], plain["connector.linear_1.weight"])
    with pytest.raises(CheckpointError, match="connector"):  # a generator is no decoder yet
        load_average([chunk], generator, groups)


def test_checkpoint_without_an_average(repo: Path, overrides: list[str], tmp_path: Path) -> None:
    """Going on with ema_decay set says what to do, in one line; the other way round the average is dropped."""
    short = [*overrides, "train.steps=1"]

    def train(*more: str) -> int:
        recipe = small_recipe(repo, *short, *more)
        return train_stage(recipe, select_stage(recipe, "decoder"), tmp_path)

    assert train("train.ema_decay=null") == 0
    directory = checkpoint_folder(tmp_path, "decoder") / "step_00000001"
    assert read_meta(directory)["average_steps"] is None
    assert not averages(directory)
    with pytest.raises(CheckpointError, match=r"has no average of the weights; set train\.ema_decay to null") as caught:
        train("train.steps=2")
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()
    assert train("train.steps=2", "train.ema_decay=null") == 0


def test_a_run_may_drop_its_average(
    repo: Path, overrides: list[str], two_ranks: Path, world: World, tmp_path: Path
) -> None:
    without = restored(repo, [*overrides, "train.ema_decay=null"], two_ranks / "step_00000002", tmp_path, world)
    saved = without.save(2, {}, asynchronous=False)
    assert not averages(saved)
    expected = tensors(two_ranks / "step_00000002")
    assert all(torch.equal(value, expected[key]) for key, value in tensors(saved).items())


def test_export_leaves_the_average_out(two_ranks: Path, tmp_path: Path) -> None:
    """A Hugging Face folder has the plain weights; what it names is the same with and without an average."""
    export_checkpoint(two_ranks / f"step_{STEPS:08d}", tmp_path / "exported")
    names = [str(path.relative_to(tmp_path)) for path in (tmp_path / "exported").rglob("*")]
    assert names
    assert not [name for name in names if "average" in name]
    index = [json.loads(path.read_text()) for path in (tmp_path / "exported").rglob("*.index.json")]
    assert not any("average" in key for each in index for key in each.get("weight_map", {}))
