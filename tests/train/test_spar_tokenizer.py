"""SPAR's tokenizer on one rank: layers against plain torch, losses and who learns from them, statistics, rows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.load import load_recipe, select_stage
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data import images
from megatron_unimm.data.pictures import PictureRow, PictureSample, PictureWork
from megatron_unimm.data.shapes import write_shapes
from megatron_unimm.errors import ConfigError
from megatron_unimm.evaluate.api import evaluate
from megatron_unimm.generate.picture_tokenizer import PictureTokenizer
from megatron_unimm.methods.footprint import ChunkPlace
from megatron_unimm.methods.spar.tokenizer import losses
from megatron_unimm.methods.spar.tokenizer.footprint import TokenizerFootprints
from megatron_unimm.methods.spar.tokenizer.losses import TERMS
from megatron_unimm.methods.spar.tokenizer.method import SparTokenizer
from megatron_unimm.methods.spar.tokenizer.model import SparTokenizerModel
from megatron_unimm.models.memory import Spread
from megatron_unimm.models.tokenizer.grid import CellGrids, GridLayers
from megatron_unimm.models.tokenizer.model import LatentStatistics
from megatron_unimm.models.tokenizer.pixels import patches_of_pixels, pixels_of_patches
from megatron_unimm.models.trainable import apply_rules
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.run import train_stage
from megatron_unimm.train.state import model_state

World = tuple[Platform, ParallelGroups]
CPU = torch.device("cpu")
SMALL = (
    "model.vision_encoder.num_layers=2",
    "model.vision_encoder.hidden_size=32",
    "model.vision_encoder.mlp_size=48",
    "model.vision_encoder.full_attention_layers=[1]",
    "tokenizer.latent_channels=8",
    "generator.mmdit.latent_channels=8",  # of later stages
    "generator.vae.latent_channels=8",
    "tokenizer.semantic={num_layers: 1, hidden_size: 16, num_heads: 2, mlp_size: 24}",
    "tokenizer.pixel={num_layers: 1, hidden_size: 16, num_heads: 2, mlp_size: 24, encoder_layers: [1]}",
    "tokenizer.decoder={num_layers: 1, hidden_size: 16, num_heads: 2, mlp_size: 24, channels: 4, num_blocks: 1,"
    " norm_groups: 2}",
    "stages.tokenizer_adversarial.method.adversarial={weight: 0.5, channels: [4, 4], norm_groups: 2}",
    "system.cpu_threads=1",
)


def small(repo: Path, name: str = "tokenizer_adversarial", *overrides: str) -> StageConfig:
    return load_recipe(repo / "configs/spar/shapes.yaml", [*SMALL, *overrides]).stages[name]


def build(stage: StageConfig, world: World, shake: float = 0.1) -> tuple[SparTokenizer, SparTokenizerModel]:
    method = SparTokenizer(stage, *world)
    model = method.build(0).float()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += shake * torch.randn(parameter.shape, generator=generator)
    apply_rules([model], stage.train.trainable)
    return method, model


def picture(stage: StageConfig, name: str, *grids: tuple[int, int], learned: bool = True) -> PictureSample:
    """Of random pixels; grids count patches."""
    encoder, rng = stage.model.vision_encoder, np.random.default_rng(len(name))
    whole = np.array([[1, *grid] for grid in grids], dtype=np.int64)
    made = [rng.integers(0, 256, (rows * 8, columns * 8, 3), dtype=np.uint8) for rows, columns in grids]
    patches = np.concatenate([images.patchify(image, encoder)[0] for image in made])
    return PictureSample(name, "text_to_image", whole, len(patches) // 4, learned, patches)


def row_of(stage: StageConfig, *samples: PictureSample) -> PictureRow:
    return PictureWork(stage.model.vision_encoder, stage.data, {}).row(samples)


def test_pixels_are_those_of_the_image(repo: Path) -> None:
    encoder = small(repo).model.vision_encoder
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    patches = torch.from_numpy(images.patchify(image, encoder)[0])
    pixels = pixels_of_patches(patches, encoder)
    cells = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1).reshape(3, 2, 16, 3, 16).permute(1, 3, 0, 2, 4)
    torch.testing.assert_close(pixels, cells.reshape(6, -1).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(patches_of_pixels(pixels, encoder), patches, rtol=0, atol=1e-5)


def test_layers_over_grids_are_a_plain_transformer(repo: Path, world: World) -> None:
    """Two pictures of other sizes and padding behind them, each by itself through a transformer of ten lines."""
    stage = small(repo)
    _, model = build(stage, world)
    layers = model.tokenizer.decoder.layers
    sizes = np.array([[2, 3], [1, 4]])
    cells = torch.randn(10, 16, generator=torch.Generator().manual_seed(3))
    found = layers(cells, CellGrids.build(sizes, 4, CPU))
    expected = [plain_layers(layers, part, tuple(size)) for part, size in zip(cells.split([6, 4]), sizes, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)


def plain_layers(layers: GridLayers, hidden: Tensor, size: tuple[int, int]) -> Tensor:
    weights = {name.removeprefix("block."): value for name, value in layers.named_parameters()}
    heads, head = 2, 8

    def norm(name: str, values: Tensor) -> Tensor:
        return F.layer_norm(values, values.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    row, column = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    frequencies = 10000.0 ** -(torch.arange(0, head // 2, 2) / (head // 2))
    angles = torch.cat([place.reshape(-1, 1) * frequencies for place in (row, column)], dim=1)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotated(values: Tensor) -> Tensor:
        turned = torch.complex(*values.unflatten(-1, (2, -1)).unbind(-2)) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    for name in ("layers.0",):
        mixed = linear(f"{name}.self_attention.linear_qkv", norm(f"{name}.input_layernorm", hidden))
        query, key, value = mixed.view(-1, heads, 3, head).unbind(2)
        scores = torch.einsum("qhd,khd->hqk", rotated(query), rotated(key)) / head**0.5
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
        hidden = hidden + linear(f"{name}.self_attention.linear_proj", attended)
        inside = linear(f"{name}.mlp.linear_fc1", norm(f"{name}.pre_mlp_layernorm", hidden))
        hidden = hidden + linear(f"{name}.mlp.linear_fc2", F.gelu(inside, approximate="tanh"))
    return norm("final_layernorm", hidden) if "final_layernorm.weight" in weights else hidden


def test_semantic_stream_begins_as_the_encoder(repo: Path, world: World) -> None:
    stage = small(repo, "tokenizer")
    method, model = build(stage, world, shake=0.0)
    batch = method.batch(row_of(stage, picture(stage, "a", (4, 4))), model, CPU)
    encoded, original = model.encode(batch.images, batch.grids)
    torch.testing.assert_close(encoded.semantic, model.vision_encoder(batch.images))
    assert torch.equal(original.tokens, model.vision_encoder(batch.images))
    assert dict(zip(TERMS, model(batch).tolist(), strict=True))["semantic"] == pytest.approx(0, abs=1e-5)


def test_losses_are_their_formulas(repo: Path, world: World) -> None:
    """Of a row of two pictures of other sizes, from what the model's parts give, one picture at a time."""
    stage = small(repo)
    method, model = build(stage, world)
    samples = [picture(stage, "a", (4, 4)), picture(stage, "long", (2, 6))]
    batch = method.batch(row_of(stage, *samples), model, CPU)
    found = dict(zip(TERMS, model(batch).tolist(), strict=True))
    expected = dict.fromkeys(TERMS, 0.0)
    for sample in samples:
        alone = method.batch(row_of(stage, sample), model, CPU)
        true = pixels_of_patches(alone.images.patches, model.encoder)
        encoded, original = model.encode(alone.images, alone.grids)
        drawn = model.tokenizer.decode(encoded.latents, alone.grids)
        expected["l1"] += ((drawn - true).abs().sum() / true.shape[1]).item()
        expected["l2"] += ((drawn - true) ** 2).sum().item() / true.shape[1]
        again = replace(alone.images, patches=patches_of_pixels(drawn, model.encoder))
        tokens, taps = model.base.vision_encoder.tapped(again, [0, 1])
        pairs = [(tokens, original.tokens, 1), *((*pair, 4) for pair in zip(taps, original.taps, strict=True))]
        for mine, theirs, count in pairs:
            unit_a, unit_b = mine / mine.norm(dim=-1, keepdim=True), theirs / theirs.norm(dim=-1, keepdim=True)
            expected["perceptual"] += ((unit_a - unit_b) ** 2).sum().item() / count / 3
        wanted = model.base.vision_encoder(alone.images)
        for name, mine in (("semantic", encoded.semantic), ("latent", model.tokenizer.readout(encoded.latents))):
            cosine = (mine * wanted).sum(1) / mine.norm(dim=1) / wanted.norm(dim=1)
            expected[name] += (1 - cosine).sum().item()
        ((size, real),) = alone.grids.pictures(true, 16).items()
        real, fake = model.discriminator(real)[0], model.discriminator(alone.grids.pictures(drawn, 16)[size])[0]
        expected["adversarial"] -= fake.mean().item()
        expected["discriminator"] += 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()).item()
    # Once more by the adaptive weight, which its own test is about.
    scale = found["adversarial"] / expected["adversarial"]
    assert scale > 0
    expected["adversarial"] *= scale
    assert found == pytest.approx(expected, rel=1e-4)


def test_adaptive_weight_is_a_ratio_of_gradients() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    pixels, adversarial = (weight * torch.tensor([3.0, 4.0])).sum(), 0.5 * weight[1]
    assert losses.adaptive_weight(pixels, adversarial, weight).item() == pytest.approx(5 / 0.5001)
    assert losses.adaptive_weight(pixels, 0 * adversarial, weight).item() == 1e4
    (pixels + adversarial).backward()  # the graph is still there


def test_each_learns_from_its_own_loss(repo: Path, world: World) -> None:
    stage = small(repo)
    method, model = build(stage, world)
    batch = method.batch(row_of(stage, picture(stage, "a", (4, 4))), model, CPU)

    def learners(term: str) -> set[str]:
        model.zero_grad()
        model(batch)[TERMS.index(term)].backward()
        return {
            name.split(".")[0] for name, each in model.named_parameters() if each.grad is not None and each.grad.any()
        }

    assert learners("discriminator") == {"discriminator"}
    assert learners("adversarial") == {"tokenizer", "vision_encoder"}
    assert learners("semantic") == {"tokenizer", "vision_encoder"}
    assert learners("perceptual") == {"tokenizer", "vision_encoder"}
    assert not any(parameter.requires_grad for parameter in model.base.parameters())


def test_broken_pictures_and_empty_rows_count_for_nothing(repo: Path, world: World) -> None:
    stage = small(repo, "tokenizer_adversarial", "stages.tokenizer_adversarial.method.adversarial.adaptive=false")
    method, model = build(stage, world)
    good, broken = picture(stage, "a", (4, 4)), picture(stage, "wide", (4, 4), (2, 4), learned=False)
    alone, both = row_of(stage, good), row_of(stage, good, broken)
    sums = [model(method.batch(row, model, CPU)) for row in (alone, both)]
    torch.testing.assert_close(*sums)
    assert method.counts([alone]) == method.counts([both]) == [4, 4, 4, 4, 4, 1, 1]
    nothing = model(method.batch(row_of(stage), model, CPU))
    assert not nothing.any()
    nothing.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_statistics_are_those_of_all_cells(world: World) -> None:
    """However they come, and kept in float32; beyond the window the oldest fade."""
    _, groups = world
    cells = 3 + 2 * torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    statistics = LatentStatistics(4, window=1000).to(torch.bfloat16)
    assert statistics.mean.dtype == torch.float32
    for part in (cells[:10], cells[10:11], cells[11:]):
        padded = torch.cat([part, torch.full((3, 4), 99.0)])
        statistics.update(padded, torch.tensor([1.0] * len(part) + [0.0] * 3), groups.collection.dp)
    torch.testing.assert_close(statistics.mean, cells.mean(0))
    torch.testing.assert_close(statistics.variance, cells.var(0, correction=0))
    normal = statistics.normalise(cells)
    torch.testing.assert_close(normal.std(0, correction=0), torch.ones(4))
    torch.testing.assert_close(statistics.restore(normal), cells)
    short = LatentStatistics(4, window=10)
    for value in (0.0, 1.0, 1.0, 1.0):
        short.update(torch.full((10, 4), value), torch.ones(10), groups.collection.dp)
    torch.testing.assert_close(short.mean, torch.full((4,), 0.875))


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (("system.parallel.pipeline=2",), "system.parallel.pipeline: 2, but a tokenizer"),
        (("system.parallel.context=2",), "system.parallel.context: 2, but a tokenizer"),
        (
            ("system.parallel.tensor=4", "tokenizer.pixel.num_heads=2"),
            "4 does not divide tokenizer.semantic.num_heads 2",
        ),
    ],
)
def test_layouts_that_cannot_run_are_refused(repo: Path, overrides: tuple[str, ...], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        check_layout(small(repo, "tokenizer", *overrides), 4)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("data.latent_cache=x", "reads pixels; leave data.latent_cache empty"),
        ("tokenizer.pixel.encoder_layers=[2]", r"encoder_layers \[2\] must ascend and lie in 0..1"),
        ("tokenizer=null", "give its section tokenizer"),
    ],
)
def test_wrong_settings_are_refused(repo: Path, override: str, what: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=what):
        small(repo, "tokenizer", override)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_adversarial"])
def test_planned_weights_are_those_of_the_model(repo: Path, world: World, name: str) -> None:
    stage = small(repo, name, "data.sequence_length=64")
    _, model = build(stage, world)
    footprints = TokenizerFootprints()
    row = footprints.typical_row(stage)
    assert row.num_tokens <= 64
    found = footprints.chunk(stage, Spread.of(stage.system, fused=False), ChunkPlace(True, True, range(1)), row)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert found.trained.total == trained
    assert found.frozen.total == sum(each.numel() for each in model.parameters()) - trained
    assert found.companions.total == sum(each.numel() for each in model.base.parameters())


@pytest.mark.slow
def test_stages_hand_over_and_are_scored(repo: Path, tmp_path: Path) -> None:
    """From a base model's encoder, through both stages, to the suite's scores; statistics go with the checkpoint."""
    write_shapes(tmp_path / "data", count=40, seed=1)
    kinds = ("understanding", "text_to_image", "editing")
    settings = [
        *SMALL,
        *(f"data.sources.{kind}.path={tmp_path}/data/train/{kind}.jsonl" for kind in kinds),
        f"base_checkpoint={tmp_path}/base",
        "train.steps=2",
        "train.global_batch_size=8",
        "train.logging.every_steps=1",
    ]
    recipe = load_recipe(repo / "configs/spar/shapes.yaml", settings)
    stage = recipe.stages["alignment"]  # of the base model's parts
    platform, groups = setup.enter(stage)
    _, chunks = setup.build_model(stage, platform, groups)
    state = {
        "model0": {
            key: value
            for key, value in model_state(chunks, groups)["model0"].items()
            if "query" not in key and "layer_router" not in key
        }
    }
    meta = {"kind": "base_model", "family": "qwen2_5_vl", "architecture": stage.model.model_dump(mode="json")}
    save(state, tmp_path / "base", meta)
    destroy_groups()
    for name in ("tokenizer", "tokenizer_adversarial"):
        assert train_stage(recipe, select_stage(recipe, name), tmp_path / "run") == 0
    report = evaluate(tmp_path / "run", "reconstruction", to=tmp_path / "scores.json", num_samples=16)
    assert report["stage"] == "tokenizer_adversarial"
    assert report["scores"]["psnr"] > 3
    assert {"ssim", "frechet", "probe/original", "probe/semantic", "probe/readout"} <= set(report["scores"])
    with PictureTokenizer.open(tmp_path / "run") as tokenizer:
        statistics = tokenizer.model.tokenizer.statistics
        assert statistics.seen > 100
        assert not torch.equal(statistics.variance, torch.ones(8))
