"""Conversations of two edits, led by painters that are right, or wrong in one way."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing
from fake_generator import Asked, FakeGenerator, enter_world

from megatron_unimm.data.sample import Turn
from megatron_unimm.data.shapes import (
    COLOURS,
    HISTORY_TYPES,
    Scene,
    ShapeObject,
    find_objects,
    render_array,
    scene_is_held_out,
    shows_scene,
    write_eval_sets,
)
from megatron_unimm.data.shapes.edits import EDIT_TYPES, Edit
from megatron_unimm.data.shapes.history import FROM_EARLIER
from megatron_unimm.data.shapes.scene import CELLS, cell_centre, fits
from megatron_unimm.errors import UserError
from megatron_unimm.evaluate import shapes_sessions as suite
from megatron_unimm.evaluate.shapes_edits import EditItem, copies, edit_of, judge_edit
from megatron_unimm.evaluate.suite import SHEET_COLUMNS
from megatron_unimm.evaluate.suites import suite_of
from megatron_unimm.generate.decode import GeneratedImage

EMPTY = render_array(Scene(()))
CIRCLE = ShapeObject("circle", "red", "large", 0.25, 0.25)
SQUARE = ShapeObject("square", "blue", "small", 0.75, 0.25)
CROSS = ShapeObject("cross", "black", "large", 0.5, 0.75)

Paint = Callable[[suite.SessionItem, np.ndarray], np.ndarray]
"""Draws the answer to an instruction; the second argument is the newest picture that the model sees."""


class Talker(FakeGenerator):
    """Takes conversations of several turns, and shows a painter the last of them."""

    def prompt(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[np.ndarray | GeneratedImage] = (),
        *,
        open_image: bool = False,
        number: int = 0,
    ) -> Asked:
        assert [turn.role for turn in turns] == ["user", "assistant", "user"][: len(turns)]
        shown = [part for turn in turns for part in turn.parts if isinstance(part, int)]
        assert shown == list(range(len(pictures)))
        # What the model drew comes back as it made it in a conversation, and as pixels without one.
        is_drawing = [isinstance(picture, GeneratedImage) for picture in pictures]
        assert is_drawing == ([False, True] if len(turns) == 3 else [False] * len(pictures))
        text = "\n".join(part for turn in turns for part in turn.parts if isinstance(part, str))
        seen = [picture.pixels if isinstance(picture, GeneratedImage) else picture for picture in pictures]
        return Asked(text, tuple(p for p in seen if p is not None), open_image, number)


def true(scene: Scene) -> np.ndarray:
    return render_array(scene)


def talker(
    samples: suite.SessionSamples,
    first: Paint = lambda item, newest: true(item.first.result),
    with_history: Paint = lambda item, newest: true(item.second.result),
    without: Paint = lambda item, newest: true(item.second.result),
    choose: Callable[[int], np.ndarray] | None = None,
    **changes: object,
) -> Talker:
    """A generator of painters; those that are not given are perfect."""
    count = len(samples.sessions)

    def paint(asked: Asked) -> np.ndarray:
        if asked.number >= 2 * count:
            place = asked.number - 2 * count
            assert asked.text == samples.choices[place].instruction
            assert len(asked.pictures) == len(samples.choices[place].sources)
            return choose(place) if choose is not None else true(samples.choices[place].result)
        item = samples.sessions[asked.number % count]
        if asked.number < count:
            assert asked.text == item.first.instruction
            assert np.array_equal(asked.pictures[0], true(item.source))
            return first(item, asked.pictures[-1])
        if len(asked.pictures) == 1:
            assert asked.text == item.second.instruction
            return without(item, asked.pictures[-1])
        assert asked.text == f"{item.first.instruction}\n{item.second.instruction}"
        assert np.array_equal(asked.pictures[0], true(item.source))
        return with_history(item, asked.pictures[-1])

    return Talker(paint, **changes)  # type: ignore[arg-type]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    enter_world(tmp_path)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def samples() -> suite.SessionSamples:
    return suite.load_samples(None, 2)


def scores_of(samples: suite.SessionSamples, generator: Talker) -> dict[str, float]:
    return suite.run(generator, samples).scores  # type: ignore[arg-type]


def copy(item: suite.SessionItem, newest: np.ndarray) -> np.ndarray:
    return newest


# -- samples -----------------------------------------------------------------------------------------------------------


def test_samples_take_turns_and_are_held_out(samples: suite.SessionSamples) -> None:
    kinds = [item.second.type for item in samples.sessions]
    assert kinds[::2] == 2 * list(EDIT_TYPES)
    assert kinds[1::2] == 2 * list(HISTORY_TYPES)
    assert [item.group for item in samples.sessions] == 10 * ["plain", "history"]
    for item in samples.sessions:
        assert all(scene_is_held_out(s) for s in (item.source, item.first.result, item.second.result))
    assert [len(choice.sources) for choice in samples.choices] == 2 * list(range(3, 13))
    assert all(scene_is_held_out(choice.result) for choice in samples.choices)
    more = suite.load_samples(None, 3)
    assert (more.sessions[:20], more.choices[:20]) == (samples.sessions, samples.choices)


def test_the_first_instruction_leads_to_what_is_taken_back(samples: suite.SessionSamples) -> None:
    firsts = {item.second.type: item.first.type for item in samples.sessions}
    assert (firsts["bring_back"], firsts["old_colour"], firsts["move_back"]) == ("remove", "recolour", "move")
    taken_back = [i for i in samples.sessions if i.second.type in {*HISTORY_TYPES} - {"first_picture"}]
    assert all(set(item.second.result.objects) == set(item.source.objects) for item in taken_back)


def test_pictures_have_the_size_of_the_folder(tmp_path: Path) -> None:
    write_eval_sets(tmp_path, num_questions=1, num_pairs=1, num_prompts=1, canvas=96)
    found = suite.load_samples(tmp_path, 1)
    assert found.canvas == 96
    assert found.sessions == suite.load_samples(None, 1).sessions


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("world")
def test_a_perfect_model_scores_one_everywhere(samples: suite.SessionSamples) -> None:
    result = suite.run(talker(samples), samples)  # type: ignore[arg-type]
    assert next(iter(result.scores)) == "with_history"
    for name, score in result.scores.items():
        assert score == (0 if name.endswith("/copied") else 1), name
    assert result.counts == {"sessions": 20, "plain": 10, "history": 10, "change": 20, "multi_image": 20}


@pytest.mark.usefixtures("world")
def test_a_model_that_forgets_fails_history_tasks_alone(samples: suite.SessionSamples) -> None:
    """Without history it does plain edits, and copies the newest picture where it does not know what is meant."""

    def without(item: suite.SessionItem, newest: np.ndarray) -> np.ndarray:
        return true(item.second.result) if item.group == "plain" else newest

    scores = scores_of(samples, talker(samples, without=without))
    assert (scores["with_history"], scores["with_history/copied"]) == (1, 0)
    assert (scores["without_history"], scores["without_history/copied"]) == (0.5, 0.5)
    assert (scores["without_history/plain"], scores["without_history/history"]) == (1, 0)
    assert [scores[f"without_history/{kind}"] for kind in suite.SECOND_TYPES] == 5 * [1, 0]
    assert scores["without_history/change"] == 0.5


@pytest.mark.usefixtures("world")
def test_a_model_that_only_copies_scores_nothing(samples: suite.SessionSamples) -> None:
    generator = talker(samples, copy, copy, copy, lambda place: true(samples.choices[place].sources[-1]))
    scores = scores_of(samples, generator)
    # The given picture, left as it is twice, is the true end of eight of these ten history tasks.
    assert sum(set(item.second.result.objects) == set(item.source.objects) for item in samples.sessions) == 8
    for way in suite.WAYS:
        assert [scores[f"{way}{part}"] for part in ("", "/plain", "/history", "/change")] == [0, 0, 0, 0]
        assert scores[f"{way}/copied"] == 1
    assert (scores["first"], scores["first/copied"]) == (0, 1)
    assert (scores["multi_image"], scores["multi_image/copied"]) == (0, 1)


@pytest.mark.usefixtures("world")
def test_going_back_after_a_first_failure_is_right(samples: suite.SessionSamples) -> None:
    """The first drawing is empty; who goes back to the given picture is right, and this is what was asked for."""
    undos = suite.SessionSamples([item for item in samples.sessions if item.second.type == "undo"], [], 64)
    scores = scores_of(undos, talker(undos, lambda item, newest: EMPTY, without=copy))
    assert (scores["first"], scores["with_history"], scores["with_history/change"]) == (0, 1, 1)
    assert (scores["without_history"], scores["without_history/change"]) == (0, 0)


@pytest.mark.usefixtures("world")
def test_a_model_that_draws_nothing_copies_nothing(samples: suite.SessionSamples) -> None:
    nothing: Paint = lambda item, newest: EMPTY  # noqa: E731
    scores = scores_of(samples, talker(samples, nothing, nothing, nothing, lambda place: EMPTY))
    # Nothing is there to be changed or kept, but an object can be added to nothing; it was not.
    assert {name: score for name, score in scores.items() if score} == {}


@pytest.mark.usefixtures("world")
def test_the_first_errors_do_not_count_against_the_change(samples: suite.SessionSamples) -> None:
    """The first drawing holds one object more; the second does what was asked and leaves that one where it is."""

    def spot(item: suite.SessionItem) -> ShapeObject | None:
        """A small object of another look, clear of everything before and after the second edit."""
        objects = [*item.first.result.objects, *item.second.result.objects]
        look = next(
            ShapeObject("square", c, "small") for c in COLOURS if f"{c} square" not in {o.name for o in objects}
        )
        return next((at for cell in CELLS if fits(at := look.at(*cell_centre(cell)), objects)), None)

    items = suite.heldout_sessions(60)
    spots = {item: found for item in items if (found := spot(item)) and item.second.type not in FROM_EARLIER}
    assert len({item.second.type for item in spots}) == 8
    few = suite.SessionSamples(list(spots), [], 64)

    def with_spot(item: suite.SessionItem, scene: Scene) -> np.ndarray:
        return true(Scene((*scene.objects, spots[item])))

    generator = talker(
        few,
        lambda item, newest: with_spot(item, item.first.result),
        lambda item, newest: with_spot(item, item.second.result),
    )
    result = suite.run(generator, few)  # type: ignore[arg-type]
    assert result.counts["change"] == len(spots)
    scores = result.scores
    assert (scores["first"], scores["with_history"], scores["with_history/change"]) == (0, 0, 1)
    # Drawing the true scene takes the spot away, which nobody asked for.
    assert (scores["without_history"], scores["without_history/change"]) == (1, 0)
    assert scores["multi_image"] == 0


@pytest.mark.usefixtures("world")
def test_choices_count_by_the_number_of_pictures(samples: suite.SessionSamples) -> None:
    """Right up to ten pictures: of 3 to 12 in turn, eight in ten."""

    def choose(place: int) -> np.ndarray:
        choice = samples.choices[place]
        return true(choice.result) if len(choice.sources) <= 10 else EMPTY

    scores = scores_of(samples, talker(samples, choose=choose))
    assert scores["multi_image"] == pytest.approx(0.8)
    assert [scores[f"multi_image/{name}"] for name in ("up_to_6", "7_to_10", "over_10")] == [1, 1, 0]


@pytest.mark.usefixtures("world")
def test_the_second_drawings_share_their_random_numbers(samples: suite.SessionSamples) -> None:
    generator = talker(samples)
    suite.run(generator, samples)  # type: ignore[arg-type]
    assert all(asked.open_image for asked in generator.asked)
    numbers = [asked.number for asked in generator.asked]
    assert numbers == [*range(20), *range(20, 40), *range(20, 40), *range(40, 60)]


# -- edits of what is shown --------------------------------------------------------------------------------------------


def test_copies() -> None:
    scene = Scene((CIRCLE, SQUARE))
    assert copies(scene, true(scene))
    assert copies(scene, true(Scene((CIRCLE.at(0.25 + 3 / 64, 0.25), SQUARE))))
    assert not copies(scene, true(Scene((CIRCLE.at(0.25 + 6 / 64, 0.25), SQUARE))))
    assert not copies(scene, true(Scene((CIRCLE,))))
    assert not copies(Scene(()), EMPTY)


def test_an_edit_goes_along_with_what_is_shown() -> None:
    green = ShapeObject("circle", "green", "large", 0.25, 0.25)
    item = EditItem(Scene((CIRCLE, SQUARE)), Edit("recolour", "Make the red circle green.", Scene((green, SQUARE))))
    shown = Scene((CIRCLE.at(0.28, 0.25), CROSS))
    found = edit_of(shown, item)
    assert found is not None
    assert set(found.edit.result.objects) == {green.at(0.28, 0.25), CROSS}
    assert (found.source, found.edit.type) == (shown, "recolour")
    assert edit_of(Scene((SQUARE, CROSS)), item) is None  # nothing to recolour
    assert edit_of(Scene((CIRCLE, CIRCLE.at(0.75, 0.75))), item) is None  # which one?
    assert edit_of(Scene((CIRCLE.at(0.5, 0.5),)), item) is None  # elsewhere


def test_a_swap_exchanges_the_places_that_are_shown() -> None:
    swapped = Scene((CIRCLE.at(SQUARE.x, SQUARE.y), SQUARE.at(CIRCLE.x, CIRCLE.y)))
    item = EditItem(Scene((CIRCLE, SQUARE)), Edit("swap", "Swap the red circle and the blue square.", swapped))
    found = edit_of(Scene((SQUARE.at(0.74, 0.26), CIRCLE.at(0.27, 0.24))), item)
    assert found is not None
    assert set(found.edit.result.objects) == {CIRCLE.at(0.74, 0.26), SQUARE.at(0.27, 0.24)}


def test_a_place_that_is_taken_cannot_be_filled() -> None:
    item = EditItem(Scene((SQUARE,)), Edit("add", "Add a large red circle at the top left.", Scene((SQUARE, CIRCLE))))
    assert edit_of(Scene((SQUARE, CROSS.at(0.3, 0.3))), item) is None
    found = edit_of(Scene((CROSS,)), item)
    assert found is not None
    verdict = judge_edit(found, true(Scene((CROSS, CIRCLE))))
    assert verdict.succeeded
    assert verdict.untouched


def test_every_edit_of_a_true_drawing_is_the_edit_itself(samples: suite.SessionSamples) -> None:
    for item in samples.sessions:
        _, step = item.steps
        found = edit_of(find_objects(true(item.first.result)), step)
        assert found is not None
        assert shows_scene(found.edit.result, true(item.second.result), 2 / 64)


# -- the suite ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("world")
def test_the_sheet_shows_each_task_once(samples: suite.SessionSamples) -> None:
    pictures = suite.run(talker(samples, without=copy), samples).pictures  # type: ignore[arg-type]
    rows = [pictures[start : start + SHEET_COLUMNS] for start in range(0, len(pictures), SHEET_COLUMNS)]
    assert [row[3][0].split("\n")[1] for row in rows] == list(suite.SECOND_TYPES)
    for row, item in zip(rows, samples.sessions, strict=False):
        assert row[2][0].startswith("with history: correct")
        assert row[3][0].startswith("without history: wrong")
        scenes = (item.source, item.first.result, item.second.result, item.first.result)
        for (_, picture), scene in zip(row, (*scenes, item.first.result, item.second.result), strict=True):
            assert np.array_equal(picture, true(scene))


@pytest.mark.usefixtures("world")
def test_a_model_without_a_decoder_is_refused(samples: suite.SessionSamples) -> None:
    with pytest.raises(UserError, match="suite shapes_sessions judges pixels"):
        suite.run(talker(samples, paints=False), samples)  # type: ignore[arg-type]


def test_the_suite_has_its_name() -> None:
    found = suite_of("shapes-sessions", "suite")
    assert found is suite.SUITE
    assert (found.needs_pixels, found.draws) == (True, True)


def replica(rank: int, folder: str) -> None:
    """One of two ranks: half of everything, the scores of all."""
    enter_world(Path(folder), rank, 2)
    samples = suite.load_samples(None, 1)
    generator = talker(samples, without=copy)
    result = suite.run(generator, samples)  # type: ignore[arg-type]
    np.savez(
        f"{folder}/{rank}.npz",
        numbers=[asked.number for asked in generator.asked],
        scores=list(result.scores.values()),
        pictures=[picture for _, picture in result.pictures],
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_replicas_share_the_work(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(replica, (str(tmp_path),), nprocs=2)
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    assert first["numbers"].tolist() == [*range(0, 10, 2), *2 * [*range(10, 20, 2)], *range(20, 30, 2)]
    assert second["numbers"].tolist() == [*range(1, 10, 2), *2 * [*range(11, 20, 2)], *range(21, 30, 2)]
    assert np.array_equal(first["scores"], second["scores"])
    assert first["scores"][0] == 1
    assert len(first["pictures"]) == 10 * SHEET_COLUMNS
    assert np.array_equal(first["pictures"], second["pictures"])
