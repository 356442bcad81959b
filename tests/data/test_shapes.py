"""The Shapes world: the scorer never errs on true pictures, held-out things stay held out, files say what they show."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageFilter

from megatron_unimm.data.shapes import (
    COLOURS,
    DEFAULT_MIX,
    HELD_OUT,
    KINDS,
    PROMPT_KINDS,
    SHAPES,
    Prompt,
    Scene,
    find_objects,
    geneval_prompts,
    heldout_questions,
    is_correct,
    make_conversation,
    prompt_from_dict,
    prompt_is_held_out,
    prompt_scene,
    render,
    render_array,
    retrieval_pairs,
    sample_prompt,
    scene_from_list,
    scene_is_held_out,
    score,
    shows_scene,
    text_is_held_out,
    write_eval_sets,
    write_shapes,
)
from megatron_unimm.data.shapes.conversations import free_scene, generator
from megatron_unimm.data.shapes.edits import EDIT_TYPES
from megatron_unimm.data.shapes.heldout import relation_is_held_out
from megatron_unimm.data.shapes.questions import QUESTION_TYPES
from megatron_unimm.data.shapes.scene import (
    BORDER,
    CELLS,
    GAP,
    RELATIONS,
    SIZES,
    ShapeObject,
    cell_centre,
    clear_direction,
)
from megatron_unimm.data.shapes.scorer import scene_satisfies
from megatron_unimm.errors import UserError

NOISE_30_DB = 255 * 10 ** (-30 / 20)
"""Standard deviation of the noise, in grey levels, whose PSNR is 30 dB."""


@cache
def prompts_with_scenes(count: int) -> tuple[tuple[Prompt, Scene], ...]:
    """Training prompts of the six kinds in turn."""
    rng = np.random.default_rng(5)
    prompts = [sample_prompt(rng, PROMPT_KINDS[i % len(PROMPT_KINDS)]) for i in range(count)]
    return tuple((prompt, prompt_scene(prompt, rng)) for prompt in prompts)


def untouched(image: Image.Image) -> Image.Image:
    return image


def as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return Image.open(buffer)


def noisy(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.float32)
    noise = np.random.default_rng(int(pixels.sum())).normal(0, NOISE_30_DB, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).round().astype(np.uint8))


def blurred(image: Image.Image) -> Image.Image:
    """What a small autoencoder does: soft edges (a blur of 0.6 pixels costs 28 to 35 dB here)."""
    return image.filter(ImageFilter.GaussianBlur(0.6))


@pytest.mark.parametrize(("damage", "count"), [(untouched, 2100), (as_jpeg, 2100), (noisy, 2100), (blurred, 600)])
def test_scorer_is_right_on_every_true_picture(damage: Callable[[Image.Image], Image.Image], count: int) -> None:
    cases = prompts_with_scenes(2100)[:count]
    result = score([prompt for prompt, _ in cases], [damage(render(scene)) for _, scene in cases])
    assert result.by_kind == dict.fromkeys(PROMPT_KINDS, 1.0)
    assert result.overall == 1.0
    assert set(result.counts.values()) == {count // 6}


@pytest.mark.parametrize("damage", [untouched, as_jpeg, noisy])
def test_scorer_reads_free_layouts_exactly(damage: Callable[[Image.Image], Image.Image]) -> None:
    for index in range(300):
        scene = free_scene(generator(3, index), "train")
        assert shows_scene(scene, damage(render(scene)), tolerance=1 / 64)


@pytest.mark.parametrize("canvas", [48, 128, 256])
def test_scorer_and_renderer_take_any_canvas(canvas: int) -> None:
    for index in range(20):
        scene = free_scene(generator(4, index), "train")
        picture = render_array(scene, canvas)
        assert picture.shape == (canvas, canvas, 3)
        assert shows_scene(scene, picture, tolerance=1 / 64)


def wrong_scenes(prompt: Prompt, scene: Scene) -> Iterator[Scene]:
    """Scenes that break the prompt in one thing each."""
    first, *rest = scene.objects
    if prompt.include[0].colour is not None:
        other = next(c for c in COLOURS if all(c != o.colour for o in scene.objects))
        yield Scene((replace(first, colour=other), *rest))
    if prompt.include[0].size is not None:
        yield Scene((replace(first, size="small" if first.size == "large" else "large"), *rest))
    shape = next(s for s in SHAPES if all(s != o.shape for o in scene.objects))
    yield Scene((replace(first, shape=shape), *rest))
    yield Scene(tuple(rest))
    free = [
        corner
        for corner in (cell_centre(c) for c in CELLS)
        if all(abs(corner[0] - o.x) + abs(corner[1] - o.y) > 0.4 for o in scene.objects)
    ]
    if free:
        yield Scene((*scene.objects, replace(first, size="small", x=free[0][0], y=free[0][1])))
    if prompt.kind == "position":
        yield Scene((first.at(rest[0].x, rest[0].y), rest[0].at(first.x, first.y)))
        yield Scene(tuple(o.at(o.y, o.x) for o in scene.objects))
    if prompt.kind == "color_attr" and first.colour != rest[0].colour and first.shape != rest[0].shape:
        yield Scene((replace(first, colour=rest[0].colour), replace(rest[0], colour=first.colour)))


def test_scorer_refuses_wrong_pictures() -> None:
    tried = 0
    for prompt, scene in prompts_with_scenes(2100)[:300]:
        for wrong in wrong_scenes(prompt, scene):
            tried += 1
            assert not is_correct(prompt, render(wrong)), (prompt.caption, wrong)
            assert not scene_satisfies(prompt, wrong)
    assert tried > 900


def test_scorer_sees_nothing_in_nothing() -> None:
    assert find_objects(render(Scene(()))).objects == ()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert not is_correct(prompts_with_scenes(2100)[0][0], noise)


def test_score_wants_one_picture_for_each_prompt() -> None:
    with pytest.raises(ValueError, match="1 prompts, 0 pictures"):
        score([prompts_with_scenes(2100)[0][0]], [])


def test_every_caption_fixes_its_scene() -> None:
    """Two draws of a prompt's scene differ by the jitter only."""
    for index, (prompt, scene) in enumerate(prompts_with_scenes(2100)[:200]):
        other = prompt_scene(prompt, np.random.default_rng(index))
        for a, b in zip(scene.objects, other.objects, strict=True):
            assert (a.shape, a.colour, a.size) == (b.shape, b.colour, b.size)
            assert max(abs(a.x - b.x), abs(a.y - b.y)) <= 2 / 64


def test_objects_keep_their_distance() -> None:
    for index in range(300):
        objects = free_scene(generator(6, index), "train").objects
        assert 1 <= len(objects) <= 5
        for number, a in enumerate(objects):
            assert min(a.x, a.y, 1 - a.x, 1 - a.y) >= a.extent + BORDER - 1e-9
            for b in objects[:number]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.extent + b.extent + GAP - 1e-9


def test_training_never_shows_or_says_a_held_out_combination() -> None:
    seen = Counter()
    for kind in KINDS:
        for index in range(1500):
            sample = make_conversation(kind, 1, index)
            assert not any(scene_is_held_out(scene) for scene in sample.scenes)
            assert not any(text_is_held_out(text) for _, text in sample.turns)
            assert sample.prompt is None or not prompt_is_held_out(sample.prompt)
            seen.update(f"{o.colour} {o.shape}" for scene in sample.scenes for o in scene.objects)
    # Each look on its own is common in training; only combinations are new.
    assert all(seen[f"{colour} {shape}"] > 50 for colour, shape, _ in HELD_OUT)


def test_the_held_out_split_always_holds_one() -> None:
    for index in range(200):
        assert scene_is_held_out(make_conversation("understanding", 1, index, "heldout").scenes[0])
        assert prompt_is_held_out(make_conversation("text_to_image", 1, index, "heldout").prompt)
        assert scene_is_held_out(make_conversation("editing", 1, index, "heldout").scenes[-1])


def test_held_out_combinations_are_read_from_words() -> None:
    assert text_is_held_out("Please draw a red triangle left of a pink circle for me.")
    assert text_is_held_out("Is the pink circle right of the small red triangle?")
    assert not text_is_held_out("a red triangle right of a pink circle")
    assert not text_is_held_out("a red triangle left of a red triangle")
    assert {relation for *_, relation in HELD_OUT} == set(RELATIONS)
    assert {shape for _, shape, _ in HELD_OUT} == set(SHAPES)
    assert {colour for colour, *_ in HELD_OUT} == set(COLOURS)


def test_held_out_relations_agree_from_both_sides() -> None:
    a, b = ShapeObject("triangle", "red", "large"), ShapeObject("cross", "black", "small")
    assert relation_is_held_out(a, b, "left of")
    assert relation_is_held_out(b, a, "right of")
    assert not relation_is_held_out(a, b, "right of")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_sample_depends_on_seed_and_index_only(kind: str, split: str) -> None:
    first = [make_conversation(kind, 7, index, split) for index in range(20)]
    again = [make_conversation(kind, 7, index, split) for index in reversed(range(20))][::-1]
    assert first == again
    assert first != [make_conversation(kind, 8, index, split) for index in range(20)]


def test_all_tasks_and_prompt_kinds_occur() -> None:
    tasks = {kind: Counter(make_conversation(kind, 0, i).task for i in range(600)) for kind in KINDS}
    assert tasks["text_to_image"] == dict.fromkeys(PROMPT_KINDS, 100)
    assert set(tasks["editing"]) == {*EDIT_TYPES, "composition", "multi_turn"}
    assert set(tasks["understanding"]) == {"qa", "caption_qa", "qa_two_images"}
    assert min(min(counter.values()) for counter in tasks.values()) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_turns_alternate_and_marks_match_images(kind: str) -> None:
    for index in range(300):
        sample = make_conversation(kind, 2, index)
        assert [who for who, _ in sample.turns] == ["human", "gpt"] * (len(sample.turns) // 2)
        assert sum(text.count("<image>") for _, text in sample.turns) == len(sample.scenes)
        made = sum(text.count("<image>") for who, text in sample.turns if who == "gpt")
        assert (made > 0) == (kind != "understanding")
        if kind == "understanding":
            assert 3 <= len(sample.turns) // 2 <= 6


def test_answers_are_true() -> None:
    """Answers are recomputed here from the scene, for the kinds whose question names everything that counts."""
    for item in heldout_questions(300):
        words = item.question.question.rstrip("?").split()
        objects = item.scene.objects
        if item.question.type == "existence":
            there = any(f"{o.colour} {o.shape}" == " ".join(words[3:]) for o in objects)
            assert item.question.answer == ("yes" if there else "no")
        elif item.question.type == "relation" and words[0] == "Where":
            a = next(o for o in objects if o.name == " ".join(words[3:5]))
            b = next(o for o in objects if o.name == " ".join(words[8:10]))
            assert item.question.answer == clear_direction(a, b)
        elif item.question.type == "colour":
            wanted = [o for o in objects if all(w in (o.shape, o.size) for w in words[4:])]
            assert [o.colour for o in wanted] == [item.question.answer]


def test_held_out_questions_cover_all_types() -> None:
    items = heldout_questions(120)
    assert Counter(item.question.type for item in items) == dict.fromkeys(QUESTION_TYPES, 20)
    assert all(scene_is_held_out(item.scene) for item in items)


def test_any_64_retrieval_pairs_differ() -> None:
    pairs = retrieval_pairs(600)
    for start in range(len(pairs) - 64):
        window = pairs[start : start + 64]
        assert len({pair.prompt.caption for pair in window}) == 64
        looks = [frozenset((o.name, round(o.x * 4), round(o.y * 4)) for o in pair.scene.objects) for pair in window]
        assert len(set(looks)) == 64
    assert all(scene_is_held_out(pair.scene) and scene_satisfies(pair.prompt, pair.scene) for pair in pairs)


def test_geneval_prompts_take_kinds_in_turn() -> None:
    prompts = geneval_prompts(60)
    assert [prompt.kind for prompt in prompts] == list(PROMPT_KINDS) * 10
    assert all(prompt_is_held_out(p) == (p.kind in ("position", "color_attr")) for p in prompts)
    assert [prompt_from_dict(json.loads(json.dumps(p.to_dict()))) for p in prompts] == prompts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both splits and the evaluation lists, in small shards."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, 150, seed=3, shard_size=25)
    write_shapes(folder, 40, seed=3, split="heldout")
    write_eval_sets(folder, num_questions=30, num_pairs=20, num_prompts=12)
    return folder


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("kind", DEFAULT_MIX)
def test_files_show_what_they_say(world: Path, split: str, kind: str) -> None:
    lines = [json.loads(line) for line in (world / split / f"{kind}.jsonl").read_text().splitlines()]
    suffixes = set()
    for number, record in enumerate(lines):
        sample = make_conversation(kind, 3, number, split)
        assert (record["id"], record["kind"]) == (f"{kind}-{number:07d}", kind)
        assert [(turn["from"], turn["value"]) for turn in record["conversations"]] == list(sample.turns)
        files = record["image"] if isinstance(record["image"], list) else [record["image"]]
        for file, scene in zip(files, record["scenes"], strict=True):
            suffixes.add(Path(file).suffix)
            assert shows_scene(scene_from_list(scene), Image.open(world / split / file), tolerance=1 / 64)
        if kind == "text_to_image":
            assert is_correct(prompt_from_dict(record["geneval"]), Image.open(world / split / files[0]))
    assert suffixes == {".jpg", ".png"}


def test_shards_hold_the_same_samples(world: Path) -> None:
    index = json.loads((world / "train" / "index.json").read_text())
    assert index["counts"] == {"understanding": 61, "text_to_image": 52, "editing": 37}
    assert len(index["shards"]) == 3 + 3 + 2
    shard = world / "train" / "shards" / "editing-000001.tar"
    lines = [json.loads(line) for line in (world / "train" / "editing.jsonl").read_text().splitlines()][25:]
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [json.loads(sample["json"]) for sample in samples] == lines
    for sample, record in zip(samples, lines, strict=True):
        for number, file in enumerate(record["image"]):
            suffix = Path(file).suffix
            assert sample[f"{number}{suffix}"] == (world / "train" / file).read_bytes()
    with tarfile.open(shard) as tar:
        assert all(member.mtime == 0 for member in tar)


def test_writing_twice_gives_equal_bytes(world: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path, 150, seed=3, shard_size=25)
    for path in sorted((world / "train").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(world)).read_bytes()


def test_evaluation_files(world: Path) -> None:
    questions = [json.loads(line) for line in (world / "eval" / "questions.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (world / "eval" / "retrieval.jsonl").read_text().splitlines()]
    prompts = [json.loads(line) for line in (world / "eval" / "prompts.jsonl").read_text().splitlines()]
    assert (len(questions), len(pairs), len(prompts)) == (30, 20, 12)
    for record in questions:
        assert shows_scene(scene_from_list(record["scene"]), Image.open(world / "eval" / record["image"]))
        assert record["conversations"][1]["value"] == record["answer"]
    for record in pairs:
        assert is_correct(prompt_from_dict(record["geneval"]), Image.open(world / "eval" / record["image"]))
    assert [prompt_from_dict(record).kind for record in prompts] == list(PROMPT_KINDS) * 2


def test_wrong_requests_say_what_to_do(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already holds"):
        write_shapes(world, 10)
    with pytest.raises(UserError, match="count 0"):
        write_shapes(tmp_path, 0)
    with pytest.raises(UserError, match="train or heldout"):
        write_shapes(tmp_path, 10, split="test")
    with pytest.raises(UserError, match="shares"):
        write_shapes(tmp_path, 10, mix={"video": 1.0})
    with pytest.raises(ValueError, match="name no relation"):
        sample_prompt(np.random.default_rng(0), "counting", "heldout")
    with pytest.raises(ValueError, match="no such kind"):
        make_conversation("video", 0, 0)


def test_sizes_differ_clearly() -> None:
    assert SIZES["large"] / SIZES["small"] > 1.5
