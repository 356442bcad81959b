"""Suites by name."""

from megatron_unimm.config.wording import suggest_or_list
from megatron_unimm.errors import ConfigError
from megatron_unimm.evaluate import (
    geneval_images,
    reconstruction,
    shapes,
    shapes_qa,
    shapes_retrieval,
    shapes_scales,
    shapes_sessions,
)
from megatron_unimm.evaluate.suite import Suite

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        shapes.SUITE,
        shapes_sessions.SUITE,
        shapes_scales.SUITE,
        shapes_qa.SUITE,
        shapes_retrieval.SUITE,
        geneval_images.SUITE,
        reconstruction.SUITE,
    )
}


def suite_of(name: str, where: str) -> Suite:
    """The suite of that name; hyphens may stand for underscores.

    Args:
        where: the setting that names it, for the message.

    Raises:
        ConfigError: there is none.
    """
    known = name.replace("-", "_")
    if known not in SUITES:
        raise ConfigError(where, f"no suite {name}{suggest_or_list(known, SUITES)}")
    return SUITES[known]
