"""Interleaved conversations of the Shapes world: a reader of their words of its own comes to the same pictures."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from megatron_unimm.cli import main
from megatron_unimm.config.data import SourceConfig
from megatron_unimm.data.images import decode
from megatron_unimm.data.shapes import (
    DEFAULT_MIX,
    HISTORY_TYPES,
    KINDS,
    Conversation,
    Scene,
    ShapeObject,
    make_conversation,
    scene_is_held_out,
    shows_scene,
    text_is_held_out,
    write_shapes,
)
from megatron_unimm.data.shapes.edits import sample_choice
from megatron_unimm.data.shapes.history import make_history_edit
from megatron_unimm.data.shapes.scene import PAIR_PLACES, cell_centre
from megatron_unimm.data.sources.opening import open_source
from megatron_unimm.errors import UserError

MARK = "<image>"
TASKS = {"draw_and_edit", "edit_and_ask", "multi_image", *HISTORY_TYPES}
ORDINALS = ("first", "second", "third", "fourth")


def talks(count: int, split: str = "train", seed: int = 2) -> list[Conversation]:
    return [make_conversation("interleaved", seed, index, split) for index in range(count)]


def drawings(talk: Conversation) -> list[tuple[str, list[Scene], Scene]]:
    """Each instruction of a conversation with the pictures before it and the one that it asks for."""
    found, seen = [], 0
    for (_, asked), (_, answered) in zip(talk.turns[::2], talk.turns[1::2], strict=True):
        seen += asked.count(MARK)
        if answered == MARK:
            found.append((asked.replace(MARK, ""), list(talk.scenes[:seen]), talk.scenes[seen]))
            seen += 1
    return found


# -- what exists already -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "split", "digest"),
    [
        ("understanding", "train", "c636706e20c6a16b"),
        ("understanding", "heldout", "b07976922ebc1df3"),
        ("text_to_image", "train", "6cd730ff9b6e94e7"),
        ("text_to_image", "heldout", "fb181c193c252439"),
        ("editing", "train", "2fb516738e86201f"),
        ("editing", "heldout", "4330b933a5d4b938"),
    ],
)
def test_older_kinds_are_what_they_were(kind: str, split: str, digest: str) -> None:
    """Published figures rest on them; the digests were taken before the kind interleaved was there."""
    samples = [make_conversation(kind, 5, index, split) for index in range(100)]
    lines = json.dumps([sample.to_dict(str(i), [""] * len(sample.scenes)) for i, sample in enumerate(samples)])
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == digest
    assert KINDS[:3] == tuple(DEFAULT_MIX)  # the number of a kind is part of its random stream


# -- form --------------------------------------------------------------------------------------------------------------


def test_all_tasks_occur_as_often_as_planned() -> None:
    counts = Counter(talk.task for talk in talks(1000))
    assert set(counts) == TASKS
    assert abs(counts["draw_and_edit"] - 250) < 50
    assert abs(counts["edit_and_ask"] - 250) < 50
    assert all(abs(counts[kind] - 60) < 30 for kind in HISTORY_TYPES)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_turns_alternate_and_marks_match_pictures(split: str) -> None:
    turns = Counter()
    for talk in talks(300, split):
        assert [who for who, _ in talk.turns] == ["human", "gpt"] * (len(talk.turns) // 2)
        assert sum(text.count(MARK) for _, text in talk.turns) == len(talk.scenes)
        assert all(text == MARK or MARK not in text for who, text in talk.turns if who == "gpt")
        assert all(MARK not in text for who, text in talk.turns[2:] if who == "human")
        starts_with_prompt = MARK not in talk.turns[0][1]
        assert (talk.prompt is not None) == starts_with_prompt
        assert starts_with_prompt or talk.task != "draw_and_edit"
        turns[len(talk.turns) // 2] += 1
    assert set(turns) == {2, 3, 4}


def test_questions_stand_between_edits() -> None:
    for talk in talks(400):
        if talk.task == "edit_and_ask":
            draws = [answer == MARK for who, answer in talk.turns if who == "gpt"]
            assert draws[-3:] == [True, False, True]


def test_training_never_shows_a_held_out_combination_and_the_other_split_always_does() -> None:
    for talk in talks(1500):
        assert not any(scene_is_held_out(scene) for scene in talk.scenes)
        assert not any(text_is_held_out(text) for _, text in talk.turns)
    for talk in talks(200, "heldout"):
        assert all(scene_is_held_out(result) for *_, result in drawings(talk))


def test_a_sample_depends_on_seed_and_index_only() -> None:
    again = [make_conversation("interleaved", 2, index) for index in reversed(range(40))][::-1]
    assert talks(40) == again != talks(40, seed=3)


# -- every instruction fixes its result --------------------------------------------------------------------------------


def called(words: str, scene: Scene) -> ShapeObject:
    """The only object that words like ``red circle``, ``circle`` or ``object`` can mean."""
    (only,) = [o for o in scene.objects if set(words.split()) <= {o.colour, o.shape, "object"}]
    return only


def put(scene: Scene, old: ShapeObject | None, *new: ShapeObject) -> set[ShapeObject]:
    return {o for o in scene.objects if o != old} | set(new)


def obey(words: str, scenes: list[Scene]) -> set[ShapeObject] | None:
    """What an instruction of one picture after another asks for; None where it is of no known form."""
    now = scenes[-1]
    if words in ("Undo that.", "Undo the last change."):
        return set(scenes[-2].objects)
    if found := re.fullmatch(r"Go back to the first (?:picture|image) and (.)(.*)", words):
        return obey(found[1].upper() + found[2], scenes[:1])
    if found := re.fullmatch(r"(?:Bring|Put) the removed (.*) back\.", words):
        shown = {o for scene in scenes for o in scene.objects}
        absent = {o for o in shown if all(max(abs(o.x - n.x), abs(o.y - n.y)) > 1e-9 for n in now.objects)}
        # What was moved or swapped is still there in another place.
        lost = [o for o in absent if o.name not in {n.name for n in now.objects} and found[1] in (o.shape, "object")]
        return put(now, None, *lost) if len(lost) == 1 else None
    if found := re.fullmatch(r"(?:Give the (.*) its old colour back|Turn the (.*) back to its old colour)\.", words):
        item = called(found[1] or found[2], now)
        (old,) = [o for o in scenes[0].objects if (o.x, o.y) == (item.x, item.y)]
        return put(now, item, replace(item, colour=old.colour))
    if found := re.fullmatch(r"(?:Move the (.*) back|Put the (.*) back where it was)\.", words):
        item = called(found[1] or found[2], now)
        old = called(item.name, Scene(tuple(o for o in scenes[0].objects if o.size == item.size)))
        return put(now, item, old)
    for form in (
        r"Make the (\w+ \w+) (\w+)\.",
        r"Turn the (\w+ \w+) (\w+)\.",
        r"Change the colour of the (.*) to (.*)\.",
    ):
        if found := re.fullmatch(form, words):
            item = called(found[1], now)
            return put(now, item, replace(item, colour=found[2]))
    if found := re.fullmatch(r"(?:Remove|Delete) the (.*)\.", words):
        return put(now, called(found[1], now))
    if found := re.fullmatch(r"Move the (.*) to the (.*)\.", words):
        item = called(found[1], now)
        return put(now, item, item.at(*cell_centre(found[2])))
    if found := re.fullmatch(r"Swap the (.*) and the (.*)\.", words):
        a, b = called(found[1], now), called(found[2], now)
        return (put(now, a) - {b}) | {a.at(b.x, b.y), b.at(a.x, a.y)}
    if found := re.fullmatch(r"Add an? (\w+) (\w+) (\w+) (?:at|in) the (.*)\.", words):
        return put(now, None, ShapeObject(found[3], found[2], found[1], *cell_centre(found[4])))
    return None


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_following_the_words_gives_the_pictures(split: str) -> None:
    """Only a removal that came after another change of the same object is beyond this test's reader."""
    followed, missed = Counter(), Counter()
    for talk in talks(800, split):
        if talk.task == "multi_image":
            continue
        for place, (words, before, result) in enumerate(drawings(talk)):
            if not before:
                continue
            expected = obey(words, before)
            kind = talk.task if place == len(drawings(talk)) - 1 else "edit"
            if expected is None:
                missed[kind] += 1
                continue
            followed[kind] += 1
            assert set(result.objects) == expected, (words, before)
    assert set(followed) == TASKS - {"multi_image"} | {"edit"}
    assert set(missed) <= {"bring_back"}
    assert missed["bring_back"] < 0.25 * followed["bring_back"]


def test_history_tasks_cannot_be_followed_with_the_newest_picture() -> None:
    """Nothing that they bring about is told by their words and the newest picture; an edit of the first picture gives
    another result there."""
    tried = Counter()
    for talk in talks(1500):
        if talk.task not in HISTORY_TYPES:
            continue
        words, before, result = drawings(talk)[-1]
        newest = before[-1]
        tried[talk.task] += 1
        assert set(result.objects) != set(newest.objects)
        come = [o for o in result.objects if o not in newest.objects]
        if talk.task == "first_picture":
            first, last = set(before[0].objects), set(result.objects)
            assert first - last <= set(newest.objects)
            assert set(newest.objects) - (first - last) | (last - first) != last
        elif talk.task == "old_colour":
            assert len(come) == 1
            assert come[0].colour not in words
        elif talk.task in ("bring_back", "move_back"):
            assert len(come) == 1
            assert any(come[0] in scene.objects for scene in before)
    assert min(tried[kind] for kind in HISTORY_TYPES) > 40


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_choices_bring_the_named_objects_together(split: str) -> None:
    numbers = Counter()
    rng = np.random.default_rng(0)
    for _ in range(300):
        choice = sample_choice(rng, split)  # type: ignore[arg-type]
        looks = [scene.objects[0] for scene in choice.sources]
        assert len({item.name for item in looks}) == len(looks)
        numbers[len(looks)] += 1
        named = re.findall(r"\b(first|second|third|fourth|\d+)\b", choice.instruction)
        chosen = [looks[ORDINALS.index(word) if word in ORDINALS else int(word) - 1] for word in named]
        assert [(o.name, o.size) for o in choice.result.objects] == [(o.name, o.size) for o in chosen]
        relation = next((r for r in PAIR_PLACES if r in choice.instruction), "left of")
        assert ("side by side" in choice.instruction) == all(r not in choice.instruction for r in PAIR_PLACES)
        for item, (x, y) in zip(choice.result.objects, PAIR_PLACES[relation], strict=True):
            assert max(abs(item.x - x), abs(item.y - y)) <= 1 / 64 + 1e-9
        assert scene_is_held_out(choice.result) == (split == "heldout")
    assert set(numbers) == set(range(3, 13))


CIRCLE = ShapeObject("circle", "red", "large", 0.25, 0.25)
SQUARE = ShapeObject("square", "blue", "small", 0.75, 0.25)
CROSS = ShapeObject("cross", "black", "large", 0.5, 0.75)
START = Scene((CIRCLE, SQUARE, CROSS))


def looked_back(kind: str, *scenes: Scene) -> set[str]:
    """Instructions that 40 tries give."""
    edits = [make_history_edit(scenes, np.random.default_rng(seed), kind) for seed in range(40)]
    return {edit.instruction for edit in edits if edit is not None}


def test_what_could_mean_two_things_is_not_said() -> None:
    blue = replace(CIRCLE, colour="blue")
    twice = START, Scene((blue, SQUARE, CROSS)), Scene((replace(CIRCLE, colour="pink"), SQUARE, CROSS))
    assert looked_back("old_colour", *twice) == set()
    assert looked_back("old_colour", *twice[:2]) == {
        "Give the circle its old colour back.",
        "Turn the circle back to its old colour.",
    }
    both = Scene((CIRCLE, replace(SQUARE, shape="circle"), CROSS))
    after = Scene((replace(CIRCLE, colour="pink"), *both.objects[1:]))
    assert {"pink circle" in words for words in looked_back("old_colour", both, after)} == {True}
    one, none = Scene(both.objects[1:]), Scene((CROSS,))
    assert looked_back("bring_back", both, one, none) == set()
    assert looked_back("bring_back", both, one) == {
        f"{verb} the removed {noun} back." for verb in ("Bring", "Put") for noun in ("circle", "object")
    }
    assert looked_back("bring_back", START, Scene((SQUARE, CROSS)), Scene((CROSS,))) == {
        f"{verb} the removed {noun} back." for verb in ("Bring", "Put") for noun in ("circle", "square")
    }


def test_places_that_were_taken_since_are_not_asked_for() -> None:
    moved = Scene((CIRCLE.at(0.25, 0.75), SQUARE))
    taken = Scene((*moved.objects, CROSS.at(0.25, 0.25)))
    assert looked_back("move_back", Scene((CIRCLE, SQUARE)), moved) != set()
    assert looked_back("move_back", Scene((CIRCLE, SQUARE)), moved, taken) == set()
    removed, filled = Scene((SQUARE,)), Scene((SQUARE, CROSS.at(0.25, 0.25)))
    assert looked_back("bring_back", Scene((CIRCLE, SQUARE)), removed, filled) == set()


# -- words -------------------------------------------------------------------------------------------------------------


def test_the_base_models_tokenizer_reads_the_words(repo: Path) -> None:
    """It is byte-level, so nothing is unknown; but the more words are whole tokens, the more the base model knows."""
    tokenizer = Tokenizer.from_file(str(repo / "tools/base_models/shapes_vlm/tokenizer.json"))
    whole = total = 0
    for talk in talks(500):
        for text in (text.replace(MARK, "") for _, text in talk.turns):
            assert text.isascii()
            assert tokenizer.decode(tokenizer.encode(text).ids) == text
            words = re.findall(r"^[A-Z][a-z]+|(?<= )[a-z]+", text)
            pieces = [tokenizer.encode(word if text.startswith(word) else f" {word}").ids for word in words]
            whole, total = whole + sum(len(ids) == 1 for ids in pieces), total + len(words)
    assert whole / total > 0.9  # measured 0.96


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of it interleaved."""
    folder = tmp_path_factory.mktemp("sessions")
    code = main.run(["data", "shapes", "--to", str(folder), "--count", "80", "--seed", "3", "--mix",
                     "editing=1, interleaved=1"])  # fmt: skip
    assert code == 0
    return folder / "train"


def test_files_hold_the_conversations(world: Path) -> None:
    assert json.loads((world / "index.json").read_text())["counts"] == {"editing": 40, "interleaved": 40}
    lines = [json.loads(line) for line in (world / "interleaved.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    for number, record in enumerate(lines):
        talk = make_conversation("interleaved", 3, number)
        assert (record["kind"], record["task"]) == ("interleaved", talk.task)
        assert [(turn["from"], turn["value"]) for turn in record["conversations"]] == list(talk.turns)
        for file, scene in zip(record["image"], talk.scenes, strict=True):
            assert shows_scene(scene, Image.open(world / file), tolerance=1 / 64)
    assert not (world / "understanding.jsonl").exists()


def test_shards_and_lines_are_read_as_the_same_documents(world: Path) -> None:
    lines = open_source(SourceConfig(path=str(world / "interleaved.jsonl"), kind="interleaved"), "lines")
    shards = open_source(SourceConfig(path=str(world / "shards/interleaved-000000.tar"), kind="interleaved"), "shards")
    assert len(lines) == len(shards) == 40
    for index in range(40):
        one, other = lines[index], shards[index]
        assert one.kind == other.kind == "interleaved"
        assert one.turns == other.turns
        for file, same in zip(one.images, other.images, strict=True):
            assert np.array_equal(decode(file, 1 << 24), decode(same, 1 << 24))


def test_the_default_mix_writes_no_documents(tmp_path: Path) -> None:
    written = write_shapes(tmp_path, 20)
    assert written.counts == {"understanding": 8, "text_to_image": 7, "editing": 5}
    assert {path.name for path in written.folder.glob("*.jsonl")} == {f"{kind}.jsonl" for kind in DEFAULT_MIX}


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("interleaved", "'interleaved' is no KIND=SHARE"),
        ("interleaved=much", "'interleaved=much' is no KIND=SHARE"),
        ("interleaved=1,interleaved=2", "gives interleaved twice"),
        ("video=1", "error: mix: "),
        ("interleaved=inf", "error: mix: "),
        ("interleaved=0", "error: mix: "),
    ],
)
def test_a_wrong_mix_is_one_line(mix: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["data", "shapes", "--to", str(tmp_path), "--count", "10", "--mix", mix]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_says_the_default_mix(capsys: pytest.CaptureFixture[str]) -> None:
    main.run(["data", "shapes", "--help"])
    shown = re.sub(r"\s+", "", capsys.readouterr().out)
    assert ",".join(f"{kind}={share}" for kind, share in DEFAULT_MIX.items()) in shown
    assert all(kind in shown for kind in KINDS)


def test_a_mix_of_unknown_kinds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"understanding, text_to_image, editing, interleaved"):
        write_shapes(tmp_path, 10, mix={"interleaved": 1.0, "video": 1.0})
