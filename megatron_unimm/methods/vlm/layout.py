"""How rows of a vision-language model lie on a layout."""

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.models.backbone.deepstack import travelling_levels


def travelling_rows(stage: StageConfig) -> int:
    """Hidden states of a row between pipeline stages, and deepstack levels under them."""
    return stage.data.sequence_length * (1 + travelling_levels(stage.model, stage.system.parallel))


def alignment(stage: StageConfig) -> int:
    """Of samples in a row: each context rank has two chunks of every one."""
    context = stage.system.parallel.context
    return 2 * context if context > 1 else 1
