"""Questions about held-out Shapes scenes, scored by exact match."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.images import decode
from megatron_unimm.data.sample import Turn
from megatron_unimm.data.shapes import QUESTION_TYPES, heldout_questions, render_array
from megatron_unimm.evaluate.suite import Suite, SuiteResult, gather, list_file, share
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.sampling import DecodeSettings

ANSWER_TOKENS = 16
"""The answers are one or two words."""
MAX_IMAGE_PIXELS = 1 << 24


@dataclass(frozen=True)
class QuestionItem:
    """A question about a picture."""

    picture: np.ndarray
    """uint8 (H, W, 3)."""
    question: str
    answer: str
    type: str


def load_questions(data: Path | None, count: int) -> list[QuestionItem]:
    """The first ``count`` questions of ``questions.jsonl``, or as many made on the spot (the same list).

    Raises:
        DataError: no such file.
    """
    if data is None:
        made = heldout_questions(count)
        return [
            QuestionItem(render_array(m.scene), m.question.question, m.question.answer, m.question.type) for m in made
        ]
    path = list_file(data, "questions.jsonl")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [
        QuestionItem(
            decode(DiskImage(path.parent / r["image"]), MAX_IMAGE_PIXELS), r["question"], r["answer"], r["type"]
        )
        for r in records
    ]


def normalised(answer: str) -> str:
    """Lower case, no space around it, no final dot."""
    return answer.strip().lower().removesuffix(".").strip()


def run(generator: Generator, questions: Sequence[QuestionItem]) -> SuiteResult:
    """Accuracy over all questions, and per type."""
    mine = share(generator, len(questions))
    prompts = [
        generator.prompt([Turn("user", (0, questions[i].question))], [questions[i].picture], number=i) for i in mine
    ]
    answers = generator.answer(prompts, DecodeSettings(max_new_tokens=ANSWER_TOKENS, images=False))
    right = gather(
        generator,
        {
            i: normalised(answer.text) == normalised(questions[i].answer)
            for i, answer in zip(mine, answers, strict=True)
        },
    )
    scores, counts = {"accuracy": float(np.mean(right))}, {"questions": len(questions)}
    for type_ in QUESTION_TYPES:
        of_type = [hit for hit, question in zip(right, questions, strict=True) if question.type == type_]
        if of_type:
            scores[f"accuracy/{type_}"], counts[f"questions/{type_}"] = float(np.mean(of_type)), len(of_type)
    return SuiteResult(scores, counts)


SUITE = Suite(
    name="shapes_qa",
    about="exact match of answers about held-out scenes",
    num_samples=300,
    draws=False,
    needs_targets=False,
    load=load_questions,
    run=run,
)
