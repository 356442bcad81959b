"""Users' functions, weighted sums, and what recipes may say about rewards."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from megatron_unimm.config.base import Section
from megatron_unimm.config.rewards import PythonRewardConfig, Rewards, ShapesRewardConfig
from megatron_unimm.data.shapes import geneval_prompts, prompt_scene, render_array
from megatron_unimm.errors import ConfigError, UserError
from megatron_unimm.rewards.registry import RewardSum, build_reward
from megatron_unimm.rewards.reward import RewardPrompt

CPU = torch.device("cpu")
PICTURES = [np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30)]
PROMPTS = [RewardPrompt(f"grey {i}", {"level": i}, f"id-{i}") for i in range(3)]

GOOD = """
import numpy as np
import torch

LIMIT = 255

def brightness(pictures, prompts):
    return [picture.mean() for picture in pictures]

def with_default(pictures, prompts, scale=2.0):
    return np.array([scale * prompt.metadata["level"] for prompt in prompts])

def of_torch(pictures, prompts):
    return torch.tensor([len(prompt.text) for prompt in prompts])

def right(pictures, prompts):
    return np.array([picture.max() > 15 for picture in pictures])

class Scorer:
    def __call__(self, pictures, prompts):
        return [1.0] * len(pictures)

scorer = Scorer()

def one_argument(pictures):
    return [0.0]

def too_many(pictures, prompts, device):
    return [0.0]

def not_finite(pictures, prompts):
    return [0.0, float("nan"), float("inf")]

def too_few(pictures, prompts):
    return [0.0]

def table(pictures, prompts):
    return np.zeros((3, 1))

def words(pictures, prompts):
    return ["good"] * 3

def nothing(pictures, prompts):
    return None

def ragged(pictures, prompts):
    return [[1.0], [1.0, 2.0], 3.0]

def crash(pictures, prompts):
    raise RuntimeError("out of paper")
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RewardSum]:
    """Builds the reward of a function of a user's module."""
    (tmp_path / "their_scores").mkdir()
    (tmp_path / "their_scores" / "__init__.py").touch()
    (tmp_path / "their_scores" / "grey.py").write_text(GOOD)
    (tmp_path / "their_scores" / "broken.py").write_text("import no_such_package_of_theirs\n")
    monkeypatch.syspath_prepend(tmp_path)

    def build(entry_point: str) -> RewardSum:
        config = PythonRewardConfig(kind="python", entry_point=entry_point)
        return build_reward({"mine": config}, CPU)

    return build


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("brightness", [10, 20, 30]),
        ("with_default", [0, 2, 4]),
        ("of_torch", [6, 6, 6]),
        ("right", [0, 1, 1]),
        ("scorer", [1, 1, 1]),
    ],
)
def test_users_functions(written: Callable[[str], RewardSum], name: str, expected: list[float]) -> None:
    values = written(f"their_scores.grey:{name}")(PICTURES, PROMPTS)
    assert values.dtype == np.float64
    assert values.tolist() == expected


@pytest.mark.parametrize(
    ("entry_point", "message"),
    [
        ("no_such_package_at_all.x:f", r"no module no_such_package_at_all; install its package"),
        ("their_scores.gray:f", r"no module their_scores.gray; install"),
        ("their_scores.broken:f", r"module their_scores.broken imports no_such_package_of_theirs, which is not"),
        ("their_scores.grey:brightnes", r"grey.py\) has no brightnes, did you mean brightness\?"),
        ("their_scores.grey:LIMIT", r"is a int, wanted a function LIMIT\(pictures, prompts\)"),
        ("their_scores.grey:one_argument", r"takes \(pictures\), but is called as \(pictures, prompts\)"),
        ("their_scores.grey:too_many", r"takes \(pictures, prompts, device\).*missing a required argument: 'device'"),
    ],
)
def test_functions_that_cannot_be_called(written: Callable[[str], RewardSum], entry_point: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"rewards.mine.entry_point: .*{message}"):
        written(entry_point)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_finite", r"gave nan for sample id-1 \(picture 2 of 3, 'grey 1'\)"),
        ("too_few", r"values of shape \[1\] for 3 pictures"),
        ("table", r"values of shape \[3, 1\] for 3 pictures"),
        ("words", r"gave <U4 values, not numbers"),
        ("nothing", r"gave object values, not numbers"),
        ("ragged", r"gave what is no array of numbers"),
    ],
)
def test_values_that_are_none(written: Callable[[str], RewardSum], name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"rewards.mine: .*{message}"):
        written(f"their_scores.grey:{name}")(PICTURES, PROMPTS)


def test_crashes_say_whose_they_are(written: Callable[[str], RewardSum]) -> None:
    with pytest.raises(RuntimeError, match="out of paper") as caught:
        written("their_scores.grey:crash")(PICTURES, PROMPTS)
    assert caught.value.__notes__ == ["raised by the reward rewards.mine, their_scores.grey:crash"]


class Holder(Section):
    """Stands for a stage."""

    rewards: Rewards


def test_weighted_sum_keeps_its_parts(written: Callable[[str], RewardSum]) -> None:
    """The Shapes scorer, a user's function as a penalty, and one that is only shown."""
    assert written
    mine = {"kind": "python", "entry_point": "their_scores.grey:brightness"}
    config = Holder.model_validate(
        {
            "rewards": {
                "right": {"kind": "shapes", "weight": 2},
                "dark": {**mine, "weight": -0.01},
                "shown": {**mine, "weight": 0},
            }
        }
    )
    prompts = geneval_prompts(2)
    pictures = [render_array(prompt_scene(prompts[0])), np.zeros((64, 64, 3), np.uint8)]
    found = build_reward(config.rewards, CPU).values(
        pictures, [RewardPrompt(prompt.caption, {"geneval": prompt.to_dict()}) for prompt in prompts]
    )
    bright = float(pictures[0].mean())
    assert list(found.parts) == ["right", "dark", "shown"]
    assert found.parts["right"].tolist() == [1, 0]
    assert found.parts["dark"].tolist() == found.parts["shown"].tolist() == [bright, 0]
    np.testing.assert_allclose(found.total, [2 - 0.01 * bright, 0], rtol=1e-12)


def test_a_reward_that_is_not_finite_is_named() -> None:
    """Also where it is none of the user's functions."""

    def broken(pictures: object, prompts: object) -> np.ndarray:
        return np.array([0, 1, np.inf])

    with pytest.raises(UserError, match=r"rewards.siglip: gave inf for sample id-2 \(picture 3 of 3"):
        RewardSum("rewards", {"siglip": broken}, {"siglip": 1.0})(PICTURES, PROMPTS)  # type: ignore[dict-item]


# -- what recipes may say ----------------------------------------------------------------------------------------------


def test_null_leaves_an_inherited_reward_out() -> None:
    config = Holder.model_validate({"rewards": {"right": {"kind": "shapes"}, "other": None}})
    assert config.rewards == {"right": ShapesRewardConfig(kind="shapes", weight=1.0, grading="correct")}
    assert Holder.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "no reward with a weight other than 0"),
        ({"a": {"kind": "shapes", "weight": 0}}, "no reward with a weight other than 0"),
        ({"total": {"kind": "shapes"}}, "total is the name of the sum"),
        ({"a/b": {"kind": "shapes"}}, "'a/b' is no name for a reward"),
        ({"a": {"kind": "pickscore"}}, "pickscore"),
        ({"a": {"kind": "python", "entry_point": "their_scores.grey"}}, "not of the form package.module:function"),
        ({"a": {"kind": "python", "entry_point": "their scores:f"}}, "not of the form package.module:function"),
        ({"a": {"kind": "siglip"}}, "path"),
        ({"a": {"kind": "shapes", "weight": float("nan")}}, "finite"),
    ],
)
def test_wrong_rewards(rewards: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Holder.model_validate({"rewards": rewards})
