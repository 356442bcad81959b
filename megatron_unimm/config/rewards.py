"""Rewards that a stage of reinforcement learning raises. Together they are one number, the sum of weight x value."""

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from megatron_unimm.config.base import Section


class ShapesRewardConfig(Section):
    """Whether a picture of the Shapes world shows what its prompt asks for. Samples need the scorer's requirements,
    ``geneval``, in their metadata, as ``unimm data shapes`` writes them."""

    kind: Literal["shapes"]
    weight: float = 1.0
    """Of the value in the sum; 0 only shows it, below 0 is a penalty."""
    grading: Literal["correct", "share"] = "correct"
    """``correct`` is 1 or 0, what evaluations count. ``share`` is the share of requirements that are met (shape, colour
    and size of every object as far as they are named, relations; every object too many is one not met), 1 exactly where
    ``correct`` is: it also tells apart pictures none of which is right."""


class SiglipRewardConfig(Section):
    """How well SigLIP (arXiv 2303.15343) finds that a picture fits its text."""

    kind: Literal["siglip"]
    weight: float = 1.0
    """Of the value in the sum; 0 only shows it, below 0 is a penalty."""
    path: str
    """Hugging Face folder of the whole model (both towers, tokenizer, image processor): SigLIP, or SigLIP 2 of one
    resolution."""
    value: Literal["cosine", "probability"] = "cosine"
    """``cosine`` of the two embeddings, in [-1, 1], or the ``probability`` that they belong together, the sigmoid of
    the scaled cosine: the former has a slope everywhere, the latter is near 0 for most pairs."""
    batch_size: int = Field(default=32, gt=0)
    """Pictures that are looked at together."""


ENTRY_POINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class PythonRewardConfig(Section):
    """A function of yours: ``score(pictures, prompts)`` gives a number for each picture. Pictures are a list of uint8
    arrays [height, width, 3], prompts a list of objects with ``text``, ``metadata`` and ``id``."""

    kind: Literal["python"]
    weight: float = 1.0
    """Of the value in the sum; 0 only shows it, below 0 is a penalty."""
    entry_point: str
    """``package.module:function``, importable where the training runs."""

    @field_validator("entry_point")
    @classmethod
    def _check(cls, entry_point: str) -> str:
        if not ENTRY_POINT.fullmatch(entry_point):
            raise ValueError(f"{entry_point!r} is not of the form package.module:function")
        return entry_point


RewardConfig: TypeAlias = Annotated[
    ShapesRewardConfig | SiglipRewardConfig | PythonRewardConfig, Field(discriminator="kind")
]


def _leave_out_nulls(rewards: Any) -> Any:
    """A stage, or the command line, leaves out an inherited reward by setting it to null."""
    if isinstance(rewards, dict):
        return {name: reward for name, reward in rewards.items() if reward is not None}
    return rewards


def _check(rewards: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
    wrong = [name for name in rewards if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no name for a reward; use letters, digits, _ and -")
    if "total" in rewards:
        raise ValueError("total is the name of the sum; call the reward something else")
    if all(reward.weight == 0 for reward in rewards.values()):
        raise ValueError(
            "there is no reward with a weight other than 0, so nothing to learn; add one, e.g. shapes: {kind: shapes}"
        )
    return rewards


Rewards: TypeAlias = Annotated[dict[str, RewardConfig], BeforeValidator(_leave_out_nulls), AfterValidator(_check)]
"""By name; each one's own value is shown beside the sum."""
