"""The shipped diffusion base (tools/base_models/shapes_mmdit), loaded and run with plain diffusers and transformers."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from megatron_unimm.data.shapes import (
    Prompt,
    Scene,
    geneval_prompts,
    is_correct,
    prompt_scene,
    render_array,
    sample_prompt,
    score,
)
from megatron_unimm.data.shapes.conversations import free_scene

FOLDER = Path(__file__).parents[2] / "tools" / "base_models" / "shapes_mmdit"
STEPS, GUIDANCE = 12, 2.0


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(FOLDER / "vae", dtype=torch.float32).eval()


def heldout_scenes(count: int) -> tuple[list[Prompt], list[Scene]]:
    """`count` held-out captions, their scenes, and as many free held-out scenes after them."""
    rng = np.random.default_rng(5)
    prompts = [sample_prompt(rng, None, "heldout") for _ in range(count)]
    scenes = [prompt_scene(prompt, rng) for prompt in prompts]
    return prompts, scenes + [free_scene(rng, "heldout") for _ in range(count)]


def to_pixels(scenes: list[Scene]) -> Tensor:
    """Pictures in [-1, 1], float [B, 3, 64, 64]."""
    pictures = torch.from_numpy(np.stack([render_array(scene) for scene in scenes]))
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: Tensor) -> np.ndarray:
    """The inverse of `to_pixels`; uint8 [B, 64, 64, 3]."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def test_weights_are_bf16_and_small() -> None:
    files = sorted(FOLDER.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"vae", "text_encoder", "transformer"}
    for file in files:
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 14 * 2**20


@torch.no_grad()
def test_autoencoder_gives_back_held_out_scenes(vae: AutoencoderKL) -> None:
    prompts, scenes = heldout_scenes(32)
    pixels = to_pixels(scenes)
    latents = vae.encode(pixels).latent_dist.mode()
    assert latents.shape == (64, 8, 8, 8)
    rebuilt = to_pictures(vae.decode(latents).sample)
    error = np.square(rebuilt.astype(np.float64) - to_pictures(pixels)).mean()
    assert 10 * np.log10(255**2 / error) >= 30
    accepted = [is_correct(prompt, picture) for prompt, picture in zip(prompts, rebuilt[:32], strict=True)]
    assert np.mean(accepted) >= 0.95


@torch.no_grad()
def test_latents_are_scaled_to_those_of_the_training_split(vae: AutoencoderKL) -> None:
    """Held-out scenes have more objects, which latents differ by."""
    rng = np.random.default_rng(6)
    scenes = [prompt_scene(sample_prompt(rng), rng) for _ in range(64)] + [free_scene(rng, "train") for _ in range(64)]
    latents = vae.encode(to_pixels(scenes)).latent_dist.mode()
    normal = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(float(normal.mean())) < 0.1
    assert abs(float(normal.std()) - 1) < 0.1


@torch.no_grad()
def test_draws_held_out_prompts(vae: AutoencoderKL) -> None:
    """Euler's method from noise (t = 1) to the picture's latents (t = 0), with classifier-free guidance."""
    transformer = SD3Transformer2DModel.from_pretrained(FOLDER / "transformer", dtype=torch.float32).eval()
    encoder = CLIPTextModelWithProjection.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    prompts = geneval_prompts(24, seed=3)
    captions = [prompt.caption for prompt in prompts] + [""] * len(prompts)
    text = encoder(tokenizer(captions, padding="max_length", return_tensors="pt").input_ids)
    latents = torch.randn(len(prompts), 8, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(1, 0, STEPS + 1)
    for t, after in pairwise(times):
        twice = torch.cat([latents, latents])
        velocity = transformer(twice, text.last_hidden_state, text.text_embeds, (1000 * t).expand(len(twice))).sample
        asked, free = velocity.chunk(2)
        latents = latents + (after - t) * (free + GUIDANCE * (asked - free))
    pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert score(prompts, list(to_pictures(pixels))).overall >= 0.85
