"""Model FLOPs of HieraQuery's rows: what is counted and how is said in ``models/flops.py``.

Counted are all products of the diffusion transformer, of the VLM, of the connector with the layers around it, and of
the alignment's projector and vision encoder. Left out are the VAE, whose convolutions are no matrix products, and what
makes the pooled conditions, two layers on one row per picture. Of conditions that were computed beforehand the VLM
costs nothing.

Legend  Q queries of a row, C width of the condition, H hidden size of the VLM, H' of the connector.
"""

import numpy as np

from megatron_unimm.config.methods import HieraQueryConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow, FrameSample, frames_of
from megatron_unimm.methods.drawing.flops import alignment_flops, frames_load, mmdit_cost
from megatron_unimm.methods.vlm.flops import backbone_trains, has_gradient, tower_flops
from megatron_unimm.methods.vlm.queries import VLM, vlm_stage
from megatron_unimm.models.flops import Work, causal_pairs, decoder_work
from megatron_unimm.models.trainable import is_frozen

CONDITION = ("scale_adapters", "scale_connector", VLM.removesuffix("."))
"""Parts that make the condition."""


def row_flops(row: FrameRow, stage: StageConfig) -> float:
    """Model FLOPs of one row, forward and backward, over all ranks that share it."""
    frames, grids = row.frames, row.target_grids
    load = frames_load(row.num_text, row.num_tokens - row.num_text, frames)
    total = mmdit_cost(load, stage, *CONDITION) + connector_flops(len(row.query_index), stage)
    if grids is not None:
        total += _alignment_flops(int((frames.counts * row.learned).sum()), grids, stage)
    if stage.data.condition_cache:
        return total
    conversation = row.conversation
    decoder = decoder_work(stage.model.backbone, conversation.num_tokens, causal_pairs(conversation.segment_bounds))
    total += decoder.cost(backbone_trains(stage, VLM), has_gradient(stage, VLM))
    return total + tower_flops(conversation.grids, vlm_stage(stage), VLM)


def sample_flops(sample: FrameSample, stage: StageConfig) -> float:
    """What a sample costs beyond its tokens' share of a row: attention among its tokens, its conditioning vectors, the
    connector, what is aligned, and the VLM."""
    frames = frames_of([sample])
    total = mmdit_cost(frames_load(0, 0, frames), stage, *CONDITION)
    total += connector_flops(len(sample.layout.query_index), stage)
    if sample.target_grids is not None:
        total += _alignment_flops(int((frames.counts * ~frames.is_clean).sum()), sample.target_grids, stage)
    if stage.data.condition_cache:
        return total
    pairs = causal_pairs((0, len(sample.layout)))
    decoder = decoder_work(stage.model.backbone, len(sample.layout), pairs)
    total += decoder.cost(backbone_trains(stage, VLM), has_gradient(stage, VLM))
    return total + tower_flops(sample.layout.tokens.grids, vlm_stage(stage), VLM)


def connector_works(num_queries: int, stage: StageConfig) -> tuple[Work, Work, Work]:
    """What stands before the connector, the connector, and what stands behind it.

    Before 2 Q (H H' + H'²), where widths differ, and behind 2 Q (H' C + C²). Per layer and query QKV 2 H' (N + 2 G) D,
    output 2 N D H', a gated MLP 6 H' M; attention 4 N D pairs, each scale's queries among themselves.
    """
    scales, model = stage.hieraquery, stage.generator
    assert scales is not None
    assert model is not None
    connector, hidden, queries = scales.connector, stage.model.backbone.hidden_size, float(num_queries)
    inner, condition = connector.hidden_size, model.mmdit.condition_size
    before = Work(2 * queries * (hidden * inner + inner**2) * (hidden != inner))
    behind = Work(2 * queries * (inner * condition + condition**2) * (inner != condition))
    heads = connector.num_heads * connector.head_size
    products = 4 * heads + 4 * connector.num_kv_heads * connector.head_size + 6 * connector.mlp_size
    pairs = queries / scales.num_queries * sum(count**2 for count in scales.picture_scales.queries)
    layer = Work(queries * inner * products, 4 * heads * pairs)
    return before, layer.times(connector.num_layers), behind


def connector_flops(num_queries: int, stage: StageConfig) -> float:
    """The connector and what stands around it, forward and backward."""
    rules, passes, total = stage.train.trainable, has_gradient(stage, VLM), 0.0
    parts = ("scale_adapters", "scale_connector", "scale_adapters")
    for part, work in zip(parts, connector_works(num_queries, stage), strict=True):
        trains = not is_frozen(part, rules)
        total += work.cost(trains, passes)
        passes = passes or trains
    return total


def _alignment_flops(num_tokens: int, grids: np.ndarray, stage: StageConfig) -> float:
    """Of section 3.2's loss, forward and backward."""
    assert isinstance(stage.method, HieraQueryConfig)
    assert stage.method.alignment is not None
    return alignment_flops(num_tokens, grids, stage, stage.method.alignment, CONDITION)
