"""MMCORE's diffusion transformer: its loss against a computation in the open, what a frame sees, what gets gradients,
where weights come from, and FLOPs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from megatron.core.dist_checkpointing import ShardedTensor
from small_decoder import generator_of
from small_diffusion import (
    MODELS,
    SMALL,
    SOME_OF_THE_VLM,
    THREE,
    World,
    chunk_of,
    diffusion_step,
    make_frames,
    row_of,
    several,
    small_diffusion,
    small_recipe,
    write_world,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_unimm.checkpoint.ranks import Ranks
from megatron_unimm.checkpoint.store import save
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.cli.main import unimm
from megatron_unimm.config.load import select_stage
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.convert import verify
from megatron_unimm.data.conditions import ConditionStore
from megatron_unimm.data.features import FeatureStore, Key
from megatron_unimm.data.frames import FrameRow, FrameSample
from megatron_unimm.errors import ConfigError, UserError
from megatron_unimm.methods.drawing.model import DrawingModel, PictureInput
from megatron_unimm.methods.mmcore import flops as mmcore_flops
from megatron_unimm.methods.mmcore.diffusion.flops import row_flops
from megatron_unimm.methods.mmcore.diffusion.model import DiffusionBatch
from megatron_unimm.methods.mmcore.model import MMCoreVlm
from megatron_unimm.models.mmdit import modulation
from megatron_unimm.models.mmdit.canvas import Canvas
from megatron_unimm.models.mmdit.frames import Frames
from megatron_unimm.models.mmdit.trunk import MMDiTInput
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.caches import condition_metas, open_caches
from megatron_unimm.train.feature_cache import make_cache
from megatron_unimm.train.run import train_stage
from megatron_unimm.train.state import checkpoint_folder, find_start, model_state
from megatron_unimm.train.step import TrainStep


def batch_of(step: TrainStep, row: FrameRow) -> DiffusionBatch:
    return step.method.batch(row, chunk_of(step), torch.device("cpu"))


def sums_and_gradients(step: TrainStep, rows: Sequence[FrameRow]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums of the terms, and every gradient of the loss's sum."""
    counts = torch.tensor(step.method.counts(rows), dtype=torch.float32)
    means = step.forward_backward(rows)
    named = chunk_of(step).named_parameters()
    return means * counts, {name: p.main_grad * counts[0] for name, p in named if p.requires_grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every gradient to 1e-4 of its norm."""
    total = torch.stack([gradient.square().sum() for gradient in expected.values()]).sum().sqrt()
    assert total > 1e-3
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * total, name


# -- the loss


def folded(patches: Tensor, rows: int, columns: int, side: int) -> Tensor:
    return F.fold(patches.T[None], (rows * side, columns * side), side, stride=side)


def frame_loss(
    step: TrainStep, sample: FrameSample, number: int, condition: Tensor, read: Sequence[Tensor] = ()
) -> tuple[Tensor, float]:
    """Summed squared error of one noisy frame, and its timestep: the transformer sees its condition, it, and the clean
    pictures before it, and nothing else is there.

    Args:
        read: ``[u, H]`` of each picture, added to its clean tokens.
    """
    chunk, generator = chunk_of(step), generator_of(step.stage)
    side, patch, vae = generator.token_pixels, generator.mmdit.patch_size, generator.vae
    x_0 = []
    for pixels, (rows, columns) in zip(
        np.split(sample.pixels, np.cumsum(sample.sizes.prod(axis=1))[:-1]), sample.sizes, strict=True
    ):
        picture = folded(torch.from_numpy(pixels), rows, columns, side)
        latents = (chunk.vae.encode(picture).latent_dist.mean - vae.shift_factor) * vae.scaling_factor
        x_0.append(F.unfold(latents, patch, stride=patch)[0].T)  # [U, F]
    uniform = torch.tensor(sample.uniform[number], dtype=torch.float64)
    t = torch.sigmoid(torch.distributions.Normal(0.5, 1.0).icdf(uniform))  # logit normal as the recipe has it
    numbers = np.random.Generator(np.random.Philox(key=sample.noise_seed + number))
    noise = torch.from_numpy(numbers.standard_normal(x_0[number].shape, np.float32))
    x_t = ((1 - t) * x_0[number] + t * noise).float()
    frames = Frames(
        sizes=sample.sizes[: number + 1],
        num_condition=np.array([0] * number + [len(condition)]),
        sample=np.zeros(number + 1, dtype=np.int64),
        number=np.arange(number + 1),
        is_clean=np.arange(number + 1) < number,
    )
    canvas = Canvas.build(
        frames, len(condition), len(condition) + int(frames.counts.sum()), generator, chunk.place(None)
    )
    added = torch.zeros(int(frames.counts.sum()), generator.mmdit.hidden_size)
    if generator.mmdit.family == "sd3":
        added = chunk.frame_embedding(torch.from_numpy(np.repeat(frames.number, frames.counts)))
    if read:
        added = added + torch.cat([*read[:number], torch.zeros(len(x_t), added.shape[1])])
    inputs = MMDiTInput(
        condition=condition,
        patches=torch.cat([*x_0[:number], x_t]),
        position_index=canvas.position_index,
        timestep=torch.tensor([0.0] * number + [float(t)]),
        pooled=chunk.pathways.pooled.expand(number + 1, -1),
        guidance=torch.full((number + 1,), 3.5) if generator.mmdit.guidance else None,
        added=added,
    )
    velocity = chunk.mmdit(canvas.row, inputs, None)[-len(noise) :]
    return (velocity - (noise - x_0[number])).square().mean(dim=1).sum(), float(t)


def sample_losses(step: TrainStep, sample: FrameSample, read: Sequence[Tensor] = ()) -> list[tuple[Tensor, float, int]]:
    """Of each picture of a conversation, from the VLM on it alone: the loss, the timestep, and its tokens."""
    chunk, queries = chunk_of(step), sample.queries[0]
    alone = batch_of(step, row_of(step.stage, [sample])).condition
    assert alone is not None
    hidden, latents = chunk.vlm.condition(alone.conversation)
    found = []
    for place, number in enumerate(np.flatnonzero(sample.is_drawn)):
        words = chunk.pathways.text.norm(hidden[torch.from_numpy(sample.layout.text_index[place])])
        visual = chunk.pathways.visual.norm(latents[place * queries : (place + 1) * queries])
        text, seen = chunk.pathways.text, chunk.pathways.visual
        words = text.linear_2(F.gelu(text.linear_1(words * (sample.text_uniform[number] >= 0.4))))
        visual = seen.linear_2(F.gelu(seen.linear_1(visual * (sample.visual_uniform[number] >= 0.3))))
        condition = torch.cat([words, visual + chunk.pathways.place])
        loss, t = frame_loss(step, sample, int(number), condition, read)
        found.append((loss, t, int(sample.sizes[number].prod())))
    return found


@pytest.mark.parametrize("model", MODELS)
def test_loss_equals_a_computation_frame_by_frame(model: str, repo: Path, world: World) -> None:
    """Every term, and every gradient, of a packed row of conversations of up to three frames."""
    step = diffusion_step(small_diffusion(repo, *MODELS[model]), world)
    samples = several(step.stage)
    row = row_of(step.stage, samples)
    assert 0 < row.text_kept.mean() < 1
    assert 0 < row.visual_kept.mean() < 1
    found, gradients = sums_and_gradients(step, [row])
    each = [loss for sample in samples if sample.learned for loss in sample_losses(step, sample)]
    assert len(each) == 1 + 2 + 1 + 3
    total = sum(loss for loss, _, _ in each)
    expected = torch.zeros(11)
    expected[0] = total.detach()
    for loss, t, _ in each:
        expected[1 + int(t * 10)] += loss.detach()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert step.method.counts([row])[0] == sum(tokens for _, _, tokens in each)
    trained = {name: p for name, p in chunk_of(step).named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    right = {
        name: torch.zeros_like(trained[name]) if gradient is None else gradient
        for name, gradient in zip(trained, wanted, strict=True)
    }
    assert_same(gradients, right)


@pytest.mark.parametrize("model", MODELS)
def test_packed_equals_unpacked(model: str, repo: Path, world: World) -> None:
    step = diffusion_step(small_diffusion(repo, *MODELS[model]), world)
    samples = several(step.stage)
    packed = sums_and_gradients(step, [row_of(step.stage, samples)])
    alone = sums_and_gradients(step, [row_of(step.stage, [sample]) for sample in samples])
    torch.testing.assert_close(packed[0], alone[0], rtol=1e-5, atol=1e-6)
    assert_same(packed[1], alone[1])


def test_dropout_goes_by_the_step(repo: Path, world: World) -> None:
    """Later steps leave less out, and so have another loss, of the same rows otherwise."""
    annealed = "stages.diffusion.method.text_dropout={start: 1.0, end: 0.0, steps: 10}"
    step = diffusion_step(small_diffusion(repo, annealed), world)
    samples = several(step.stage)
    rows = [row_of(step.stage, samples, number) for number in (0, 5, 10, 1000)]
    assert [float(row.text_kept.mean()) for row in rows[::3]] == [0.0, 1.0]
    losses = [step.forward_backward([row], forward_only=True)[0].item() for row in rows]
    assert losses[2] == losses[3]
    assert len(set(losses[:3])) == 3
    words_left_out = replace(rows[3], text_kept=np.zeros_like(rows[3].text_kept))
    assert step.forward_backward([words_left_out], forward_only=True)[0].item() == losses[0]


# -- what a frame sees


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_what_frames_see(model: str, earlier: bool, repo: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a conversation of three: gradients of each picture's velocity to all conditions and all pictures. A frame
    follows its own words and visual latents and nobody else's, and all pictures up to itself. Where it sees earlier
    visual latents, it follows through them the words that these have seen."""
    settings = (*MODELS[model], f"method.earlier_latents={str(earlier).lower()}")
    step = diffusion_step(small_diffusion(repo, *settings), world)
    chunk, sample = chunk_of(step), make_frames(step.stage, "three", ("says", 4), ("draws", 2, 2), *THREE[1:])
    no_dropout = {"text_uniform": np.ones(3), "visual_uniform": np.ones(3)}
    row = row_of(step.stage, [replace(sample, **no_dropout), *several(step.stage)])
    batch = batch_of(step, row)
    assert batch.condition is not None
    with torch.no_grad():
        hidden, latents = chunk.vlm.condition(batch.condition.conversation)
        pictures = chunk._encoded(batch.pictures)
    for leaf in (hidden, latents, pictures):
        leaf.requires_grad_()
    monkeypatch.setattr(chunk.vlm, "condition", lambda conversation: (hidden, latents))
    given = vars(batch.pictures) | {"pixels": None, "latents": pictures}
    batch = replace(batch, pictures=PictureInput(**given))
    velocities: list[Tensor] = []
    handle = chunk.mmdit.register_forward_hook(lambda module, inputs, output: velocities.append(output))
    chunk(batch)
    handle.remove()
    counts, queries = row.frames.counts, sample.queries[0]
    bounds = np.cumsum([0, *counts])
    noisy = [place for place in range(5) if not row.frames.is_clean[place]]
    assert row.frames.number[:5].tolist() == [0, 0, 1, 1, 2]
    words = [torch.from_numpy(index) for index in sample.layout.text_index]
    tokens = np.cumsum([0, *sample.sizes.prod(axis=1)])
    for frame, place in enumerate(noisy):
        target = velocities[0][bounds[place] : bounds[place + 1]].square().sum()
        by_word, by_latent, by_picture = torch.autograd.grad(target, (hidden, latents, pictures), retain_graph=True)
        for other in range(3):
            moves = [
                by_word.index_select(0, words[other]).any(),
                by_latent[other * queries : (other + 1) * queries].any(),
                by_picture[tokens[other] : tokens[other + 1]].any(),
            ]
            own = other == frame or (earlier and other < frame)
            assert [bool(each) for each in moves] == [own, own, other <= frame], (frame, other)
        assert not by_picture[tokens[3] :].any(), "other conversations"
        assert not by_latent[3 * queries :].any()


# -- what trains


def gradients_of_the_vlm(step: TrainStep, row: FrameRow) -> dict[str, Tensor | None]:
    chunk = chunk_of(step)
    chunk(batch_of(step, row))[0].backward()
    vlm = {name: p for name, p in chunk.named_parameters() if name.startswith("vlm.")}
    return {name: getattr(p, "main_grad", None) if p.requires_grad else p.grad for name, p in vlm.items()}


def test_a_frozen_vlm_gets_no_gradient(repo: Path, world: World) -> None:
    """Nor does anything need one: what the pathways read is no part of a graph."""
    step = diffusion_step(small_diffusion(repo), world)
    row = row_of(step.stage, several(step.stage))
    assert set(gradients_of_the_vlm(step, row).values()) == {None}
    batch = batch_of(step, row)
    assert batch.condition is not None
    assert not any(each.requires_grad for each in chunk_of(step).vlm.condition(batch.condition.conversation))


def test_queries_train_where_the_table_says_so(repo: Path, world: World) -> None:
    """They are among what the whole frozen backbone reads."""
    step = diffusion_step(small_diffusion(repo, SOME_OF_THE_VLM), world)
    found = gradients_of_the_vlm(step, row_of(step.stage, several(step.stage)))
    trained = {name for name, gradient in found.items() if gradient is not None}
    assert trained == {name for name in found if name.startswith(("vlm.query_tokens.", "vlm.query_connector."))}
    assert all(found[name].norm() > 1e-6 for name in trained)


# -- where weights come from, and where they go


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the imported models and the data."""
    return tmp_path_factory.mktemp("imported")


@pytest.fixture(scope="module")
def overrides(repo: Path, imported: Path) -> list[str]:
    run = ["train.checkpoint.every_steps=2", "train.steps=4", "train.ema_decay=0.9", "train.global_batch_size=6"]
    pictures = "train.logging={every_steps: 1, pictures_every_steps: null}"
    return [*write_world(repo, imported), *run, pictures]


@pytest.fixture(scope="module")
def run_dir(repo: Path, overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("vlm", "diffusion"):
        train(repo, folder, stage, overrides)
    return folder


def train(repo: Path, run_dir: Path, stage: str, overrides: Sequence[str]) -> list[dict]:
    """A whole run of a stage; what it logged."""
    recipe = small_recipe(repo, *overrides)
    try:
        assert train_stage(recipe, select_stage(recipe, stage), run_dir) == 0
    finally:
        destroy_groups()
    return [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]


def tensors(directory: Path, *parts: str) -> dict[str, Tensor]:
    """Of a checkpoint; only of parts where they are given."""
    with Reader(directory) as reader:
        return {key: reader.read(key) for key in reader.tensors if not parts or key.split(".")[0] in parts}


VLM_PARTS = ("vision_encoder", "backbone", "query_tokens", "query_connector")


def test_weights_come_from_three_checkpoints(
    repo: Path, overrides: list[str], imported: Path, run_dir: Path, tmp_path: Path, world: World
) -> None:
    """The VLM from the stage before, what draws from the imported generator; with no stage before, the VLM from the
    imported base model. What neither holds is fresh, and the same each time."""
    generator, base = tensors(imported / "generator"), tensors(imported / "base")
    trained = tensors(checkpoint_folder(run_dir, "vlm") / "step_00000004", *VLM_PARTS)
    assert {key.split(".")[0] for key in generator} == {"mmdit", "vae"}
    assert {key.split(".")[0] for key in base} == {"vision_encoder", "backbone"}
    assert any(not torch.equal(value, trained[key]) for key, value in base.items())
    fresh = []
    for after, from_vlm in (("vlm", trained), (None, base)):
        stage = small_diffusion(repo, *overrides).model_copy(update={"after": after})
        method, chunks = setup.build_model(stage, *world)
        start = find_start(stage, run_dir if after else tmp_path, "never", Ranks.alone(), lambda *told: None)
        setup.fill(chunks, stage, method, start, world[1])
        state = {value.key: value.data for value in model_state(chunks, world[1])["model0"].values()}
        for key, value in {**generator, **from_vlm}.items():
            assert torch.equal(state[key], value), key
        rest = {key: value for key, value in state.items() if key not in generator and key not in from_vlm}
        fresh.append(
            {key: value for key, value in rest.items() if key.split(".")[0] in ("pathways", "frame_embedding")}
        )
        others = {key.split(".")[0] for key in rest} - {"pathways", "frame_embedding"}
        assert others == (set() if after else {"query_tokens", "query_connector"})
    assert fresh[0].keys() == fresh[1].keys()
    assert all(torch.equal(fresh[0][key], fresh[1][key]) for key in fresh[0])


def test_a_checkpoint_answers_by_itself(imported: Path, run_dir: Path) -> None:
    """VLM, diffusion transformer and VAE under their own names; the frozen ones as they came."""
    end = checkpoint_folder(run_dir, "diffusion") / "step_00000004"
    found = tensors(end)
    parts = {key.split(".")[0] for key in found}
    assert parts == {*VLM_PARTS, "mmdit", "vae", "pathways", "frame_embedding", "optimizer"}
    for key, value in tensors(checkpoint_folder(run_dir, "vlm") / "step_00000004", *VLM_PARTS).items():
        assert torch.equal(found[key], value), key
    generator = tensors(imported / "generator")
    still = {key for key, value in generator.items() if torch.equal(found[key], value)}
    # The text of SD3's last block asks nothing of anybody.
    fixed = {"mmdit.latent_embedder.position_table", "mmdit.blocks.layers.1.text.attention.q_layernorm.weight"}
    assert still == fixed | {key for key in generator if key.startswith("vae.")}
    moments = {key for key in found if key.startswith("optimizer.")}
    assert moments
    assert not any(part in key for key in moments for part in (*VLM_PARTS, "vae."))


def test_resume_is_exact(repo: Path, overrides: list[str], run_dir: Path, tmp_path: Path) -> None:
    """Killed after two of four steps: the same losses, and the same checkpoint bit for bit, average and moments too."""
    resumed = tmp_path / "resumed"
    shutil.copytree(run_dir, resumed)
    shutil.rmtree(checkpoint_folder(resumed, "diffusion") / "step_00000004")
    expected = [json.loads(line) for line in (run_dir / "diffusion" / "metrics.jsonl").read_text().splitlines()]
    found = train(repo, resumed, "diffusion", overrides)
    kept = ("step", "losses", "gradient_norm", "learning_rates", "draws")
    assert [{key: line[key] for key in kept} for line in found] == [
        {key: line[key] for key in kept} for line in expected
    ]
    ends = [checkpoint_folder(run, "diffusion") / "step_00000004" for run in (run_dir, resumed)]
    report = verify(*ends)
    assert report.identical, report.differences[:3]
    one, other = (tensors(end) for end in ends)
    assert one.keys() == other.keys()
    assert any(key.startswith("optimizer.average.") for key in one)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


# -- conditions computed beforehand


@pytest.fixture(scope="module")
def cache(repo: Path, overrides: list[str], run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``unimm data cache`` writes for the stage."""
    folder = tmp_path_factory.mktemp("cache")
    command = ["data", "cache", str(repo / "configs/mmcore/shapes.yaml"), "--stage", "diffusion", "--to", str(folder)]
    try:
        done = CliRunner().invoke(unimm, [*command, "--run-dir", str(run_dir), *SMALL, *overrides])
    finally:
        destroy_groups()
    assert done.exit_code == 0, done.output
    counts = {line.split()[1]: int(line.split()[0]) for line in done.stdout.splitlines()}
    # 12 samples of each of three kinds; two pictures of an edit, and more of a session.
    assert counts[f"{folder}/conditions"] == 36
    assert counts[f"{folder}/latents"] > 36
    return folder


def used(cache: Path, *names: str) -> list[str]:
    folders = {"condition": "conditions", "latent": "latents"}
    return [f"data.{name}_cache={cache}/{folders[name]}" for name in names or folders]


def trained_weights(run_dir: Path) -> dict[str, Tensor]:
    found = tensors(checkpoint_folder(run_dir, "diffusion") / "step_00000004")
    return {key: value for key, value in found.items() if not key.startswith("optimizer.")}


@pytest.mark.parametrize("names", [("condition",), ("condition", "latent")])
def test_conditions_from_a_cache_train_alike(
    names: tuple[str, ...],
    repo: Path,
    overrides: list[str],
    run_dir: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four steps, in which the VLM is not run: losses, gradient norms and the order of samples are those of the run
    with the VLM; so are the weights at the end, the VLM's, which are still there, bit for bit."""
    shutil.copytree(run_dir / "vlm", tmp_path / "vlm")
    monkeypatch.setattr(MMCoreVlm, "condition", None)
    if len(names) == 2:
        monkeypatch.setattr(DrawingModel, "_encoded", lambda self, pictures: pictures.latents)
    lines = train(repo, tmp_path, "diffusion", [*overrides, *used(cache, *names)])
    expected = [json.loads(line) for line in (run_dir / "diffusion" / "metrics.jsonl").read_text().splitlines()]
    for found, wanted in zip(lines, expected, strict=True):
        assert found["draws"] == wanted["draws"]
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
        assert found["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-5)
    weights, with_vlm = trained_weights(tmp_path), trained_weights(run_dir)
    assert weights.keys() == with_vlm.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, with_vlm[key], rtol=0, atol=0 if key.startswith(VLM_PARTS) else 1e-4)


def test_one_pathway_alone_takes_the_cache(
    repo: Path, overrides: list[str], run_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without words the losses from it are those with the VLM, and the cache that is made of such a stage is the same,
    words and all."""
    overrides = [*overrides, "stages.diffusion.method.pathways=visual"]
    make_cache(small_diffusion(repo, *overrides), tmp_path / "cache", run_dir)
    for part in ("conditions/words", "conditions/visual"):
        found, expected = entries(FeatureStore(tmp_path / "cache" / part)), entries(FeatureStore(cache / part))
        assert found.keys() == expected.keys()
        assert all(len(rows) for rows in found.values())
        for key, rows in found.items():
            np.testing.assert_allclose(rows, expected[key], rtol=0, atol=1e-5)
    lines = []
    for name in ("with", "without"):
        shutil.copytree(run_dir / "vlm", tmp_path / name / "vlm")
        lines.append(train(repo, tmp_path / name, "diffusion", overrides))
        monkeypatch.setattr(MMCoreVlm, "condition", None)
        overrides += used(cache, "condition")
    for wanted, found in zip(*lines, strict=True):
        assert found["draws"] == wanted["draws"]
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
        assert found["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-5)


def open_conditions(stage: StageConfig, start: Path, world: World) -> ConditionStore:
    conditions = open_caches(stage, start, world[1])[2]
    assert conditions is not None
    return conditions


def test_conditions_belong_to_a_vlm(repo: Path, overrides: list[str], run_dir: Path, cache: Path, world: World) -> None:
    """They serve this stage, its resumes and the one after it. Another VLM's are refused, by weights, configs and
    dtype; of one without query tokens none are made."""
    overrides = [*overrides, *used(cache, "condition")]
    recipe = small_recipe(repo, *overrides)
    before, after = (checkpoint_folder(run_dir, name) / "step_00000004" for name in ("vlm", "diffusion"))
    for stage, start in (("diffusion", before), ("diffusion", after), ("diffusion_sft", after)):
        assert len(open_conditions(recipe.stages[stage], start, world).words) == 36
    refused = {
        "weights differs: of another model; make it again": ([], before.with_name("step_00000002")),
        "encoder differs: of another model": (["queries.connector.projection=linear"], before),
        "weights differs: of another model": (["system.precision.dtype=bfloat16"], before),
    }
    for message, (more, start) in refused.items():
        with pytest.raises(UserError, match=f"conditions/words: {message}"):
            open_conditions(small_diffusion(repo, *overrides, *more), start, world)
    with pytest.raises(UserError, match="holds no query tokens"):
        open_conditions(recipe.stages["diffusion"], Path(recipe.stages["diffusion"].base_checkpoint), world)


def test_the_hash_goes_by_what_is_computed_with(repo: Path, overrides: list[str], run_dir: Path) -> None:
    """Not by the text head, nor by whether a checkpoint was saved with more digits than the stage has."""
    before = checkpoint_folder(run_dir, "vlm") / "step_00000004"
    halved = small_diffusion(repo, *overrides, "system.precision.dtype=bfloat16")
    found = {key: value.bfloat16() for key, value in tensors(before, *VLM_PARTS).items()}
    other = run_dir / "in_bfloat16"
    head = "backbone.output_layer.weight"
    state = {key: ShardedTensor.from_rank_offsets(key, value) for key, value in found.items()}
    state[head].data = torch.zeros_like(state[head].data)
    save({"model": state}, other, {})
    assert condition_metas(halved, other) == condition_metas(halved, before)


WRONG_USE = {
    "the VLM trains": ("diffusion", (SOME_OF_THE_VLM,), r"set, but the VLM trains in stage diffusion, and what"),
    "the vision encoder is needed": (
        "diffusion",
        ("stages.diffusion.method.vit_features=true",),
        r"set, but method.vit_features of stage diffusion takes what its vision encoder sees",
    ),
    "no diffusion transformer": ("vlm", (), r"set, but method mmcore of stage vlm learns from no such conditions"),
    "policy": ("policy", (), r"set, but method mmcore_policy of stage policy learns from no such conditions"),
}


@pytest.mark.parametrize("name", WRONG_USE)
def test_conditions_are_of_use_to_a_frozen_vlm_only(name: str, repo: Path, world: World, tmp_path: Path) -> None:
    stage, more, message = WRONG_USE[name]
    recipe = small_recipe(repo, *more, *used(tmp_path, "condition"))
    with pytest.raises(ConfigError, match=rf"data\.condition_cache: {message}"):
        open_caches(recipe.stages[stage], tmp_path, world[1])


def test_features_are_of_no_use_to_it(repo: Path, world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.feature_cache: .* is its VLM's own; leave it empty"):
        open_caches(small_diffusion(repo, f"data.feature_cache={tmp_path}"), tmp_path, world[1])


def test_a_trained_vlm_leaves_latents_to_make(repo: Path, overrides: list[str], run_dir: Path, tmp_path: Path) -> None:
    stage = small_diffusion(repo, *overrides, SOME_OF_THE_VLM)
    assert list(make_cache(stage, tmp_path / "cache", run_dir)) == [tmp_path / "cache/latents"]
    policy = small_recipe(repo, *overrides).stages["policy"]
    with pytest.raises(ConfigError, match="policy learns from what it draws itself"):
        make_cache(policy, tmp_path / "none", run_dir)


LAYOUTS = {"tensor": "system.parallel={tensor: 2, sequence: true}", "context": "system.parallel={context: 2}"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_share_the_work(
    layout: str, repo: Path, overrides: list[str], run_dir: Path, cache: Path, tmp_path: Path
) -> None:
    """Two ranks compute together, or each has its share though in training they share rows: the same keys and
    numbers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_unimm.cli", "data", "cache", str(repo / "configs/mmcore/shapes.yaml")]
    command += ["--stage", "diffusion", "--run-dir", str(run_dir), *SMALL, *overrides]
    done = subprocess.run([*command, "--to", str(tmp_path / "to"), LAYOUTS[layout]], cwd=repo, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert len(list((tmp_path / "to/conditions/words").glob("part-*.rows"))) == (1 if layout == "tensor" else 2)
    for part in ("conditions/words", "conditions/visual", "latents"):
        found, expected = FeatureStore(tmp_path / "to" / part), FeatureStore(cache / part)
        assert found.meta == expected.meta
        assert entries(expected)
        for key, rows in entries(expected).items():
            np.testing.assert_allclose(found.get(key), rows, rtol=0, atol=1e-5)


def entries(store: FeatureStore) -> dict[Key, np.ndarray]:
    keys = [(int(one), int(two)) for part in store._parts for one, two in part.keys]
    found = {key: store.get(key) for key in keys}
    return {key: rows for key, rows in found.items() if rows is not None}


# -- FLOPs


FLOP_SETTINGS = {
    "drawing": (),
    "queries too": (SOME_OF_THE_VLM,),
    "drawing, from cached conditions": ("data.condition_cache=somewhere",),
    "drawing with earlier latents": ("method.earlier_latents=true",),
}


@pytest.mark.parametrize("trains", FLOP_SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_flops_equal_torch_counter(
    model: str, trains: str, repo: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, of everything but what is left out: the VAE's convolutions (latents come made), the pathways, the
    masked half of the VLM's attention, and sums over the tokens of a conditioning vector, which the layers write as
    products."""
    step = diffusion_step(small_diffusion(repo, *MODELS[model], *FLOP_SETTINGS[trains]), world)
    chunk, row = chunk_of(step), row_of(step.stage, several(step.stage))
    if step.stage.data.condition_cache:
        words, visual = (np.ones((len(index), 64), np.float32) for index in (row.word_index, row.query_index))
        row = replace(row, words=words, visual=visual)
    batch = batch_of(step, row)
    with torch.no_grad():
        latents = chunk._encoded(batch.pictures)
    batch = replace(batch, pictures=PictureInput(**(vars(batch.pictures) | {"pixels": None, "latents": latents})))

    def summed(values: Tensor, vectors: modulation.VectorOfToken) -> Tensor:
        return values.new_zeros(len(vectors.members), values.shape[-1]).index_add(0, vectors.index, values[:, 0])

    monkeypatch.setattr(modulation, "_of_vectors", summed)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        chunk(batch)[0].backward()
    monkeypatch.setattr(mmcore_flops, "causal_pairs", lambda bounds: float((np.diff(bounds) ** 2).sum()))
    condition, pathways = chunk.model.mmdit.condition_size, 0.0
    for count, width in ((len(row.word_index), 64), (len(row.query_index), 64)):
        # Forward, weights, and inputs: a norm that trains stands before the first product.
        pathways += 3 * 2 * count * condition * (width + condition)
    assert counter.get_total_flops() == row_flops(row, step.stage) + pathways
