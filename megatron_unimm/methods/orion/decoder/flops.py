"""Model FLOPs of the image decoder's rows: what is counted and how is said in ``models/flops.py``."""

import numpy as np

from megatron_unimm.config.mmdit import FluxConfig, ImageGeneratorConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.drawing import DrawingRow, DrawingSample
from megatron_unimm.models.flops import Work, vision_work
from megatron_unimm.models.trainable import is_frozen


def row_flops(row: DrawingRow, stage: StageConfig) -> float:
    """Forward and backward of the diffusion transformer on one row, and the frozen vision encoder's forward pass. The
    VAE and the connector are not counted: the first is no matrix product to speak of, the second is two layers."""
    model = stage.generator
    assert model is not None
    pairs = float(((row.num_condition + row.pictures.prod(axis=1)) ** 2).sum())
    trains = not is_frozen("mmdit", stage.train.trainable)
    total = mmdit_work(model, row.num_text, row.num_tokens - row.num_text, pairs).cost(trains, passes_gradient=True)
    return total + _tower(row.grids, stage)


def sample_flops(sample: DrawingSample, stage: StageConfig) -> float:
    """What a sample costs beyond its tokens' share of a row: attention among its tokens, the vision encoder."""
    model = stage.generator
    assert model is not None
    trains = not is_frozen("mmdit", stage.train.trainable)
    return mmdit_work(model, 0, 0, float(len(sample) ** 2)).cost(trains, True) + _tower(sample.grids, stage)


def mmdit_work(model: ImageGeneratorConfig, num_text: int, num_image: int, pairs: float) -> Work:
    """The diffusion transformer's layers.

    Per joint block and token: QKV 2 · 3 H², output 2 H², MLP 2 · 8 H²; text has none of the last two in SD3's last
    block. A second attention adds QKV, output and the image's own pairs, counted as all pairs. Per single block and
    token the same 2 · 12 H². Attention 4 pairs H. Modulations are products of a few rows and are left out, like
    embeddings.
    """
    mmdit = model.mmdit
    hidden, tokens = mmdit.hidden_size, float(num_text + num_image)
    block = Work(24.0 * tokens * hidden**2, 4 * pairs * hidden)
    if isinstance(mmdit, FluxConfig):
        return block.times(mmdit.num_blocks)
    dual = Work(8.0 * num_image * hidden**2, 4 * pairs * hidden).times(len(mmdit.dual_attention_layers))
    last_text = Work(-18.0 * num_text * hidden**2)
    return block.times(mmdit.num_layers) + dual + last_text


def _tower(grids: np.ndarray, stage: StageConfig) -> float:
    if stage.data.feature_cache:
        return 0.0
    embedding, rest = vision_work(stage.model.vision_encoder, grids)
    return (embedding + rest).cost(trains=False, passes_gradient=False)
