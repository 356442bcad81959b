"""Pictures to be drawn: layouts, pixels, randomness that belongs to the draw alone, rows, and the loader over them."""

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_unimm.config.data import DataConfig, SourceConfig
from megatron_unimm.config.mmdit import ImageGeneratorConfig, Sd3Config, VaeConfig
from megatron_unimm.config.model import Qwen25VisionConfig
from megatron_unimm.data import images
from megatron_unimm.data.decode.build import build_decoder
from megatron_unimm.data.drawing import DrawingRow, DrawingSample, DrawingWork
from megatron_unimm.data.features import FeatureMeta, FeatureStore, FeatureWriter, finish_cache, image_key
from megatron_unimm.data.loader import DataShard, StepLoader
from megatron_unimm.data.mix import Draw, Mix
from megatron_unimm.data.packing import plan_rows
from megatron_unimm.data.plan import BadSample, BatchSize, Laid
from megatron_unimm.data.sources.opening import open_sources
from megatron_unimm.errors import DataError
from megatron_unimm.models.vae import from_patches

BATCH = 8
SAMPLES, ALONE = BatchSize(samples=BATCH), DataShard()
SIDE = 8  # pixels of an image token: 2 latents of 4 pixels each
TOWER = Qwen25VisionConfig(family="qwen2_5", num_layers=1, hidden_size=32, num_heads=2, mlp_size=32, out_size=32)
GENERATOR = ImageGeneratorConfig(
    mmdit=Sd3Config(
        family="sd3", num_layers=1, num_heads=2, head_size=8, latent_channels=4, condition_size=8, pooled_size=8
    ),
    vae=VaeConfig(latent_channels=4, block_channels=[8, 8, 8], norm_groups=4, scaling_factor=1.0),
)
LATENT_PATCH = 4 * 2 * 2
MakeWork = Callable[..., DrawingWork]


def turns(*said: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


@pytest.fixture
def world(tmp_path: Path, write_image, write_jsonl) -> dict[str, SourceConfig]:
    """Two sources: 12 pictures of words and 6 edits, of several sizes; their sources are smaller."""
    draw, edit = [], []
    for i in range(12):
        write_image(tmp_path / f"draw{i}.png", 64 + 16 * (i % 3), 64, seed=i)
        draw.append({"id": f"draw{i}", "image": f"draw{i}.png", "conversations": turns(f"draw {i}", "<image>")})
    for i in range(6):
        write_image(tmp_path / f"from{i}.png", 40, 30, seed=100 + i)
        write_image(tmp_path / f"to{i}.png", 80, 60, seed=200 + i)
        said = turns("<image> in blue", "Here: <image>")
        edit.append({"id": f"edit{i}", "image": [f"from{i}.png", f"to{i}.png"], "conversations": said})
    write_jsonl(tmp_path / "draw.jsonl", draw)
    write_jsonl(tmp_path / "edit.jsonl", edit)
    return {
        "draw": SourceConfig(path=str(tmp_path / "draw.jsonl"), kind="text_to_image", weight=3.0),
        "edit": SourceConfig(path=str(tmp_path / "edit.jsonl"), kind="editing", weight=1.0),
    }


@pytest.fixture
def make_work(world: dict[str, SourceConfig]) -> MakeWork:
    """Builds work on the world; keywords are fields of DrawingWork, or of its DataConfig."""

    def make(**settings: object) -> DrawingWork:
        fields = (
            "seed",
            "condition_dropout",
            "condition_noise",
            "with_sources",
            "stream_multiple",
            "features",
            "latents",
            "sources",
        )
        own = {name: settings.pop(name) for name in fields if name in settings}
        data = {
            "generation_size": {"min_side": 56, "max_side": 56},
            "understanding_size": {"min_side": 28, "max_side": 28},
            "drawing_size": {"rule": "square", "side": 32},
            "sequence_length": 96,
            "decoder": "pillow",
            "prefetch_workers": 0,
            **settings,
        }
        given = {"sources": open_sources(world), "seed": 7, "condition_dropout": 0.3, "with_sources": True, **own}
        return DrawingWork(generator=GENERATOR, encoder=TOWER, data=DataConfig(**data), **given)

    return make


@pytest.fixture
def make_loader(world: dict[str, SourceConfig], make_work: MakeWork):
    """Builds loaders over the world, and closes them."""
    loaders = []

    def make(shard: DataShard = ALONE, batch: BatchSize = SAMPLES, **settings) -> StepLoader:
        work = make_work(**settings)
        weights = {name: world[name].weight for name in world}
        loaders.append(StepLoader(work=work, mix=Mix(work.sources, weights, seed=5), size=batch, shard=shard))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def laid(work: DrawingWork, source: str, index: int, epoch: int = 0) -> Laid:
    found = work.lay_out(Draw(source, index, epoch))
    assert isinstance(found, Laid), found
    return found


def loaded(work: DrawingWork, *draws: Draw) -> list[tuple[DrawingSample, list[BadSample]]]:
    with build_decoder("pillow", max_pixels=work.data.max_image_pixels, threads=0, device=None) as decoder:
        return work.load([laid(work, draw.source, draw.index, draw.epoch) for draw in draws], decoder)


def take(loader: StepLoader, count: int) -> list:
    return [next(loader) for _ in range(count)]


def assert_same(left: object, right: object) -> None:
    """Two rows, or two samples."""
    for field, value in vars(left).items():
        np.testing.assert_array_equal(value, getattr(right, field), err_msg=field)


# -- what a sample holds


def test_layout_of_a_picture_of_words(make_work: MakeWork) -> None:
    """80 x 64: 32 x 32 is drawn, 4 x 4 tokens; the tower sees 56 x round(44.8 / 28) 28 = 56 x 56, 4 x 4 patches."""
    sample = laid(make_work(), "draw", 1).layout
    assert (sample.id, sample.kind, sample.image_index) == ("draw/draw1", "text_to_image", (0,))
    assert sample.grids.tolist() == [[1, 4, 4]]
    assert sample.picture.tolist() == [4, 4]
    assert (sample.num_condition, sample.num_picture, len(sample)) == (4, 16, 20)


@pytest.mark.parametrize("with_sources", [True, False])
def test_layout_of_an_edit(make_work: MakeWork, with_sources: bool) -> None:
    """The picture comes first though it stands second; the source is sized as images that are read: 28 x 28."""
    sample = laid(make_work(with_sources=with_sources), "edit", 0).layout
    assert sample.kind == "editing"
    assert sample.image_index == ((1, 0) if with_sources else (1,))
    assert sample.grids.tolist() == [[1, 4, 4], [1, 2, 2]][: 1 + with_sources]
    assert sample.num_condition == 4 + with_sources


def test_all_that_stands_before_the_picture_is_its_source(
    make_work: MakeWork, tmp_path: Path, write_image, write_jsonl
) -> None:
    """Of a conversation that goes on, the last picture is drawn; what the user shows afterwards says nothing of it.
    What the assistant had drawn has the size of what is drawn, what the user shows that of what is read."""
    for i in range(4):
        write_image(tmp_path / f"{i}.png", seed=i)
    said = turns("<image> mirrored", "<image>", "and in red", "<image>", "now like this: <image>", "No.")
    item = {"id": "talk", "image": [f"{i}.png" for i in range(4)], "conversations": said}
    path = write_jsonl(tmp_path / "talk.jsonl", [item])
    sources = open_sources({"talk": SourceConfig(path=str(path), kind="interleaved")})
    found = laid(make_work(sources=sources), "talk", 0)
    assert found.layout.image_index == (2, 0, 1)
    assert found.layout.by_assistant == (True, False, True)
    assert found.layout.grids.tolist() == [[1, 4, 4], [1, 2, 2], [1, 4, 4]]
    requests = make_work(sources=sources).condition_requests(found)
    assert [(Path(str(each.file)).name, each.width) for each in requests] == [
        ("2.png", 56),
        ("0.png", 28),
        ("1.png", 56),
    ]
    assert laid(make_work(sources=sources, with_sources=False), "talk", 0).layout.image_index == (2,)


def test_nothing_to_draw_and_too_long(make_work: MakeWork, tmp_path: Path, write_jsonl) -> None:
    """Both are faults of the sample that name its place, and what to change."""
    edit = {"id": "a", "image": "draw0.png", "conversations": turns("<image> what is it?", "A dog.")}
    path = write_jsonl(tmp_path / "read.jsonl", [edit])
    sources = open_sources({"read": SourceConfig(path=str(path), kind="understanding")})
    bad = make_work(sources=sources).lay_out(Draw("read", 0, 0))
    assert isinstance(bad, BadSample)
    assert (bad.source, bad.error.fault) == ("read", "nothing to draw")
    assert str(bad.error).startswith(f"{path}:1")

    fits = laid(make_work(), "edit", 0).layout
    assert len(laid(make_work(sequence_length=len(fits)), "edit", 0).layout) == 21
    # Rounding up the text stream may cost three tokens, so that 23 are not enough for 21.
    assert isinstance(make_work(sequence_length=24, stream_multiple=4).lay_out(Draw("edit", 0, 0)), Laid)
    bad = make_work(sequence_length=23, stream_multiple=4).lay_out(Draw("edit", 0, 0))
    assert isinstance(bad, BadSample)
    assert bad.error.fault == "too long"
    assert "21 tokens, but data.sequence_length 23 has room for 20; raise it or lower" in str(bad.error)


BUCKETS = [(32, 32), (64, 16), (16, 64), (48, 24)]


def test_bucket_of_the_nearest_aspect_ratio(make_work: MakeWork, tmp_path: Path, write_image, write_jsonl) -> None:
    """Against all buckets tried one by one; the tower's grid goes by its own rule."""
    rng = np.random.default_rng(0)
    sizes = [tuple(int(side) for side in rng.integers(20, 120, 2)) for _ in range(20)]
    items = []
    for i, size in enumerate(sizes):
        write_image(tmp_path / f"{i}.png", *size)
        items.append({"id": i, "image": f"{i}.png", "conversations": turns("draw", "<image>")})
    path = write_jsonl(tmp_path / "many.jsonl", items)
    sources = open_sources({"many": SourceConfig(path=str(path), kind="text_to_image")})
    work = make_work(sources=sources, drawing_size={"rule": "buckets", "sizes": BUCKETS})
    chosen = set()
    for i, (width, height) in enumerate(sizes):
        sample = laid(work, "many", i).layout
        far = [abs(math.log((w / h) / (width / height))) for w, h in BUCKETS]
        w, h = BUCKETS[int(np.argmin(far))]
        assert sample.picture.tolist() == [h // SIDE, w // SIDE], (width, height)
        chosen.add((w, h))
        long_side = max(width, height)
        patches = [2 * max(1, round(side * 56 / (long_side * 28))) for side in (height, width)]
        assert sample.grids.tolist() == [[1, *patches]]
    assert len(chosen) == 4


# -- what its images hold


def picture_of(sample: DrawingSample) -> np.ndarray:
    """(H, W, 3) in [-1, 1] of a sample's pixels."""
    assert sample.pixels is not None
    whole = from_patches(torch.from_numpy(sample.pixels)[None], *sample.picture.tolist(), SIDE)
    return whole[0].permute(1, 2, 0).numpy()


def test_pixels_are_the_picture(make_work: MakeWork, tmp_path: Path) -> None:
    """A picture of the size that is drawn comes back byte for byte; black is -1 and white is 1."""
    known = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    known[0, 0], known[31, 0] = 0, 255
    Image.fromarray(known).save(tmp_path / "draw0.png")
    (sample, broken), (wide, _) = loaded(make_work(), Draw("draw", 0, 0), Draw("draw", 2, 0))
    assert not broken
    assert sample.learned
    assert sample.pixels is not None
    assert sample.pixels.shape == (16, 3 * SIDE**2)
    np.testing.assert_allclose(picture_of(sample), known / 127.5 - 1, atol=1e-6)
    assert picture_of(sample)[0, 0].tolist() == [-1, -1, -1]
    assert picture_of(sample)[31, 0].tolist() == [1, 1, 1]
    stretched = Image.open(tmp_path / "draw2.png").resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(picture_of(wide), np.asarray(stretched) / 127.5 - 1, atol=1e-6)


def test_pixels_of_a_bucket_are_cropped(make_work: MakeWork, tmp_path: Path) -> None:
    """80 x 64 to 64 x 16: the middle 20 rows, made smaller; the tower sees the whole picture."""
    work = make_work(drawing_size={"rule": "buckets", "sizes": [(64, 16)]})
    ((sample, _),) = loaded(work, Draw("draw", 1, 0))
    image = Image.open(tmp_path / "draw1.png")
    middle = image.crop((0, 22, 80, 42)).resize((64, 16), Image.Resampling.BICUBIC)
    assert sample.picture.tolist() == [2, 8]
    np.testing.assert_allclose(picture_of(sample), np.asarray(middle) / 127.5 - 1, atol=1e-6)
    whole = images.patchify(np.asarray(image.resize((56, 56), Image.Resampling.BICUBIC)), TOWER)[0]
    np.testing.assert_array_equal(sample.patches, whole)


def test_condition_is_the_picture_then_its_sources(make_work: MakeWork, tmp_path: Path) -> None:
    ((sample, _),) = loaded(make_work(), Draw("edit", 2, 0))
    parts = []
    for name, side in (("to2", 56), ("from2", 28)):
        resized = Image.open(tmp_path / f"{name}.png").resize((side, side), Image.Resampling.BICUBIC)
        parts.append(images.patchify(np.asarray(resized), TOWER)[0])
    np.testing.assert_array_equal(sample.patches, np.concatenate(parts))


@pytest.mark.parametrize("name", ["to1", "from1"])
def test_nothing_is_learned_from_a_broken_image(make_work: MakeWork, tmp_path: Path, name: str) -> None:
    """Header fine, pixels cut off: sizes stay, the image is grey, and the fault names the sample."""
    draws = (Draw("edit", 0, 0), Draw("edit", 1, 0))
    (before, _), (whole, _) = loaded(make_work(), *draws)
    path = tmp_path / f"{name}.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (other, _), (sample, broken) = loaded(make_work(), *draws)
    assert_same(other, before)
    assert not sample.learned
    assert whole.learned
    # The picture is read twice, for what is drawn and for the condition.
    assert [each.error.fault for each in broken] == ["unreadable image"] * (2 if name == "to1" else 1)
    assert all(str(each.error).startswith(f"{tmp_path}/edit.jsonl:2") for each in broken)
    grey, kept = (slice(0, 16), slice(16, 20)) if name == "to1" else (slice(16, 20), slice(0, 16))
    assert sample.patches is not None
    assert whole.patches is not None
    assert not sample.patches[grey].any()
    np.testing.assert_array_equal(sample.patches[kept], whole.patches[kept])
    assert sample.pixels is not None
    assert sample.pixels.any() == (name == "from1")
    row = make_work().row([other, sample])
    assert row.learned.tolist() == [True, False]


def test_broken_images_are_counted_by_the_loader(make_loader, tmp_path: Path) -> None:
    path = tmp_path / "draw3.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for batch in take(make_loader(), 3):
        drawn = [name for row in batch.rows for name, good in zip(row.sample_ids, row.learned, strict=True) if not good]
        assert drawn == ["draw/draw3"] * len(drawn)
        assert len(batch.voided) == 2 * len(drawn)


# -- everything random


@dataclass(frozen=True)
class Chance:
    """What was random about a sample."""

    uniform: float
    unconditional: bool
    noise: bytes


def chances(batches: list) -> dict[tuple[int, str], Chance]:
    """By step and sample."""
    found = {}
    for batch in batches:
        for row in batch.rows:
            noise = np.split(row.noise, np.cumsum(row.pictures.prod(axis=1))[:-1]) if len(row.pictures) else []
            for i, name in enumerate(row.sample_ids):
                chance = Chance(row.uniform[i], row.unconditional[i], noise[i].tobytes())
                assert (batch.step, name) not in found
                found[batch.step, name] = chance
    return found


def test_chance_belongs_to_the_draw(make_loader) -> None:
    """The same at any number of ranks, batch size and kind of worker; another one at the next pass and seed."""
    whole = chances(take(make_loader(), 6))
    assert len(whole) == 6 * BATCH
    assert len({chance.uniform for chance in whole.values()}) == len({chance.noise for chance in whole.values()}) == 48
    names = [name for _, name in whole]
    assert names.count("draw/draw0") > 1, "the run passes over the source more than once"
    for size in (2, 4):
        parts = [chances(take(make_loader(DataShard(rank, size)), 6)) for rank in range(size)]
        assert {key: value for part in parts for key, value in part.items()} == whole
        assert sum(len(part) for part in parts) == len(whole)
    halves = chances(take(make_loader(batch=BatchSize(samples=BATCH // 2)), 12))
    assert {(step // 2, name): chance for (step, name), chance in halves.items()} == whole
    for workers in (
        {"prefetch_workers": 2},
        {"prefetch_workers": 1, "workers": "process"},
        {"packing": False},
        {"stream_multiple": 4},
    ):
        assert chances(take(make_loader(**workers), 6)) == whole, workers
    other = chances(take(make_loader(seed=8), 6))
    assert not {chance.uniform for chance in other.values()} & {chance.uniform for chance in whole.values()}
    assert not {chance.noise for chance in other.values()} & {chance.noise for chance in whole.values()}


def test_chance_goes_by_source_place_and_pass(make_work: MakeWork) -> None:
    """Every part of the key counts, and nothing else: without sources, or with other sizes, the numbers stay."""
    work = make_work()
    draws = [Draw(source, index, epoch) for source in ("draw", "edit") for index in (0, 1) for epoch in (0, 1)]
    layouts = [laid(work, draw.source, draw.index, draw.epoch).layout for draw in draws]
    assert len({layout.uniform for layout in layouts}) == len({layout.noise_seed for layout in layouts}) == 8
    changed = make_work(with_sources=False, drawing_size={"rule": "square", "side": 16}, sequence_length=200)
    for draw, layout in zip(draws, layouts, strict=True):
        again = laid(changed, draw.source, draw.index, draw.epoch).layout
        assert again.noise_seed == layout.noise_seed
        assert (again.uniform, again.unconditional) == (layout.uniform, layout.unconditional)


def test_chance_has_its_distributions(make_work: MakeWork) -> None:
    """Uniform numbers by Kolmogorov-Smirnov, the share without a condition by its binomial, noise by its moments and
    by what samples have in common; all at about 1 in 1000, on a fixed seed."""
    work, count = make_work(), 3000
    layouts = [laid(work, "draw", i % 12, i // 12).layout for i in range(count)]
    u = np.sort([layout.uniform for layout in layouts])
    steps = np.arange(count + 1) / count
    assert max(np.abs(steps[1:] - u).max(), np.abs(u - steps[:-1]).max()) < 1.95 / math.sqrt(count)
    assert 0 < u[0] < u[-1] < 1
    left_out = np.array([layout.unconditional for layout in layouts])
    spread = math.sqrt(0.3 * 0.7 * count)
    assert abs(left_out.sum() - 0.3 * count) < 3.3 * spread
    # Whether the condition is left out says nothing of the timestep.
    uniform = np.array([layout.uniform for layout in layouts])
    assert abs(uniform[left_out].mean() - 0.5) < 3.3 * math.sqrt(1 / 12 / left_out.sum())
    rows = [work.row([replace(layout, pixels=np.zeros((16, 192), np.float32))]) for layout in layouts[:500]]
    noise = np.stack([row.noise for row in rows]).astype(np.float64)  # [500, U, F]
    assert noise.shape == (500, 16, LATENT_PATCH)
    size = noise.size
    assert abs(noise.mean()) < 3.3 / math.sqrt(size)
    assert abs(noise.var() - 1) < 3.3 * math.sqrt(2 / size)
    assert abs((noise**4).mean() - 3) < 3.3 * math.sqrt(96 / size)
    flat = noise.reshape(500, -1)
    common = flat @ flat.T / flat.shape[1]
    assert np.abs(common - np.diag(np.diag(common))).max() < 6 / math.sqrt(flat.shape[1])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.999999, 12)])
def test_dropout_at_its_ends(make_work: MakeWork, share: float, expected: int) -> None:
    work = make_work(condition_dropout=share)
    assert sum(laid(work, "draw", i).layout.unconditional for i in range(12)) == expected


# -- rows


def random_sample(rng: np.random.Generator, name: str) -> DrawingSample:
    """A loaded sample of any sizes, whose values say whose they are and which token."""
    grids = np.array([[1, *(2 * rng.integers(1, 5, 2))] for _ in range(rng.integers(1, 4))], dtype=np.int64)
    picture = rng.integers(1, 7, 2)
    count, number = int(picture.prod()), float(name)
    return DrawingSample(
        id=name,
        kind="text_to_image",
        image_index=tuple(range(len(grids))),
        by_assistant=(True,) + (False,) * (len(grids) - 1),
        grids=grids,
        picture=picture,
        num_condition=int(grids.prod(axis=1).sum()) // 4,
        uniform=rng.uniform(),
        unconditional=bool(rng.random() < 0.5),
        noise_seed=int(rng.integers(1 << 63)),
        patches=np.full((int(grids.prod(axis=1).sum()), TOWER.patch_dim), number, np.float32),
        pixels=np.full((count, 3 * SIDE**2), number, np.float32),
    )


@pytest.mark.parametrize("seed", range(25))
def test_any_samples_that_fit_make_a_row(make_work: MakeWork, seed: int) -> None:
    """Packed as the loader packs: both streams have their length, every sample its values, in order."""
    rng = np.random.default_rng(seed)
    multiple = int(rng.choice([1, 2, 4, 8, 16]))
    work = make_work(sequence_length=multiple * int(rng.integers(128 // multiple, 400 // multiple)))
    work = replace(work, stream_multiple=multiple)
    samples = [random_sample(rng, str(i)) for i in range(40)]
    samples = [sample for sample in samples if len(sample) <= work.room]
    assert len(samples) > 30
    plan = plan_rows(
        [len(sample) for sample in samples],
        costs=[1.0] * len(samples),
        sequence_length=work.room,
        num_rows_multiple=4,
        alignment=1,
        packing=True,
    )
    for chosen in plan:
        own = [samples[i] for i in chosen]
        row = work.row(own)
        assert row.num_tokens == work.data.sequence_length
        assert row.num_text % multiple == row.num_tokens % multiple == 0
        assert 0 <= row.num_text - sum(sample.num_condition for sample in own) < multiple
        assert row.num_tokens - row.num_text >= sum(sample.num_picture for sample in own)
        assert row.num_padding == row.num_tokens - sum(len(sample) for sample in own)
        assert row.num_images == len(own)
        assert row.sample_ids == tuple(sample.id for sample in own)
        assert row.pictures.tolist() == [sample.picture.tolist() for sample in own]
        assert row.num_condition.tolist() == [sample.num_condition for sample in own]
        numbers = [float(sample.id) for sample in own]
        np.testing.assert_array_equal(row.pixels[:, 0], np.repeat(numbers, row.pictures.prod(axis=1)))
        assert len(row.noise) == len(row.pixels)
        patches = [sample.grids.prod(axis=1).sum() for sample in own]
        np.testing.assert_array_equal(row.patches[:, 0], np.repeat(numbers, patches).astype(np.float32))
        assert row.is_source.tolist() == [place > 0 for sample in own for place in range(len(sample.grids))]
        assert len(row.grids) == len(row.is_source)
        for i, sample in enumerate(own):
            start = row.pictures[:i].prod(axis=1).sum()
            alone = work.row([sample]).noise
            np.testing.assert_array_equal(row.noise[start : start + sample.num_picture], alone)


def test_noise_on_the_condition(make_work: MakeWork) -> None:
    """On the picture's own tokens only, of a standard deviation that is uniform up to the given one, a sample's own in
    any row; the picture's noise stays what it was, and is another."""
    rng = np.random.default_rng(0)
    work, silent = make_work(condition_noise=0.6, sequence_length=40_000), make_work(sequence_length=40_000)
    samples = [random_sample(rng, str(i)) for i in range(300)]
    row = work.row(samples)
    assert silent.row(samples).condition_noise is None
    np.testing.assert_array_equal(row.noise, silent.row(samples).noise)
    assert row.condition_noise.shape == (row.num_condition.sum(), TOWER.out_size)
    deviations = []
    for sample, noise in zip(samples, np.split(row.condition_noise, np.cumsum(row.num_condition)[:-1]), strict=True):
        own = int(sample.grids[0].prod()) // 4
        assert not noise[own:].any()
        deviations.append(noise[:own].std() / 0.6)
        np.testing.assert_array_equal(work.row([sample]).condition_noise, noise)
    distance = np.abs(np.sort(deviations) - (np.arange(300) + 0.5) / 300).max()
    assert distance < 1.63 / math.sqrt(300)  # Kolmogorov-Smirnov, 1 in 100
    first = work.row(samples[:1])
    size = min(first.noise.size, first.condition_noise.size)
    assert abs(np.corrcoef(first.noise.flat[:size], first.condition_noise.flat[:size])[0, 1]) < 0.5


def test_row_of_nothing(make_work: MakeWork) -> None:
    """What a rank gets that has fewer rows than others."""
    row = make_work(stream_multiple=4).row([])
    assert (row.num_text, row.num_tokens, row.num_padding, row.num_images) == (0, 96, 96, 0)
    assert row.pictures.shape == (0, 2)
    assert row.grids.shape == (0, 3)
    assert (row.noise.shape, row.pixels.shape) == ((0, LATENT_PATCH), (0, 3 * SIDE**2))


def test_row_without_pixels(make_loader) -> None:
    """Ranks inside a pipeline: the same layout, and neither pixels nor noise."""
    full, lean = next(make_loader()), next(make_loader(DataShard(need_pixels=False)))
    for a, b in zip(full.rows, lean.rows, strict=True):
        for field in ("num_condition", "pictures", "grids", "uniform", "unconditional", "is_source"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)
        assert (a.num_text, a.num_tokens, a.sample_ids) == (b.num_text, b.num_tokens, b.sample_ids)
        assert len(b.pixels) == len(b.noise) == len(b.patches) == 0 < len(a.pixels)


# -- the loader


@pytest.mark.parametrize("size", [SAMPLES, BatchSize(rows=4)])
def test_same_rows_at_any_dp_size(make_loader, size: BatchSize) -> None:
    def by_name(rows: list[DrawingRow]) -> list[DrawingRow]:
        return sorted((row for row in rows if row.sample_ids), key=lambda row: row.sample_ids)

    whole = take(make_loader(batch=size), 4)
    for dp_size in (2, 4):
        parts = [take(make_loader(DataShard(rank, dp_size), batch=size), 4) for rank in range(dp_size)]
        for step, batch in enumerate(whole):
            assert len({len(part[step].rows) for part in parts}) == 1
            rows = by_name([row for part in parts for row in part[step].rows])
            for a, b in zip(rows, by_name(batch.rows), strict=True):
                assert_same(a, b)


def test_resume_is_exact(make_loader) -> None:
    """Rows after the stop are what they would have been, number for number, in the same passes."""
    size = BatchSize(rows=2)
    straight = take(make_loader(batch=size), 6)
    first = make_loader(DataShard(1, 2), batch=size)
    take(first, 3)
    resumed = make_loader(batch=size)
    resumed.load_state_dict(first.state_dict())
    for batch, expected in zip(take(resumed, 3), straight[3:], strict=True):
        assert batch.step == expected.step
        for a, b in zip(batch.rows, expected.rows, strict=True):
            assert_same(a, b)


# -- computed beforehand


def write_stores(work: DrawingWork, folder: Path, without: str = "") -> tuple[FeatureStore, FeatureStore]:
    """Features (bfloat16) and latents of the world, each number telling its place; ``without`` could not be decoded."""
    made = []
    for name, dtype, width in (("features", "bfloat16", 32), ("latents", "float32", LATENT_PATCH)):
        meta = FeatureMeta({}, "", dtype, width)
        writer = FeatureWriter(folder / name, 0, meta)
        for source in ("draw", "edit"):
            for index in range(len(work.sources[source])):
                each = laid(work, source, index)
                requests = work.condition_requests(each) if name == "features" else [work.picture_request(each)]
                for request in requests:
                    side = 28 if name == "features" else SIDE
                    count = (request.width // side) * (request.height // side) * (without not in str(request.file))
                    rows = np.arange(count * width).reshape(count, width) + 1000 * index
                    writer.add(image_key(request), rows.astype(np.int16 if dtype == "bfloat16" else np.float32))
        writer.finish()
        finish_cache(folder / name, meta)
        made.append(FeatureStore(folder / name))
    return made[0], made[1]


def test_stores_stand_in_for_pixels(make_work: MakeWork, tmp_path: Path) -> None:
    """Rows of each image in the order of the condition; layout and noise are as with pixels."""
    features, latents = write_stores(make_work(), tmp_path / "cache", without="none")
    work, plain = make_work(features=features, latents=latents), make_work()
    for own in (work, pickle.loads(pickle.dumps(work))):  # worker processes get it so
        draws = [Draw("edit", 2, 0), Draw("draw", 3, 1)]
        found = [sample for sample, broken in loaded(own, *draws) if not broken]
        row, expected = work.row(found), plain.row([sample for sample, _ in loaded(plain, *draws)])
        assert row.features is not None
        assert row.latents is not None
        places = 16.0 * np.arange(16)
        np.testing.assert_array_equal(row.latents[:, 0], np.concatenate([2000 + places, 3000 + places]))
        tokens = [2000 + 32 * np.arange(4), [2000], 3000 + 32 * np.arange(4)]  # picture, its source, picture
        np.testing.assert_array_equal(row.features[:, 0], np.concatenate(tokens))
        assert row.features.dtype == np.int16
        assert len(row.pixels) == len(row.patches) == 0
        np.testing.assert_array_equal(row.noise, expected.noise)
        np.testing.assert_array_equal(row.grids, expected.grids)
        np.testing.assert_array_equal(row.learned, [True, True])
    empty = work.row([])
    assert empty.features is not None
    assert empty.latents is not None
    assert (empty.features.shape, empty.latents.shape) == ((0, 32), (0, LATENT_PATCH))


def test_stores_know_broken_images(make_work: MakeWork, tmp_path: Path) -> None:
    """No rows say that an image could not be decoded: nothing is learned, sizes stay. What is not there is an error."""
    features, latents = write_stores(make_work(), tmp_path / "cache", without="to1")
    work = make_work(features=features, latents=latents)
    ((sample, broken),) = loaded(work, Draw("edit", 1, 0))
    assert not sample.learned
    assert [each.error.fault for each in broken] == ["unreadable image"] * 2
    assert sample.latents is not None
    assert sample.features is not None
    assert (sample.latents.shape, sample.features.shape) == ((16, LATENT_PATCH), (5, 32))
    assert not sample.latents.any()
    assert not sample.features[:4].any()
    assert sample.features[4].any()
    larger = make_work(features=features, latents=latents, drawing_size={"rule": "square", "side": 40})
    with pytest.raises(DataError, match=r"latents: lacks .*draw0\.png of .*draw\.jsonl:1; run unimm data cache again"):
        loaded(larger, Draw("draw", 0, 0))
