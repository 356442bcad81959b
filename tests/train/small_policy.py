"""A small policy stage of MMCORE, prompts for it made by hand, and rewards."""

from pathlib import Path
from typing import Any

import numpy as np
import small_orion
import torch

from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.chat import ChatFormat, ChatTokenizer
from megatron_unimm.data.prompts import PromptRow, PromptSample, PromptWork
from megatron_unimm.data.sample import Turn
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.diffusion.method import frame_work
from megatron_unimm.methods.mmcore.policy.method import MMCorePolicy
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.rollout import Reference, Rollouts
from megatron_unimm.train.step import TrainStep

World = tuple[Platform, ParallelGroups]
SMALL = (
    *(setting for setting in small_orion.SMALL if not setting.startswith(("method.", "stages.", "data.seq"))),
    "queries.num_queries=4",
    "data.sequence_length=512",
    "generator.mmdit.num_layers=2",
    "generator.mmdit.num_heads=4",
    "generator.mmdit.head_size=8",
    "generator.mmdit.condition_size=24",
    "generator.mmdit.pooled_size=12",
    "generator.mmdit.latent_channels=4",
    "generator.vae={latent_channels: 4, block_channels: [8, 8, 8, 8], norm_groups: 4}",
    "method.grpo.rewards={shapes: null, mine: {kind: python, entry_point: 'small_policy:brightness'}}",
    "method.grpo.group_size=3",
    "method.grpo.num_prompts=2",
    "method.grpo.sampler={solver: euler, steps: 4, shift: 1.0}",
    "method.grpo.trained_steps={rule: window, size: 2, within: [0, 3]}",
)
WEIGHTS = {"one": (1.0, 1.0), "two": (2.5, 1.0), "three": (2.5, 1.5)}
"""Guidance of words and visual latents, by how many velocities it takes."""


def brightness(pictures: Any, prompts: Any) -> list[float]:
    """A user's reward."""
    return [float(picture.mean()) for picture in pictures]


def coarse_brightness(pictures: Any, prompts: Any) -> list[float]:
    """Brightness to an eighth of a level. Where sums round differently a few values get the next level, each of which
    moves the brightness of 64 x 64 pixels by 8e-5 and, through the spread of a group, advantages by 1e-4: that
    must not tell, so no picture may be near the edge between two rewards."""
    eighths = [8 * value for value in brightness(pictures, prompts)]
    nearest = min(abs(value % 1 - 0.5) for value in eighths)
    assert nearest > 0.05, f"a picture is {nearest:.1e} of a step from another reward; one value is 6.5e-4 of it"
    return [round(value) / 8 for value in eighths]


def nothing_good(pictures: Any, prompts: Any) -> list[float]:
    return [float("nan")] * len(pictures)


def policy_stage(repo: Path, *overrides: str) -> StageConfig:
    return load_recipe(repo / "configs/mmcore/shapes.yaml", [*SMALL, *overrides]).stages["policy"]


def guided_by(kind: str) -> tuple[str, str]:
    text, visual = WEIGHTS[kind]
    return f"method.grpo.sampler.guidance_scale={text}", f"method.grpo.sampler.image_guidance_scale={visual}"


def shake(chunks: list[StageModel]) -> None:
    """Random weights of which none is zero."""
    torch.manual_seed(0)
    for parameter in chunks[0].parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)


def build(stage: StageConfig, world: World, repo: Path) -> tuple[TrainStep, Rollouts, Reference]:
    """A random model; the reference is what it is before the first update."""
    method, chunks = setup.build_model(stage, *world)
    assert isinstance(method, MMCorePolicy)
    shake(chunks)
    return ready(stage, world, repo, method, chunks)


def ready(
    stage: StageConfig, world: World, repo: Path, method: MMCorePolicy, chunks: list[StageModel]
) -> tuple[TrainStep, Rollouts, Reference]:
    """Step and rollouts of chunks that have their weights."""
    platform, groups = world
    reference = Reference(chunks)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    step = TrainStep(stage, method, wrapped, build_optimizer(wrapped, stage, groups), platform, groups)
    tokenizer = ChatTokenizer(repo / "tools/base_models/shapes_vlm", stage.model)
    chat = ChatFormat(tokenizer, stage.model.vision_encoder, stage.data)
    work = PromptWork(frame_work(stage, DataSetup({}, lambda: chat)))
    return step, Rollouts(stage, method.grpo, wrapped, work, reference, platform, groups), reference


def prompts() -> list[PromptRow]:
    """Words alone, and an edit of a given picture."""
    rng = np.random.default_rng(0)
    given = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    words = PromptSample("a", "text_to_image", (Turn("user", ("a red circle",)),), (64, 64), 60, 11, {}, ())
    edit = PromptSample("b", "editing", (Turn("user", (0, "turn it blue")),), (64, 64), 90, 12, {}, (given,))
    return [PromptRow((words, edit), 512)]
