"""Tiny random models of MMCORE, saved as training saves them, and what to ask them."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_unimm.checkpoint.manifest import step_directory
from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.state import Checkpointer, checkpoint_folder, model_state, sharding_metadata
from megatron_unimm.train.step import TrainStep

REPO = Path(__file__).resolve().parents[2]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HIDDEN, LATENT, QUERIES, CONDITION = 64, 64, 6, 24
MODELS = (
    "model.vision_encoder.num_layers=2",
    "model.vision_encoder.hidden_size=32",
    "model.vision_encoder.mlp_size=40",  # no multiple of a vector register
    "model.vision_encoder.full_attention_layers=[1]",
    f"model.vision_encoder.out_size={LATENT}",
    "model.backbone.num_layers=2",
    f"model.backbone.hidden_size={HIDDEN}",
    "model.backbone.num_heads=4",
    "model.backbone.head_size=16",
    "model.backbone.mlp_size=88",
    "model.backbone.mrope_sections=[2,3,3]",
    "generator.mmdit.num_layers=3",
    "generator.mmdit.num_heads=4",
    "generator.mmdit.head_size=8",
    f"generator.mmdit.condition_size={CONDITION}",
    "generator.mmdit.pooled_size=12",
    "generator.mmdit.latent_channels=4",
    "generator.vae={latent_channels: 4, block_channels: [8, 8, 8, 8], layers_per_block: 1, norm_groups: 4,"
    " scaling_factor: 1.3, shift_factor: 0.1, sample_size: 128}",
    "system.cpu_threads=1",
)
SMALL = (
    *MODELS,
    f"queries.num_queries={QUERIES}",
    "stages.diffusion.data.drawing_size={rule: buckets, sizes: [[64, 64], [96, 48]]}",
    "stages.diffusion.method.sampler={steps: 3, guidance_scale: 2.5, image_guidance_scale: 1.5}",
    "stages.diffusion.method.max_frames=4",
    "train.global_batch_size=8",
    "stages.diffusion.train.global_batch_size=8",
)
FLUX = (
    "generator.mmdit={family: flux, num_layers: 2, num_single_layers: 2, num_heads: 4, head_size: 8,"
    f" rotary_axes: [2, 2, 4], latent_channels: 4, condition_size: {CONDITION}, pooled_size: 12, guidance: true}}",
    "stages.diffusion.method.embedded_guidance=2.5",
)
"""In place of SD3."""
DUAL = "generator.mmdit.dual_attention_layers=[0,1]"
"""SD3.5's second attention."""
CONNECTOR = (
    "queries.connector={num_layers: 2, projection: linear}",
    "model.vision_encoder.out_size=128",
    "model.backbone.hidden_size=128",
    "model.backbone.head_size=32",
    "model.backbone.mrope_sections=[4,6,6]",
)
"""With layers, two heads of 64."""
QWEN3 = (
    "model.vision_encoder={family: qwen3, num_layers: 4, hidden_size: 32, num_heads: 4, mlp_size: 40, patch_size: 8, "
    f"out_size: {HIDDEN}, num_position_embeddings: 36, deepstack_layers: [0, 1]}}",
    "model.backbone.mrope_interleaved=true",
    "model.backbone.qkv_bias=false",
    "model.backbone.qk_norm=true",
)
POLICY = tuple(each.replace(".diffusion.", ".policy.") for each in SMALL if each.startswith("stages.diffusion."))
"""For the stage that learns from rewards."""
PLAIN = "stages.diffusion.train.ema_decay=null"
"""Without a running average."""
LORA = "queries.lora={rank: 4, alpha: 6}"


def tiny_stage(
    folder: Path, name: str, *overrides: str, method: str = "mmcore", small: Sequence[str] = SMALL
) -> StageConfig:
    """A stage of a method's Shapes recipe with small models."""
    bases = [f"base_checkpoint={folder}/base", f"generator_checkpoint={folder}/generator"]
    return load_recipe(REPO / f"configs/{method}/shapes.yaml", [*small, *bases, *overrides]).stages[name]


def make_run(
    folder: Path,
    *overrides: str,
    name: str = "diffusion",
    family: str = "qwen2_5_vl",
    method: str = "mmcore",
    small: Sequence[str] = SMALL,
) -> Path:
    """FOLDER/run with one checkpoint of a stage, which is returned. Weights, and their running average where the stage
    has one, all differ."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    for file in TOKENIZER_FILES:
        (tokenizer / file).write_bytes((REPO / "tools/base_models/shapes_vlm" / file).read_bytes())
    stage = tiny_stage(folder, name, *overrides, method=method, small=small)
    platform, groups = setup.enter(stage)
    torch.set_num_threads(1)
    built, chunks = setup.build_model(stage, platform, groups)
    shift(chunks[0], 0)
    assert stage.generator is not None
    # Of what a stage starts from, saving reads the manifest and the files beside the weights.
    meta = {"family": family, "architecture": stage.model.model_dump(mode="json")}
    save({}, folder / "base", {"kind": "base_model", **meta}, hf_files=tokenizer)
    meta = {"family": stage.generator.mmdit.family, "architecture": stage.generator.model_dump(mode="json")}
    save({}, folder / "generator", {"kind": "base_model", **meta})
    wrapped = wrap_data_parallel(chunks, stage, groups)
    optimizer = build_optimizer(wrapped, stage, groups)
    step = TrainStep(stage, built, wrapped, optimizer, platform, groups)
    if step.average is not None:
        generator = torch.Generator().manual_seed(2)
        for average in step.average.average:
            average += 0.05 * torch.randn(average.shape, generator=generator)
    # Adam has its moments from the first step on, or once they are to be loaded.
    optimizer.sharded_state_dict(model_state(chunks, groups), is_loading=True, metadata=sharding_metadata(groups))
    run = folder / "run"
    Checkpointer(stage, built, run, wrapped, optimizer, step.average, groups, None).save(1, {}, asynchronous=False)
    destroy_groups()
    shutil.rmtree(folder / "base")  # a checkpoint answers by itself
    shutil.rmtree(folder / "generator")
    return step_directory(checkpoint_folder(run, name), 1)


def shift(chunk: torch.nn.Module, seed: int) -> None:
    """Random steps of every parameter: norms, biases and the second halves of adapters count too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in chunk.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def picture(seed: int, width: int = 64, height: int = 64) -> np.ndarray:
    """Noise, uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


ASKED: dict[str, tuple[str, list[np.ndarray]]] = {
    "text": ("a red circle left of a blue square", []),
    "edit": ("Make the circle green, please.", [picture(0)]),
    "wide": ("Swap them.", [picture(1, 96, 48)]),
    "two": ("Put both into one picture.", [picture(2, 70, 50), picture(3)]),
}
"""Prompts and the pictures before them."""


# -- damage to an exported folder


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


def cut(part: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / part / "model.safetensors")
        save_file({**tensors, name: tensors[name][:-1].clone()}, folder / part / "model.safetensors")

    return change


def dropped(part: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / part / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / part / "model.safetensors")

    return change
