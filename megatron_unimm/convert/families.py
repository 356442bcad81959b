"""The model families that can be converted. A new one is a module like ``qwen2_5_vl.py`` and a line here."""

from typing import Any

from megatron_unimm.convert.flux import FLUX
from megatron_unimm.convert.ming import MING_LITE_OMNI
from megatron_unimm.convert.pipeline import architectures_of
from megatron_unimm.convert.qwen2 import QWEN2
from megatron_unimm.convert.qwen2_5_vl import QWEN2_5_VL
from megatron_unimm.convert.qwen3_vl import QWEN3_VL, QWEN3_VL_MOE
from megatron_unimm.convert.sana import SANA
from megatron_unimm.convert.sd3 import SD3
from megatron_unimm.convert.siglip import SIGLIP, SIGLIP2
from megatron_unimm.convert.table import Family
from megatron_unimm.errors import CheckpointError

FAMILIES: tuple[Family, ...] = (
    *(QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, MING_LITE_OMNI, QWEN2),
    *(SIGLIP, SIGLIP2, SD3, FLUX, SANA),
)


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of what :func:`pipeline.read_model` read.

    Raises:
        CheckpointError: none of ours; names those that are.
    """
    architectures = architectures_of(config)
    for family in FAMILIES:
        if any(architecture in architectures for architecture in family.architectures):
            return family
    known = ", ".join(architecture for family in FAMILIES for architecture in family.architectures)
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
