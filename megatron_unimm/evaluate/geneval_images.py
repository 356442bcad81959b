"""GenEval: images in its folder layout, and their scores once a detector has seen them (arXiv 2310.11513).

Images are written as GenEval's own tools read them, four to a line of its metadata file (from
https://github.com/djghosh13/geneval, prompts/evaluation_metadata.jsonl, or the same with other words as prompts)::

    DIR/00000/metadata.jsonl     the first line of the metadata file
    DIR/00000/samples/0000.png   its images, with their settings inside

Scores come from a JSON file of what a detector found in every image; the surest colour name, or scores by name, where
the metadata asks for a colour::

    {"00000/samples/0000.png": [{"class": "bench", "score": 0.98, "box": [12, 80, 401, 390], "color": "red"}, ...], ...}
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_unimm.data.sample import Turn
from megatron_unimm.errors import DataError, UserError
from megatron_unimm.evaluate.geneval_rules import (
    Box,
    Task,
    Verdict,
    box_from_dict,
    judge,
    summary,
    task_from_metadata,
)
from megatron_unimm.evaluate.suite import Suite, SuiteFiles, SuiteResult, gather, is_writer, require_pixels, share
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.png import read_settings, write_png
from megatron_unimm.generate.sampling import DecodeSettings

logger = logging.getLogger(__name__)

NAME = "geneval_images"
MAX_IMAGES = 10_000
"""Of a prompt: file names have four digits."""
CHUNK = 64
"""Images that are generated before they are written."""


@dataclass(frozen=True)
class GenEvalSamples:
    """What to draw, and where to."""

    tasks: list[Task]
    num_images: int
    """Of each task."""
    files: SuiteFiles | None = None

    def names(self) -> list[tuple[int, int, str]]:
        """(task, image, name below the images' folder) of every image."""
        numbers = ((task, image) for task in range(len(self.tasks)) for image in range(self.num_images))
        return [(task, image, f"{_folder(task)}/samples/{image:04d}.png") for task, image in numbers]


def load_tasks(data: Path | None, count: int) -> GenEvalSamples:
    """GenEval's metadata, to be drawn ``count`` times.

    Raises:
        UserError: no file is given, or too many images are asked for.
        DataError: a line that is no GenEval metadata.
    """
    if data is None:
        raise UserError(
            "data", f"suite {NAME} draws the lines of a GenEval metadata file; give evaluation_metadata.jsonl as --data"
        )
    if not data.is_file():
        raise DataError(str(data), "is no file; give a GenEval metadata file such as evaluation_metadata.jsonl")
    if count > MAX_IMAGES:
        raise UserError("num_samples", f"{count} images of a prompt do not fit names of four digits; {MAX_IMAGES} do")
    lines = data.read_text(encoding="utf-8").splitlines()
    tasks = [_task(f"{data}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise DataError(str(data), "is empty; give a GenEval metadata file such as evaluation_metadata.jsonl")
    return GenEvalSamples(tasks, count)


def _task(where: str, line: str) -> Task:
    try:
        return task_from_metadata(json.loads(line))
    except json.JSONDecodeError as error:
        raise DataError(where, f"is no JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:
        raise DataError(where, f"is no GenEval metadata: {error}") from None


def _folder(task: int) -> str:
    return f"{task:05d}"


def _files(samples: GenEvalSamples) -> SuiteFiles:
    if samples.files is None:
        raise UserError(NAME, "writes files, which training does not; run it with `unimm evaluate`")
    return samples.files


# -- images ------------------------------------------------------------------------------------------------------------


def run(generator: Generator, samples: GenEvalSamples) -> SuiteResult:
    """Make the images that are not there yet; an image depends on the seed, its prompt's number and its own, and on
    nothing else.

    Raises:
        UserError: the model gives no pixels, or the folder holds images of another list or checkpoint.
    """
    require_pixels(generator, NAME)
    folder = _files(samples).images
    # One rank looks: another might already see what a fast one has written.
    missing = json.loads(generator.agree(lambda: json.dumps(missing_images(samples, folder, _made_by(generator)))))
    mine = share(generator, len(missing))
    for start in range(0, len(mine), CHUNK):
        part = [missing[place] for place in mine[start : start + CHUNK]]
        _make(generator, samples, part, folder)
        logger.info("%s: %d of %d images of this replica", folder, start + len(part), len(mine))
    gather(generator, dict.fromkeys(mine, True))  # all are written before anyone says so
    return SuiteResult(
        scores={},
        counts={
            "prompts": len(samples.tasks),
            "images": len(samples.tasks) * samples.num_images,
            "images_made_now": len(missing),
        },
    )


def _made_by(generator: Generator) -> dict[str, str]:
    """The checkpoints of language model and image decoder, spelled the same from every folder."""
    origins = {"checkpoint": generator.origin, "decoder": generator.drawn_by}
    return {name: str(Path(origin).resolve()) for name, origin in origins.items()}


def missing_images(samples: GenEvalSamples, folder: Path, made_by: Mapping[str, str]) -> list[tuple[int, int, str]]:
    """Images that are not there, as ``GenEvalSamples.names`` has them.

    Raises:
        UserError: the folder belongs to another metadata file, checkpoint or decoder: images of both would be scored
            together.
    """
    other = "give another folder as --images, or delete this one"
    for number, task in enumerate(samples.tasks):
        file = folder / _folder(number) / "metadata.jsonl"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != task.metadata:
            raise UserError(str(file), f"is not line {number + 1} of the metadata file; {other}")
    missing = []
    for task, image, name in samples.names():
        if not (folder / name).is_file():
            missing.append((task, image, name))
            continue
        settings = read_settings(folder / name)
        for part, wanted in made_by.items():
            if settings.get(part) != wanted:
                raise UserError(
                    str(folder / name), f"was made by {part} {settings.get(part)}, not by {wanted}; {other}"
                )
    return missing


def _make(generator: Generator, samples: GenEvalSamples, part: Sequence[tuple[int, int, str]], folder: Path) -> None:
    """Draw some images; one rank of the replica writes them."""
    settings = DecodeSettings(stop_after_image=True)
    prompts = [
        generator.prompt(
            [Turn("user", (samples.tasks[task].prompt,))], open_image=True, number=task * MAX_IMAGES + image
        )
        for task, image, _ in part
    ]
    answers = generator.answer(prompts, settings)
    if not is_writer(generator):
        return
    for (task, image, name), answer in zip(part, answers, strict=True):
        pixels = answer.images[0].pixels
        assert pixels is not None, "a generator that paints left an image without pixels"
        line = json.dumps(samples.tasks[task].metadata) + "\n"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / _folder(task) / "metadata.jsonl").write_text(line, encoding="utf-8")
        write_png(
            folder / name,
            pixels,
            {
                "prompt": samples.tasks[task].prompt,
                "task": task,
                "image": image,
                "seed": settings.seed,
                **_made_by(generator),
            },
        )


# -- scores ------------------------------------------------------------------------------------------------------------


def score(samples: GenEvalSamples) -> SuiteResult:
    """Judge every image by what the detector found in it, and write a row for each.

    Raises:
        DataError: a damaged file of detections, or one that lacks images or colours.
    """
    files = _files(samples)
    assert files.detections is not None, "there is nothing to score without detections"
    detections = load_detections(files.detections)
    _check_names(samples, detections, files.detections)
    results, rows = [], []
    for task_number, _, name in samples.names():
        task = samples.tasks[task_number]
        verdict = judge(task, detections[name])
        _check_colours(task, verdict, f"{files.detections}: {name}")
        results.append((task.tag, verdict.correct))
        rows.append(row(files.images / name, task, verdict))
    files.rows.parent.mkdir(parents=True, exist_ok=True)
    files.rows.write_text("".join(f"{json.dumps(line)}\n" for line in rows), encoding="utf-8")
    counts = {"prompts": len(samples.tasks), "images": len(results)}
    scores = summary(results)
    tags = [tag for tag, _ in results]
    return SuiteResult(scores, counts | {f"images/{tag}": tags.count(tag) for tag in scores if tag != "overall"})


def load_detections(file: Path) -> dict[str, list[Box]]:
    """The boxes of each image, by its name below the images' folder; the format stands at the top of this file.

    Raises:
        DataError: something else.
    """
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(str(file), f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(str(file), f"is no JSON: {error}") from None
    if not isinstance(read, dict):
        raise DataError(str(file), "must be an object: a list of boxes for each image, by its name")
    return {name: _boxes(f"{file}: {name}", entries) for name, entries in read.items()}


def _boxes(where: str, entries: Any) -> list[Box]:
    if not isinstance(entries, list):
        raise DataError(where, "must have a list of boxes; an image without objects has an empty one")
    boxes = []
    for number, entry in enumerate(entries):
        try:
            boxes.append(box_from_dict(entry))
        except ValueError as error:
            raise DataError(f"{where}[{number}]", str(error)) from None
    return boxes


def _check_names(samples: GenEvalSamples, detections: Mapping[str, Sequence[Box]], file: Path) -> None:
    """Exactly the images of the metadata have boxes, and the detector speaks of the metadata's classes."""
    names = [name for _, _, name in samples.names()]
    absent = [name for name in names if name not in detections]
    if absent:
        raise DataError(
            str(file),
            f"has no boxes of {absent[0]} and {len(absent) - 1} other images of {len(names)}; run the detector on all, "
            "an image without objects has an empty list",
        )
    surplus = sorted(set(detections) - set(names))
    if surplus:
        raise DataError(
            str(file),
            f"has boxes of {surplus[0]}, which is none of the {len(names)} images: {samples.num_images} of each of "
            f"{len(samples.tasks)} prompts; give --num-samples and --data as the images were made with",
        )
    asked = {group.class_name for task in samples.tasks for group in task.include}
    unseen = sorted(asked - {box.class_name for boxes in detections.values() for box in boxes})
    if unseen:
        logger.warning("%s: no image has a %s; does the detector use GenEval's names?", file, ", ".join(unseen))


def _check_colours(task: Task, verdict: Verdict, where: str) -> None:
    """Colours are asked of the boxes that a group takes, not of all: naming one costs a detector another model."""
    for group in task.include:
        taken = verdict.objects.get(group.class_name, [])[: group.count]
        if group.colour is not None and len(taken) == group.count and any(box.colour is None for box in taken):
            raise DataError(
                where, f'a {group.class_name} has no color, but "{task.prompt}" asks for one; add "color" to its box'
            )


def row(file: Path, task: Task, verdict: Verdict) -> dict[str, Any]:
    """A line of GenEval's results file; metadata and details are JSON texts there."""
    details = {name: [[*box.corners, box.score] for box in boxes] for name, boxes in verdict.objects.items()}
    return {
        "filename": str(file),
        "tag": task.tag,
        "prompt": task.prompt,
        "correct": verdict.correct,
        "reason": "\n".join(verdict.reasons),
        "metadata": json.dumps(task.metadata),
        "details": json.dumps(details),
    }


def with_files(samples: GenEvalSamples, files: SuiteFiles) -> GenEvalSamples:
    """The samples with the places of files."""
    return replace(samples, files=files)


SUITE = Suite(
    name=NAME,
    about="images for GenEval, and its scores from a detector's boxes",
    num_samples=4,
    draws=True,
    needs_targets=False,
    needs_pixels=True,
    load=load_tasks,
    run=run,
    with_files=with_files,
    score_files=score,
)
