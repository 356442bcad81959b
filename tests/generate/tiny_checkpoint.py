"""A tiny random model, as a training checkpoint and as a base model, and conversations to try it on."""

from pathlib import Path

import numpy as np
import torch

from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.load import dump, load_recipe
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.sample import Turn
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.decode import GeneratedImage, Prompt
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.state import model_state

REPO = Path(__file__).resolve().parents[2]
TOKENIZER = REPO / "tools/base_models/shapes_vlm"
V = 16
"""Visual tokens of an image of 64 pixels."""
HIDDEN = 64


def small_model(base: Path) -> list[str]:
    """Overrides of the Shapes recipe that make its language model small, with four layers."""
    return [
        "model.vision_encoder.num_layers=2",
        "model.vision_encoder.hidden_size=32",
        "model.vision_encoder.mlp_size=48",
        "model.vision_encoder.full_attention_layers=[1]",
        f"model.vision_encoder.out_size={HIDDEN}",
        "model.backbone.num_layers=4",
        f"model.backbone.hidden_size={HIDDEN}",
        "model.backbone.num_heads=4",
        "model.backbone.head_size=16",
        "model.backbone.mlp_size=96",
        "model.backbone.mrope_sections=[2,3,3]",
        f"data.tokenizer={TOKENIZER}",
        f"base_checkpoint={base}",
        "system.precision.dtype=float32",
        "system.parallel.tensor=1",
        "system.parallel.sequence=false",
        "system.cpu_threads=1",
    ]


def stage_config(base: Path, *overrides: str) -> StageConfig:
    """The recipe's SFT stage with the small model."""
    return load_recipe(REPO / "configs/orion/shapes.yaml", [*small_model(base), *overrides]).stages["sft"]


# Three levels for four layers: one travels between two stages, two between four chunks.
DEEPSTACK = (
    "model.vision_encoder={family: qwen3, num_layers: 4, hidden_size: 32, num_heads: 4, mlp_size: 48, patch_size: 8, "
    f"out_size: {HIDDEN}, num_position_embeddings: 36, deepstack_layers: [0, 1, 3]}}",
    "model.backbone.mrope_interleaved=true",
    "model.backbone.qkv_bias=false",
    "model.backbone.qk_norm=true",
)
"""Qwen3-VL in place of Qwen2.5-VL."""


def make_checkpoints(folder: Path, *overrides: str) -> None:
    """FOLDER/base, and FOLDER/run/sft/checkpoints/step_00000001 with other weights. Large ones: answers vary."""
    stage = stage_config(folder / "base", *overrides)
    platform, groups = setup.enter(stage)
    _, chunks = setup.build_model(stage, platform, groups)
    architecture = {"family": "qwen2_5_vl", "architecture": stage.model.model_dump(mode="json")}
    head = {"vision_head": stage.method.vision_head.model_dump(mode="json")}
    metas = {
        folder / "base": {"kind": "base_model", **architecture},
        folder / "run/sft/checkpoints/step_00000001": {
            "kind": "training",
            "stage": "sft",
            "step": 1,
            "config": dump(stage),
            **architecture,
            **head,
        },
    }
    for seed, (directory, meta) in enumerate(metas.items()):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in chunks[0].named_parameters():
            # A random head that is fed its own output amplifies rounding from token to token; one with small weights
            # and large biases does not.
            scale = {"vision_head.linear_fc2.weight": 0.02, "vision_head.linear_fc2.bias": 0.5}.get(name, 0.1)
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
        directory.parent.mkdir(parents=True, exist_ok=True)
        save(model_state(chunks, groups), directory, meta, hf_files=TOKENIZER if meta["kind"] == "base_model" else None)
    destroy_groups()


def picture(seed: int) -> np.ndarray:
    """Noise, uint8 (64, 64, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def generated(seed: int) -> GeneratedImage:
    """Visual tokens as if they had been generated."""
    tokens = torch.randn(V, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return GeneratedImage(tokens, np.array([1, 8, 8]))


def prompts(generator: Generator) -> list[Prompt]:
    """Unequal conversations of every kind: text, images in one or both turns, an answer that begins with an image."""

    def user(*parts: str | int) -> Turn:
        return Turn("user", parts)

    said = Turn("assistant", (1, "There."))
    return [
        generator.prompt([user("Hello.")], number=0),
        generator.prompt([user(0, "How many circles are there?")], [picture(0)], number=1),
        generator.prompt([user("Draw a red circle, and then tell me about it.")], open_image=True, number=2),
        generator.prompt([user(0, 1, "Both, please.")], [picture(1), picture(2)], open_image=True, number=3),
        generator.prompt([user(0, "Make it blue."), said, user("Why?")], [picture(3), generated(4)], number=4),
    ]
