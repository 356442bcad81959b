"""GenEval: its rules by hand-computed cases, its folders, and its scores from boxes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing
from fake_generator import Asked, FakeGenerator, enter_world
from PIL import Image

from megatron_unimm.cli import main
from megatron_unimm.errors import DataError, UserError
from megatron_unimm.evaluate import geneval_images
from megatron_unimm.evaluate.geneval_rules import (
    Box,
    Rules,
    box_from_dict,
    counted_objects,
    judge,
    overlap,
    relations,
    summary,
    task_from_metadata,
)
from megatron_unimm.evaluate.suite import SuiteFiles
from megatron_unimm.evaluate.suites import SUITES, suite_of
from megatron_unimm.generate.png import read_settings

LINES: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "apple", "count": 1, "color": "black"}],
        "prompt": "a photo of a red cup and a black apple",
    },
    {
        "tag": "position",
        "include": [{"class": "bear", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a dog right of a bear",
    },
]
BENCH, CLOCKS, COLOURS, POSITION = (task_from_metadata(line) for line in LINES)


def box(name: str, score: float = 0.95, x: float = 0, y: float = 0, colour: str | None = None) -> Box:
    """Ten pixels wide and high, its centre at (x, y)."""
    return Box(name, score, (x - 5, y - 5, x + 5, y + 5), colour)


# -- rules -------------------------------------------------------------------------------------------------------------


def test_a_box_must_be_above_the_threshold() -> None:
    assert judge(BENCH, [box("bench", 0.31)]).correct
    assert not judge(BENCH, [box("bench", 0.3)]).correct, "above, not at"
    assert not judge(BENCH, [box("chair")]).correct
    assert judge(BENCH, [box("bench"), box("bench"), box("chair")]).correct, "others and more do not matter"
    assert judge(BENCH, []).reasons == ("expected bench>=1, found 0",)


def test_counting_asks_for_surer_boxes() -> None:
    sure, unsure = box("clock", 0.91), box("clock", 0.9)
    assert judge(CLOCKS, [sure, sure]).correct
    assert judge(CLOCKS, [sure, unsure, sure]).correct, "0.9 does not count"
    assert judge(CLOCKS, [sure, unsure]).reasons == ("expected clock>=2, found 1",)
    assert judge(CLOCKS, [sure, sure, sure]).reasons == ("expected clock<3, found 3",), "one too many"


def test_at_most_sixteen_of_a_class_the_surest() -> None:
    boxes = [box("clock", 0.5 + number / 100) for number in range(20)]
    counted = counted_objects([*boxes, box("cup", 0.4)], "single_object")
    assert [b.score for b in counted["clock"]] == [0.5 + number / 100 for number in range(19, 3, -1)]
    assert len(counted["cup"]) == 1
    many = task_from_metadata({**LINES[0], "exclude": [{"class": "clock", "count": 17}]})
    assert judge(many, [box("bench"), *boxes]).correct, "seventeen are never seen"


def test_overlaps_are_dropped_only_where_asked() -> None:
    near = [box("clock", 0.95), box("clock", 0.99, x=1), box("clock", 0.92, x=50)]
    assert len(counted_objects(near, "counting")["clock"]) == 3
    kept = counted_objects(near, "counting", Rules(nms_iou=0.8))["clock"]
    assert [b.score for b in kept] == [0.99, 0.92]
    # 11 x 11 pixels each, one column apart: 110 common of 2 * 121 - 110.
    assert overlap(near[0].corners, near[1].corners) == pytest.approx(110 / 132)
    assert overlap(near[0].corners, near[2].corners) == 0


def test_excluded_objects_must_stay_below_their_number() -> None:
    task = task_from_metadata({**LINES[0], "exclude": [{"class": "dog", "count": 2}]})
    assert judge(task, [box("bench"), box("dog")]).correct
    assert judge(task, [box("bench"), box("dog"), box("dog", 0.2)]).correct
    assert judge(task, [box("bench"), box("dog"), box("dog")]).reasons == ("expected dog<2, found 2",)


def test_colours_of_the_surest_boxes() -> None:
    cup, apple = box("cup", colour="red"), box("apple", colour="black")
    assert judge(COLOURS, [cup, apple]).correct
    wrong = judge(COLOURS, [cup, box("apple", colour="green")])
    assert wrong.reasons == ("expected black apple>=1, found 0; and green",)
    surer = judge(COLOURS, [cup, box("apple", 0.8, colour="black"), box("apple", 0.9, colour="green")])
    assert not surer.correct, "the surest apple is judged, not the best one"
    two = task_from_metadata({**LINES[0], "include": [{"class": "cup", "count": 2, "color": "red"}]})
    assert judge(two, [cup, cup]).correct
    assert judge(two, [cup, box("cup", colour="blue")]).reasons == ("expected red cup>=2, found 1; and blue, red",)


@pytest.mark.parametrize(
    ("x", "y", "holds"),
    [
        (20, 0, {"right of"}),  # 18 of 20 remain
        (-20, 0, {"left of"}),
        (0, -20, {"above"}),
        (0, 20, {"below"}),
        (20, 20, {"right of", "below"}),  # 18 / 28.3 = 0.64 on both axes
        (20, 12, {"right of"}),  # 18 / 23.3 = 0.77 and 10 / 23.3 = 0.43
        (4, 0, set()),  # 2 of 4 remain: half is not more than half
        (4.1, 0, {"right of"}),  # 2.1 of 4.1
        (2, 0, set()),  # within the slack of 0.1 * (10 + 10)
        (0, 0, set()),
        (-15, -15, {"left of", "above"}),  # 13 / 21.2 = 0.61
        (5, 5, set()),  # 3 / 7.07 = 0.42
    ],
)
def test_relations_of_boxes_ten_wide(x: float, y: float, holds: set[str]) -> None:
    assert relations(box("a", x=x, y=y).corners, box("b").corners) == holds


def test_the_slack_grows_with_the_extents_of_each_axis() -> None:
    """30 + 10 wide: 4 off along x; 10 + 10 high: 2 off along y."""
    wide = (-15.0, -5.0, 15.0, 5.0)
    assert relations(box("a", x=8).corners, wide) == set(), "4 of 8 remain"
    assert relations(box("a", x=8.2).corners, wide) == {"right of"}
    assert relations(box("a", y=4.1).corners, wide) == {"below"}
    assert relations(box("a", x=2).corners, box("b").corners, slack=0.0) == {"right of"}


def test_positions_in_an_image() -> None:
    bear = box("bear")
    assert judge(POSITION, [bear, box("dog", x=20)]).correct
    assert judge(POSITION, [bear, box("dog", x=-20)]).reasons == ("expected dog right of target, found left of",)
    assert judge(POSITION, [bear, box("dog", x=1)]).reasons == ("expected dog right of target, found no relation",)
    assert judge(POSITION, [box("dog", x=20)]).reasons == (
        "expected bear>=1, found 0",
        "no target for dog to be right of",
    )
    nearer = [bear, box("dog", 0.9, x=-20), box("dog", 0.8, x=20)]
    assert not judge(POSITION, nearer).correct, "the surest dog is judged"


def test_every_pair_of_two_groups_must_stand_so() -> None:
    include = [{"class": "bear", "count": 2}, {"class": "dog", "count": 1, "position": ["right of", 0]}]
    task = task_from_metadata({**LINES[3], "include": include})
    assert judge(task, [box("bear", x=-20), box("bear"), box("dog", x=20)]).correct
    assert not judge(task, [box("bear", x=-20), box("bear", x=40), box("dog", x=20)]).correct


def test_overall_is_the_mean_of_tags_not_of_images() -> None:
    scores = summary([("colors", True), ("colors", True), ("colors", False), ("colors", False), ("position", True)])
    assert scores == {"overall": 0.75, "colors": 0.5, "position": 1.0}
    assert next(iter(scores)) == "overall"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tag": "colour"}, "tag 'colour' is none of single_object"),
        ({"prompt": " "}, "prompt"),
        ({"include": []}, "at least one"),
        ({"include": [{"class": "dog"}]}, r"include\[0\]\.count None"),
        ({"include": [{"class": "dog", "count": 1, "position": ["right of", 0]}]}, "earlier entry, below 0"),
        ({"include": [{"class": "dog", "count": 1, "color": 3}]}, "color 3"),
        ({"exclude": [{"class": "dog", "count": 0}]}, r"exclude\[0\]\.count 0"),
    ],
)
def test_damaged_metadata(change: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        task_from_metadata({**LINES[0], **change})


def test_boxes_from_json() -> None:
    entry = {"class": "cup", "score": 0.5, "box": [1, 2, 3, 4], "color": {"red": 0.2, "blue": 0.7}}
    assert box_from_dict(entry) == Box("cup", 0.5, (1, 2, 3, 4), "blue")
    assert box_from_dict({**entry, "color": "red"}).colour == "red"
    damaged = [
        ("score", "0.5", "score '0.5'"),
        ("score", 95, "from 0 to 1"),
        ("box", [1, 2, 3], "four numbers"),
        ("box", [10, 10, 5, 20], "width, height"),
        ("box", [1, 2, 3, float("nan")], "four numbers"),
        ("class", 7, "class 7"),
        ("color", {}, "color"),
    ]
    for key, value, what in damaged:
        with pytest.raises(ValueError, match=what):
            box_from_dict({**entry, key: value})


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    enter_world(tmp_path)
    yield
    dist.destroy_process_group()


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    path = tmp_path / "metadata.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in LINES))
    return path


def samples(metadata: Path, count: int, folder: Path, detections: Path | None = None) -> geneval_images.GenEvalSamples:
    files = SuiteFiles(folder / "images", folder / "rows.jsonl", detections)
    return geneval_images.with_files(geneval_images.load_tasks(metadata, count), files)


def noise(asked: Asked) -> np.ndarray:
    """A picture that only the prompt's number fixes."""
    return np.random.default_rng(asked.number).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.usefixtures("world")
def test_the_layout_is_geneval_s(metadata: Path, tmp_path: Path) -> None:
    generator = FakeGenerator(noise)
    result = geneval_images.run(generator, samples(metadata, 2, tmp_path))  # type: ignore[arg-type]
    images = tmp_path / "images"
    assert sorted(contents(images)) == sorted(
        f"0000{task}/{name}" for task in range(4) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    )
    for number, line in enumerate(LINES):
        assert json.loads((images / f"0000{number}/metadata.jsonl").read_text()) == line
    assert {asked.text for asked in generator.asked} == {line["prompt"] for line in LINES}
    assert len({asked.number for asked in generator.asked}) == 8
    settings = read_settings(images / "00002/samples/0001.png")
    assert (settings["prompt"], settings["task"], settings["image"]) == (LINES[2]["prompt"], 2, 1)
    assert result.counts == {"prompts": 4, "images": 8, "images_made_now": 8}


@pytest.mark.usefixtures("world")
def test_an_interrupted_run_goes_on(metadata: Path, tmp_path: Path) -> None:
    """What is there is kept, what is missing comes out as in one go, also when more images are asked for later."""
    whole = tmp_path / "whole"
    geneval_images.run(FakeGenerator(noise), samples(metadata, 3, whole))  # type: ignore[arg-type]
    parts = tmp_path / "parts"
    geneval_images.run(FakeGenerator(noise), samples(metadata, 2, parts))  # type: ignore[arg-type]
    shutil.rmtree(parts / "images/00001")
    (parts / "images/00003/samples/0000.png").unlink()
    generator = FakeGenerator(noise)
    result = geneval_images.run(generator, samples(metadata, 3, parts))  # type: ignore[arg-type]
    assert result.counts["images_made_now"] == len(generator.asked) == 3 + 1 + 3
    assert contents(parts / "images") == contents(whole / "images")
    again = FakeGenerator(noise)
    assert geneval_images.run(again, samples(metadata, 3, parts)).counts["images_made_now"] == 0  # type: ignore[arg-type]
    assert again.asked == []


@pytest.mark.usefixtures("world")
def test_images_of_two_origins_are_not_mixed(metadata: Path, tmp_path: Path) -> None:
    geneval_images.run(FakeGenerator(noise), samples(metadata, 1, tmp_path))  # type: ignore[arg-type]
    other = FakeGenerator(noise, origin="runs/other")
    first = r"00000/samples/0000\.png: was made by"
    with pytest.raises(UserError, match=first + " checkpoint .*runs/fake, not by .*runs/other"):
        geneval_images.run(other, samples(metadata, 1, tmp_path))  # type: ignore[arg-type]
    other = FakeGenerator(noise, decoder="runs/other_decoder")
    with pytest.raises(UserError, match=first + " decoder .*runs/fake/decoder, not by .*runs/other_decoder"):
        geneval_images.run(other, samples(metadata, 1, tmp_path))  # type: ignore[arg-type]
    metadata.write_text("".join(f"{json.dumps(line)}\n" for line in LINES[::-1]))
    with pytest.raises(UserError, match="is not line 1 of the metadata file"):
        geneval_images.run(FakeGenerator(noise), samples(metadata, 1, tmp_path))  # type: ignore[arg-type]


@pytest.mark.usefixtures("world")
def test_a_model_without_a_decoder_is_refused(metadata: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train a diffusion decoder"):
        geneval_images.run(FakeGenerator(noise, paints=False), samples(metadata, 1, tmp_path))  # type: ignore[arg-type]


def replica(rank: int, folder: str) -> None:
    enter_world(Path(folder), rank, 2)
    generator = FakeGenerator(noise)
    geneval_images.run(generator, samples(Path(folder) / "metadata.jsonl", 2, Path(folder)))  # type: ignore[arg-type]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(len(generator.asked)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_replicas_share_the_images(metadata: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(replica, (str(tmp_path),), nprocs=2)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [4, 4]
    enter_world(tmp_path)
    geneval_images.run(FakeGenerator(noise), samples(metadata, 2, tmp_path / "alone"))  # type: ignore[arg-type]
    dist.destroy_process_group()
    assert contents(tmp_path / "images") == contents(tmp_path / "alone/images")


def test_metadata_errors_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give evaluation_metadata"):
        geneval_images.load_tasks(None, 4)
    with pytest.raises(DataError, match="is no file"):
        geneval_images.load_tasks(tmp_path, 4)
    path = tmp_path / "m.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        geneval_images.load_tasks(path, 4)
    path.write_text(json.dumps(LINES[0]) + "\n{")
    with pytest.raises(DataError, match=r"m\.jsonl:2: is no JSON"):
        geneval_images.load_tasks(path, 4)
    path.write_text(json.dumps(LINES[0]) + "\n" + json.dumps({**LINES[0], "tag": "x"}))
    with pytest.raises(DataError, match=r"m\.jsonl:2: is no GenEval metadata: tag 'x'"):
        geneval_images.load_tasks(path, 4)


# -- scores ------------------------------------------------------------------------------------------------------------


def entry(name: str, x: float = 0, score: float = 0.95, **more: Any) -> dict[str, Any]:
    return {"class": name, "score": score, "box": [x, 0, x + 10, 10], **more}


def boxes() -> dict[str, Any]:
    """Of two images a prompt, both right for the first prompt, and one for each other but the last."""
    found = [
        [[entry("bench")], [entry("bench", score=0.4), entry("dog")]],
        [[entry("clock"), entry("clock", 50)], [entry("clock"), entry("clock", 50), entry("clock", 80)]],
        [
            [entry("cup", color={"red": 0.9, "white": 0.1}), entry("apple", color="black")],
            [entry("cup", color="red"), entry("apple", color="red")],
        ],
        [[entry("bear"), entry("dog", -50)], []],
    ]
    return {f"{t:05d}/samples/{i:04d}.png": one for t, task in enumerate(found) for i, one in enumerate(task)}


def test_scores_from_boxes(metadata: Path, tmp_path: Path) -> None:
    detections = tmp_path / "boxes.json"
    detections.write_text(json.dumps(boxes()))
    result = geneval_images.score(samples(metadata, 2, tmp_path, detections))
    assert result.scores == {
        "overall": 0.5,
        "single_object": 1.0,
        "counting": 0.5,
        "position": 0.0,
        "color_attr": 0.5,
    }
    assert result.counts["images"] == 8
    assert result.counts["images/position"] == 2
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == 8 * [
        ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    ]
    assert [row["correct"] for row in rows] == [True, True, True, False, True, False, False, False]
    assert rows[3]["reason"] == "expected clock<3, found 3"
    assert rows[3]["filename"] == str(tmp_path / "images/00001/samples/0001.png")
    assert json.loads(rows[3]["metadata"]) == LINES[1]
    assert json.loads(rows[0]["details"]) == {"bench": [[0, 0, 10, 10, 0.95]]}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"00001/samples/0000.png": None}, "must have a list of boxes"),
        ({"00001/samples/0000.png": [{}]}, r"00001/samples/0000\.png\[0\]: class None"),
        ({"00004/samples/0000.png": []}, "which is none of the 8 images"),
        ({"00002/samples/0000.png": [entry("cup"), entry("apple")]}, "a cup has no color"),
    ],
)
def test_errors_of_boxes_name_the_image(metadata: Path, tmp_path: Path, change: dict[str, Any], what: str) -> None:
    detections = tmp_path / "boxes.json"
    detections.write_text(json.dumps(boxes() | change))
    with pytest.raises(DataError, match=what):
        geneval_images.score(samples(metadata, 2, tmp_path, detections))


def test_boxes_that_nobody_takes_need_no_colour(metadata: Path, tmp_path: Path) -> None:
    detections = tmp_path / "boxes.json"
    more = {"00002/samples/0000.png": [*boxes()["00002/samples/0000.png"], entry("cup", score=0.6)]}
    detections.write_text(json.dumps(boxes() | more))
    assert geneval_images.score(samples(metadata, 2, tmp_path, detections)).scores["color_attr"] == 0.5


def test_absent_images_and_unknown_names(metadata: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    detections = tmp_path / "boxes.json"
    detections.write_text(json.dumps(boxes()))
    with pytest.raises(DataError, match=r"no boxes of 00000/samples/0002\.png and 3 other images of 12"):
        geneval_images.score(samples(metadata, 3, tmp_path, detections))
    detections.write_text(json.dumps({name: [] for name in boxes()}))
    assert geneval_images.score(samples(metadata, 2, tmp_path, detections)).scores["overall"] == 0
    assert "no image has a apple, bear, bench, clock, cup, dog" in caplog.text
    detections.write_text("[1")
    with pytest.raises(DataError, match="is no JSON"):
        geneval_images.score(samples(metadata, 2, tmp_path, detections))


# -- command -----------------------------------------------------------------------------------------------------------


def test_both_spellings_name_the_suite() -> None:
    assert suite_of("geneval-images", "suite") is suite_of("geneval_images", "suite") is SUITES["geneval_images"]


def test_the_command_scores_without_building_a_model(
    tiny: Path, metadata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    detections, to = tmp_path / "boxes.json", tmp_path / "out" / "geneval.json"
    detections.write_text(json.dumps(boxes()))
    monkeypatch.setattr("megatron_unimm.evaluate.api.load_generator", None)
    arguments = ["evaluate", "--model", str(tiny / "run"), "--suite", "geneval-images", "--data", str(metadata)]
    arguments += ["--num-samples", "2", "--to", str(to), "--detections", str(detections)]
    assert main.run(arguments) == 0
    report = json.loads(to.read_text())
    assert (report["suite"], report["step"], report["scores"]["overall"]) == ("geneval_images", 1, 0.5)
    rows = (tmp_path / "out/geneval.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["filename"] == str(tmp_path / "out/geneval/00000/samples/0000.png")
    assert "0.5000  overall" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--suite", "geneval-images"], "give evaluation_metadata.jsonl as --data"),
        (["--suite", "shapes_qa", "--images", "x"], "shapes_qa writes no images"),
        (["--suite", "geneval_images", "--data", "DATA"], "is no file"),
    ],
)
def test_command_errors_are_one_line(
    tmp_path: Path, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path) if word == "DATA" else word for word in arguments]
    assert main.run(["evaluate", "--model", "nowhere", *words, "--to", str(tmp_path / "x.json")]) == 2
    assert line in capsys.readouterr().err


def test_images_are_readable_by_other_tools(tmp_path: Path, metadata: Path) -> None:
    enter_world(tmp_path)
    geneval_images.run(FakeGenerator(noise), samples(metadata, 1, tmp_path))  # type: ignore[arg-type]
    dist.destroy_process_group()
    with Image.open(tmp_path / "images/00000/samples/0000.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (8, 8))
