"""What a reward is.

Pictures are uint8 arrays (H, W, 3), RGB, of any sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron_unimm.errors import UserError

Float64: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class RewardPrompt:
    """What a picture was asked for."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The sample's record: what scorers need beside the text, such as ``geneval``."""
    id: str = ""
    """Of the sample, for messages."""


class Reward(Protocol):
    """Scores pictures."""

    def __call__(self, pictures: Sequence[np.ndarray], prompts: Sequence[RewardPrompt]) -> Float64:
        """A finite number ``[n]`` for each of n pictures, in their order; more is better. A picture's number does not
        depend on the others."""
        ...


def check_pictures(where: str, pictures: Sequence[np.ndarray], prompts: Sequence[RewardPrompt]) -> None:
    """Assert that each prompt has a picture, and that it is one."""
    assert len(pictures) == len(prompts), f"{where}: {len(pictures)} pictures for {len(prompts)} prompts"
    for picture in pictures:
        right = picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert right, f"{where}: a picture is {picture.dtype} {picture.shape}, not uint8 (H, W, 3)"


def checked_values(where: str, values: Any, prompts: Sequence[RewardPrompt]) -> Float64:
    """What a reward gave, as float64 ``[n]``.

    Args:
        where: the reward's place in the recipe, for the message.

    Raises:
        UserError: it is not one finite number for each prompt.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors with a gradient or on a device
        raise UserError(where, f"gave what is no array of numbers ({error}); return a list of floats") from error
    if array.dtype.kind not in "biuf":
        raise UserError(where, f"gave {array.dtype} values, not numbers; return a list of floats")
    if array.shape != (len(prompts),):
        raise UserError(
            where, f"gave values of shape {list(array.shape)} for {len(prompts)} pictures; return one number for each"
        )
    for place in np.flatnonzero(~np.isfinite(array))[:1]:
        raise UserError(where, f"gave {array[place]} for {told(prompts, int(place))}; rewards must be finite")
    return array.astype(np.float64)


def told(prompts: Sequence[RewardPrompt], place: int) -> str:
    """Which sample it is, for messages."""
    prompt = prompts[place]
    name = f"sample {prompt.id} " if prompt.id else ""
    text = prompt.text if len(prompt.text) <= 60 else prompt.text[:57] + "..."
    return f"{name}(picture {place + 1} of {len(prompts)}, {text!r})"
