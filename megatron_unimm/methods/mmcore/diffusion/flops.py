"""Model FLOPs of rows of MMCORE's diffusion transformer: what is counted and how is said in ``models/flops.py``.

Counted are all products of the diffusion transformer and of the VLM. Left out are the VAE, whose convolutions are no
matrix products, the pathways, two layers on the condition's tokens, and the layer of ``method.vit_features``. Of
conditions that were computed beforehand the VLM costs nothing.
"""

import numpy as np

from megatron_unimm.config.methods import PathwayDiffusionConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow, FrameSample
from megatron_unimm.methods.drawing.flops import MMDiTLoad, frames_load, mmdit_cost
from megatron_unimm.methods.mmcore.flops import latents_flops
from megatron_unimm.methods.vlm.flops import backbone_trains, has_gradient, tower_flops
from megatron_unimm.methods.vlm.queries import VLM, vlm_stage
from megatron_unimm.models.flops import causal_pairs, decoder_work
from megatron_unimm.models.mmdit.frames import Frames

CONDITION = ("pathways", VLM.removesuffix("."))
"""Parts that make the condition."""


def row_flops(row: FrameRow, stage: StageConfig) -> float:
    """Model FLOPs of one row, forward and backward, over all ranks that share it."""
    drawing = mmdit_cost(load_of(row), stage, *CONDITION)
    if stage.data.condition_cache:
        return drawing
    return drawing + latents_flops(row.conversation, row.num_images, vlm_stage(stage), VLM)


def sample_flops(sample: FrameSample, stage: StageConfig) -> float:
    """What a sample costs beyond its tokens' share of a row: attention among its tokens, its conditioning vectors, and
    the VLM without its connector."""
    latents = np.array([0 if clean else sample.num_queries[view] for view, clean in sample.entries])
    frames = Frames(
        sizes=np.array([sample.sizes[number] for number, _ in sample.entries]),
        num_condition=np.array([0 if clean else sample.num_condition[number] for number, clean in sample.entries]),
        sample=np.zeros(len(sample.entries), dtype=np.int64),
        number=np.array([number for number, _ in sample.entries]),
        is_clean=np.array([clean for _, clean in sample.entries]),
        num_shared=latents if sees_earlier_latents(stage) else None,
    )
    drawing = mmdit_cost(frames_load(0, 0, frames), stage, *CONDITION)
    if stage.data.condition_cache:
        return drawing
    pairs = causal_pairs((0, len(sample.layout)))
    decoder = decoder_work(stage.model.backbone, len(sample.layout), pairs)
    vlm = decoder.cost(backbone_trains(stage, VLM), has_gradient(stage, VLM))
    vlm += tower_flops(sample.layout.tokens.grids, vlm_stage(stage), VLM)
    return drawing + vlm


def sees_earlier_latents(stage: StageConfig) -> bool:
    return isinstance(stage.method, PathwayDiffusionConfig) and stage.method.earlier_latents


def load_of(row: FrameRow) -> MMDiTLoad:
    """What a row asks of the diffusion transformer."""
    return frames_load(row.num_text, row.num_tokens - row.num_text, row.frames)
