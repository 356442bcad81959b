"""A small ORION stage and rows for it, made by hand: no files, no tokenizer."""

from pathlib import Path

import numpy as np

from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.packing import build_row
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow, TokenizedSample

SMALL = (
    "model.vision_encoder.num_layers=2",
    "model.vision_encoder.hidden_size=32",
    "model.vision_encoder.mlp_size=48",
    "model.vision_encoder.full_attention_layers=[1]",
    "model.vision_encoder.out_size=64",
    "model.backbone.num_layers=2",
    "model.backbone.hidden_size=64",
    "model.backbone.num_heads=4",
    "model.backbone.head_size=16",
    "model.backbone.mlp_size=96",
    "model.backbone.mrope_sections=[2,3,3]",
    "method.token_noise=0",  # references know none; tests of noise set it
    "data.sequence_length=128",
    "system.cpu_threads=1",
    "train.evaluation.suites=[]",
    "stages.sft.train.schedule={max_learning_rate: 1.0e-4, min_learning_rate: 1.0e-5}",
)


def small_stage(repo: Path, *overrides: str) -> StageConfig:
    """The SFT stage of the Shapes recipe with a two-layer model."""
    return load_recipe(repo / "configs/orion/shapes.yaml", [*SMALL, *overrides]).stages["sft"]


def make_sample(stage: StageConfig, name: str, length: int, grid: tuple[int, int], generated: bool) -> TokenizedSample:
    """Text with one image of a patch grid behind its fourth token; every third position after it has a label."""
    model = stage.model
    rng = np.random.default_rng(length)
    num_visual = grid[0] * grid[1] // model.vision_encoder.spatial_merge_size**2
    visual_index = 4 + np.arange(num_visual)
    input_ids = rng.integers(0, 100, length)
    input_ids[visual_index] = model.token_ids.image_pad
    labels = np.full(length, IGNORED_LABEL)
    answer = labels[visual_index[-1] + 1 :: 3]
    answer[:] = rng.integers(0, 100, len(answer))
    none = np.empty(0, dtype=np.int64)
    return TokenizedSample(
        id=name,
        kind="text_to_image" if generated else "understanding",
        input_ids=input_ids,
        labels=labels,
        position_ids=np.tile(np.arange(length), (3, 1)),
        patches=rng.standard_normal((grid[0] * grid[1], model.vision_encoder.patch_dim)).astype(np.float32),
        grids=np.array([[1, *grid]]),
        is_target=np.array([generated]),
        visual_index=visual_index,
        predict_index=visual_index - 1 if generated else none,
        target_index=np.arange(num_visual) if generated else none,
    )


def make_row(stage: StageConfig, length: int = 128) -> PackedRow:
    """A read image, a generated one, and a tail of padding; the images do not fill whole windows."""
    samples = [make_sample(stage, "read", 50, (10, 8), False), make_sample(stage, "drawn", 41, (6, 4), True)]
    patch_dim = stage.model.vision_encoder.patch_dim
    pad = stage.model.token_ids.pad
    return build_row(samples, sequence_length=length, alignment=1, pad_id=pad, patch_dim=patch_dim)
