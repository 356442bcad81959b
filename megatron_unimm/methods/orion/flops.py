"""Model FLOPs of ORION's rows: what is counted and how is said in ``models/flops.py``."""

from collections.abc import Collection

import numpy as np

from megatron_unimm.config.methods import OrionConfig
from megatron_unimm.config.model import VisionEncoder, VisionHeadConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow, TokenizedSample
from megatron_unimm.models.flops import Work, causal_pairs, decoder_work, logits_work, vision_work
from megatron_unimm.models.trainable import is_frozen

PARTS = ("vision_encoder", "backbone", "vision_head")
"""Parts that a stage trains or freezes as a whole, as far as this file is concerned."""


def vision_head_cost(
    model: VisionHeadConfig, hidden: int, num_positions: int, trains: bool, passes_gradient: bool
) -> float:
    """Forward and backward of ORION's vision head on n positions.

    Linear: 2 n H H. MLP: 2 n H eH twice; the second product's input always gets a gradient where the first one trains.
    Q-Former: per layer and pair of tokens 2 · 2n H (3H + H) and 2 · 2n H 2H twice, attention over 2 × 2 pairs
    4 · 4n H, and one projection 2 n H H; its query token is a weight, so gradient passes through all of it.
    """
    products = vision_head_work(model, hidden, num_positions)
    return sum(work.cost(trains, passes_gradient or (inner and trains)) for work, inner in products)


def vision_head_work(model: VisionHeadConfig, hidden: int, num_positions: int) -> list[tuple[Work, bool]]:
    """The same as works, each with whether it is behind weights of the head, whose training passes a gradient."""
    square = 2.0 * num_positions * hidden * hidden
    if model.kind == "linear":
        return [(Work(square), False)]
    if model.kind == "mlp":
        return [(Work(square * model.expansion), False), (Work(square * model.expansion), True)]
    layer = Work(2 * square * 4 + 2 * square * 2 * 2, 16.0 * num_positions * hidden)
    return [(layer.times(model.num_layers) + Work(square), True)]


def frozen_parts(stage: StageConfig) -> frozenset[str]:
    """The parts of :data:`PARTS` in which nothing trains."""
    return frozenset(part for part in PARTS if is_frozen(part, stage.train.trainable))


def row_flops(row: PackedRow, stage: StageConfig, frozen: Collection[str]) -> float:
    """Model FLOPs of one packed row, forward and backward, over all ranks that share it.

    The student's tower and decoder; text logits where a text token is predicted; the vision head where a visual token
    is; with a KL weight the teacher's decoder (forward) and both models' logits at those positions, in rows that
    generate an image; the frozen tower (forward) on all images where the student's own is frozen or regression targets
    are wanted.

    Args:
        frozen: names of frozen parts, see :func:`frozen_parts`.
    """
    assert isinstance(stage.method, OrionConfig)
    backbone, weights = stage.model.backbone, stage.method.loss_weights
    tower_trains, backbone_trains = "vision_encoder" not in frozen, "backbone" not in frozen
    num_vision = len(row.predict_index)
    num_text = int(np.count_nonzero(row.labels != IGNORED_LABEL)) if weights.cross_entropy else 0
    decoder = decoder_work(backbone, len(row.input_ids), causal_pairs(row.segment_bounds))
    total = _tower_flops(row, stage.model.vision_encoder, tower_trains)
    total += decoder.cost(backbone_trains, backbone_trains or tower_trains)
    total += logits_work(backbone, num_text).cost(backbone_trains, backbone_trains or tower_trains)
    head = stage.method.vision_head
    total += vision_head_cost(
        head, backbone.hidden_size, num_vision, "vision_head" not in frozen, backbone_trains or tower_trains
    )
    if weights.kl and num_vision:
        student = logits_work(backbone, num_vision).cost(backbone_trains, backbone_trains or tower_trains)
        teacher = (decoder + logits_work(backbone, num_vision)).cost(trains=False, passes_gradient=False)
        total += student + teacher
    return total


def sample_flops(sample: TokenizedSample, stage: StageConfig, frozen: Collection[str]) -> float:
    """What a sample costs beyond its tokens' share of a row, forward and backward: attention among its tokens, and the
    tower on its images. Rows of the same length differ in nothing else that is large."""
    backbone, trains = stage.model.backbone, "backbone" not in frozen
    passes = trains or "vision_encoder" not in frozen
    pairs = decoder_work(backbone, 0, causal_pairs((0, len(sample)))).cost(trains, passes)
    return pairs + _tower_flops(sample, stage.model.vision_encoder, "vision_encoder" not in frozen)


def _tower_flops(row: PackedRow | TokenizedSample, model: VisionEncoder, trains: bool) -> float:
    total = 0.0
    if row.features is not None:  # Computed beforehand.
        return total
    if trains:
        embedding, rest = vision_work(model, row.grids[~row.is_target])
        total += embedding.cost(trains=True, passes_gradient=False) + rest.cost(trains=True, passes_gradient=True)
    if not trains or row.is_target.any():
        embedding, rest = vision_work(model, row.grids)
        total += (embedding + rest).cost(trains=False, passes_gradient=False)
    return total
