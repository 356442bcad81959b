"""The image decoder's objective and training: against an independent computation, against itself packed or not, from
caches, across a resume; that it learns; and its FLOPs against torch's counter."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_decoder import (
    FLUX,
    World,
    decoder_step,
    generator_of,
    make_picture,
    row_of,
    several,
    small_decoder,
    small_recipe,
    write_world,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_unimm.checkpoint.store import latest
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.load import select_stage
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.convert import verify
from megatron_unimm.data.drawing import DrawingRow, DrawingSample
from megatron_unimm.data.features import finish_cache
from megatron_unimm.errors import UserError
from megatron_unimm.methods.drawing.flops import mmdit_cost
from megatron_unimm.methods.orion.decoder.flops import load_of
from megatron_unimm.methods.orion.decoder.model import OrionDecoderModel
from megatron_unimm.models.mmdit import modulation
from megatron_unimm.models.mmdit.canvas import Canvas
from megatron_unimm.models.mmdit.frames import Frames
from megatron_unimm.models.mmdit.trunk import MMDiTInput
from megatron_unimm.models.vision import VisionInput
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train.caches import latent_meta, open_caches
from megatron_unimm.train.feature_cache import make_cache
from megatron_unimm.train.run import train_stage
from megatron_unimm.train.state import checkpoint_folder
from megatron_unimm.train.step import TrainStep

DUAL = "generator.mmdit.dual_attention_layers=[0]"
MODELS = {"sd3": (), "dual": (DUAL,), "flux": (FLUX,)}
SOURCES = "stages.decoder.method.connector.sources=true"


def chunk_of(step: TrainStep) -> OrionDecoderModel:
    return step.chunks[0].module


def sums_and_gradients(step: TrainStep, rows: Sequence[DrawingRow]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums of the terms, and every gradient of the loss's sum."""
    counts = torch.tensor(step.method.counts(rows), dtype=torch.float32)
    means = step.forward_backward(rows)
    named = chunk_of(step).named_parameters()
    return means * counts, {name: p.main_grad * counts[0] for name, p in named if p.requires_grad}


# -- packing


@pytest.mark.parametrize("model", MODELS)
def test_packed_equals_unpacked(model: str, repo: Path, world: World) -> None:
    """A row of pictures of six sizes gives the sums and gradients of the pictures alone; padding of any length
    adds nothing, nor does an empty row."""
    stage = small_decoder(repo, *MODELS[model])
    step = decoder_step(stage, world)
    samples = several(stage)
    packed = row_of(stage, samples, world)
    assert packed.num_padding > 100
    sums, gradients = sums_and_gradients(step, [packed])
    alone = [row_of(stage, [sample], world) for sample in samples]
    expected_sums, expected = sums_and_gradients(step, [*alone, row_of(stage, [], world)])
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-6)
    assert sums[0] > 1
    total = sum(gradient.square().sum() for gradient in expected.values()).sqrt()
    for name, gradient in expected.items():
        # Nothing reads what the text of SD3's last block asks for.
        assert gradient.norm() > 0 or name == "mmdit.blocks.layers.1.text.attention.q_layernorm.weight", name
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6 * total, name


# -- the loss, computed independently


def unfolded(picture_CHW: Tensor, side: int) -> Tensor:
    """Patches (channel, row, column), row by row: torch's own."""
    return F.unfold(picture_CHW[None], side, stride=side)[0].T


def folded(patches: Tensor, rows: int, columns: int, side: int) -> Tensor:
    return F.fold(patches.T[None], (rows * side, columns * side), side, stride=side)


def reference_terms(step: TrainStep, sample: DrawingSample, stage: StageConfig, weight: str) -> tuple[Tensor, Tensor]:
    """Weighted loss and plain loss of each token, ``[2, U]``, and the timestep of one picture: x_0 by the VAE, x_t on
    the straight line, the transformer called on this picture alone."""
    chunk, generator = chunk_of(step), generator_of(stage)
    side, patch = generator.token_pixels, generator.mmdit.patch_size
    rows, columns = sample.picture.tolist()
    t = torch.sigmoid(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(sample.uniform, dtype=torch.float64)))
    picture = folded(torch.from_numpy(sample.pixels), rows, columns, side)
    latents = (chunk.vae.encode(picture).latent_dist.mean - generator.vae.shift_factor) * generator.vae.scaling_factor
    x_0 = unfolded(latents[0], patch)  # [U, F]
    noise = torch.from_numpy(
        np.random.Generator(np.random.Philox(key=sample.noise_seed)).standard_normal(x_0.shape, np.float32)
    )
    x_t = ((1 - t) * x_0 + t * noise).float()
    encoder = stage.model.vision_encoder
    images = VisionInput.build(sample.patches, sample.grids, encoder, torch.device("cpu"), torch.float32)
    visual = chunk.base.vision_encoder(images) * (not sample.unconditional)
    kinds = np.repeat(np.arange(len(sample.grids)) > 0, sample.grids.prod(axis=1) // 4)
    hidden = F.relu(chunk.connector.norm_1(chunk.connector.linear_1(visual)))
    condition = chunk.connector.norm_2(chunk.connector.linear_2(hidden))
    condition[torch.from_numpy(kinds)] += chunk.connector.source
    count = len(condition) + len(x_0)
    frames = Frames.single(sample.picture[None], np.array([len(condition)]))
    canvas = Canvas.build(frames, len(condition), count, generator, chunk.place(None))
    guidance = torch.tensor([3.5]) if generator.mmdit.guidance else None
    inputs = MMDiTInput(condition, x_t, canvas.position_index, t.float()[None], chunk.connector.pooled[None], guidance)
    errors = (chunk.mmdit(canvas.row, inputs, None) - (noise - x_0)).square().mean(dim=1)
    w = {"uniform": 1.0, "cosmap": 2 / (torch.pi * (1 - 2 * t + 2 * t * t)), "sigma_sqrt": 1 / t**2}[weight]
    return torch.stack([errors * w, errors]), t


@pytest.mark.parametrize("weight", ["uniform", "cosmap", "sigma_sqrt"])
@pytest.mark.parametrize("model", MODELS)
def test_loss_equals_ten_lines_of_torch(model: str, weight: str, repo: Path, world: World) -> None:
    """Every term of a packed row, and what it is divided by."""
    stage = small_decoder(repo, SOURCES, f"stages.decoder.method.flow.weighting={weight}", *MODELS[model])
    step = decoder_step(stage, world)
    samples = several(stage)
    row = row_of(stage, samples, world)
    sums, _ = sums_and_gradients(step, [row])
    weighted, plain = torch.zeros(()), torch.zeros(10)
    tokens = np.zeros(10, dtype=np.int64)
    with torch.no_grad():
        for sample in samples:
            if sample.learned:
                errors, t = reference_terms(step, sample, stage, weight)
                weighted += errors[0].sum()
                plain[int(t * 10)] += errors[1].sum()
                tokens[int(t * 10)] += sample.num_picture
    torch.testing.assert_close(sums, torch.cat([weighted[None], plain]), rtol=2e-5, atol=1e-6)
    counts = step.method.counts([row])
    assert counts == [tokens.sum(), *tokens]
    assert (tokens > 0).sum() >= 4
    assert counts[0] == sum(counts[1:]) == sum(sample.num_picture for sample in samples if sample.learned)
    means = step.forward_backward([row])
    in_bins = sum(mean * count for mean, count in zip(means[1:], counts[1:], strict=True)) / counts[0]
    if weight == "uniform":
        assert means[0] == pytest.approx(in_bins.item(), rel=1e-6)
    else:
        assert abs(means[0] / in_bins - 1) > 1e-2


def test_timesteps_at_their_ends(repo: Path, world: World) -> None:
    """The rarest draws fall into the outer parts, and the loss stays finite under a weight without bound."""
    stage = small_decoder(repo, "stages.decoder.method.flow.weighting=sigma_sqrt")
    step = decoder_step(stage, world)
    row = row_of(stage, [make_picture(stage, "a", uniform=1e-7), make_picture(stage, "b", uniform=1 - 1e-7)], world)
    assert step.method.counts([row]) == [8, 4, *[0] * 8, 4]
    assert step.forward_backward([row]).isfinite().all()


# -- conditions


def velocity(step: TrainStep, row: DrawingRow) -> Tensor:
    """``[t_image, F]``"""
    chunk = chunk_of(step)
    batch = step.method.batch(row, chunk, torch.device("cpu"))
    with torch.no_grad():
        inputs = chunk._inputs(batch, chunk._latents(batch.pictures))
        return chunk.mmdit(batch.canvas.row, inputs, None)


def repainted(sample: DrawingSample, first: int, stop: int) -> DrawingSample:
    """Other pixels in some of the condition's patches, the picture to be drawn as it was."""
    assert sample.patches is not None
    patches = sample.patches.copy()
    patches[first:stop] = patches[first:stop][::-1] + 1
    return replace(sample, patches=patches)


@pytest.mark.parametrize("sources", [True, False])
def test_what_a_condition_does(sources: bool, repo: Path, world: World) -> None:
    """An unconditional picture ignores its visual tokens, a conditional one sees those of the picture and of sources,
    and no picture of the row sees another's."""
    stage = small_decoder(repo, f"stages.decoder.method.connector.sources={str(sources).lower()}")
    step = decoder_step(stage, world)
    grids = [(4, 4), (4, 4)] if sources else [(4, 4)]
    pair = [make_picture(stage, name, (2, 2), grids, unconditional=name == "without") for name in ("with", "without")]
    before = velocity(step, row_of(stage, pair, world))
    for place in range(len(grids)):
        for changed, same in ((slice(0, 4), slice(4, 8)), (slice(4, 8), slice(0, 4))):
            number = changed.start // 4
            pixels = list(pair)
            pixels[number] = repainted(pair[number], 16 * place, 16 * place + 16)
            after = velocity(step, row_of(stage, pixels, world))
            assert torch.equal(after[same], before[same])
            assert torch.equal(after[changed], before[changed]) == pair[number].unconditional


def test_sources_may_stay_where_the_picture_is_left_out(repo: Path, world: World) -> None:
    """Then the sources' visual tokens count, and the picture's own do not."""
    stage = small_decoder(repo, SOURCES)
    step = decoder_step(stage, world)
    sample = replace(make_picture(stage, "a", (2, 2), [(4, 4), (4, 4)], unconditional=True), sources_kept=True)
    before = velocity(step, row_of(stage, [sample], world))
    own, source = (velocity(step, row_of(stage, [repainted(sample, at, at + 16)], world)) for at in (0, 16))
    assert torch.equal(own, before)
    assert not torch.equal(source, before)


def test_sources_are_told_from_the_picture(repo: Path, world: World) -> None:
    """The connector's vector marks them, in unconditional pictures too, and gets gradients; without
    ``connector.sources`` there is none and a source is no part of the condition."""
    stage = small_decoder(repo, SOURCES)
    step = decoder_step(stage, world)
    chunk = chunk_of(step)
    rows = {
        name: row_of(stage, [make_picture(stage, "a", (2, 2), grids)], world)
        for name, grids in (("edit", [(4, 4), (4, 4)]), ("picture", [(4, 4)]))
    }
    before = {name: velocity(step, row) for name, row in rows.items()}
    _, gradients = sums_and_gradients(step, [rows["edit"]])
    assert gradients["connector.source"].norm() > 1e-4
    _, gradients = sums_and_gradients(step, [rows["picture"]])
    assert not gradients["connector.source"].any()
    with torch.no_grad():
        chunk.connector.source += 1
    assert torch.equal(velocity(step, rows["picture"]), before["picture"])
    assert not torch.equal(velocity(step, rows["edit"]), before["edit"])
    plain = small_decoder(repo, "stages.decoder.method.connector.sources=false")
    assert not any(name.endswith("source") for name, _ in chunk_of(decoder_step(plain, world)).named_parameters())


def test_noise_of_a_bf16_row_is_that_of_its_timestep(repo: Path, world: World) -> None:
    """x_t is interpolated at the timestep itself, not at its three digits of bfloat16."""
    stage = small_decoder(repo, "system.precision.dtype=bfloat16")
    step = decoder_step(stage, world)
    chunk = chunk_of(step)
    row = row_of(stage, [make_picture(stage, str(i), uniform=0.5 + 0.01 * i) for i in range(8)], world)
    batch = step.method.batch(row, chunk, torch.device("cpu"))
    zero = torch.zeros_like(batch.pictures.noise)
    with torch.no_grad():
        noisy = chunk._inputs(batch, zero).patches[: len(zero)]
    t = batch.timestep.index_select(0, batch.canvas.frame_of_token)[:, None]
    assert noisy.dtype is torch.bfloat16
    assert torch.equal(noisy, (t * batch.pictures.noise.float()).bfloat16())
    assert not torch.equal(noisy, t.bfloat16() * batch.pictures.noise)


# -- runs


RUN = (
    "train.steps=4",
    "train.ema_decay=0.9",
    "train.checkpoint={every_steps: 2, keep_last: 10}",
    "train.logging={every_steps: 1, pictures_every_steps: null}",
)


@pytest.fixture(scope="module")
def overrides(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*write_world(repo, tmp_path_factory.mktemp("decoder")), *RUN]


def train(repo: Path, run_dir: Path, *overrides: str) -> list[dict]:
    """A whole run; what it logged."""
    recipe = small_recipe(repo, *overrides)
    try:
        assert train_stage(recipe, select_stage(recipe, "decoder"), run_dir) == 0
    finally:
        destroy_groups()
    return [json.loads(line) for line in (run_dir / "decoder" / "metrics.jsonl").read_text().splitlines()]


def test_resume_is_exact(repo: Path, overrides: list[str], tmp_path: Path) -> None:
    """Killed after two of four steps: the same losses, and the same checkpoint bit for bit, average and moments too."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    expected = train(repo, straight, *overrides)
    shutil.copytree(straight, resumed)
    folder = checkpoint_folder(resumed, "decoder")
    shutil.rmtree(folder / "step_00000004")
    assert latest(folder) == folder / "step_00000002"
    found = train(repo, resumed, *overrides)
    kept = ("step", "losses", "gradient_norm", "learning_rates", "draws")
    assert [{key: line[key] for key in kept} for line in found] == [
        {key: line[key] for key in kept} for line in expected
    ]
    assert set(expected[-1]["draws"]) == {"text_to_image", "editing"}
    ends = [checkpoint_folder(run, "decoder") / "step_00000004" for run in (straight, resumed)]
    report = verify(*ends)
    assert report.identical, report.differences[:3]
    with_optimizer = [tensors(end) for end in ends]
    assert with_optimizer[0].keys() == with_optimizer[1].keys()
    assert any(key.startswith("optimizer.average.") for key in with_optimizer[0])
    for key, value in with_optimizer[0].items():
        assert torch.equal(value, with_optimizer[1][key]), key


def tensors(directory: Path) -> dict[str, Tensor]:
    with Reader(directory) as reader:
        return {key: reader.read(key) for key in reader.tensors}


def test_caches_train_alike(repo: Path, overrides: list[str], tmp_path: Path) -> None:
    """The same losses from features and latents computed beforehand as from pixels; of other weights they are refused,
    each by its own model's."""
    recipe = small_recipe(repo, *overrides)
    cache = tmp_path / "cache"
    counts = make_cache(select_stage(recipe, "decoder"), cache, run_dir=tmp_path)
    assert list(counts) == [cache / "features", cache / "latents"]
    assert min(counts.values()) > 20
    features, latents = f"data.feature_cache={cache}/features", f"data.latent_cache={cache}/latents"
    short = [*overrides, "train.steps=2"]
    pixels = train(repo, tmp_path / "pixels", *short)
    for name, used in (("features", [features]), ("both", [features, latents])):
        cached = train(repo, tmp_path / name, *short, *used)
        for line, expected in zip(cached, pixels, strict=True):
            assert line["losses"] == pytest.approx(expected["losses"], rel=1e-5), name
    base, generator = (each for each in write_world(repo, tmp_path / "other", seed=3) if "checkpoint=" in each)
    for part, other in (("features", base), ("latents", generator)):
        with pytest.raises(UserError, match=rf"{part}: weights differs: of another model; make it again"):
            train(repo, tmp_path / f"wrong_{part}", *short, features, latents, other)


def test_latents_of_another_patch_size_are_refused(
    repo: Path, overrides: list[str], world: World, tmp_path: Path
) -> None:
    """The VAE is the same, but its latents are cut in other patches."""
    stage = small_decoder(repo, *overrides, f"data.latent_cache={tmp_path}")
    finish_cache(tmp_path, replace(latent_meta(stage), width=4))
    with pytest.raises(UserError, match=r"width differs: 4 there, 16 here; make it again"):
        open_caches(stage, Path(stage.generator_checkpoint), world[1])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.drawing_size={rule: square, side: 40}", r"data\.drawing_size\.side: 40 is no multiple of 16 pixels"),
        ("data.drawing_size={rule: buckets, sizes: [[64, 40]]}", r"data\.drawing_size\.sizes: 64x40: sides must be"),
        ("data.generation_size={rule: square, side: 56}", r"data\.generation_size\.side: 56 is no multiple of 16"),
    ],
)
def test_sizes_are_whole_tokens(override: str, message: str, repo: Path, world: World) -> None:
    with pytest.raises(UserError, match=message):
        row_of(small_decoder(repo, override), [], world)


def test_it_learns_what_its_condition_says(repo: Path, world: World) -> None:
    """Eight pictures, fresh noise and timesteps in every step: at noises kept apart the loss falls below 0.4 of what it
    was (measured: 0.33), and goes up again where the pictures are given each other's conditions."""
    stage = small_decoder(
        repo,
        "data.feature_cache=given",
        "data.latent_cache=given",
        "train.optimizer.weight_decay=0",
        "stages.decoder.method.connector.sources=false",
    )
    step = decoder_step(stage, world)
    rng = np.random.default_rng(0)
    width, patch_dim = stage.model.vision_encoder.out_size, generator_of(stage).mmdit.patch_dim
    shown = rng.standard_normal((8, 4, width)).astype(np.float32)
    drawn = rng.standard_normal((8, 4, patch_dim)).astype(np.float32)

    def row(seed: int, conditions: Sequence[int] = range(8)) -> DrawingRow:
        chance = np.random.default_rng(seed)
        samples = [make_picture(stage, str(i), uniform=chance.uniform()) for i in range(8)]
        plain = row_of(stage, samples, world)
        noise = chance.standard_normal(plain.noise.shape).astype(np.float32)
        visual = np.concatenate([shown[i] for i in conditions])
        return replace(plain, noise=noise, features=visual, latents=np.concatenate(list(drawn)))

    def loss(rows: list[DrawingRow]) -> float:
        return step.forward_backward(rows, forward_only=True)[0].item()

    fixed = [row(seed) for seed in (1000, 1001, 1002, 1003)]
    mixed = [row(seed, [*range(1, 8), 0]) for seed in (1000, 1001, 1002, 1003)]
    before = loss(fixed)
    for number in range(150):
        step.run([row(number)], 4e-3)
    after, swapped = loss(fixed), loss(mixed)
    print(f"loss {before:.3f} -> {after:.3f}, with each other's conditions {swapped:.3f}")
    assert after < 0.4 * before
    assert swapped > 2 * after


# -- FLOPs


FROZEN = {
    "all": ("all", "[{pattern: 'vae.*', train: false}, {pattern: '*'}]"),
    "connector": ("connector", "[{pattern: 'connector.*'}, {pattern: '*', train: false}]"),
    "mmdit": ("mmdit", "[{pattern: 'mmdit.*'}, {pattern: '*', train: false}]"),
}


@pytest.mark.parametrize("trains", FROZEN)
@pytest.mark.parametrize("model", MODELS)
def test_flops_equal_torch_counter(
    model: str, trains: str, repo: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, of the diffusion transformer alone: its input comes as the connector hands it over. Left out are sums
    over the tokens of a conditioning vector, which the layers write as products."""
    stage = small_decoder(repo, f"train.trainable={FROZEN[trains][1]}", *MODELS[model])
    step = decoder_step(stage, world)
    chunk = chunk_of(step)
    row = row_of(stage, several(stage), world)
    batch = step.method.batch(row, chunk, torch.device("cpu"))
    inputs = chunk._inputs(batch, chunk._latents(batch.pictures))
    cut = {
        name: vars(inputs)[name].detach().requires_grad_(vars(inputs)[name].requires_grad)
        for name in ("condition", "pooled")
    }
    inputs = replace(inputs, **cut)

    def summed(values: Tensor, vectors: modulation.VectorOfToken) -> Tensor:
        return values.new_zeros(len(vectors.members), values.shape[-1]).index_add(0, vectors.index, values[:, 0])

    monkeypatch.setattr(modulation, "_of_vectors", summed)
    # The plain kernel is counted as the products that it consists of; the fused one on CPU is not counted at all.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        chunk.mmdit(batch.canvas.row, inputs, None).sum().backward()
    assert counter.get_total_flops() == mmdit_cost(load_of(row), stage, "connector")
