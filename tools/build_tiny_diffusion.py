"""Builds the tiny diffusion base models: an autoencoder and an SD3-style text-to-image model, trained from scratch on
the Shapes world with plain diffusers and transformers, on a CPU.

They play the part of the pretrained generator that the papers start from: it draws pictures of captions with its own
small text encoder, and knows nothing of the base VLM.

    python tools/build_tiny_diffusion.py --to tools/base_models/shapes_mmdit
    python tools/build_tiny_diffusion.py --score tools/base_models/shapes_mmdit

Two parts. The autoencoder (f8, eight channels) learns to give back pictures of the training split. Then the
text encoder and the transformer learn flow matching over its latents (Lipman et al., arXiv:2210.02747; architecture and
logit-normal timesteps of Esser et al., arXiv:2403.03206), one caption in ten being dropped for classifier-free
guidance (Ho and Salimans, arXiv:2207.12598). What is saved are the averaged weights.

Legend  B samples, S side of a picture (64), s side of its latents (8), C latent channels (8), T caption tokens (16),
        E width of the text encoder.
The result depends on the seed, the number of threads and the versions of the libraries only.
"""

import argparse
import copy
import json
import math
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_tiny_models import make_optimizer, schedule
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from megatron_unimm.data.shapes import (
    CANVAS,
    COLOURS,
    PROMPT_KINDS,
    Prompt,
    Scene,
    Score,
    geneval_prompts,
    is_correct,
    prompt_scene,
    render_array,
    sample_prompt,
    score,
)
from megatron_unimm.data.shapes.conversations import free_scene, generator
from megatron_unimm.data.shapes.prompts import RELATIONAL_KINDS
from megatron_unimm.data.shapes.scene import BACKGROUND

CHANNELS = (16, 32, 64, 64)
"""Widths of the autoencoder from the full resolution to the latents."""
LATENT_CHANNELS = 8
LATENT_SIDE = CANVAS // 2 ** (len(CHANNELS) - 1)
DECODER_NOISE, COLOUR_NOISE = 0.3, 1.0
"""Largest standard deviation of the noise that the decoder, and the layer that reads colours, find on latents in
training; in standard deviations of the latents."""
PALETTE = torch.tensor([BACKGROUND, *COLOURS.values()]).float().div(127.5).sub(1)
"""Colours of a picture, background first; float [9, 3] in [-1, 1]."""

VOCAB_SIZE = 640
CAPTION_TOKENS = 16
TEXT_WIDTH = 128
BLOCKS, HEADS = 6, 4
CAPTION_KINDS = (*PROMPT_KINDS, *RELATIONAL_KINDS)
"""Kinds of training captions in turn: those with the most different captions come twice as often."""
DROPPED = 0.1
"""Share of training captions that are replaced by the empty one."""
SAMPLING_STEPS = 20
GUIDANCE = 2.0
GUIDANCES = (1.0, 1.5, GUIDANCE, 3.0, 4.0)

_PICTURES, _HELD_OUT, _CAPTIONS = 31, 32, 33
"""Streams of random numbers, apart from those of the package's own samples."""


# --- training --------------------------------------------------------------------------------------------


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all weights."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def update(optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> None:
    """One step down the sum of the losses, the gradient clipped to norm 1."""
    torch.stack(list(losses.values())).sum().backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


class Progress:
    """Prints the mean losses of every hundred steps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = time.monotonic()
        self.recent: list[list[float]] = []
        self.step = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        self.step += 1
        self.recent.append([float(value.detach()) for value in losses.values()])
        if len(self.recent) == 100:
            means = zip(losses, np.mean(self.recent, axis=0), strict=True)
            shown = "  ".join(f"{key} {value:.4f}" for key, value in means)
            print(f"{self.name} step {self.step}  {shown}  {time.monotonic() - self.started:.0f} s", flush=True)
            self.recent = []


# --- autoencoder -----------------------------------------------------------------------------------------


def training_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the training split: a free one and a caption's in turn."""
    rng = generator(seed, index, _PICTURES)
    return free_scene(rng, "train") if index % 2 == 0 else prompt_scene(sample_prompt(rng), rng)


def to_pixels(scenes: list[Scene]) -> Tensor:
    """Pictures of scenes in [-1, 1], float [B, 3, S, S]."""
    pictures = torch.from_numpy(np.stack([render_array(scene) for scene in scenes]))
    return pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_pictures(pixels: Tensor) -> np.ndarray:
    """The inverse of `to_pixels`, rounded; uint8 [B, S, S, 3]."""
    return pixels.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def make_vae() -> AutoencoderKL:
    """The architecture, with random weights. Attention in the middle and the 1 x 1 convolutions around the latents are
    left out, as in SD3's autoencoder the latter are."""
    depth = len(CHANNELS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=CANVAS,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbours along rows and along columns."""
    return pixels[..., 1:] - pixels[..., :-1], pixels[..., 1:, :] - pixels[..., :-1, :]


def vae_losses(vae: AutoencoderKL, colour_head: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """What the autoencoder minimises, weighted.

    The squared error finds the objects (most of a picture is background, whose median the absolute error would rest
    at), the absolute error and that of the edges make them crisp, the small divergence keeps the latents near a normal.

    A linear layer reads the colours of each latent's square from noisy latents, which draws colours apart. Without it
    they lie on a line, a tenth as far from one another as shapes are, and whatever learns to draw in these latents
    learns colours last (latents aligned to what matters, VA-VAE, arXiv:2501.01423). The decoder reads a little noise,
    too (RAE, arXiv:2510.11690).
    """
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
        rebuilt = vae.decode(with_noise(posterior.mode(), DECODER_NOISE)).sample
    latents = posterior.mode().float()
    error = rebuilt.float() - pixels
    return {
        "squared": 3 * error.square().mean(),
        "absolute": error.abs().mean(),
        "edges": 0.5 * sum((part.abs().mean() for part in edges(error)), torch.zeros(())),
        "divergence": 5e-4 * divergence(posterior),
        "colours": 0.05 * colour_loss(colour_head(with_noise(latents, COLOUR_NOISE) / latents.std()), pixels),
    }


def with_noise(latents: Tensor, largest: float) -> Tensor:
    """Latents with Gaussian noise, each picture's of a standard deviation between 0 and ``largest`` of theirs."""
    level = largest * torch.rand(len(latents), 1, 1, 1)
    return latents + level * latents.std() * torch.randn_like(latents)


def colour_loss(logits: Tensor, pixels: Tensor) -> Tensor:
    """Cross entropy with the share of each colour in a latent's square; background, most of a picture, counts a tenth.

    Args:
        logits: [B, 9, s, s], background first.
    """
    distance = (pixels[:, None] - PALETTE[None, :, :, None, None]).square().sum(2)  # [B, 9, S, S]
    nearest = nn.functional.one_hot(distance.argmin(1), len(PALETTE)).permute(0, 3, 1, 2).float()
    shares = nn.functional.avg_pool2d(nearest, CANVAS // LATENT_SIDE)  # [B, 9, s, s]
    weight = torch.where(shares[:, 0] > 0.9, 0.1, 1.0)
    return -((shares * logits.log_softmax(1)).sum(1) * weight).sum() / weight.sum()


def divergence(posterior: DiagonalGaussianDistribution) -> Tensor:
    """KL divergence of the posterior from a standard normal, per latent number."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def train_vae(seed: int, steps: int, batch: int, rate: float) -> AutoencoderKL:
    """Train the autoencoder, then set the shift and scale of its latents."""
    torch.manual_seed(seed)
    vae = make_vae().train()
    colour_head = nn.Conv2d(LATENT_CHANNELS, len(PALETTE), 1)
    optimizer = make_optimizer([vae, colour_head], rate)
    progress = Progress("vae")
    for step in range(steps):
        set_rate(optimizer, rate * schedule(step / steps))
        losses = vae_losses(vae, colour_head, to_pixels([training_scene(seed, step * batch + i) for i in range(batch)]))
        update(optimizer, losses)
        progress.add(losses)
        if (step + 1) % 500 == 0:
            print(f"vae step {step + 1}  {vae_scores(vae, 96).text}", flush=True)
    latents = encode(vae.eval(), [training_scene(seed, index) for index in range(2048)])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, scenes: list[Scene]) -> Tensor:
    """Means of the posteriors of pictures, not yet shifted and scaled; float [B, C, s, s]."""
    parts = [to_pixels(scenes[start : start + 64]) for start in range(0, len(scenes), 64)]
    means = [vae.encode(part.to(memory_format=torch.channels_last)).latent_dist.mode() for part in parts]
    return torch.cat(means).contiguous()


def heldout_scenes(count: int) -> tuple[list[Prompt], list[Scene]]:
    """`count` scenes of held-out captions with their prompts, and as many free held-out scenes after them."""
    prompts, scenes, free = [], [], []
    for index in range(count):
        rng = generator(0, index, _HELD_OUT)
        prompts.append(sample_prompt(rng, RELATIONAL_KINDS[index % len(RELATIONAL_KINDS)], "heldout"))
        scenes.append(prompt_scene(prompts[-1], rng))
        free.append(free_scene(rng, "heldout"))
    return prompts, scenes + free


@dataclass(frozen=True)
class VaeScores:
    """How well the autoencoder gives back held-out scenes."""

    psnr: float
    """Decibels, from the mean squared error over all pictures, half of them free scenes."""
    accepted: float
    """Share of the captions' pictures that the scorer still finds right."""

    @property
    def text(self) -> str:
        return f"PSNR {self.psnr:.2f} dB, accepted {self.accepted:.3f}"


@torch.no_grad()
def vae_scores(vae: AutoencoderKL, count: int) -> VaeScores:
    """Measure on `count` captions' scenes and as many free ones, all held out."""
    prompts, scenes = heldout_scenes(count)
    latents = encode(vae, scenes)
    rebuilt = np.concatenate([to_pictures(vae.decode(part).sample) for part in latents.split(64)])
    truth = np.stack([render_array(scene) for scene in scenes])
    error = np.square(rebuilt.astype(np.float64) - truth).mean()
    accepted = [is_correct(prompt, picture) for prompt, picture in zip(prompts, rebuilt[:count], strict=True)]
    return VaeScores(10 * math.log10(255**2 / error), sum(accepted) / count)


# --- text to image ---------------------------------------------------------------------------------------


def training_prompt(seed: int, index: int) -> tuple[Prompt, Scene]:
    """Caption `index` of the training split, and its scene."""
    rng = generator(seed, index, _CAPTIONS)
    prompt = sample_prompt(rng, CAPTION_KINDS[index % len(CAPTION_KINDS)])
    return prompt, prompt_scene(prompt, rng)


def build_tokenizer(seed: int) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of its own: the bytes, and each word of the world's captions as one token."""
    tokenizer = CLIPTokenizer()
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.normalizer = tokenizer.backend_tokenizer.normalizer
    raw.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    raw.train_from_iterator([training_prompt(seed, index)[0].caption for index in range(6000)], trainer)
    learned = json.loads(raw.to_str())["model"]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [word for word in learned["vocab"] if word not in words]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) <= VOCAB_SIZE
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CAPTION_TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """The text encoder's architecture, with random weights."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CAPTION_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_transformer() -> SD3Transformer2DModel:
    """The transformer's architecture. Its modulations and its last layer start at 0, so that each block starts as the
    identity (adaLN-Zero of Peebles and Xie, arXiv:2212.09748)."""
    model = SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=BLOCKS,
        attention_head_dim=32,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32 * HEADS,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    modulations = [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*modulations, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


@dataclass(frozen=True)
class Examples:
    """Captions and the latents of their pictures."""

    latents: Tensor
    """float [N, C, s, s], shifted and scaled."""
    ids: Tensor
    """int64 [N, T]."""
    empty: Tensor
    """int64 [T]: the empty caption."""

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Latents and captions of random examples, some captions dropped."""
        chosen = torch.randint(len(self.ids), (size,))
        dropped = torch.rand(size, 1) < DROPPED
        return self.latents[chosen], torch.where(dropped, self.empty, self.ids[chosen])


def caption_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions padded to T tokens; int64 [B, T]."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def make_examples(vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int, count: int) -> Examples:
    """Encode the training captions and their pictures once and for all."""
    drawn = [training_prompt(seed, index) for index in range(count)]
    latents = (encode(vae, [scene for _, scene in drawn]) - vae.config.shift_factor) * vae.config.scaling_factor
    ids = caption_ids(tokenizer, [prompt.caption for prompt, _ in drawn])
    return Examples(latents, ids, caption_ids(tokenizer, [""])[0])


def flow_loss(
    transformer: SD3Transformer2DModel, text_encoder: CLIPTextModelWithProjection, latents: Tensor, ids: Tensor
) -> Tensor:
    """Squared error of the velocity of x_t = (1 - t) x_0 + t noise, t logit-normal.

    Args:
        transformer: takes t times 1000.
        text_encoder: its last hidden states and its projected end-of-text state are the condition.
        latents: x_0, [B, C, s, s].
        ids: captions, [B, T].
    """
    noise = torch.randn_like(latents)
    t = torch.sigmoid(torch.randn(len(latents)))
    noisy = latents + t[:, None, None, None] * (noise - latents)
    # The default kernel's backward pass takes a third of the step for these short sequences.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        text = text_encoder(ids)
        velocity = transformer(noisy, text.last_hidden_state, text.text_embeds, 1000 * t).sample
    return nn.functional.mse_loss(velocity.float(), noise - latents)


ABSENT = dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
"""Parts of diffusers' pipeline that this one goes without."""


def make_pipeline(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModelWithProjection,
    transformer: SD3Transformer2DModel,
) -> StableDiffusion3Pipeline:
    """diffusers' own pipeline, which takes the captions' embeddings since it has one text encoder of three."""
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        **ABSENT,
    )


@torch.no_grad()
def draw(
    pipeline: StableDiffusion3Pipeline, captions: list[str], steps: int, guidance: float, seed: int = 0
) -> np.ndarray:
    """Pictures of captions, uint8 [B, S, S, 3]; 1 is no guidance."""
    pipeline.set_progress_bar_config(disable=True)
    encoder, parts = pipeline.text_encoder, []
    source = torch.Generator().manual_seed(seed)
    for start in range(0, len(captions), 64):
        some = captions[start : start + 64]
        text = encoder(caption_ids(pipeline.tokenizer, some))
        empty = encoder(caption_ids(pipeline.tokenizer, [""] * len(some)))
        pixels = pipeline(
            prompt_embeds=text.last_hidden_state,
            pooled_prompt_embeds=text.text_embeds,
            negative_prompt_embeds=empty.last_hidden_state,
            negative_pooled_prompt_embeds=empty.text_embeds,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=source,
            output_type="np",
        ).images
        parts.append((255 * pixels).round().astype(np.uint8))
    return np.concatenate(parts)


def score_line(scored: Score) -> str:
    """Overall and each kind."""
    return "  ".join(f"{kind} {value:.3f}" for kind, value in ({"overall": scored.overall} | scored.by_kind).items())


def train_mmdit(
    vae: AutoencoderKL, seed: int, steps: int, batch: int, rate: float, examples: int
) -> StableDiffusion3Pipeline:
    """Train text encoder and transformer together; the pipeline holds their averaged weights."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed)
    text_encoder, transformer = make_text_encoder(tokenizer), make_transformer()
    pipeline = make_pipeline(vae, tokenizer, text_encoder, transformer)
    pool = make_examples(vae, tokenizer, seed, examples)
    print(f"mmdit {examples} examples, latents {pool.latents.mean():.3f} +- {pool.latents.std():.3f}", flush=True)
    weights = [*transformer.parameters(), *text_encoder.parameters()]
    optimizer, average = make_optimizer([transformer, text_encoder], rate), EMAModel(weights, decay=0.999)
    progress, prompts = Progress("mmdit"), geneval_prompts(120, seed=1)
    for step in range(steps):
        set_rate(optimizer, rate * schedule(step / steps))
        losses = {"flow": flow_loss(transformer.train(), text_encoder.train(), *pool.batch(batch))}
        update(optimizer, losses)
        average.step(weights)
        progress.add(losses)
        if (step + 1) % 500 == 0:
            average.store(weights)
            average.copy_to(weights)
            pictures = draw(pipeline, [prompt.caption for prompt in prompts], 12, GUIDANCE)
            average.restore(weights)
            print(f"mmdit step {step + 1}  {score_line(score(prompts, list(pictures)))}", flush=True)
    average.copy_to(weights)
    return pipeline


# --- files -----------------------------------------------------------------------------------------------


def save_part(model: ModelMixin | PreTrainedModel, folder: Path) -> None:
    """Write a copy of a model in bf16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def load_vae(folder: Path) -> AutoencoderKL:
    """The stored autoencoder in float32, with the channels last: in float32 that is six times as fast on a CPU."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    return vae.eval().to(memory_format=torch.channels_last)


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """The stored models in float32."""
    return StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, vae=load_vae(folder), **ABSENT)


def record(folder: Path, part: str, facts: dict[str, Any]) -> None:
    """Note how a part was trained in training.json, beside the other's."""
    path = folder / "training.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {part: facts}, indent=2) + "\n")


def build_vae(options: argparse.Namespace) -> None:
    """Train and write the autoencoder."""
    started = time.monotonic()
    vae = train_vae(options.seed, options.vae_steps, options.vae_batch, options.vae_rate)
    save_part(vae, options.to / "vae")
    facts = {"steps": options.vae_steps, "batch": options.vae_batch, "rate": options.vae_rate, "seed": options.seed}
    minutes = round((time.monotonic() - started) / 60, 1)
    record(options.to, "vae", facts | {"threads": options.threads, "minutes": minutes})


def build_mmdit(options: argparse.Namespace) -> None:
    """Train and write text encoder and transformer, over the latents of the stored autoencoder."""
    started = time.monotonic()
    pipeline = train_mmdit(
        load_vae(options.to), options.seed, options.steps, options.batch, options.rate, options.examples
    )
    pipeline.tokenizer.save_pretrained(options.to / "tokenizer")
    pipeline.scheduler.save_pretrained(options.to / "scheduler")
    save_part(pipeline.text_encoder, options.to / "text_encoder")
    save_part(pipeline.transformer, options.to / "transformer")
    (options.to / "model_index.json").write_text(pipeline.to_json_string())
    facts = {"steps": options.steps, "batch": options.batch, "rate": options.rate, "seed": options.seed}
    minutes = round((time.monotonic() - started) / 60, 1)
    record(options.to, "mmdit", facts | {"examples": options.examples, "threads": options.threads, "minutes": minutes})


README = """# shapes_mmdit

The tiny diffusion base, trained from scratch on the Shapes world's training split, weights in bf16:

| part | class | parameters |
|---|---|---|
{parts}

The autoencoder turns 64 x 64 pixels into 8 x 8 latents of 8 channels. The condition of the transformer is the text
encoder's `last_hidden_state` (captions padded to {tokens} tokens, all attended to) and its `text_embeds`; the empty
caption stands for none. It learned flow matching with t = 1 for noise and takes 1000 t as its timestep.
`StableDiffusion3Pipeline.from_pretrained` loads the folder (with `None` for `text_encoder_2`, `tokenizer_2`,
`text_encoder_3` and `tokenizer_3`); give it `prompt_embeds` and `pooled_prompt_embeds`, since it has one text encoder
instead of three.

    {command}

rebuilds it; `--score {folder}` measures it again.

| training | steps | samples of a step | seed | threads | minutes |
|---|---|---|---|---|---|
{training}

Autoencoder on {scenes} held-out scenes: PSNR {psnr:.2f} dB; the scorer accepts {accepted:.1%} of the {prompts} pictures
of captions among them.

Text to image, {count} prompts of `geneval_prompts`, Euler's method with {steps} steps, share of right pictures:

| guidance | overall | {kinds} |
|---|---|{rules}
{rows}
"""


def score_folder(folder: Path, count: int, sheet: Path | None) -> None:
    """Measure the stored models, write the README and print the scores; draw the first pictures where asked to."""
    pipeline = load_pipeline(folder)
    vae = vae_scores(pipeline.vae, count)
    print(f"vae {vae.text}", flush=True)
    prompts = geneval_prompts(count)
    rows = []
    for guidance in GUIDANCES:
        pictures = draw(pipeline, [prompt.caption for prompt in prompts], SAMPLING_STEPS, guidance)
        scored = score(prompts, list(pictures))
        print(f"guidance {guidance}  {score_line(scored)}", flush=True)
        values = " | ".join(f"{value:.3f}" for value in (scored.overall, *scored.by_kind.values()))
        rows.append(f"| {guidance} | {values} |")
        if sheet is not None and guidance == GUIDANCE:
            write_sheet(prompts, pictures, sheet)
    parts = {"vae": pipeline.vae, "text_encoder": pipeline.text_encoder, "transformer": pipeline.transformer}
    sizes = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in parts.items()}
    table = [f"| `{name}` | {type(model).__name__} | {sizes[name]:.2f} M |" for name, model in parts.items()]
    training = json.loads((folder / "training.json").read_text())
    command = (
        f"python tools/build_tiny_diffusion.py --to {folder} --vae-steps {training['vae']['steps']} "
        f"--steps {training['mmdit']['steps']} --seed {training['mmdit']['seed']} "
        f"--threads {training['mmdit']['threads']}"
    )
    text = README.format(
        parts="\n".join(table),
        tokens=CAPTION_TOKENS,
        command=command,
        folder=folder,
        training="\n".join(
            f"| {name} | {t['steps']} | {t['batch']} | {t['seed']} | {t['threads']} | {t['minutes']} |"
            for name, t in training.items()
        ),
        psnr=vae.psnr,
        scenes=2 * count,
        accepted=vae.accepted,
        prompts=count,
        count=count,
        steps=SAMPLING_STEPS,
        kinds=" | ".join(PROMPT_KINDS),
        rules="---|" * len(PROMPT_KINDS),
        rows="\n".join(rows),
    )
    (folder / "README.md").write_text(text)


def write_sheet(prompts: list[Prompt], pictures: np.ndarray, file: Path) -> None:
    """Up to 48 pictures with their captions and whether they are right, eight in a row."""
    cell = (150, 96)
    count = min(len(prompts), 48)
    sheet = Image.new("RGB", (8 * cell[0], -(-count // 8) * cell[1]), "white")
    words = ImageDraw.Draw(sheet)
    for index in range(count):
        x, y = index % 8 * cell[0], index // 8 * cell[1]
        sheet.paste(Image.fromarray(pictures[index]), (x, y))
        right = is_correct(prompts[index], pictures[index])
        for row, part in enumerate(textwrap.wrap(prompts[index].caption, 26)):
            words.text((x, y + CANVAS + 12 * row), part, fill="black" if right else "red")
    sheet.save(file)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", type=Path, help="folder to write")
    target.add_argument("--score", type=Path, help="folder to measure, without training")
    parser.add_argument("--part", choices=("all", "vae", "mmdit"), default="all", help="mmdit reads the folder's vae")
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--vae-batch", type=int, default=16, help="pictures of a step")
    parser.add_argument("--vae-rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128, help="captions of a step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--examples", type=int, default=40000, help="different pictures with captions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=300, help="held-out prompts to measure on")
    parser.add_argument("--sheet", type=Path, help="PNG file for a sheet of drawn pictures")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    logging.set_verbosity_error()  # diffusers warns of optional packages and of nothing being kept in float32
    torch.set_num_threads(options.threads)
    folder = options.score or options.to
    if options.to is not None:
        if options.part != "mmdit":
            build_vae(options)
        if options.part != "vae":
            build_mmdit(options)
    if (folder / "model_index.json").exists():
        score_folder(folder, options.prompts, options.sheet)
    else:
        print(f"vae {vae_scores(load_vae(folder), options.prompts).text}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
