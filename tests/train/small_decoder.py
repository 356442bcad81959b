"""A small image decoder's stage, the checkpoints that it starts from, and pictures for it made by hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from small_orion import SMALL

from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.mmdit import ImageGeneratorConfig
from megatron_unimm.config.recipe import Recipe, StageConfig
from megatron_unimm.data.drawing import DrawingRow, DrawingSample
from megatron_unimm.data.shapes import write_shapes
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.orion.decoder.method import OrionDecoder
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.state import model_state, sharding_metadata
from megatron_unimm.train.step import TrainStep

World = tuple[Platform, ParallelGroups]

SMALL_DECODER = (
    *SMALL,
    "method.condition_noise=0",  # references know none; tests of noise set it
    "generator.mmdit.num_layers=2",
    "generator.mmdit.num_heads=2",
    "generator.mmdit.head_size=16",
    "generator.mmdit.condition_size=24",
    "generator.mmdit.pooled_size=12",
    "generator.mmdit.latent_channels=4",
    "generator.vae={latent_channels: 4, block_channels: [8, 8, 8, 8], layers_per_block: 1, norm_groups: 4,"
    " mid_attention: false}",
    "data.sequence_length=256",
    "stages.decoder.train.global_batch_size=8",
    "stages.decoder.train.global_batch_rows=null",
)
FLUX = (
    "generator.mmdit={family: flux, num_layers: 2, num_single_layers: 2, num_heads: 2, head_size: 16,"
    " rotary_axes: [4, 6, 6], latent_channels: 4, condition_size: 24, pooled_size: 12, guidance: true}"
)
STAGES = "{channels: 8, layers: 1, attention: false}, " * 4 + "{channels: 16, layers: 1, attention: true, scales: [5]}"
SANA = (
    "generator.mmdit={family: sana, num_layers: 4, num_heads: 4, head_size: 8, num_cross_heads: 2, cross_head_size: 12,"
    " latent_channels: 8, condition_size: 24}",
    f"generator.vae={{family: dc_ae, latent_channels: 8, attention_head_size: 8, encoder: [{STAGES}],"
    f" decoder: [{STAGES}], scaling_factor: 0.4}}",
)
"""With a VAE of 16 pixels to a latent."""


def small_recipe(repo: Path, *overrides: str) -> Recipe:
    """The Shapes recipe with two-layer models."""
    return load_recipe(repo / "configs/orion/shapes.yaml", [*SMALL_DECODER, *overrides])


def small_decoder(repo: Path, *overrides: str) -> StageConfig:
    """Its decoder's stage."""
    return small_recipe(repo, *overrides).stages["decoder"]


def generator_of(stage: StageConfig) -> ImageGeneratorConfig:
    assert stage.generator is not None
    return stage.generator


def write_world(repo: Path, folder: Path, seed: int = 0) -> list[str]:
    """Shapes data, a random base model (its vision encoder) and a random image generator; the overrides that take
    them."""
    write_shapes(folder / "data", count=48, seed=1)
    stage = small_decoder(repo)
    platform, groups = setup.enter(stage)
    try:
        _, (chunk,) = setup.build_model(stage, platform, groups)
        shake([chunk], seed)
        tower = chunk.base_sharded_state_dict("vision_encoder", sharding_metadata(groups))
        base = {"kind": "base_model", "family": "qwen2_5_vl", "architecture": stage.model.model_dump(mode="json")}
        save({"model0": tower}, folder / "base", base)
        generator = {
            key: value for key, value in model_state([chunk], groups)["model0"].items() if "connector" not in key
        }
        meta = {"kind": "base_model", "family": "sd3", "architecture": generator_of(stage).model_dump(mode="json")}
        save({"model0": generator}, folder / "generator", meta)
    finally:
        destroy_groups()
    data = [f"data.sources.{kind}.path={folder}/data/train/{kind}.jsonl" for kind in ("text_to_image", "editing")]
    return [*data, f"base_checkpoint={folder}/base", f"generator_checkpoint={folder}/generator"]


def shake(chunks: Sequence[torch.nn.Module], seed: int = 0) -> None:
    """Move every weight, so that none is zero (gates, biases, the pooled condition) and none goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def decoder_step(stage: StageConfig, world: World, seed: int = 0) -> TrainStep:
    """A step over a random model."""
    platform, groups = world
    torch.manual_seed(seed)
    method, chunks = setup.build_model(stage, platform, groups)
    shake(chunks, seed)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    return TrainStep(stage, method, wrapped, build_optimizer(wrapped, stage, groups), platform, groups)


def make_picture(
    stage: StageConfig,
    name: str,
    picture: tuple[int, int] = (2, 2),
    grids: Sequence[tuple[int, int]] = ((4, 4),),
    uniform: float = 0.4,
    unconditional: bool = False,
    learned: bool = True,
) -> DrawingSample:
    """A loaded sample of rows and columns of image tokens, and of patches of each condition image, of random pixels."""
    encoder, side = stage.model.vision_encoder, generator_of(stage).token_pixels
    rng = np.random.default_rng(sum(map(ord, name)))
    whole = np.array([[1, *grid] for grid in grids], dtype=np.int64)
    num_patches = int(whole.prod(axis=1).sum())
    return DrawingSample(
        id=name,
        kind="editing" if len(grids) > 1 else "text_to_image",
        image_index=tuple(range(len(grids))),
        by_assistant=(True,) + (False,) * (len(grids) - 1),
        grids=whole,
        picture=np.array(picture, dtype=np.int64),
        num_condition=num_patches // encoder.spatial_merge_size**2,
        uniform=uniform,
        unconditional=unconditional,
        noise_seed=int(rng.integers(1 << 63)),
        learned=learned,
        patches=rng.standard_normal((num_patches, encoder.patch_dim)).astype(np.float32),
        pixels=rng.uniform(-1, 1, (picture[0] * picture[1], 3 * side**2)).astype(np.float32),
    )


def several(stage: StageConfig) -> list[DrawingSample]:
    """Pictures of several sizes and timesteps, with and without condition, sources, and one that is not learned."""
    return [
        make_picture(stage, "square", (2, 2), uniform=0.3),
        make_picture(stage, "wide", (1, 4), [(4, 8)], uniform=0.9),
        make_picture(stage, "edit", (3, 2), [(6, 4), (4, 4)], uniform=0.55),
        make_picture(stage, "alone", (2, 2), [(4, 6)], uniform=0.05, unconditional=True),
        make_picture(stage, "broken", (2, 3), uniform=0.7, learned=False),
        make_picture(stage, "tall", (4, 1), [(4, 4), (4, 6), (6, 4)], uniform=0.52),
    ]


def row_of(stage: StageConfig, samples: Sequence[DrawingSample], world: World) -> DrawingRow:
    """One row of samples, as the stage's own work lays it."""

    def no_chat() -> None:
        raise AssertionError("the decoder reads no text")

    return OrionDecoder(stage, *world).work(DataSetup({}, no_chat)).row(samples)
