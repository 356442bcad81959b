"""A small stage of MMCORE's diffusion transformer, the checkpoints that it starts from, and conversations for it that
are made by hand: no files, no tokenizer."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import small_mmcore
import torch
from small_decoder import FLUX, generator_of, shake
from small_mmcore import vlm_of

from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import Recipe, StageConfig
from megatron_unimm.data.chat import TokenSequence
from megatron_unimm.data.frames import FrameRow, FrameSample
from megatron_unimm.data.queries import QueryTokens
from megatron_unimm.data.shapes import write_shapes
from megatron_unimm.data.typical import wordless_chat
from megatron_unimm.data.workers import void
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.diffusion.method import frame_work
from megatron_unimm.methods.mmcore.diffusion.model import MMCoreDiffusionModel
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.state import model_state
from megatron_unimm.train.step import TrainStep

World = tuple[Platform, ParallelGroups]

SMALL = (
    *small_mmcore.SMALL,
    "generator.mmdit.num_layers=2",
    "generator.mmdit.num_heads=2",
    "generator.mmdit.head_size=16",
    "generator.mmdit.condition_size=24",
    "generator.mmdit.pooled_size=12",
    "generator.mmdit.latent_channels=4",
    "generator.vae={latent_channels: 4, block_channels: [8, 8, 8, 8], layers_per_block: 1, norm_groups: 4,"
    " mid_attention: false}",
    "stages.diffusion.data.sequence_length=256",
    "stages.diffusion.method.text_dropout={start: 0.4, end: 0.4, steps: 0}",
    "stages.diffusion.method.visual_dropout={start: 0.3, end: 0.3, steps: 0}",
)
TRAIN_VLM = "{pattern: 'vlm.query_tokens.*'}, {pattern: 'vlm.query_connector.*'}"
SOME_OF_THE_VLM = (
    f"stages.diffusion.train.trainable=[{TRAIN_VLM}, {{pattern: 'vlm.*', train: false}},"
    " {pattern: 'vae.*', train: false}, {pattern: '*'}]"
)
MODELS = {"sd3": (), "dual": ("generator.mmdit.dual_attention_layers=[0]",), "flux": (FLUX,)}

Part = tuple[str, int] | tuple[str, int, int]
"""``says`` with a number of words; ``shows`` and ``draws`` with rows and columns of image tokens."""


def small_recipe(repo: Path, *overrides: str) -> Recipe:
    """The Shapes recipe with two-layer models."""
    return load_recipe(repo / "configs/mmcore/shapes.yaml", [*SMALL, *overrides])


def small_diffusion(repo: Path, *overrides: str) -> StageConfig:
    """Its diffusion transformer's stage."""
    return small_recipe(repo, *overrides).stages["diffusion"]


def write_world(repo: Path, folder: Path) -> list[str]:
    """Shapes data, a random base model and a random image generator; the overrides that take them."""
    kinds = ("understanding", "text_to_image", "editing", "interleaved")
    write_shapes(folder / "data", count=48, seed=1, mix=dict.fromkeys(kinds, 0.25))
    recipe = small_recipe(repo)
    for name, target in (("vlm", "base"), ("diffusion", "generator")):
        stage = recipe.stages[name]
        architecture = stage.model if name == "vlm" else generator_of(stage)
        family = "qwen2_5_vl" if name == "vlm" else "sd3"
        meta = {"kind": "base_model", "family": family, "architecture": architecture.model_dump(mode="json")}
        platform, groups = setup.enter(stage)
        try:
            _, (chunk,) = setup.build_model(stage, platform, groups)
            shake([chunk], seed=len(target))
            held = ("vision_encoder.", "backbone.") if name == "vlm" else ("mmdit.", "vae.")
            state = model_state([chunk], groups)["model0"]
            save({"model0": {key: each for key, each in state.items() if key.startswith(held)}}, folder / target, meta)
        finally:
            destroy_groups()
    data = [f"data.sources.{kind}.path={folder}/data/train/{kind}.jsonl" for kind in kinds]
    tokenizer = f"data.tokenizer={repo}/tools/base_models/shapes_vlm"
    return [*data, tokenizer, f"base_checkpoint={folder}/base", f"generator_checkpoint={folder}/generator"]


def diffusion_step(stage: StageConfig, world: World, seed: int = 0) -> TrainStep:
    """A step over a random model, no weight of which is zero."""
    platform, groups = world
    torch.manual_seed(seed)
    method, chunks = setup.build_model(stage, platform, groups)
    shake(chunks, seed)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    return TrainStep(stage, method, wrapped, build_optimizer(wrapped, stage, groups), platform, groups)


def chunk_of(step: TrainStep) -> MMCoreDiffusionModel:
    return step.chunks[0].module


def make_frames(stage: StageConfig, name: str, *parts: Part, learned: bool = True) -> FrameSample:
    """A loaded conversation of parts, the last of which is drawn; words, pixels and chance are random."""
    model, vlm, generator = stage.model, vlm_of(stage), generator_of(stage)
    rng = np.random.default_rng(sum(map(ord, name)))
    sequence = TokenSequence(model.token_ids, model.vision_encoder.spatial_merge_size)
    words: list[np.ndarray] = []
    texts: list[np.ndarray] = []
    queries: list[np.ndarray] = []
    sizes, drawn = [], []
    for place, (kind, *size) in enumerate(parts):
        if kind == "says":
            words.append(np.arange(size[0]) + len(sequence))
            sequence.add_text(rng.integers(0, 100, size[0]).tolist(), learned=False)
            continue
        sizes.append(size)
        drawn.append(kind == "draws")
        if drawn[-1]:
            queries.append(sequence.add_queries(vlm.num_queries, learned=False))
            texts.append(np.concatenate(words))
            words = []
        if place < len(parts) - 1:
            sequence.add_image(np.array([1, 4, 6] if drawn[-1] else [1, 4, 4]), is_target=False)
    kind = "interleaved" if len(sizes) > 2 else "editing" if len(sizes) > 1 else "text_to_image"
    tokens = void(sequence.finish(name, kind, model.vision_encoder.patch_dim))
    num_patches = int(tokens.grids.prod(axis=1).sum())
    patches = rng.standard_normal((num_patches, model.vision_encoder.patch_dim)).astype(np.float32)
    num_image = int(np.prod(sizes, axis=1).sum())
    count = len(sizes)
    return FrameSample(
        id=name,
        kind=kind,
        layout=QueryTokens(
            tokens=replace(tokens, patches=patches),
            read_index=(),
            read_drawn=(),
            drawn_index=tuple(np.flatnonzero(drawn).tolist()),
            query_index=np.concatenate(queries),
            text_index=tuple(texts),
        ),
        image_index=tuple(range(count)),
        sizes=np.array(sizes, dtype=np.int64),
        is_drawn=np.array(drawn),
        uniform=rng.uniform(0.02, 0.98, count),
        text_uniform=rng.random(count),
        visual_uniform=rng.random(count),
        noise_seed=int(rng.integers(1 << 62)),
        queries=vlm.scales.queries,
        learned=learned,
        pixels=rng.uniform(-1, 1, (num_image, 3 * generator.token_pixels**2)).astype(np.float32),
    )


THREE = (("shows", 2, 2), ("says", 3), ("draws", 2, 3), ("says", 6), ("draws", 3, 2))
"""A picture that is given, its edit, and the edit of that."""


def several(stage: StageConfig) -> list[FrameSample]:
    """One to three frames of several sizes, given and drawn, and a sample of which nothing is learned."""
    return [
        make_frames(stage, "picture", ("says", 5), ("draws", 2, 2)),
        make_frames(stage, "edits", *THREE),
        make_frames(stage, "edit", ("shows", 3, 2), ("says", 4), ("draws", 2, 2)),
        make_frames(stage, "broken", ("shows", 1, 2), ("says", 2), ("draws", 2, 1), learned=False),
        make_frames(
            stage, "story", ("says", 4), ("draws", 2, 2), ("says", 2), ("draws", 1, 4), ("says", 1), ("draws", 2, 2)
        ),
    ]


def row_of(stage: StageConfig, samples: Sequence[FrameSample], step: int = 0) -> FrameRow:
    """One row of samples, as the stage's own work lays it."""
    return frame_work(stage, DataSetup({}, lambda: wordless_chat(stage.model, stage.data))).row(samples, step)
