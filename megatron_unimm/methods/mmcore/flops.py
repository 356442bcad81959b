"""Model FLOPs of rows of MMCORE's VLM: what is counted and how is said in ``models/flops.py``."""

import numpy as np

from megatron_unimm.config.model import ModelConfig
from megatron_unimm.config.queries import CONNECTOR_MLP_RATIO, QueryVlmConfig, SiglipTeacher
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.queries import QueryRow, QuerySample
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow
from megatron_unimm.methods.vlm.flops import ADAPTER_MARK, backbone_trains, has_gradient, tower_flops
from megatron_unimm.models.flops import Work, causal_pairs, decoder_work, logits_work, siglip_work, vision_work
from megatron_unimm.models.lora_shapes import adapted_linears
from megatron_unimm.models.trainable import is_frozen, matching_rule


def adapters_train(stage: StageConfig, prefix: str = "") -> bool:
    """Whether there are any, and they do."""
    assert stage.queries is not None
    rule = matching_rule(f"{prefix}backbone.{ADAPTER_MARK}a.weight", stage.train.trainable)
    return stage.queries.lora is not None and rule is not None and rule.train


def adapters_work(stage: StageConfig, layers: range, num_tokens: int) -> Work:
    """Low-rank adapters of decoder layers (zero-based): 2 T r (inputs + outputs) of each linear that has one."""
    assert stage.queries is not None
    linears = [each for n in layers for each in adapted_linears(stage.model.backbone, stage.queries.lora, n)]
    return Work(float(sum(2 * num_tokens * each.rank * (each.inputs + each.outputs) for each in linears)))


def connector_works(vlm: QueryVlmConfig, model: ModelConfig, num_pictures: int) -> tuple[Work, list[Work]]:
    """The connector's layers, and its projection, on the queries of a row.

    Per layer and query 2 H 4H (QKV, output) and a gated MLP of four times the width, 3 · 2 H 4H; attention 4 N² H per
    picture. The projection is 2 H H and 2 H D, or 2 H D alone.
    """
    hidden, queries = model.backbone.hidden_size, float(num_pictures * vlm.num_queries)
    square = 2 * queries * hidden**2
    layer = Work((4 + 3 * CONNECTOR_MLP_RATIO) * square, 4.0 * num_pictures * vlm.num_queries**2 * hidden)
    last = Work(2 * queries * hidden * vlm.latent_size(model))
    projection = [last] if vlm.connector.projection == "linear" else [Work(square), last]
    return layer.times(vlm.connector.num_layers), projection


def row_flops(row: QueryRow, stage: StageConfig) -> float:
    """Model FLOPs of one row, forward and backward, over all ranks that share it: what its visual latents cost, text
    logits where a text token is predicted, and the frozen teacher (forward) on the pictures to be drawn."""
    num_text = int(np.count_nonzero(row.tokens.labels != IGNORED_LABEL))
    logits = logits_work(stage.model.backbone, num_text).cost(backbone_trains(stage), has_gradient(stage))
    return latents_flops(row.tokens, len(row.target_grids), stage) + logits + _teacher_flops(row.target_grids, stage)


def latents_flops(row: PackedRow, num_pictures: int, stage: StageConfig, prefix: str = "") -> float:
    """Of a VLM up to its visual latents, forward and backward: vision encoder on the images that are read, decoder,
    adapters, and the connector at the queries.

    Args:
        prefix: before the names of the VLM's parameters.
    """
    assert stage.queries is not None
    vlm, model, passes = stage.queries, stage.model, has_gradient(stage, prefix)
    total = tower_flops(row.grids, stage, prefix)
    decoder = decoder_work(model.backbone, row.num_tokens, causal_pairs(row.segment_bounds))
    total += decoder.cost(backbone_trains(stage, prefix), passes)
    adapters = adapters_work(stage, range(model.backbone.num_layers), row.num_tokens)
    total += adapters.cost(adapters_train(stage, prefix), passes)
    connector_trains = not is_frozen(f"{prefix}query_connector", stage.train.trainable)
    layers, projection = connector_works(vlm, model, num_pictures)
    total += layers.cost(connector_trains, passes or connector_trains)
    behind = passes or (connector_trains and bool(vlm.connector.num_layers))
    for work in projection:
        total += work.cost(connector_trains, behind)
        behind = behind or connector_trains
    return total


def sample_flops(sample: QuerySample, stage: StageConfig) -> float:
    """What a sample costs beyond its tokens' share of a row: attention among its tokens, vision encoder and teacher on
    its images."""
    pairs = decoder_work(stage.model.backbone, 0, causal_pairs((0, len(sample))))
    grids = sample.layout.tokens.grids
    return (
        pairs.cost(backbone_trains(stage), has_gradient(stage))
        + tower_flops(grids, stage)
        + _teacher_flops(sample.target_grids, stage)
    )


def teacher_work(grids: np.ndarray, stage: StageConfig) -> Work:
    """The frozen teacher on the pictures to be drawn."""
    assert stage.queries is not None
    teacher = stage.queries.teacher
    if isinstance(teacher, SiglipTeacher):
        return siglip_work(teacher.encoder, grids)
    if stage.data.feature_cache:  # Computed beforehand.
        return Work(0.0)
    embedding, rest = vision_work(stage.model.vision_encoder, grids)
    return embedding + rest


def _teacher_flops(grids: np.ndarray, stage: StageConfig) -> float:
    return teacher_work(grids, stage).cost(trains=False, passes_gradient=False)
