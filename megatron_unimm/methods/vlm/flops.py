"""What model FLOPs of VLMs with query tokens go by: what is counted and how is said in ``models/flops.py``."""

import numpy as np

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.models.backbone.routing import ROUTER_MARK
from megatron_unimm.models.flops import vision_work
from megatron_unimm.models.trainable import is_frozen

ADAPTER_MARK = "lora_"
"""In patterns over adapters' names, which tell rules for them from rules for the weights."""


def backbone_trains(stage: StageConfig, prefix: str = "") -> bool:
    """Whether its own weights do; adapters and routers of layers are others.

    Args:
        prefix: before the names of the VLM's parameters.
    """
    marks = ADAPTER_MARK, ROUTER_MARK
    return not is_frozen(
        f"{prefix}backbone", [rule for rule in stage.train.trainable if not any(mark in rule.pattern for mark in marks)]
    )


def has_gradient(stage: StageConfig, prefix: str = "") -> bool:
    """Whether a gradient passes through the decoder's layers, because something in them or before them trains."""
    parts = ("vision_encoder", "query_tokens", "backbone")
    return not all(is_frozen(prefix + part, stage.train.trainable) for part in parts)


def tower_flops(grids: np.ndarray, stage: StageConfig, prefix: str = "") -> float:
    """The vision encoder on images that are read."""
    if stage.data.feature_cache:  # Computed beforehand.
        return 0.0
    trains = not is_frozen(f"{prefix}vision_encoder", stage.train.trainable)
    embedding, rest = vision_work(stage.model.vision_encoder, grids)
    return embedding.cost(trains, passes_gradient=False) + rest.cost(trains, passes_gradient=trains)
