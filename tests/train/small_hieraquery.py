"""A small stage of HieraQuery, and conversations for it that are made by hand: no files, no tokenizer."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import small_decoder
import small_mmcore
import torch
from small_decoder import generator_of, shake
from small_diffusion import Part, World

from megatron_unimm.config.hieraquery import MultiScaleConfig
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.chat import TokenSequence
from megatron_unimm.data.frames import FrameRow, FrameSample
from megatron_unimm.data.queries import QueryTokens
from megatron_unimm.data.typical import wordless_chat
from megatron_unimm.data.workers import void
from megatron_unimm.methods.hieraquery.method import frame_work
from megatron_unimm.methods.hieraquery.model import HieraQueryModel
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.train import setup
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.step import TrainStep

SMALL = (
    *(setting for setting in small_mmcore.SMALL if not setting.startswith("queries.")),
    "generator.mmdit.num_layers=3",
    "generator.mmdit.num_heads=2",
    "generator.mmdit.head_size=16",
    "generator.mmdit.condition_size=24",
    "generator.mmdit.pooled_size=12",
    "generator.mmdit.latent_channels=4",
    "generator.vae={latent_channels: 4, block_channels: [8, 8, 8, 8], layers_per_block: 1, norm_groups: 4,"
    " mid_attention: false}",
    "hieraquery.scales=[[1, 2], 2]",
    "hieraquery.connector={num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, head_size: 8, mlp_size: 48}",
    "data.sequence_length=384",
    "stages.editing.method.condition_dropout=0.3",
    "stages.editing.method.alignment={layer: 2, projector_size: 20}",
)
"""Scales of 2 and 4 queries, for pictures of half the side and of all of it."""
BY_THEMSELVES = ("method.shows_sources=false",)
SANA = (*BY_THEMSELVES, *small_decoder.SANA)
"""It needs to draw pictures by themselves."""


def small_stage(repo: Path, *overrides: str) -> StageConfig:
    """The last stage of the Shapes recipe with small models."""
    return load_recipe(repo / "configs/hieraquery/shapes.yaml", [*SMALL, *overrides]).stages["editing"]


def scales_of(stage: StageConfig) -> MultiScaleConfig:
    assert stage.hieraquery is not None
    return stage.hieraquery


def step_of(stage: StageConfig, world: World, seed: int = 0) -> TrainStep:
    """A step over a random model, no weight of which is zero."""
    platform, groups = world
    torch.manual_seed(seed)
    method, chunks = setup.build_model(stage, platform, groups)
    shake(chunks, seed)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    return TrainStep(stage, method, wrapped, build_optimizer(wrapped, stage, groups), platform, groups)


def chunk_of(step: TrainStep) -> HieraQueryModel:
    return step.chunks[0].module


def make_sample(stage: StageConfig, name: str, *parts: Part, learned: bool = True) -> FrameSample:
    """A loaded conversation of parts, the last of which is drawn; rows and columns of pictures are those of the finest
    scale. Words, pixels and chance are random."""
    model, generator, encoder = stage.model, generator_of(stage), stage.model.vision_encoder
    scales = stage.scales
    rng = np.random.default_rng(sum(map(ord, name)))
    sequence = TokenSequence(model.token_ids, encoder.spatial_merge_size)
    queries: list[np.ndarray] = []
    sizes, drawn = [], []
    shows_sources = stage.method.shows_sources
    for place, (kind, *size) in enumerate(parts):
        if kind == "says":
            sequence.add_text(rng.integers(0, 100, size[0]).tolist(), learned=False)
            continue
        is_drawn = kind == "draws"
        if is_drawn or shows_sources:
            sizes.append(size)
            drawn.append(is_drawn)
        if is_drawn:
            queries += [sequence.add_queries(count, learned=False) for count in scales.queries]
        if place < len(parts) - 1:
            sequence.add_image(np.array([1, 4, 6] if is_drawn else [1, 4, 4]), is_target=False)
    tokens = void(sequence.finish(name, "editing" if len(parts) > 2 else "text_to_image", encoder.patch_dim))
    views = np.array([[int(side * share) for side in size] for share in scales.shares for size in sizes])
    targets = np.array([[1, 2 * rows, 4 * columns] for (rows, columns), own in zip(sizes, drawn, strict=True) if own])

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return FrameSample(
        id=name,
        kind=tokens.kind,
        layout=QueryTokens(
            tokens=replace(tokens, patches=normal(int(tokens.grids.prod(axis=1).sum()), encoder.patch_dim)),
            read_index=(),
            read_drawn=(),
            drawn_index=tuple(np.flatnonzero(drawn).tolist()),
            query_index=np.concatenate(queries),
            text_index=(np.zeros(0, dtype=np.int64),) * sum(drawn),
        ),
        image_index=tuple(range(len(sizes))) * len(scales.queries),
        sizes=views,
        is_drawn=np.array(drawn * len(scales.queries)),
        uniform=rng.uniform(0.02, 0.98, len(views)),
        text_uniform=rng.random(len(views)),
        visual_uniform=rng.random(len(views)),
        noise_seed=int(rng.integers(1 << 62)),
        queries=scales.queries,
        shows_sources=shows_sources,
        has_words=False,
        learned=learned,
        pixels=rng.uniform(-1, 1, (int(views.prod(axis=1).sum()), 3 * generator.token_pixels**2)).astype(np.float32),
        target_grids=targets,
        target_patches=normal(int(targets.prod(axis=1).sum()), encoder.patch_dim),
    )


def several(stage: StageConfig) -> list[FrameSample]:
    """Text to image, edits of one and two turns, one of which nothing is learned."""
    return [
        make_sample(stage, "picture", ("says", 5), ("draws", 2, 4)),
        make_sample(stage, "edits", ("shows", 2, 2), ("says", 3), ("draws", 4, 2), ("says", 6), ("draws", 2, 4)),
        make_sample(stage, "broken", ("shows", 2, 2), ("says", 2), ("draws", 2, 2), learned=False),
        make_sample(stage, "edit", ("shows", 4, 2), ("says", 4), ("draws", 2, 2)),
    ]


def row_of(stage: StageConfig, samples: Sequence[FrameSample]) -> FrameRow:
    """One row of samples, as the stage's own work lays it."""
    return frame_work(stage, DataSetup({}, lambda: wordless_chat(stage.model, stage.data))).row(samples)
