"""Conversations with query tokens: layouts drawn by hand, which images are asked for, broken ones, packed rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.model import SiglipConfig
from megatron_unimm.config.queries import QueryVlmConfig, SiglipTeacher, VisionEncoderTeacher
from megatron_unimm.data.chat import ChatFormat
from megatron_unimm.data.decode.build import build_decoder
from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.images import SiglipFormat, decode, patchify, resize
from megatron_unimm.data.mix import Draw
from megatron_unimm.data.plan import BadSample, Laid
from megatron_unimm.data.queries import QuerySample, QueryTokens, QueryWork, conversation_layout, query_tokens
from megatron_unimm.data.sample import IGNORED_LABEL, Sample, Turn
from megatron_unimm.data.sources.source import Source

SHORT = {"<|im_start|>": "<s>", "<|im_end|>": "<e>", "<|vision_start|>": "[", "<|vision_end|>": "]"}
SHORT |= {"<|image_pad|>": "#", "\n": "n"}
WIDE, HIGH, SMALL = (56, 28), (28, 56), (28, 28)
"""Two visual tokens beside each other, on top of each other, and one."""


def drawn(layout: QueryTokens, chat: ChatFormat) -> str:
    """Token by token, ``q`` for queries."""
    texts = [SHORT.get(text, text) for text in (chat.tokenizer.decode([i]) for i in layout.tokens.input_ids)]
    for place in layout.query_index:
        assert texts[place] == "#"
        texts[place] = "q"
    return " ".join(texts)


def labels(layout: QueryTokens, chat: ChatFormat) -> str:
    texts = ["-" if i == IGNORED_LABEL else chat.tokenizer.decode([i]) for i in layout.tokens.labels]
    return " ".join(SHORT.get(text, text) for text in texts)


def words(layout: QueryTokens) -> str:
    """Which picture each position describes, by number."""
    marks = ["-"] * len(layout)
    for number, index in enumerate(layout.text_index):
        for place in index:
            assert marks[place] == "-"
            marks[place] = str(number)
    return " ".join(marks)


def lay(chat: ChatFormat, *turns: Turn, sizes: Sequence[tuple[int, int]], num_queries: int = 2, **how) -> QueryTokens:
    return query_tokens("s", "interleaved", turns, sizes, chat, (num_queries,), **how)


# -- layouts


def test_text_to_image(make_chat) -> None:
    chat = make_chat(system_prompt="")
    got = lay(chat, Turn("user", ("red",)), Turn("assistant", (0,)), sizes=[WIDE])
    assert drawn(got, chat) == "<s> user n red <e> n <s> assistant n [ q q ] <e> n"
    assert labels(got, chat) == "- - - - - - - - [ - - - <e> - -"
    assert words(got) == "0 0 0 0 0 0 0 0 0 - - - - - -"
    assert got.query_index.tolist() == [10, 11]
    assert got.tokens.position_ids.tolist() == [list(range(15))] * 3
    assert (got.drawn_index, got.read_index, got.read_drawn) == ((0,), (), ())
    assert len(got.tokens.grids) == len(got.tokens.visual_index) == len(got.tokens.predict_index) == 0


def test_edit(make_chat) -> None:
    """The source is read, one token above the other; the picture is the last thing, so it is not."""
    chat = make_chat(system_prompt="")
    got = lay(chat, Turn("user", (0, "blue")), Turn("assistant", ("red", 1)), sizes=[HIGH, WIDE], num_queries=3)
    assert drawn(got, chat) == "<s> user n [ # # ] blue <e> n <s> assistant n red [ q q q ] <e> n"
    assert labels(got, chat) == "- - - - - - - - - - - - red [ - - - - <e> - -"
    assert words(got) == "0 0 0 - - - - 0 0 0 0 0 0 0 - - - - - - -"
    assert got.query_index.tolist() == [15, 16, 17]
    assert got.tokens.visual_index.tolist() == [4, 5]
    time, height, width = got.tokens.position_ids.tolist()
    assert time == width == [0, 1, 2, 3, 4, 4, *range(6, 21)]
    assert height == [0, 1, 2, 3, 4, 5, *range(6, 21)]
    assert (got.drawn_index, got.read_index, got.read_drawn) == ((1,), (0,), (False,))
    assert got.tokens.grids.tolist() == [[1, 4, 2]]
    assert got.tokens.is_target.tolist() == [False]


def test_several_turns(make_chat) -> None:
    """A picture that the conversation goes on from is read behind its queries, at the size of pictures that are drawn;
    the second one's words are those since the first."""
    chat = make_chat(system_prompt="")
    turns = (
        Turn("user", ("red",)),
        Turn("assistant", (0,)),
        Turn("user", ("blue",)),
        Turn("assistant", (1, "red")),
    )
    got = lay(chat, *turns, sizes=[(112, 56), SMALL], num_queries=1)
    tokens = "<s> user n red <e> n <s> assistant n [ q ] [ # # ] <e> n"
    tokens += " <s> user n blue <e> n <s> assistant n [ q ] [ # # # # ] red <e> n"
    assert drawn(got, chat) == tokens
    learned = "- - - - - - - - [ - - - - - - <e> - - - - - - - - - - [ - - - - - - - - red <e> - -"
    assert labels(got, chat) == learned
    expected = "0 0 0 0 0 0 0 0 0 - - - - - - - 1 1 1 1 1 1 1 1 1 1 1 - - - - - - - - - - - -"
    assert words(got) == expected
    assert got.query_index.tolist() == [10, 28]
    assert (got.drawn_index, got.read_index, got.read_drawn) == ((0, 1), (0, 1), (True, True))
    assert got.tokens.grids.tolist() == [[1, 2, 4], [1, 4, 4]], "the long side is 56 pixels"
    # The first picture's tokens stand beside each other: they count as one row, two columns.
    assert got.tokens.position_ids[:, 12:17].tolist() == [
        [12, 13, 13, 15, 16],
        [12, 13, 13, 15, 16],
        [12, 13, 14, 15, 16],
    ]


def test_understanding(make_chat) -> None:
    chat = make_chat(system_prompt="")
    got = lay(chat, Turn("user", (0, "blue")), Turn("assistant", ("red",)), sizes=[SMALL])
    assert drawn(got, chat) == "<s> user n [ # ] blue <e> n <s> assistant n red <e> n"
    assert labels(got, chat) == "- - - - - - - - - - - red <e> - -"
    assert got.text_index == got.drawn_index == ()
    assert len(got.query_index) == 0
    assert (got.read_index, got.read_drawn) == ((0,), (False,))


def test_history_and_an_open_picture(make_chat) -> None:
    """A prompt: nothing is learned, the last answer's picture is read, and the queries of the next one end it."""
    chat = make_chat(system_prompt="")
    turns = Turn("user", ("red",)), Turn("assistant", (0,)), Turn("user", ("blue",))
    got = lay(chat, *turns, sizes=[SMALL], open_picture=True, answer=False)
    tokens = (
        "<s> user n red <e> n <s> assistant n [ q q ] [ # # # # ] <e> n <s> user n blue <e> n <s> assistant n [ q q ]"
    )
    assert drawn(got, chat) == tokens
    assert set(labels(got, chat).split()) == {"-"}
    assert got.drawn_index == (0, -1)
    # The same tokens as a sample has that goes on so.
    trained = lay(chat, *turns, Turn("assistant", (1,)), sizes=[SMALL, SMALL])
    np.testing.assert_array_equal(trained.tokens.input_ids[: len(got)], got.tokens.input_ids)
    np.testing.assert_array_equal(trained.tokens.position_ids[:, : len(got)], got.tokens.position_ids)
    assert all(np.array_equal(a, b) for a, b in zip(trained.text_index, got.text_index, strict=True))


def random_conversation(rng: np.random.Generator) -> tuple[list[Turn], list[tuple[int, int]]]:
    """Turns of words and images in any order, perhaps with a system prompt of its own."""
    sizes: list[tuple[int, int]] = []

    def parts(most: int) -> tuple[str | int, ...]:
        made: list[str | int] = []
        for _ in range(rng.integers(1, most + 1)):
            if rng.random() < 0.5:
                sizes.append((28 * int(rng.integers(1, 4)), 28 * int(rng.integers(1, 4))))
                made.append(len(sizes) - 1)
            else:
                made.append(" ".join(rng.choice(["red", "blue", "user", "<|im_end|>", "a\nb"], rng.integers(1, 4))))
        return tuple(made)

    turns = [Turn("system", ("You draw.",))] if rng.random() < 0.5 else []
    for _ in range(rng.integers(1, 4)):
        turns += [Turn("user", parts(3)), Turn("assistant", parts(4))]
    return turns, sizes


def test_properties_of_random_conversations(make_chat) -> None:
    """Queries stand behind all words that describe them, and only words do that: no system prompt, no image, no query;
    every word before a picture describes it or an earlier one. Labels are next tokens."""
    chat, rng = make_chat(), np.random.default_rng(0)
    ids, seen = chat.tokenizer.token_ids, 0
    for _ in range(200):
        turns, sizes = random_conversation(rng)
        number = int(rng.integers(1, 6))
        got = lay(chat, *turns, sizes=sizes, num_queries=number)
        tokens = got.tokens.input_ids
        by_assistant = [
            part for turn in turns if turn.role == "assistant" for part in turn.parts if isinstance(part, int)
        ]
        assert list(got.drawn_index) == by_assistant
        by_user = [part for turn in turns if turn.role == "user" for part in turn.parts if isinstance(part, int)]
        last = turns[-1].parts[-1]
        again = [part for part in by_assistant if part != last]
        assert sorted(got.read_index) == sorted(by_user + again)
        assert dict(zip(got.read_index, got.read_drawn, strict=True)) == {
            **dict.fromkeys(by_user, False),
            **dict.fromkeys(again, True),
        }
        pads = np.flatnonzero(tokens == ids.image_pad)
        assert sorted([*got.query_index, *got.tokens.visual_index]) == pads.tolist()
        queries = got.query_index.reshape(-1, number)
        assert (np.diff(queries, axis=1) == 1).all()
        assert (tokens[queries[:, 0] - 1] == ids.vision_start).all()
        assert (tokens[queries[:, -1] + 1] == ids.vision_end).all()
        system_end = int(np.flatnonzero(tokens == ids.im_end)[0]) + 1  # and the line break behind it
        plain = ~np.isin(tokens, [ids.image_pad, ids.vision_start, ids.vision_end])
        after = system_end
        for mine, text in zip(queries, got.text_index, strict=True):
            between = np.arange(after + 1, mine[0] - 1)
            np.testing.assert_array_equal(text, between[plain[between]])
            after = int(mine[-1])
        learned = np.flatnonzero(got.tokens.labels != IGNORED_LABEL)
        np.testing.assert_array_equal(got.tokens.labels[learned], tokens[learned + 1])
        started = [place for place in learned if tokens[place + 1] == ids.vision_start]
        assert len(started) == len(by_assistant), "that a picture begins is learned, once"
        assert not np.isin(tokens[learned + 1], [ids.image_pad, ids.vision_end, ids.im_start]).any()
        assert (np.diff(got.tokens.position_ids, axis=1).max(axis=0) <= 1).all() or len(got.tokens.grids)
        seen += len(by_assistant)
    assert seen > 100


# -- images


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


def sample_of(kind: SampleKind, images: Sequence[Path], *turns: Turn) -> Sample:
    return Sample("s", kind, turns, tuple(DiskImage(path) for path in images))


@pytest.fixture
def files(tmp_path: Path, write_image) -> list[Path]:
    return [write_image(tmp_path / f"{i}.png", *size, seed=i) for i, size in enumerate([(112, 56), (60, 60), (28, 84)])]


SIGLIP = SiglipTeacher.model_validate(
    {
        "family": "siglip",
        "checkpoint": "somewhere",
        "size": {"rule": "square", "side": 38},
        "encoder": SiglipConfig(family="siglip", num_layers=1, hidden_size=8, num_heads=1, mlp_size=8, patch_size=7),
    }
)
"""38 pixels are five patches of 7, and three pixels more."""


def work_of(chat: ChatFormat, samples: Sequence[Sample], teacher=None, **settings) -> QueryWork:
    vlm = QueryVlmConfig(num_queries=3, teacher=teacher or VisionEncoderTeacher())
    return QueryWork(chat, vlm, {"made": Made(*samples)}, **settings)


def laid_out(work: QueryWork) -> list[Laid]:
    found = [work.lay_out(Draw("made", index, 0)) for index in range(len(work.sources["made"]))]
    assert all(isinstance(each, Laid) for each in found), found
    return [each for each in found if isinstance(each, Laid)]


def loaded(work: QueryWork) -> list[tuple[QuerySample, list[BadSample]]]:
    with build_decoder("pillow", max_pixels=work.data.max_image_pixels, threads=0, device=None) as decoder:
        return work.load(laid_out(work), decoder)


def multi_turn(files: Sequence[Path]) -> Sample:
    turns = Turn("user", (0, "red")), Turn("assistant", (1,)), Turn("user", ("blue",)), Turn("assistant", (2,))
    return sample_of("editing", files, *turns)


def asked(requests) -> list[tuple[str, int, int]]:
    return [(Path(str(request.file)).name, request.width, request.height) for request in requests]


def test_requests_with_the_vision_encoder_as_teacher(make_chat, files) -> None:
    """Read images by who shows them; then both drawn ones at the size of pictures that are drawn, 56 pixels long."""
    work = work_of(make_chat(), [multi_turn(files)])
    (laid,) = laid_out(work)
    read = [("0.png", 112, 56), ("1.png", 56, 56)]
    target = [("1.png", 56, 56), ("2.png", 28, 56)]
    assert asked(work.target_requests(laid)) == target
    assert asked(work.requests(laid)) == read + target
    assert laid.layout.target_grids.tolist() == [[1, 4, 4], [1, 4, 2]]


def test_requests_with_siglip_as_teacher(make_chat, files) -> None:
    """It looks at squares of its own size, and its convolution leaves the pixels out that fill no patch; a cache of the
    vision encoder's features needs the read images alone."""
    work = work_of(make_chat(), [multi_turn(files)], SIGLIP)
    (laid,) = laid_out(work)
    assert asked(work.target_requests(laid)) == [("1.png", 38, 38), ("2.png", 38, 38)]
    assert asked(work.requests(laid)) == [("0.png", 112, 56), ("1.png", 56, 56)]
    assert laid.layout.target_grids.tolist() == [[1, 5, 5], [1, 5, 5]]
    ((sample, broken),) = loaded(work)
    assert not broken
    pixels = [resize(decode(DiskImage(files[number]), 10**6), 38, 38) for number in (1, 2)]
    expected = [patchify(each[:35, :35], SiglipFormat(7))[0] for each in pixels]
    np.testing.assert_array_equal(sample.target_patches, np.concatenate(expected))


def test_pixels_of_both_sides(make_chat, files) -> None:
    """What is read, and what is aligned to, in the order of the grids."""
    chat = make_chat()
    ((sample, broken),) = loaded(work_of(chat, [multi_turn(files)]))
    assert not broken
    assert sample.learned

    def patches(number: int, width: int, height: int) -> np.ndarray:
        return patchify(resize(decode(DiskImage(files[number]), 10**6), width, height), chat.encoder)[0]

    np.testing.assert_array_equal(
        sample.layout.tokens.patches, np.concatenate([patches(0, 112, 56), patches(1, 56, 56)])
    )
    np.testing.assert_array_equal(sample.target_patches, np.concatenate([patches(1, 56, 56), patches(2, 28, 56)]))


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("teacher", [VisionEncoderTeacher(), SIGLIP], ids=["vision_encoder", "siglip"])
def test_a_broken_image_voids_its_sample(number: int, teacher, make_chat, files, tmp_path, write_image) -> None:
    """Whichever it is, read, drawn or both; its neighbour is as it would be alone. The shapes stay."""
    own = write_image(tmp_path / "own.png", 40, 60)
    fine = sample_of("text_to_image", [own], Turn("user", ("red",)), Turn("assistant", (0,)))
    work = work_of(make_chat(), [multi_turn(files), fine], teacher)
    (sound, _), (other, _) = loaded(work)
    whole = files[number].read_bytes()
    files[number].write_bytes(whole[: len(whole) // 2])  # the header still says its size
    (sample, broken), (neighbour, none) = loaded(work)
    assert {bad.error.fault for bad in broken} == {"unreadable image"}
    assert not none
    assert not sample.learned
    assert (sample.layout.tokens.labels == IGNORED_LABEL).all()
    assert sample.target_patches.shape == sound.target_patches.shape
    assert sample.layout.tokens.patches.shape == sound.layout.tokens.patches.shape
    np.testing.assert_array_equal(sample.layout.query_index, sound.layout.query_index)
    assert neighbour.learned
    np.testing.assert_array_equal(neighbour.target_patches, other.target_patches)
    row = work.row([sample, neighbour])
    assert row.learned.tolist() == [False, False, True]


@pytest.mark.parametrize("alignment", [1, 8])
def test_packed_rows(alignment: int, make_chat, files) -> None:
    """Behind one another, each where its tokens are; ranks that read no images have the same row without pixels."""
    chat = make_chat(sequence_length=384)
    read = sample_of("understanding", files[:1], Turn("user", (0, "red")), Turn("assistant", ("blue",)))
    write = sample_of("text_to_image", files[1:2], Turn("user", ("red blue",)), Turn("assistant", (0,)))
    work = work_of(chat, [write, read, multi_turn(files), write], SIGLIP, alignment=alignment)
    samples = [sample for sample, _ in loaded(work)]
    row = work.row(samples)
    assert row.num_tokens == 384
    assert all(bound % alignment == 0 for bound in row.tokens.segment_bounds)
    start = queries = 0
    for sample, bound in zip(samples, row.tokens.segment_bounds, strict=False):
        index = sample.layout.query_index
        np.testing.assert_array_equal(row.query_index[queries : queries + len(index)], index + bound)
        queries += len(index)
        start += len(sample)
    assert queries == len(row.query_index) == 3 * 4
    assert row.num_padding == 384 - start
    assert row.num_images == 4 + 3, "drawn and read"
    assert row.learned.tolist() == [True] * 4
    assert (row.tokens.input_ids[row.query_index] == chat.tokenizer.token_ids.image_pad).all()
    assert row.kinds == ("text_to_image", "understanding", "editing", "text_to_image")
    np.testing.assert_array_equal(
        row.target_patches, np.concatenate([sample.target_patches for sample in samples if len(sample.target_grids)])
    )
    assert len(row.target_patches) == row.target_grids.prod(axis=1).sum()
    blind = work.row([laid.layout for laid in laid_out(work)])
    for field in ("query_index", "learned", "target_grids"):
        np.testing.assert_array_equal(vars(blind)[field], vars(row)[field])
    np.testing.assert_array_equal(blind.tokens.input_ids, row.tokens.input_ids)
    assert len(blind.target_patches) == len(blind.tokens.patches) == 0
    empty = work.row([])
    assert len(empty.query_index) == len(empty.learned) == len(empty.target_grids) == 0


def test_too_long_is_left_out(make_chat, files) -> None:
    length = len(conversation_layout(multi_turn(files), make_chat(), (3,))[0])
    (laid,) = laid_out(work_of(make_chat(sequence_length=length), [multi_turn(files)]))
    assert len(laid.layout) == length
    found = work_of(make_chat(sequence_length=length - 1), [multi_turn(files)]).lay_out(Draw("made", 0, 0))
    assert isinstance(found, BadSample)
    assert found.error.fault == "too long"
