"""Generated visual tokens against candidate pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_unimm.data.shapes import write_eval_sets
from megatron_unimm.errors import DataError
from megatron_unimm.evaluate import shapes_retrieval
from megatron_unimm.evaluate.shapes_retrieval import NUM_CANDIDATES, compare, summarise, window_start

F = 256


def features(count: int) -> Tensor:
    """Features with much in common, as those of similar pictures have."""
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(F, generator=generator) + torch.randn(count, F, generator=generator)


def scores(generated: Tensor, candidates: Tensor) -> dict[str, float]:
    return summarise([compare(vector, candidates, i) for i, vector in enumerate(generated)]).scores


def test_the_truth_with_a_little_noise_is_found() -> None:
    candidates = features(100)
    noise = 0.1 * torch.randn(candidates.shape, generator=torch.Generator().manual_seed(1))
    found = scores(candidates + noise, candidates)
    assert found["accuracy"] == found["accuracy_cosine"] == 1
    assert found["squared_error"] == pytest.approx(0.01, rel=0.05)
    assert found["squared_error_of_mean"] == pytest.approx(1.0, rel=0.1)


def test_a_shrunken_truth_is_found() -> None:
    """A regression under doubt predicts close to the mean; the cosine does not mind, nor does the distance here."""
    candidates = features(NUM_CANDIDATES)
    mean = candidates.mean(dim=0)
    assert scores(mean + 0.2 * (candidates - mean), candidates)["accuracy_cosine"] == 1


def test_random_features_are_at_chance() -> None:
    """640 captions: chance is 10 hits, four standard deviations 12.6."""
    candidates = features(640)
    shuffled = candidates[torch.randperm(640, generator=torch.Generator().manual_seed(2))]
    noise = torch.randn(candidates.shape, generator=torch.Generator().manual_seed(3))
    for generated in (shuffled + noise, features(1) + noise):
        found = scores(generated, candidates)
        for name in ("accuracy", "accuracy_cosine"):
            assert abs(found[name] * 640 - 10) < 12.6


def test_the_mean_is_as_wrong_as_it_says() -> None:
    candidates = features(NUM_CANDIDATES)
    found = scores(candidates.mean(dim=0).expand(NUM_CANDIDATES, -1), candidates)
    assert found["squared_error"] == pytest.approx(found["squared_error_of_mean"])


@pytest.mark.parametrize(("index", "count", "first"), [(0, 64, 0), (63, 64, 0), (64, 128, 64), (70, 100, 36)])
def test_candidates_are_64_neighbours_with_the_truth(index: int, count: int, first: int) -> None:
    assert window_start(index, count) == first
    assert first <= index < first + NUM_CANDIDATES <= count


def test_files_hold_the_pairs_that_are_made_on_the_spot(tmp_path: Path) -> None:
    write_eval_sets(tmp_path, num_questions=6, num_pairs=64, num_prompts=6)
    read, made = shapes_retrieval.load_pairs(tmp_path, 10), shapes_retrieval.load_pairs(None, 10)
    assert len(read) == len(made) == NUM_CANDIDATES, "a caption has 64 candidates, however few are asked for"
    assert [pair.caption for pair in read] == [pair.caption for pair in made]
    assert all(np.array_equal(one.picture, other.picture) for one, other in zip(read, made, strict=True))


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    write_eval_sets(tmp_path, num_questions=6, num_pairs=10, num_prompts=6)
    with pytest.raises(DataError, match="has 10 pairs"):
        shapes_retrieval.load_pairs(tmp_path, 64)
