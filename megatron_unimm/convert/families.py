"""The model families that can be converted. A new one is a module like ``qwen2_5_vl.py`` and a line here."""

from typing import Any

from megatron_unimm.convert.qwen2_5_vl import QWEN2_5_VL
from megatron_unimm.convert.table import Family
from megatron_unimm.errors import CheckpointError

FAMILIES: tuple[Family, ...] = (QWEN2_5_VL,)


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a Hugging Face ``config.json``.

    Raises:
        CheckpointError: none of ours; names those that are.
    """
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        if family.architecture in architectures:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise CheckpointError(where, f"architectures {architectures} cannot be converted; {known} can")


def family_named(name: object, where: str) -> Family:
    """The family that a checkpoint records.

    Raises:
        CheckpointError: none of ours.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise CheckpointError(where, f"family {name!r} is unknown; one of {[family.name for family in FAMILIES]} is needed")
