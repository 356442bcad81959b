"""A tiny random image decoder beside the models of tiny_checkpoint.py, as training leaves it, and pictures to draw with
it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tiny_checkpoint import HIDDEN, REPO, make_checkpoints, small_model, stage_config

from megatron_unimm.checkpoint.manifest import step_directory
from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.generate.paint import Painter, PaintRequest
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.state import Checkpointer, checkpoint_folder, model_state, sharding_metadata
from megatron_unimm.train.step import TrainStep

FLUX = (
    "generator.mmdit={family: flux, num_layers: 2, num_single_layers: 3, num_heads: 4, head_size: 8,"
    " rotary_axes: [2, 2, 4], latent_channels: 4, condition_size: 24, pooled_size: 12, guidance: true}",
    "stages.decoder.method.embedded_guidance=2.5",
)
"""In place of SD3; five blocks, which no pipeline divides evenly."""
PLAIN = "stages.decoder.train.ema_decay=null"
"""Without a running average."""
SQUARE, WIDE = np.array([1, 8, 8]), np.array([1, 4, 8])
"""Grids of images that are drawn at 64 x 64 and at 96 x 48 pixels."""


def decoder_stage(folder: Path, *overrides: str) -> StageConfig:
    """The Shapes recipe's decoder stage with four small layers."""
    small = [
        "generator.mmdit.num_layers=4",
        "generator.mmdit.num_heads=4",
        "generator.mmdit.head_size=8",
        "generator.mmdit.condition_size=24",
        "generator.mmdit.pooled_size=12",
        "generator.mmdit.latent_channels=4",
        "generator.vae={latent_channels: 4, block_channels: [8, 8, 8, 8], layers_per_block: 1, norm_groups: 4,"
        " scaling_factor: 1.3, shift_factor: 0.1, sample_size: 128}",
        f"generator_checkpoint={folder}/generator",
        "stages.decoder.train.global_batch_size=null",
        "stages.decoder.train.global_batch_rows=4",
        "stages.decoder.data.drawing_size={rule: buckets, sizes: [[64, 64], [96, 48]]}",
    ]
    recipe = load_recipe(REPO / "configs/orion/shapes.yaml", [*small_model(folder / "base"), *small, *overrides])
    return recipe.stages["decoder"]


def make_decoder(folder: Path, *overrides: str) -> Path:
    """FOLDER/generator, an image generator as imported, and FOLDER/run/decoder, a decoder that was trained from it: its
    checkpoint, which is returned. Weights, and their running average where the stage has one, all differ."""
    stage = decoder_stage(folder, *overrides)
    platform, groups = setup.enter(stage)
    method, chunks = setup.build_model(stage, platform, groups)
    shift(chunks[0], 0)
    assert stage.generator is not None
    meta = {"family": stage.generator.mmdit.family, "architecture": stage.generator.model_dump(mode="json")}
    save(model_state(chunks, groups), folder / "generator", {"kind": "base_model", **meta})
    shift(chunks[0], 1)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    optimizer = build_optimizer(wrapped, stage, groups)
    step = TrainStep(stage, method, wrapped, optimizer, platform, groups)
    if step.average is not None:
        generator = torch.Generator().manual_seed(2)
        for average in step.average.average:
            average += 0.05 * torch.randn(average.shape, generator=generator)
    # Adam has its moments from the first step on, or once they are to be loaded.
    optimizer.sharded_state_dict(model_state(chunks, groups), is_loading=True, metadata=sharding_metadata(groups))
    run = folder / "run"
    Checkpointer(stage, method, run, wrapped, optimizer, step.average, groups, None).save(1, {}, asynchronous=False)
    destroy_groups()
    return step_directory(checkpoint_folder(run, "decoder"), 1)


def shift(chunk: torch.nn.Module, seed: int) -> None:
    """Random steps of every parameter: norms and biases count too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in chunk.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def make_all(folder: Path, *overrides: str) -> Path:
    """A language model and its decoder in one run: FOLDER/base, FOLDER/generator, FOLDER/run/{sft,decoder}."""
    make_checkpoints(folder)
    return make_decoder(folder, *overrides)


def tokens(seed: int, grid: np.ndarray = SQUARE) -> torch.Tensor:
    """Visual tokens ``[V, H]`` of an image, as if a model had made them."""
    return torch.randn(int(grid.prod()) // 4, HIDDEN, generator=torch.Generator().manual_seed(seed))


def requests() -> list[PaintRequest]:
    """Two sizes, with no source, with one and with two, of the same and of another size."""
    return [
        PaintRequest(tokens(0), SQUARE, 0),
        PaintRequest(tokens(1, WIDE), WIDE, 1, (tokens(2, WIDE),)),
        PaintRequest(tokens(3), SQUARE, 2, (tokens(4), tokens(5, WIDE))),
        PaintRequest(tokens(6, WIDE), WIDE, 3),
        PaintRequest(tokens(7), SQUARE, 4),
    ]


@contextmanager
def painter_of(checkpoint: Path) -> Iterator[Painter]:
    """A decoder alone, on one rank."""
    platform, groups = setup.enter(stage_config(checkpoint / "no_base"))
    torch.set_num_threads(1)
    try:
        yield Painter.load(checkpoint, groups, platform, "float32")
    finally:
        destroy_groups()


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """Largest, in grey levels."""
    return int(np.abs(one.astype(np.int64) - other).max())
