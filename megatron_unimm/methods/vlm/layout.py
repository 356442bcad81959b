"""How rows of a vision-language model lie on a layout."""

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.models.backbone.deepstack import travelling_levels
from megatron_unimm.models.backbone.routing import LayerMixture


def travelling_rows(stage: StageConfig) -> int:
    """Hidden states of a row between pipeline stages, deepstack levels under them, and what is mixed of layers."""
    parallel, backbone = stage.system.parallel, stage.model.backbone
    rows = stage.data.sequence_length * (1 + travelling_levels(stage.model, parallel))
    if stage.routing is None:
        return rows
    shards = parallel.context * (parallel.tensor if parallel.sequence else 1)
    mixture = LayerMixture.of(stage.routing, backbone.num_layers, backbone.hidden_size, first=False)
    return rows + shards * mixture.num_rows(stage.data.sequence_length // shards)


def alignment(stage: StageConfig) -> int:
    """Of samples in a row: each context rank has two chunks of every one."""
    context = stage.system.parallel.context
    return 2 * context if context > 1 else 1
