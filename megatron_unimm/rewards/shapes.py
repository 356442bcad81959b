"""Reward of the Shapes world: whether, or how far, a picture shows what its prompt asks for."""

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Literal

import numpy as np

from megatron_unimm.data.shapes.prompts import Prompt, Requirement, prompt_from_dict
from megatron_unimm.data.shapes.scene import Scene, ShapeObject, direction
from megatron_unimm.data.shapes.scorer import find_objects, scene_satisfies
from megatron_unimm.errors import UserError
from megatron_unimm.rewards.reward import Float64, RewardPrompt, told

METADATA_KEY = "geneval"
"""Where samples of the Shapes world keep their requirements."""
MAX_DEALT = 12
"""Objects, largest first, that are dealt out to unequal requirements; a picture of more is wrong in any case."""


class ShapesReward:
    """1 where the scorer finds the picture right, else 0; or the share of requirements that are met.

    Args:
        where: the reward's place in the recipe, for messages.
    """

    def __init__(self, where: str, grading: Literal["correct", "share"]) -> None:
        self.where = where
        self.grading = grading

    def __call__(self, pictures: Sequence[np.ndarray], prompts: Sequence[RewardPrompt]) -> Float64:
        """
        Raises:
            UserError: a sample without requirements, or a picture that is not square.
        """
        values = np.zeros(len(pictures))
        for place, picture in enumerate(pictures):
            height, width = picture.shape[:2]
            if height != width:
                raise UserError(
                    self.where,
                    f"got a picture of {width}x{height} for {told(prompts, place)}; the Shapes world's are square",
                )
            prompt, scene = self._prompt(prompts, place), find_objects(picture)
            values[place] = share_met(prompt, scene) if self.grading == "share" else scene_satisfies(prompt, scene)
        return values

    def _prompt(self, prompts: Sequence[RewardPrompt], place: int) -> Prompt:
        metadata = prompts[place].metadata
        if METADATA_KEY not in metadata:
            raise UserError(
                self.where,
                f"{told(prompts, place)} has no {METADATA_KEY} in its metadata, so nothing says what its picture must "
                "show; take samples of kind text_to_image that `unimm data shapes` wrote, or another reward",
            )
        try:
            return prompt_from_dict(metadata[METADATA_KEY])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                self.where,
                f"{told(prompts, place)} has a {METADATA_KEY} that is not of GenEval's form "
                f"({type(error).__name__}: {error})",
            ) from error


def share_met(prompt: Prompt, scene: Scene) -> float:
    """Share of a prompt's requirements that a scene meets, dealing out its objects as favourably as possible.

    Of each object that is asked for: its shape, and its colour and size where they are named. Of a relation: that it
    holds between objects of the right shapes. Every object too many counts as one more requirement that is not met:
    without that, a picture full of anything would meet many. All are met exactly where
    :func:`~megatron_unimm.data.shapes.scorer.scene_satisfies`.
    """
    wanted = [item for item in prompt.include for _ in range(item.count)]
    relations = [item for item in prompt.include if item.position is not None]
    asked = len(relations) + sum(_num_asked(item) for item in wanted)
    met = max(
        sum(_num_met(item, found) for item, found in zip(wanted, dealt, strict=True))
        + sum(_placed(prompt, item, wanted, dealt) for item in relations)
        for dealt in _deals(wanted, scene)
    )
    return met / (asked + max(len(scene.objects) - len(wanted), 0))


def _deals(wanted: Sequence[Requirement], scene: Scene) -> Iterator[tuple[ShapeObject | None, ...]]:
    """Ways to give each wanted object one of the scene, or None where there are too few."""
    spare = [None] * max(len(wanted) - len(scene.objects), 0)
    if len(set(wanted)) == 1:
        # Equal requirements: the best objects, whose order does not matter.
        best = sorted(scene.objects, key=lambda found: -_num_met(wanted[0], found))[: len(wanted)]
        yield (*best, *spare)
    else:
        yield from permutations([*scene.objects[:MAX_DEALT], *spare], len(wanted))


def _num_asked(item: Requirement) -> int:
    return 1 + (item.colour is not None) + (item.size is not None)


def _num_met(item: Requirement, found: ShapeObject | None) -> int:
    if found is None:
        return 0
    return (
        (found.shape == item.shape)
        + (item.colour is not None and found.colour == item.colour)
        + (item.size is not None and found.size == item.size)
    )


def _placed(
    prompt: Prompt, item: Requirement, wanted: Sequence[Requirement], dealt: Sequence[ShapeObject | None]
) -> bool:
    """Whether the objects of one requirement stand as it says to those of the other, all of the right shapes."""
    assert item.position is not None
    relation, index = item.position
    own = [found for asked, found in zip(wanted, dealt, strict=True) if asked is item]
    others = [found for asked, found in zip(wanted, dealt, strict=True) if asked is prompt.include[index]]
    return all(
        a is not None
        and b is not None
        and a.shape == item.shape
        and b.shape == prompt.include[index].shape
        and direction(a, b) == relation
        for a in own
        for b in others
    )
