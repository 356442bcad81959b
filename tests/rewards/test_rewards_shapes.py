"""The Shapes reward on pictures whose answers are known."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_unimm.data.shapes import (
    PROMPT_KINDS,
    Prompt,
    Requirement,
    Scene,
    ShapeObject,
    geneval_prompts,
    is_correct,
    make_conversation,
    prompt_scene,
    render_array,
)
from megatron_unimm.errors import UserError
from megatron_unimm.rewards.reward import RewardPrompt
from megatron_unimm.rewards.shapes import ShapesReward, share_met

CORRECT = ShapesReward("rewards.right", "correct")
SHARE = ShapesReward("rewards.share", "share")


def asked(prompt: Prompt, id: str = "") -> RewardPrompt:
    return RewardPrompt(prompt.caption, {"geneval": prompt.to_dict()}, id)


def test_true_pictures_are_worth_one_in_both_gradings() -> None:
    prompts = geneval_prompts(10 * len(PROMPT_KINDS))
    pictures = [render_array(prompt_scene(prompt, np.random.default_rng(i))) for i, prompt in enumerate(prompts)]
    for reward in (CORRECT, SHARE):
        values = reward(pictures, [asked(prompt) for prompt in prompts])
        assert values.dtype == np.float64
        assert values.tolist() == [1.0] * len(prompts)


def test_gradings_agree_on_what_is_right() -> None:
    """Pictures of other prompts: the share is 1 exactly where the scorer finds the picture right, which happens."""
    prompts = geneval_prompts(30 * len(PROMPT_KINDS))
    pictures = [render_array(prompt_scene(prompt)) for prompt in prompts]
    shifted = pictures[6:] + pictures[:6]  # of the same kind
    requests = [asked(prompt) for prompt in prompts]
    correct, share = CORRECT(shifted, requests), SHARE(shifted, requests)
    expected = [is_correct(prompt, picture) for prompt, picture in zip(prompts, shifted, strict=True)]
    assert correct.tolist() == [float(right) for right in expected]
    assert (share == 1).tolist() == expected
    assert 0 < sum(expected) < len(expected)
    assert 0 <= share.min() < share.max() == 1
    assert len(set(share)) > 4, "grades, not a verdict"


RED_CIRCLE = ShapeObject("circle", "red", "large", 0.3, 0.5)
BLUE_SQUARE = ShapeObject("square", "blue", "large", 0.7, 0.5)
POSITION = Prompt(
    "position",
    "a red circle left of a blue square",
    (Requirement("circle", 1, "red"), Requirement("square", 1, "blue", position=("right of", 0))),
)
"""Five requirements: two shapes, two colours, the relation."""
COUNT = Prompt("counting", "three green crosses", (Requirement("cross", 3, "green"),))
"""Six: three shapes, three colours."""
CROSSES = tuple(ShapeObject("cross", "green", "small", 0.2 + 0.3 * i, 0.5) for i in range(3))


@pytest.mark.parametrize(
    ("objects", "share"),
    [
        ((RED_CIRCLE, BLUE_SQUARE), 1),
        ((BLUE_SQUARE, RED_CIRCLE), 1),  # the order of what is found says nothing
        ((RED_CIRCLE.at(0.7, 0.5), BLUE_SQUARE.at(0.3, 0.5)), 4 / 5),  # mirrored
        ((replace(RED_CIRCLE, colour="green"), BLUE_SQUARE), 4 / 5),
        ((replace(RED_CIRCLE, shape="cross"), BLUE_SQUARE), 3 / 5),  # the relation needs both shapes
        ((RED_CIRCLE, replace(BLUE_SQUARE, shape="cross")), 3 / 5),
        ((RED_CIRCLE, BLUE_SQUARE, CROSSES[0].at(0.5, 0.2)), 5 / 6),  # one too many
        ((RED_CIRCLE,), 2 / 5),  # neither the other object nor the relation
        ((BLUE_SQUARE.at(0.1, 0.1),), 2 / 5),
        ((), 0),
    ],
)
def test_share_of_a_relation(objects: tuple[ShapeObject, ...], share: float) -> None:
    assert share_met(POSITION, Scene(objects)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("objects", "share"),
    [
        (CROSSES, 1),
        (CROSSES[:2], 4 / 6),
        ((*CROSSES[:2], replace(CROSSES[2], colour="red")), 5 / 6),
        ((*CROSSES, RED_CIRCLE), 6 / 7),  # the circle is left out, and one too many
        ((RED_CIRCLE, *CROSSES[:2]), 4 / 6),
    ],
)
def test_share_of_a_count(objects: tuple[ShapeObject, ...], share: float) -> None:
    assert share_met(COUNT, Scene(objects)) == pytest.approx(share)


def test_a_named_size_counts() -> None:
    prompt = Prompt("single_object", "a small circle", (Requirement("circle", size="small"),))
    assert share_met(prompt, Scene((RED_CIRCLE,))) == pytest.approx(1 / 2)
    assert share_met(prompt, Scene((replace(RED_CIRCLE, size="small"),))) == 1


def test_clutter_does_not_pay() -> None:
    """Noise may hold dozens of specks, some of which meet any requirement. The right two are found among the largest,
    and the sixty others weigh."""
    crowd = tuple(ShapeObject("triangle", "pink", "small", 0.01 * i, 0.9) for i in range(60))
    assert share_met(POSITION, Scene((RED_CIRCLE, BLUE_SQUARE, *crowd))) == pytest.approx(5 / 65)


def test_pictures_keep_their_order() -> None:
    picture, other = render_array(Scene((RED_CIRCLE, BLUE_SQUARE))), render_array(Scene(CROSSES))
    values = CORRECT([other, picture, other], [asked(POSITION), asked(POSITION), asked(COUNT)])
    assert values.tolist() == [0, 1, 1]


def test_written_records_are_understood() -> None:
    """What ``unimm data shapes`` writes into a record."""
    conversation = make_conversation("text_to_image", 0, 3)
    record = conversation.to_dict("sample-3", ["x.png"])
    prompt = RewardPrompt("anything", record, record["id"])
    assert CORRECT([render_array(conversation.scenes[0])], [prompt]).tolist() == [1]


def test_samples_without_requirements() -> None:
    picture = render_array(Scene((RED_CIRCLE,)))
    with pytest.raises(UserError, match=r"rewards.right: sample qa-7 \(picture 2 of 2, 'hello'\) has no geneval"):
        CORRECT([picture, picture], [asked(COUNT), RewardPrompt("hello", {}, "qa-7")])
    with pytest.raises(UserError, match=r"not of GenEval's form \(KeyError: 'include'\)"):
        CORRECT([picture], [RewardPrompt("hello", {"geneval": {"tag": "position"}}, "qa-7")])


def test_pictures_that_are_not_square() -> None:
    with pytest.raises(UserError, match=r"64x32 for sample x \(picture 1 of 1"):
        SHARE([np.zeros((32, 64, 3), np.uint8)], [asked(COUNT, "x")])
