"""Model FLOPs of the image decoder's rows: what is counted and how is said in ``models/flops.py``.

Counted are all products of the diffusion transformer and of the frozen vision encoder. Left out are the VAE, whose
convolutions are no matrix products, and the connector, two layers on the condition's tokens.
"""

import numpy as np

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.drawing import DrawingRow, DrawingSample
from megatron_unimm.methods.drawing.flops import MMDiTLoad, mmdit_cost
from megatron_unimm.models.flops import vision_work


def row_flops(row: DrawingRow, stage: StageConfig) -> float:
    """Model FLOPs of one row, forward and backward, over all ranks that share it."""
    return mmdit_cost(load_of(row), stage, "connector") + _tower(row.grids, stage)


def sample_flops(sample: DrawingSample, stage: StageConfig) -> float:
    """What a sample costs beyond its tokens' share of a row: attention among its tokens, its conditioning vector, the
    vision encoder."""
    drawn = float(sample.num_picture)
    load = MMDiTLoad(0, 0, 1, float(len(sample) ** 2), drawn**2, drawn * (len(sample) - drawn), drawn)
    return mmdit_cost(load, stage, "connector") + _tower(sample.grids, stage)


def load_of(row: DrawingRow) -> MMDiTLoad:
    """What a row asks of it."""
    tokens = row.pictures.prod(axis=1)
    joint_pairs = float(((row.num_condition + tokens) ** 2).sum())
    num_image = row.num_tokens - row.num_text
    cross_pairs = float((row.num_condition * tokens).sum())
    image_pairs, drawn = float((tokens**2).sum()), float(tokens.sum())
    return MMDiTLoad(row.num_text, num_image, len(tokens), joint_pairs, image_pairs, cross_pairs, drawn)


def _tower(grids: np.ndarray, stage: StageConfig) -> float:
    if stage.data.feature_cache:
        return 0.0
    embedding, rest = vision_work(stage.model.vision_encoder, grids)
    return (embedding + rest).cost(trains=False, passes_gradient=False)
