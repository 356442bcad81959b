"""Questions and answers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_unimm.data.shapes import QUESTION_TYPES, write_eval_sets
from megatron_unimm.errors import DataError
from megatron_unimm.evaluate import shapes_qa
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.decode import Answer, Prompt
from megatron_unimm.generate.sampling import DecodeSettings


@pytest.mark.parametrize(
    ("said", "answer"), [("Yes.", "yes"), (" two \n", "two"), ("LEFT OF", "left of"), ("no . ", "no"), ("..", ".")]
)
def test_what_exact_match_leaves_out(said: str, answer: str) -> None:
    assert shapes_qa.normalised(said) == answer


def test_files_hold_the_questions_that_are_made_on_the_spot(tmp_path: Path) -> None:
    write_eval_sets(tmp_path, num_questions=12, num_pairs=64, num_prompts=6)
    for folder in (tmp_path, tmp_path / "eval"):
        for read, made in zip(shapes_qa.load_questions(folder, 6), shapes_qa.load_questions(None, 6), strict=True):
            assert (read.question, read.answer, read.type) == (made.question, made.answer, made.type)
            assert np.array_equal(read.picture, made.picture)


def test_a_folder_without_questions_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"questions\.jsonl"):
        shapes_qa.load_questions(tmp_path, 6)


def test_scores_by_type(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is right but for colours, and shouts."""
    questions = shapes_qa.load_questions(None, 24)

    def answer(prompts: Sequence[Prompt], settings: DecodeSettings) -> list[Answer]:
        said = [questions[prompt.number] for prompt in prompts]
        return [Answer([], "?" if q.type == "colour" else f"{q.answer.upper()}.", (), (), True) for q in said]

    monkeypatch.setattr(generator, "answer", answer)
    result = shapes_qa.run(generator, questions)
    assert next(iter(result.scores)) == "accuracy"
    assert result.scores["accuracy"] == pytest.approx(5 / 6)
    for type_ in QUESTION_TYPES:
        assert result.scores[f"accuracy/{type_}"] == (type_ != "colour")
        assert result.counts[f"questions/{type_}"] == 4


def test_a_random_model_scores_nothing(generator: Generator) -> None:
    result = shapes_qa.run(generator, shapes_qa.load_questions(None, 12))
    assert result.scores["accuracy"] == 0
    assert result.counts["questions"] == 12
