"""Conversations as frames to be drawn: rows drawn by hand, what is left out of conditions, broken and excess images."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.methods import DropoutSchedule
from megatron_unimm.config.mmdit import ImageGeneratorConfig
from megatron_unimm.config.queries import PictureScales, QueryVlmConfig
from megatron_unimm.data.chat import ChatFormat
from megatron_unimm.data.conditions import VISUAL, WORDS, ConditionStore
from megatron_unimm.data.decode.build import build_decoder
from megatron_unimm.data.drawing import picture_noise
from megatron_unimm.data.features import FeatureMeta, FeatureWriter, finish_cache
from megatron_unimm.data.frames import FrameRow, FrameSample, FrameWork
from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.images import SiglipFormat, decode, patchify, resize
from megatron_unimm.data.mix import Draw
from megatron_unimm.data.plan import BadSample, Laid
from megatron_unimm.data.sample import Sample, Turn
from megatron_unimm.data.sources.source import Source
from megatron_unimm.errors import DataError

GENERATOR = ImageGeneratorConfig.model_validate(
    {
        "mmdit": {
            "family": "sd3",
            "num_layers": 1,
            "num_heads": 1,
            "head_size": 8,
            "latent_channels": 2,
            "condition_size": 8,
            "pooled_size": 8,
        },
        "vae": {"latent_channels": 2, "block_channels": [8, 8], "norm_groups": 4, "scaling_factor": 1.0},
    }
)
"""Its image tokens are squares of 4 pixels."""
DRAWING = {"rule": "buckets", "sizes": [[8, 8], [12, 8], [8, 12]]}
"""2 x 2 image tokens, 2 rows of 3, 3 rows of 2."""
NEVER, ALWAYS = DropoutSchedule(start=0, end=0), DropoutSchedule(start=1, end=1)


class Made(Source):
    """Samples in memory."""

    def __init__(self, *samples: Sample) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def where(self, index: int) -> str:
        return f"made:{index}"


@pytest.fixture
def files(tmp_path: Path, write_image) -> list[Path]:
    """Wide (2 visual tokens where it is read, 2 x 3 image tokens), square (4 where it was drawn, 2 x 2), high (3 x 2),
    and wide again."""
    sizes = [(56, 28), (60, 60), (28, 84), (56, 28)]
    return [write_image(tmp_path / f"{number}.png", *size, seed=number) for number, size in enumerate(sizes)]


def sample_of(kind: SampleKind, images: Sequence[Path], *turns: Turn) -> Sample:
    return Sample(kind, kind, turns, tuple(DiskImage(path) for path in images))


def text_to_image(files: Sequence[Path]) -> Sample:
    return sample_of("text_to_image", files[1:2], Turn("user", ("red",)), Turn("assistant", (0,)))


def edit(files: Sequence[Path]) -> Sample:
    return sample_of("editing", files[:2], Turn("user", (0, "blue")), Turn("assistant", ("red", 1)))


def session(files: Sequence[Path]) -> Sample:
    """Three frames: one that is given, its edit, and the edit of that."""
    turns = Turn("user", (0, "red")), Turn("assistant", (1,)), Turn("user", ("blue",)), Turn("assistant", (2,))
    return sample_of("editing", files[:3], *turns)


def several(files: Sequence[Path]) -> Sample:
    """Two pictures that are given at once, two that are drawn at once; the conversation goes on without drawing."""
    turns = (
        Turn("user", ("red", 0, 2)),
        Turn("assistant", (1, "blue", 3, "red")),
        Turn("user", ("blue", 1)),
        Turn("assistant", ("red",)),
    )
    return sample_of("interleaved", files, *turns)


def work_of(
    chat: ChatFormat,
    *samples: Sample,
    text: DropoutSchedule = NEVER,
    visual: DropoutSchedule = NEVER,
    max_frames: int = 8,
    **settings,
) -> FrameWork:
    return FrameWork(
        GENERATOR,
        chat,
        QueryVlmConfig(num_queries=3).scales,
        {"made": Made(*samples)},
        seed=1,
        text_dropout=text,
        visual_dropout=visual,
        max_frames=max_frames,
        **settings,
    )


def plain_chat(make_chat, **settings) -> ChatFormat:
    return make_chat(**{"system_prompt": "", "drawing_size": DRAWING, **settings})


def laid_out(work: FrameWork, epoch: int = 0) -> list[Laid]:
    found = [work.lay_out(Draw("made", index, epoch)) for index in range(len(work.sources["made"]))]
    assert all(isinstance(each, Laid) for each in found), found
    return [each for each in found if isinstance(each, Laid)]


def loaded(work: FrameWork) -> list[tuple[FrameSample, list[BadSample]]]:
    with build_decoder("pillow", max_pixels=work.data.max_image_pixels, threads=0, device=None) as decoder:
        return work.load(laid_out(work), decoder)


def row_of(work: FrameWork, step: int = 0) -> FrameRow:
    return work.row([sample for sample, _ in loaded(work)], step)


def frames(row: FrameRow) -> list[tuple[int, int, str, list[int], int]]:
    """Sample, number, noisy or clean, rows and columns, tokens of the condition."""
    each = row.frames
    kinds = ["clean" if clean else "noisy" for clean in each.is_clean]
    sizes = each.sizes.tolist()
    return list(zip(each.sample.tolist(), each.number.tolist(), kinds, sizes, each.num_condition.tolist(), strict=True))


# -- rows by hand


def test_text_to_image(make_chat, files) -> None:
    """One noisy frame: all nine words of ``<s> user n red <e> n <s> assistant n [ q q q ] <e> n`` before the picture,
    then its latents."""
    row = row_of(work_of(plain_chat(make_chat), text_to_image(files)))
    assert frames(row) == [(0, 0, "noisy", [2, 2], 9 + 3)]
    assert not row.frames.look_back
    assert (row.num_text, row.num_tokens, row.num_padding) == (12, 256, 256 - 12 - 4)
    assert row.word_index.tolist() == list(range(9))
    assert row.query_index.tolist() == [10, 11, 12]
    assert row.condition_order.tolist() == list(range(12))
    assert row.token_of.tolist() == [0, 1, 2, 3]
    assert row.pictures.tolist() == [[2, 2]]
    assert (row.conversation.num_tokens, row.num_images) == (16, 1)
    assert (row.conversation.labels < 0).all(), "the VLM learns nothing here"


def test_edit(make_chat, files) -> None:
    """``<s> user n [ # # ] blue <e> n <s> assistant n red [ q q q ] <e> n``: what is given stands there clean, and has
    no condition."""
    row = row_of(work_of(plain_chat(make_chat), edit(files)))
    assert frames(row) == [(0, 0, "clean", [2, 3], 0), (0, 1, "noisy", [2, 2], 10 + 3)]
    assert row.word_index.tolist() == [0, 1, 2, 7, 8, 9, 10, 11, 12, 13]
    assert row.query_index.tolist() == [15, 16, 17]
    assert row.token_of.tolist() == list(range(10))
    assert row.learned.tolist() == [False, True]
    assert row.conversation.grids.tolist() == [[1, 2, 4]]


def test_session_of_three(make_chat, files) -> None:
    """The picture in the middle is there twice, noisy and clean; the last one is nobody's to look back at."""
    row = row_of(work_of(plain_chat(make_chat), session(files)))
    assert frames(row) == [
        (0, 0, "clean", [2, 3], 0),
        (0, 1, "noisy", [2, 2], 9 + 3),
        (0, 1, "clean", [2, 2], 0),
        (0, 2, "noisy", [3, 2], 11 + 3),
    ]
    # <s> user n [ # # ] red <e> n <s> assistant n [ q q q ] [ # # # # ] <e> n <s> user n blue <e> n <s> assistant n …
    first, second = [0, 1, 2, 7, 8, 9, 10, 11, 12], list(range(24, 35))
    assert row.word_index.tolist() == first + second
    assert row.query_index.tolist() == [14, 15, 16, 36, 37, 38]
    assert row.condition_order.tolist() == [*range(9), 20, 21, 22, *range(9, 20), 23, 24, 25]
    assert row.token_of.tolist() == [*range(6), *range(6, 10), *range(6, 10), *range(10, 16)]
    assert row.pictures.tolist() == [[2, 3], [2, 2], [3, 2]]
    assert len(row.pixels) == 16
    assert row.num_images == 2
    assert (row.num_text, row.num_padding) == (26, 256 - 26 - 20)
    assert row.conversation.grids.tolist() == [[1, 2, 4], [1, 4, 4]], "the VLM reads the last one not"


def test_without_sources_drawings_stand_alone(make_chat, files) -> None:
    """What is given is no frame and none is there clean, with both scales of both drawings samples of their own; the
    VLM still reads all. A new picture is drawn likewise, whatever their number."""
    both = PictureScales((1, 2), (Fraction(1, 2), Fraction(1)))
    wide = {"rule": "buckets", "sizes": [[16, 16], [24, 16], [16, 24]]}
    work = replace(
        work_of(make_chat(system_prompt="", drawing_size=wide), session(files), max_frames=1, shows_sources=False),
        scales=both,
        pathways="visual",
    )
    row = row_of(work)
    assert frames(row) == [
        (0, 0, "noisy", [2, 2], 1),
        (1, 0, "noisy", [3, 2], 1),
        (2, 0, "noisy", [4, 4], 2),
        (3, 0, "noisy", [6, 4], 2),
    ]
    assert not row.frames.look_back
    # Two pictures of three queries each, as the VLM has them; in the text stream coarse ones first.
    assert row.condition_order.tolist() == [0, 3, 1, 2, 4, 5]
    assert row.pictures.tolist() == [[2, 2], [3, 2], [4, 4], [6, 4]]
    assert row.token_of.tolist() == list(range(4 + 6 + 16 + 24))
    assert row.noise.any(axis=1).all()
    # The given picture and the first drawing.
    assert len(row.conversation.grids) == 2
    turns = [*session(files).turns[:2], Turn("user", ("blue",))]
    new = work.frames_to_draw(turns, [(56, 28), (60, 60), (28, 84)], scale=0)
    assert (new.sizes.tolist(), new.is_drawn.tolist(), new.image_index) == ([[3, 2]], [True], (2,))
    assert frames(work.row([new])) == [(0, 0, "noisy", [3, 2], 1)]
    assert work.pictures_before(new, []) == []


def test_several_pictures(make_chat, files) -> None:
    """All pictures up to the last that is drawn, in the order in which they stand; what comes after is left out."""
    row = row_of(work_of(plain_chat(make_chat), several(files)))
    # <s> user n red [ # # ] [ # # # ] <e> n <s> assistant n [ q q q ] [ # # # # ] blue [ q q q ] <e> n
    assert frames(row) == [
        (0, 0, "clean", [2, 3], 0),
        (0, 1, "clean", [3, 2], 0),
        (0, 2, "noisy", [2, 2], 9 + 3),
        (0, 2, "clean", [2, 2], 0),
        (0, 3, "noisy", [2, 3], 1 + 3),
    ]
    assert row.word_index.tolist() == [0, 1, 2, 3, 13, 14, 15, 16, 17, 29]
    assert row.query_index.tolist() == [19, 20, 21, 31, 32, 33]
    assert row.condition_order.tolist() == [*range(9), 10, 11, 12, 9, 13, 14, 15]
    assert row.conversation.num_tokens == 37


@pytest.mark.parametrize(("alignment", "multiple"), [(1, 1), (8, 32)])
def test_packed_row(alignment: int, multiple: int, make_chat, files) -> None:
    """Behind one another: each sample's words, queries and pictures where its own row has them, moved."""
    chat = plain_chat(make_chat)
    samples = [session(files), text_to_image(files), edit(files)]
    row = row_of(work_of(chat, *samples, vlm_alignment=alignment, vlm_multiple=multiple, stream_multiple=16))
    alone = [row_of(work_of(chat, sample)) for sample in samples]
    assert [each[1:] for each in frames(row)] == [each[1:] for one in alone for each in frames(one)]
    assert row.frames.sample.tolist() == [0] * 4 + [1] + [2] * 2
    starts = [0, 48, 64] if alignment == 8 else [0, 42, 58]
    assert row.conversation.segment_bounds[:3] == tuple(starts)
    assert row.conversation.num_tokens % multiple == 0
    for field in ("word_index", "query_index"):
        moved = [vars(one)[field] + start for one, start in zip(alone, starts, strict=True)]
        np.testing.assert_array_equal(vars(row)[field], np.concatenate(moved))
    ids = row.conversation.input_ids
    condition = np.concatenate([row.word_index, row.query_index])[row.condition_order]
    found = [one.conversation.input_ids[np.concatenate([one.word_index, one.query_index])] for one in alone]
    orders = [one.condition_order for one in alone]
    by_sample = [values[order] for values, order in zip(found, orders, strict=True)]
    np.testing.assert_array_equal(ids[condition], np.concatenate(by_sample))
    pixels = np.concatenate([one.pixels[one.token_of] for one in alone])
    np.testing.assert_array_equal(row.pixels[row.token_of], pixels)
    assert row.num_text == 64, "26 + 12 + 13 = 51, in sixteens"
    assert row.kinds == ("editing", "text_to_image", "editing")
    # What is random belongs to the draw, of which the place in the source is a part: only the first is the same.
    np.testing.assert_array_equal(row.noise[:20], alone[0].noise)
    np.testing.assert_array_equal(row.uniform[:4], alone[0].uniform)


def test_pixels_and_noise(make_chat, files) -> None:
    """Pictures as their bucket has them, in [-1, 1]; noise of the noisy ones alone, each by its own seed."""
    work = work_of(plain_chat(make_chat), session(files))
    ((sample, broken),) = loaded(work)
    assert not broken
    row = work.row([sample])
    square = resize(decode(DiskImage(files[1]), 10**6), 8, 8)
    np.testing.assert_array_equal(row.pixels[6:10], patchify(square, SiglipFormat(4))[0])
    assert -1 <= row.pixels.min() < row.pixels.max() <= 1
    width = GENERATOR.mmdit.patch_dim
    expected = [np.zeros((6, width)), picture_noise(sample.noise_seed + 1, 4, width), np.zeros((4, width))]
    expected.append(picture_noise(sample.noise_seed + 2, 6, width))
    np.testing.assert_array_equal(row.noise, np.concatenate(expected).astype(np.float32))
    requests = work.picture_requests(laid_out(work)[0])
    sizes = [(Path(str(each.file)).name, each.width, each.height, each.crop) for each in requests]
    assert sizes == [("0.png", 12, 8, True), ("1.png", 8, 8, True), ("2.png", 8, 12, True)]


# -- what is left out


def test_dropout_by_hand(make_chat, files) -> None:
    """A frame is there below no rate but its own number: all of its words, or none, and likewise its latents."""
    chat, samples = plain_chat(make_chat), [session(files), text_to_image(files)]
    for text, visual in ((NEVER, ALWAYS), (ALWAYS, NEVER)):
        row = row_of(work_of(chat, *samples, text=text, visual=visual))
        assert (row.text_kept == (text is NEVER)).all()
        assert (row.visual_kept == (visual is NEVER)).all()
        assert (len(row.text_kept), len(row.visual_kept)) == (9 + 11 + 9, 3 * 3)
    half = DropoutSchedule(start=0.5, end=0.5)
    work = work_of(chat, *samples, text=half, visual=half)
    laid = [each.layout for each in laid_out(work)]
    row = work.row(laid)
    text = [bool(value >= 0.5) for value in (*laid[0].text_uniform[1:], *laid[1].text_uniform)]
    visual = [bool(value >= 0.5) for value in (*laid[0].visual_uniform[1:], *laid[1].visual_uniform)]
    np.testing.assert_array_equal(row.text_kept, np.repeat(text, [9, 11, 9]))
    np.testing.assert_array_equal(row.visual_kept, np.repeat(visual, 3))


def kept(work: FrameWork, step: int, epochs: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Of the pictures of many draws, whether words, and whether visual latents are there."""
    text, visual = [], []
    for epoch in range(epochs):
        row = work.row([each.layout for each in laid_out(work, epoch)], step)
        text.append(row.text_kept[[0, 9]])
        visual.append(row.visual_kept[[0, 3]])
    return np.concatenate(text), np.concatenate(visual)


def test_rates_anneal_and_are_independent(make_chat, files) -> None:
    """800 frames: rates within four standard deviations of the schedule's, of both together their product; and as a
    rate falls, what was there stays."""
    schedule = DropoutSchedule(start=0.8, end=0.2, steps=10)
    assert [schedule.at(step) for step in (0, 5, 10, 999)] == pytest.approx([0.8, 0.5, 0.2, 0.2])
    work = work_of(plain_chat(make_chat), session(files), text=schedule, visual=DropoutSchedule(start=0.4, end=0.4))
    found = {step: kept(work, step) for step in (0, 5, 10)}
    bound = 4 * 0.5 / 800**0.5
    for step, rate in ((0, 0.8), (5, 0.5), (10, 0.2)):
        text, visual = found[step]
        assert abs(1 - text.mean() - rate) < bound
        assert abs(1 - visual.mean() - 0.4) < bound
        assert abs((text & visual).mean() - (1 - rate) * 0.6) < bound
    assert (found[5][0] >= found[0][0]).all()
    assert (found[10][0] >= found[5][0]).all()
    np.testing.assert_array_equal(found[0][1], found[10][1])


def test_chance_belongs_to_the_draw(make_chat, files) -> None:
    """Not to the row that a sample ends up in; another pass over the source is another draw. Frames have their own."""
    half = DropoutSchedule(start=0.5, end=0.5)
    work = work_of(plain_chat(make_chat), session(files), text_to_image(files), text=half, visual=half)
    one, other = (each.layout for each in laid_out(work))
    for field in ("uniform", "text_uniform", "visual_uniform"):
        assert len({*vars(one)[field], *vars(other)[field]}) == 4
    there, back = work.row([one, other]), work.row([other, one])
    np.testing.assert_array_equal(there.uniform, np.concatenate([back.uniform[1:], back.uniform[:1]]))
    np.testing.assert_array_equal(there.text_kept, np.concatenate([back.text_kept[9:], back.text_kept[:9]]))
    again, next_pass = laid_out(work)[0].layout, laid_out(work, epoch=1)[0].layout
    assert again.noise_seed == one.noise_seed != next_pass.noise_seed
    assert (again.uniform == one.uniform).all()
    assert (next_pass.uniform != one.uniform).all()


# -- ranks that read no pictures, and samples that do not go


def test_a_rank_that_reads_no_pictures_plans_alike(make_chat, files) -> None:
    half = DropoutSchedule(start=0.5, end=0.5)
    work = work_of(plain_chat(make_chat), session(files), several(files), text=half, visual=half, vlm_alignment=4)
    row, blind = row_of(work), work.row([each.layout for each in laid_out(work)])
    for field, value in vars(row).items():
        if isinstance(value, np.ndarray) and field not in ("noise", "pixels"):
            np.testing.assert_array_equal(vars(blind)[field], value)
    assert frames(blind) == frames(row)
    np.testing.assert_array_equal(blind.conversation.input_ids, row.conversation.input_ids)
    assert len(blind.noise) == len(blind.pixels) == len(blind.conversation.patches) == 0
    assert blind.num_tokens == row.num_tokens
    assert blind.num_text == row.num_text


def test_an_empty_row(make_chat) -> None:
    row = work_of(plain_chat(make_chat), stream_multiple=4, vlm_multiple=8).row([])
    assert (len(row.frames), row.num_text, row.num_padding, row.num_images) == (0, 0, 256, 0)
    assert row.conversation.num_tokens == 8
    assert len(row.token_of) == len(row.pixels) == len(row.condition_order) == 0


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_broken_image_voids_its_sample(number: int, make_chat, files, tmp_path, write_image) -> None:
    """Whichever it is, none of its frames is learned; the shapes stay, and its neighbour is as it would be alone."""
    own = write_image(tmp_path / "own.png", 60, 60, seed=9)
    fine = sample_of("text_to_image", [own], Turn("user", ("red",)), Turn("assistant", (0,)))
    work = work_of(plain_chat(make_chat), session(files), fine)
    sound = row_of(work)
    whole = files[number].read_bytes()
    files[number].write_bytes(whole[: len(whole) // 2])  # the header still says its size
    (sample, broken), (neighbour, none) = loaded(work)
    assert {bad.error.fault for bad in broken} == {"unreadable image"}
    assert not none
    row = work.row([sample, neighbour])
    assert sound.learned.tolist() == [False, True, False, True, True]
    assert row.learned.tolist() == [False, False, False, False, True]
    for field in ("pixels", "noise", "token_of", "uniform", "word_index"):
        assert vars(row)[field].shape == vars(sound)[field].shape
    np.testing.assert_array_equal(row.pixels[16:], sound.pixels[16:])
    np.testing.assert_array_equal(row.noise, sound.noise)


# -- conditions computed beforehand


def write_conditions(work: FrameWork, folder: Path, broken: int | None = None) -> ConditionStore:
    """Each number tells its sample (thousands) and the token that it is of; an image of ``broken`` was unreadable."""
    for name, width in ((WORDS, 6), (VISUAL, 5)):
        meta = FeatureMeta({}, "", "float32", width)
        writer = FeatureWriter(folder / name, 0, meta)
        for number, each in enumerate(laid_out(work)):
            layout = each.layout.layout
            index = np.concatenate(layout.text_index) if name == WORDS else layout.query_index
            rows = np.repeat(index[:, None] + 1000.0 * number, width, axis=1).astype(np.float32)
            writer.add(work.condition_key(each), rows[: 0 if number == broken else None])
        assert writer.finish() == len(laid_out(work))
        finish_cache(folder / name, meta)
    return ConditionStore(folder)


def test_conditions_stand_in_for_what_the_vlm_reads(make_chat, files, tmp_path) -> None:
    """Of each sample the rows of its words and of its queries; the VLM's images are not there, and all else is as it is
    without a cache."""
    half = DropoutSchedule(start=0.5, end=0.5)
    samples, chat = [session(files), text_to_image(files), several(files)], plain_chat(make_chat)
    plain = work_of(chat, *samples, text=half, visual=half, vlm_alignment=4)
    work = replace(plain, conditions=write_conditions(plain, tmp_path / "cache"))
    expected = row_of(plain)
    starts = 1000 * np.arange(3) - np.array(expected.conversation.segment_bounds[:3])  # from the row to the samples
    sample_of_word, sample_of_query = (np.repeat(np.arange(3), counts) for counts in ([20, 9, 10], [6, 3, 6]))
    for own in (work, pickle.loads(pickle.dumps(work))):  # worker processes get it so
        row = row_of(own)
        assert row.words is not None
        assert row.visual is not None
        assert (row.words.shape, row.visual.shape) == ((39, 6), (15, 5))
        np.testing.assert_array_equal(row.words[:, 0], expected.word_index + starts[sample_of_word])
        np.testing.assert_array_equal(row.visual[:, 4], expected.query_index + starts[sample_of_query])
        assert len(row.conversation.patches) == 0 < len(expected.conversation.patches)
        for field, value in vars(row).items():
            if isinstance(value, np.ndarray) and field not in ("words", "visual"):
                np.testing.assert_array_equal(value, vars(expected)[field])
    empty = work.row([])
    assert empty.words is not None
    assert empty.visual is not None
    assert (empty.words.shape, empty.visual.shape) == ((0, 6), (0, 5))


@pytest.mark.parametrize("pathways", ["visual", "text"])
def test_conditions_serve_one_pathway_alone(pathways: str, make_chat, files, tmp_path) -> None:
    """They are those of both, whoever asks, and a row has what it has without a cache; where it is drawn from visual
    latents alone, no words."""
    samples, chat = [session(files), text_to_image(files), several(files)], plain_chat(make_chat)
    store = write_conditions(work_of(chat, *samples), tmp_path / "cache")
    plain = work_of(chat, *samples, pathways=pathways)
    assert all(store.words.get(plain.condition_key(laid)) is not None for laid in laid_out(plain))
    row, expected = row_of(replace(plain, conditions=store)), row_of(plain)
    num_words = 39 if pathways == "text" else 0
    assert row.words is not None
    assert row.visual is not None
    assert (row.words.shape, row.visual.shape) == ((num_words, 6), (15, 5))
    assert (len(row.word_index), int(row.frames.num_condition.sum())) == (num_words, num_words + 15)
    for field, value in vars(row).items():
        if isinstance(value, np.ndarray) and field not in ("words", "visual"):
            np.testing.assert_array_equal(value, vars(expected)[field])


CHANGES: dict[str, Callable[[Sample, Path], tuple[Sample, dict]]] = {
    "nothing": lambda sample, file: (sample, {}),
    "a word": lambda sample, file: (replace(sample, turns=(Turn("user", (0, "red")), *sample.turns[1:])), {}),
    "who says it": lambda sample, file: (
        replace(sample, turns=(Turn("user", (0,)), Turn("assistant", ("blue red", 1)))),
        {},
    ),
    "an image": lambda sample, file: (replace(sample, images=(DiskImage(file), sample.images[1])), {}),
    "the size of images": lambda sample, file: (sample, {"understanding_size": {"min_side": 84, "max_side": 84}}),
    "the system prompt": lambda sample, file: (sample, {"system_prompt": "red"}),
    "queries": lambda sample, file: (sample, {}),
    "the picture to be drawn": lambda sample, file: (replace(sample, images=(sample.images[0], DiskImage(file))), {}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_sample_is_not_found(what: str, make_chat, files, tmp_path, write_image) -> None:
    """Whatever of it the VLM reads. The picture that is to be drawn it does not see."""
    sample, file = edit(files), write_image(tmp_path / "other.png", 56, 28, seed=9)
    store = write_conditions(work_of(plain_chat(make_chat), sample), tmp_path / "cache")
    changed, settings = CHANGES[what](sample, file)
    work = work_of(plain_chat(make_chat, **settings), changed, conditions=store)
    work = replace(work, scales=QueryVlmConfig(num_queries=4).scales) if what == "queries" else work
    if what in ("nothing", "the picture to be drawn"):
        assert row_of(work).learned.any()
        return
    with pytest.raises(DataError, match=r"cache: lacks made:0, or has it as it was before; run unimm data cache again"):
        row_of(work)


def test_conditions_know_broken_images(make_chat, files, tmp_path) -> None:
    """No rows say that an image could not be decoded: nothing is learned of the sample, and the shapes stay."""
    plain = work_of(plain_chat(make_chat), session(files), edit(files))
    work = replace(plain, conditions=write_conditions(plain, tmp_path / "cache", broken=0))
    (sample, broken), (neighbour, none) = loaded(work)
    assert [bad.error.fault for bad in broken] == ["unreadable image"]
    assert not none
    row = work.row([sample, neighbour])
    assert row.learned.tolist() == [False, False, False, False, False, True]
    assert row.words is not None
    assert row.visual is not None
    assert (len(row.words), len(row.visual)) == (20 + 10, 6 + 3)
    assert not row.words[:20].any()
    assert not row.visual[:6].any()
    assert row.words[20:].all()


def refused(work: FrameWork) -> str:
    found = work.lay_out(Draw("made", 0, 0))
    assert isinstance(found, BadSample), found
    assert found.error.fault is not None
    return f"{found.error.fault}: {found.error}"


def test_what_is_left_out(make_chat, files) -> None:
    """Too many pictures for the table of frames, too many tokens for a row, and nothing to draw."""
    assert laid_out(work_of(plain_chat(make_chat), session(files), max_frames=3))
    assert "3 pictures, but method.max_frames is 2" in refused(
        work_of(plain_chat(make_chat), session(files), max_frames=2)
    )
    # 26 tokens of condition and 20 of pictures; rounding the text stream up may cost 3 more.
    assert laid_out(work_of(plain_chat(make_chat, sequence_length=49), session(files), stream_multiple=4))
    too_long = work_of(plain_chat(make_chat, sequence_length=48), session(files), stream_multiple=4)
    assert "46 tokens, but data.sequence_length 48 has room for 45" in refused(too_long)
    words = sample_of("understanding", files[:1], Turn("user", (0, "red")), Turn("assistant", ("blue",)))
    assert refused(work_of(plain_chat(make_chat), words)).startswith("nothing to draw")
