"""Pictures, edits and answers in the Shapes world, by generators that are right, or wrong in one way."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing
from fake_generator import Asked, FakeGenerator, enter_world, same

from megatron_unimm.data.shapes import (
    PROMPT_KINDS,
    Scene,
    ShapeObject,
    prompt_scene,
    render_array,
    scene_is_held_out,
    shows_scene,
    write_eval_sets,
)
from megatron_unimm.data.shapes.edits import EDIT_TYPES, Edit
from megatron_unimm.errors import DataError, UserError
from megatron_unimm.evaluate import shapes
from megatron_unimm.evaluate.shapes_edits import EditItem, EditVerdict, heldout_edits, judge_edit
from megatron_unimm.evaluate.shapes_retrieval import TEMPLATES
from megatron_unimm.evaluate.suite import SHEET_COLUMNS
from megatron_unimm.generate.png import picture_grid

RED, BLUE, CROSS = (
    ShapeObject("circle", "red", "large", 0.25, 0.25),
    ShapeObject("square", "blue", "small", 0.75, 0.25),
    ShapeObject("cross", "black", "large", 0.5, 0.75),
)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    enter_world(tmp_path)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def samples() -> shapes.ShapesSamples:
    return shapes.load_samples(None, 4)


def artist(samples: shapes.ShapesSamples) -> Callable[[Asked], np.ndarray]:
    """Paints what it is asked for, and edits as told."""

    def paint(asked: Asked) -> np.ndarray:
        if asked.pictures:
            return render_array(samples.edits[asked.number].item.edit.result)
        prompt = samples.prompts[asked.number].prompt
        assert prompt.caption in asked.text
        return render_array(prompt_scene(prompt))

    return paint


def perfect(samples: shapes.ShapesSamples, **changes: object) -> FakeGenerator:
    words: dict[str, object] = {"paint": artist(samples), "say": lambda asked: samples.questions[asked.number].answer}
    return FakeGenerator(**(words | changes))  # type: ignore[arg-type]


# -- samples -----------------------------------------------------------------------------------------------------------


def test_samples_take_turns(samples: shapes.ShapesSamples) -> None:
    assert [item.prompt.kind for item in samples.prompts] == 4 * list(PROMPT_KINDS)
    assert [item.item.edit.type for item in samples.edits] == 4 * list(EDIT_TYPES)
    assert len(samples.questions) == 24


def test_edits_are_held_out_before_and_after() -> None:
    items = heldout_edits(40)
    assert all(scene_is_held_out(item.source) and scene_is_held_out(item.edit.result) for item in items)
    assert heldout_edits(7) == items[:7]
    for item in items:
        assert (len(item.gone), len(item.wanted)) == {
            "recolour": (1, 1),
            "remove": (1, 0),
            "add": (0, 1),
            "move": (1, 1),
            "swap": (2, 2),
        }[item.edit.type]
        assert len(item.untouched) + len(item.gone) == len(item.source.objects)


def test_every_kind_is_asked_for_in_every_way(samples: shapes.ShapesSamples) -> None:
    for kind in range(6):
        texts = {shapes.request(samples.prompts[0].prompt, 6 * turn + kind) for turn in range(len(TEMPLATES))}
        assert len(texts) == len(TEMPLATES) == 13


@pytest.mark.parametrize("canvas", [64, 96])
def test_files_hold_the_samples_that_are_made_on_the_spot(tmp_path: Path, canvas: int) -> None:
    write_eval_sets(tmp_path, num_questions=18, num_pairs=1, num_prompts=18, canvas=canvas)
    read, made = shapes.load_samples(tmp_path, 2), shapes.load_samples(None, 2)
    assert [item.prompt for item in read.prompts] == [item.prompt for item in made.prompts]
    assert [item.question for item in read.questions] == [item.question for item in made.questions]
    assert [item.item for item in read.edits] == [item.item for item in made.edits]
    pictures = [item.picture for item in [*read.prompts, *read.questions]] + [item.source for item in read.edits]
    assert {picture.shape for picture in pictures} == {(canvas, canvas, 3)}
    if canvas == 64:
        originals = [item.picture for item in [*made.prompts, *made.questions]] + [item.source for item in made.edits]
        assert all(np.array_equal(one, other) for one, other in zip(pictures, originals, strict=True))


def test_a_folder_without_prompts_is_named(tmp_path: Path) -> None:
    write_eval_sets(tmp_path, num_questions=6, num_pairs=1, num_prompts=6)
    (tmp_path / "eval/prompts.jsonl").unlink()
    with pytest.raises(DataError, match=r"prompts\.jsonl"):
        shapes.load_samples(tmp_path, 1)


# -- edits -------------------------------------------------------------------------------------------------------------


def verdict(item: EditItem, *objects: ShapeObject) -> tuple[bool, bool]:
    found = judge_edit(item, render_array(Scene(objects)))
    return found.succeeded, found.untouched


def edit_of(kind: str, *result: ShapeObject) -> EditItem:
    return EditItem(Scene((RED, BLUE, CROSS)), Edit(kind, "", Scene(result)))


def recoloured(item: ShapeObject, colour: str) -> ShapeObject:
    return ShapeObject(item.shape, colour, item.size, item.x, item.y)


def test_a_recoloured_object() -> None:
    green = recoloured(RED, "green")
    item = edit_of("recolour", green, BLUE, CROSS)
    assert verdict(item, green, BLUE, CROSS) == (True, True)
    assert verdict(item, green.at(0.27, 0.28), BLUE, CROSS) == (True, True), "two pixels aside are about the same place"
    assert verdict(item, green.at(0.35, 0.25), BLUE, CROSS) == (False, True), "six are not"
    assert verdict(item, RED, BLUE, CROSS) == (False, True)
    assert verdict(item, recoloured(RED, "pink"), BLUE, CROSS) == (False, True)
    assert verdict(item, ShapeObject("circle", "green", "small", 0.25, 0.25), BLUE, CROSS) == (False, True), "size"
    assert verdict(item, green, BLUE) == (True, False)
    assert verdict(item, green, recoloured(BLUE, "green"), CROSS) == (True, False)
    assert verdict(item, green, BLUE, CROSS.at(0.5, 0.6)) == (True, False)
    assert verdict(item) == (False, False)


def test_a_removed_object() -> None:
    item = edit_of("remove", BLUE, CROSS)
    assert verdict(item, BLUE, CROSS) == (True, True)
    assert verdict(item, RED, BLUE, CROSS) == (False, True)
    assert verdict(item, recoloured(RED, "pink"), BLUE, CROSS) == (False, True), "another in its place is no removal"
    assert verdict(item, RED.at(0.2, 0.8), BLUE, CROSS) == (False, True), "nor is moving it"
    assert verdict(item, RED, BLUE) == (False, False)
    assert verdict(item, CROSS) == (True, False)


def test_an_added_object() -> None:
    new = ShapeObject("triangle", "purple", "small", 0.2, 0.75)
    item = edit_of("add", RED, BLUE, CROSS, new)
    assert verdict(item, RED, BLUE, CROSS, new) == (True, True)
    assert verdict(item, RED, BLUE, CROSS) == (False, True)
    assert verdict(item, RED, BLUE, CROSS, new, new.at(0.8, 0.75)) == (False, True), "one, not two"
    assert verdict(item, RED, BLUE, CROSS, new, ShapeObject("square", "pink", "small", 0.8, 0.8)) == (True, False)


def test_moved_and_swapped_objects() -> None:
    item = edit_of("move", RED.at(0.2, 0.8), BLUE, CROSS)
    assert verdict(item, RED.at(0.2, 0.8), BLUE, CROSS) == (True, True)
    assert verdict(item, RED, BLUE, CROSS) == (False, True)
    assert verdict(item, RED, RED.at(0.2, 0.8), BLUE, CROSS) == (False, True), "a copy is no move"
    swap = edit_of("swap", RED.at(0.75, 0.25), BLUE.at(0.25, 0.25), CROSS)
    assert verdict(swap, RED.at(0.75, 0.25), BLUE.at(0.25, 0.25), CROSS) == (True, True)
    assert verdict(swap, RED, BLUE, CROSS) == (False, True)
    assert verdict(swap, RED.at(0.75, 0.25), CROSS) == (False, True)


def test_both_hold_exactly_where_the_picture_is_the_result() -> None:
    """Against the strict comparison of the scorer, over 60 edits with seven pictures each."""
    hits = 0
    for item in heldout_edits(60):
        before, after = item.source.objects, item.edit.result.objects
        pictures = [
            before,
            after,
            after[1:],
            after[:-1],
            before[1:],
            (recoloured(after[0], "black" if after[0].colour != "black" else "red"), *after[1:]),
            (after[0].at(after[0].x, min(after[0].y + 0.09, 0.8)), *after[1:]),
        ]
        for objects in pictures:
            picture = render_array(Scene(tuple(objects)))
            expected = shows_scene(item.edit.result, picture)
            assert (judge_edit(item, picture) == EditVerdict(True, True)) == expected
            hits += expected
    assert 60 <= hits < 120


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("world")
def test_a_perfect_model(samples: shapes.ShapesSamples) -> None:
    generator = perfect(samples)
    result = shapes.run(generator, samples)  # type: ignore[arg-type]
    assert next(iter(result.scores)) == "overall"
    psnr = result.scores.pop("reconstruction_psnr")
    assert psnr == pytest.approx(10 * np.log10(255**2 * 12))
    assert set(result.scores.values()) == {1.0}
    types = {f"editing/{name}" for name in ("success", "untouched", *EDIT_TYPES)}
    parts = {f"overall_{part}" for part in ("decoder", "vae", "scorer")}
    assert {"overall", *PROMPT_KINDS, *parts, "editing", *types, "understanding", "understanding/count"} <= set(
        result.scores
    )
    assert result.counts["prompts"] == result.counts["questions"] == 24
    assert result.counts["edits"] == 20
    assert result.counts["prompts/position"] == result.counts["edits/swap"] == 4
    numbers = [asked.number for asked in generator.asked if asked.open_image and not asked.pictures]
    assert sorted(numbers) == list(range(24)), "every prompt has noise of its own"


@pytest.mark.usefixtures("world")
def test_where_a_loss_comes_from(samples: shapes.ShapesSamples) -> None:
    """The model counts one too many, the decoder fails at one kind more, and the VAE at none."""
    draw = artist(samples)
    empty = np.full((64, 64, 3), 235, np.uint8)

    def paint(asked: Asked) -> np.ndarray:
        if asked.pictures:
            return asked.pictures[0]
        return empty if samples.prompts[asked.number].prompt.kind == "counting" else draw(asked)

    def reconstruct(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        kinds = [samples.prompts[i].prompt.kind for i in range(len(pictures))]
        return [p if kind not in ("counting", "colors") else empty for kind, p in zip(kinds, pictures, strict=True)]

    result = shapes.run(perfect(samples, paint=paint, reconstruct=reconstruct), samples)  # type: ignore[arg-type]
    scores = result.scores
    assert [scores[kind] for kind in PROMPT_KINDS] == [1, 1, 0, 1, 1, 1]
    assert scores["overall"] == pytest.approx(5 / 6)
    assert scores["overall_decoder"] == pytest.approx(4 / 6)
    assert scores["overall_vae"] == scores["overall_scorer"] == 1
    assert (scores["editing"], scores["editing/success"], scores["editing/untouched"]) == (0, 0, 1)
    assert all(scores[f"editing/{type_}"] == 0 for type_ in EDIT_TYPES)
    assert scores["understanding"] == 1


@pytest.mark.usefixtures("world")
def test_psnr_of_a_known_error(samples: shapes.ShapesSamples) -> None:
    """Half of the pictures three grey levels too bright, half exact: a mean squared error of 4.5."""

    def brighter(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [picture + np.uint8(3 * (i % 2)) for i, picture in enumerate(pictures)]

    result = shapes.run(perfect(samples, reconstruct=brighter), samples)  # type: ignore[arg-type]
    assert result.scores["reconstruction_psnr"] == pytest.approx(10 * np.log10(255**2 / 4.5))
    assert result.scores["overall_decoder"] == 1


def test_a_decoder_of_another_size_is_compared_at_its_size() -> None:
    truth = np.full((64, 64, 3), 100, np.uint8)
    assert shapes.squared_error(np.full((96, 96, 3), 102, np.uint8), truth) == 4


@pytest.mark.usefixtures("world")
def test_the_sheet_shows_every_part(samples: shapes.ShapesSamples) -> None:
    result = shapes.run(perfect(samples), samples)  # type: ignore[arg-type]
    captions = [caption for caption, _ in result.pictures]
    rows = [captions[start : start + SHEET_COLUMNS] for start in range(0, len(captions), SHEET_COLUMNS)]
    assert [row[0].split("\n")[0] for row in rows] == [
        "true picture",
        "VAE alone: correct",
        "decoder on true tokens: correct",
        *["single_object: correct"] * 4,
        "recolour",
        "move",
        "remove",
        "swap",
    ]
    assert rows[-1][1] == "correct, the rest untouched"
    assert np.array_equal(result.pictures[0][1], samples.prompts[0].picture)
    assert picture_grid([p for _, p in result.pictures], captions, SHEET_COLUMNS).shape[1] > 6 * 192


@pytest.mark.usefixtures("world")
def test_a_model_without_a_decoder_is_refused(samples: shapes.ShapesSamples) -> None:
    with pytest.raises(UserError, match=r"runs/fake: makes visual tokens.* train a diffusion decoder"):
        shapes.run(perfect(samples, paints=False), samples)  # type: ignore[arg-type]


def replica(rank: int, folder: str) -> None:
    """One of two ranks: half of the prompts, the result of all."""
    enter_world(Path(folder), rank, 2)
    samples = shapes.load_samples(None, 1)
    generator = perfect(samples, reconstruct=same)
    result = shapes.run(generator, samples)  # type: ignore[arg-type]
    numbers = [asked.number for asked in generator.asked if asked.open_image and not asked.pictures]
    np.savez(
        f"{folder}/{rank}.npz",
        numbers=numbers,
        overall=result.scores["overall"],
        pictures=[p for _, p in result.pictures],
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_replicas_share_the_work(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(replica, (str(tmp_path),), nprocs=2)
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    assert [first["numbers"].tolist(), second["numbers"].tolist()] == [[0, 2, 4], [1, 3, 5]]
    assert first["overall"] == second["overall"] == 1
    assert np.array_equal(first["pictures"], second["pictures"])
