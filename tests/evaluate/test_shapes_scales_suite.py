"""Agreement of pictures over scales, of generators whose scales show the same, something else, or nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from fake_generator import Asked, FakeGenerator, enter_world

from megatron_unimm.data.images import resize
from megatron_unimm.data.shapes import prompt_scene, render_array
from megatron_unimm.errors import UserError
from megatron_unimm.evaluate import shapes, shapes_scales

EMPTY = np.full((64, 64, 3), 235, np.uint8)
Coarser = Callable[[np.ndarray], tuple[np.ndarray, ...]]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    enter_world(tmp_path)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def samples() -> shapes.ShapesSamples:
    return shapes.load_samples(None, 4)


def scores_of(samples: shapes.ShapesSamples, coarser: Coarser) -> dict[str, float]:
    """Of an artist who draws what is asked for, at another place the second time."""

    def paint(asked: Asked) -> np.ndarray:
        prompt = samples.prompts[asked.number % 24].prompt
        picture = render_array(prompt_scene(prompt))
        return picture if asked.number < 24 else picture[:, ::-1]

    generator = FakeGenerator(paint, coarser=coarser, reconstructs=False)
    result = shapes_scales.run(generator, samples)  # type: ignore[arg-type]
    assert result.counts == {"prompts": 24}
    assert sorted(asked.number for asked in generator.asked) == list(range(48)), "noise of their own"
    assert len(result.pictures) == 8 * generator.num_scales
    return result.scores


def smaller(picture: np.ndarray) -> tuple[np.ndarray, ...]:
    return resize(picture, 16, 16), resize(picture, 32, 32)


@pytest.mark.usefixtures("world")
def test_scales_that_show_the_same(samples: shapes.ShapesSamples) -> None:
    scores = scores_of(samples, smaller)
    assert next(iter(scores)) == "agreement"
    assert [scores[name] for name in ("agreement", "agreement/0.25x", "agreement/0.5x")] == pytest.approx([1.0] * 3)
    assert 0.1 < scores["agreement/other_noise"] < 0.95
    assert scores["agreement/other_prompt"] < scores["agreement/other_noise"]
    # As far as the scorer can read small pictures.
    for scale in ("0.25x", "0.5x"):
        assert abs(scores[f"objects/{scale}"] - scores[f"objects_scorer/{scale}"]) <= 0.3
    assert scores["objects_scorer/0.5x"] > 0.8
    assert scores["overall/1x"] == 1
    assert scores["overall/0.5x"] > 0.8


@pytest.mark.usefixtures("world")
def test_scales_that_show_something_else(samples: shapes.ShapesSamples) -> None:
    """The coarsest is empty, and the next is the finest's negative."""
    scores = scores_of(samples, lambda picture: (resize(EMPTY, 16, 16), 255 - resize(picture, 32, 32)))
    assert scores["agreement/0.25x"] == scores["objects/0.25x"] == 0
    assert scores["agreement/0.5x"] == pytest.approx(-1)
    assert scores["agreement"] == pytest.approx(-0.5)
    assert scores["overall/0.25x"] == 0


def test_correlation_of_known_pictures() -> None:
    one = np.array([[[0, 0, 0], [200, 200, 200]]], np.uint8)
    other = np.array([[[10, 10, 10], [50, 50, 50]], [[90, 90, 90], [50, 50, 50]]], np.uint8)
    assert shapes_scales.correlation(one, other[:1]) == pytest.approx(1)
    assert shapes_scales.correlation(one, other[1:]) == pytest.approx(-1)
    pair = other, np.roll(other, 1, axis=0)
    wanted = np.corrcoef(*(picture.astype(float).ravel() for picture in pair))[0, 1]
    assert shapes_scales.correlation(*pair) == pytest.approx(wanted)
    assert shapes_scales.correlation(one, np.zeros_like(one)) == 0


@pytest.mark.usefixtures("world")
def test_what_cannot_be_compared_is_refused(samples: shapes.ShapesSamples) -> None:
    with pytest.raises(UserError, match="draws every picture at one scale"):
        scores_of(samples, lambda picture: ())
    generator = FakeGenerator(lambda asked: EMPTY, paints=False, coarser=smaller)
    with pytest.raises(UserError, match="judges pixels"):
        shapes_scales.run(generator, samples)  # type: ignore[arg-type]


@pytest.mark.usefixtures("world")
def test_without_true_tokens_the_decoder_has_no_scores(samples: shapes.ShapesSamples) -> None:
    """Of the suite shapes: the others are there, and no picture of it on the sheet."""
    generator = FakeGenerator(lambda asked: EMPTY, say=lambda asked: "", reconstructs=False)
    result = shapes.run(generator, samples)  # type: ignore[arg-type]
    assert {"overall", "overall_vae", "overall_scorer", "editing"} <= result.scores.keys()
    assert not {"overall_decoder", "reconstruction_psnr"} & result.scores.keys()
    assert result.scores["overall_vae"] == 1
    assert not any(caption.startswith("decoder") for caption, _ in result.pictures)
