"""Methods by the name in a recipe."""

from collections.abc import Callable

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.footprint import Footprints
from megatron_unimm.methods.hieraquery.footprint import HieraQueryFootprints
from megatron_unimm.methods.hieraquery.method import HieraQuery
from megatron_unimm.methods.interface import Method
from megatron_unimm.methods.mmcore.diffusion.footprint import DiffusionFootprints
from megatron_unimm.methods.mmcore.diffusion.method import MMCoreDiffusion
from megatron_unimm.methods.mmcore.footprint import MMCoreFootprints
from megatron_unimm.methods.mmcore.method import MMCore
from megatron_unimm.methods.mmcore.policy.footprint import PolicyFootprints
from megatron_unimm.methods.mmcore.policy.method import MMCorePolicy
from megatron_unimm.methods.orion.decoder.footprint import DecoderFootprints
from megatron_unimm.methods.orion.decoder.method import OrionDecoder
from megatron_unimm.methods.orion.footprint import OrionFootprints
from megatron_unimm.methods.orion.method import Orion
from megatron_unimm.methods.spar.alignment.footprint import AlignmentFootprints
from megatron_unimm.methods.spar.alignment.method import SparAlignment
from megatron_unimm.methods.spar.diffusion.footprint import SparFootprints
from megatron_unimm.methods.spar.diffusion.method import Spar
from megatron_unimm.methods.spar.tokenizer.footprint import TokenizerFootprints
from megatron_unimm.methods.spar.tokenizer.method import SparTokenizer
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform

METHODS: dict[str, Callable[[StageConfig, Platform, ParallelGroups], Method]] = {
    "orion": Orion,
    "orion_decoder": OrionDecoder,
    "mmcore": MMCore,
    "mmcore_diffusion": MMCoreDiffusion,
    "mmcore_policy": MMCorePolicy,
    "hieraquery": HieraQuery,
    "spar_tokenizer": SparTokenizer,
    "spar_alignment": SparAlignment,
    "spar": Spar,
}


def build_method(stage: StageConfig, platform: Platform, groups: ParallelGroups) -> Method:
    """The method that the stage's config names."""
    return METHODS[stage.method.name](stage, platform, groups)


FOOTPRINTS: dict[str, Footprints] = {
    "orion": OrionFootprints(),
    "orion_decoder": DecoderFootprints(),
    "mmcore": MMCoreFootprints(),
    "mmcore_diffusion": DiffusionFootprints(),
    "mmcore_policy": PolicyFootprints(),
    "hieraquery": HieraQueryFootprints(),
    "spar_tokenizer": TokenizerFootprints(),
    "spar_alignment": AlignmentFootprints(),
    "spar": SparFootprints(),
}


def footprints_of(stage: StageConfig) -> Footprints:
    """What its chunks ask of a rank, without building anything."""
    return FOOTPRINTS[stage.method.name]
