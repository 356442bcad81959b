"""MMCORE (arXiv 2604.19902) from an exported folder: transformers' VLM, diffusers' diffusion transformer and VAE, and
the parts between them.

    pipeline = MMCorePipeline.from_pretrained("exported")
    picture = pipeline("a red circle left of a blue square")  # uint8 (H, W, 3)
    edited = pipeline("Make the circle green.", [picture])

It draws what ``unimm generate`` draws of the checkpoint, without Megatron-Core; on a CPU in float32 to the last bit
(``hub/order.py``). The folder holds data only: no code comes from it.

Legend  u image tokens of the picture, U of all frames, F values of a patch of latents, V words and Q visual latents,
        C width of the condition, k conditions that a guided velocity is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_unimm.checkpoint.folder import LANGUAGE_MODEL
from megatron_unimm.config.data import DataConfig
from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.methods import DropoutSchedule
from megatron_unimm.config.mmdit import ImageGeneratorConfig
from megatron_unimm.config.model import ModelConfig
from megatron_unimm.config.queries import QueryVlmConfig
from megatron_unimm.convert.pipeline import TRANSFORMER, VAE
from megatron_unimm.convert.source import HfModel
from megatron_unimm.data import images
from megatron_unimm.data.chat import ChatFormat, ChatTokenizer
from megatron_unimm.data.frames import FrameSample, FrameWork
from megatron_unimm.data.queries import QueryTokens
from megatron_unimm.data.sample import Turn
from megatron_unimm.errors import CheckpointError, UserError
from megatron_unimm.flow.guidance import combined, guided_at
from megatron_unimm.flow.solvers import solve
from megatron_unimm.flow.timesteps import timestep_grid
from megatron_unimm.hub.denoiser import Denoiser, FrameRow
from megatron_unimm.hub.language_model import Connector, LanguageModel
from megatron_unimm.models.mmdit.frames import Frames
from megatron_unimm.models.pathways import DualPathway
from megatron_unimm.models.vae import decode, encode, from_patches, to_patches

CANVAS = 1 << 14
"""Pixels per side of a picture that nothing gives a shape: brought to the largest square that the model draws."""
NO_DROPOUT = DropoutSchedule(start=0.0, end=0.0)
WEIGHTS = "model.safetensors"
PartT = TypeVar("PartT", bound=nn.Module)


class MMCorePipeline:
    """Draws pictures of prompts, one at a time.

    Args:
        work: how conversations become frames, without any source.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        pathways: DualPathway,
        denoiser: Denoiser,
        vae: AutoencoderKL,
        work: FrameWork,
        sampler: SamplerConfig,
    ) -> None:
        self.language_model = language_model
        self.pathways = pathways
        self.denoiser = denoiser
        self.vae = vae
        self.work = work
        self.sampler = sampler
        """What the checkpoint's recipe draws with."""
        self.device = language_model.queries.device

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "MMCorePipeline":
        """Load a folder that ``unimm convert export`` wrote, in float32.

        Raises:
            CheckpointError: it is incomplete, damaged, or of something else.
            ConfigError: its tokenizer does not fit its language model.
        """
        folder = Path(folder)
        generator, spoken, parts = _configs(folder)
        settings = parts["pathways"]
        if "sampler" not in settings:
            what = "does not say how to draw; export the checkpoint of a training run"
            raise CheckpointError(str(folder / "pathways"), what)
        vlm = QueryVlmConfig.model_validate(parts["query_tokens"])
        chat = ChatFormat(
            ChatTokenizer(folder / LANGUAGE_MODEL, spoken),
            spoken.vision_encoder,
            DataConfig.model_validate(settings["data"]),
        )
        work = FrameWork(generator, chat, vlm, {}, 0, NO_DROPOUT, NO_DROPOUT, settings["max_frames"])
        hidden, latent, mmdit = spoken.backbone.hidden_size, vlm.latent_size(spoken), generator.mmdit
        connector = _filled(
            Connector(vlm.connector, vlm.num_queries, hidden, latent), folder / "query_connector", device
        )
        pathways = _filled(
            DualPathway(hidden, latent, vlm.num_queries, mmdit.condition_size, mmdit.pooled_size),
            folder / "pathways",
            device,
        )
        loading = {"torch_dtype": torch.float32, "local_files_only": True, "low_cpu_mem_usage": False}
        kind = FluxTransformer2DModel if mmdit.family == "flux" else SD3Transformer2DModel
        transformer = _ready(kind.from_pretrained(folder / TRANSFORMER, **loading), device)
        vae = _ready(AutoencoderKL.from_pretrained(folder / VAE, **loading), device)
        vae.enable_tiling()  # as models/vae.py
        speaker = transformers.AutoModelForImageTextToText.from_pretrained(
            folder / LANGUAGE_MODEL, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        queries = _weights(folder / "query_tokens", device)["weight"]
        embedding = _weights(folder / "frame_embedding", device)["weight"] if mmdit.family == "sd3" else None
        return cls(
            LanguageModel(_ready(speaker, device), spoken.vision_encoder, queries, connector),
            pathways,
            Denoiser(transformer, generator, pathways.pooled, embedding, settings["embedded_guidance"]),
            vae,
            work,
            SamplerConfig.model_validate(settings["sampler"]),
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        pictures: Sequence[np.ndarray] = (),
        *,
        seed: int = 0,
        number: int = 0,
        **sampler: Any,
    ) -> np.ndarray:
        """The picture, uint8 (H, W, 3), that answers a prompt with pictures (uint8 (H, W, 3)) before it.

        Args:
            seed, number: fix the noise.
            sampler: fields of ``SamplerConfig`` in place of the recipe's: ``steps``, ``guidance_scale``, …

        Raises:
            UserError: no prompt, something that is no picture, or more pictures than the model can tell apart.
        """
        latents, (rows, columns) = self.latents(prompt, pictures, seed=seed, number=number, **sampler)
        grid = from_patches(latents[None], rows, columns, self.work.generator.mmdit.patch_size)
        pixels = decode(self.vae, grid)[0]
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()

    @torch.no_grad()
    def latents(
        self, prompt: str, pictures: Sequence[np.ndarray] = (), *, seed: int = 0, number: int = 0, **sampler: Any
    ) -> tuple[Tensor, tuple[int, int]]:
        """Patches of latents ``[u, F]`` of the picture, and its rows and columns of these; arguments as a call's."""
        settings = SamplerConfig.model_validate({**self.sampler.model_dump(), **sampler})
        asked = self._lay_out(prompt, pictures)
        rows, columns = (int(count) for count in asked.sample.sizes[-1])
        noise = _noise(seed, number, rows * columns, self.work.generator.mmdit.patch_dim).to(self.device)
        grid = timestep_grid(settings.steps, settings.shift, rows * columns, settings.spacing)
        guided = Guided(self, asked, settings)
        return solve(guided.velocity, noise, grid.tolist(), settings.solver), (rows, columns)

    # -- what is asked

    def _lay_out(self, prompt: str, pictures: Sequence[np.ndarray]) -> "Asked":
        _check(prompt, pictures)
        work, data, encoder = self.work, self.work.data, self.work.chat.encoder
        height, width = pictures[-1].shape[:2] if pictures else (CANVAS, CANVAS)  # edits keep the shape
        new = images.target_size(width, height, data.generation_size, encoder.token_pixels)
        sizes = [*((picture.shape[1], picture.shape[0]) for picture in pictures), new]
        sample = work.frames_to_draw([Turn("user", (*range(len(pictures)), prompt))], sizes)
        tokens = replace(sample.layout.tokens, patches=self._patches(sample.layout, pictures))
        return Asked(replace(sample, layout=replace(sample.layout, tokens=tokens)), tuple(pictures))

    def _patches(self, layout: QueryTokens, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Of the pictures as the VLM reads them, float32 ``[P, patch_dim]``."""
        encoder, rule = self.work.chat.encoder, self.work.data.understanding_size
        parts = [np.zeros((0, encoder.patch_dim), dtype=np.float32)]
        for index, grid in zip(layout.read_index, layout.tokens.grids, strict=True):
            height, width = int(grid[1]) * encoder.patch_size, int(grid[2]) * encoder.patch_size
            pixels = images.resize(pictures[index], width, height, crop=rule.crop, filter=rule.filter)
            parts.append(images.patchify(pixels, encoder)[0])
        return np.concatenate(parts)

    def clean_latents(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Patches of latents of pictures, one behind the other, at the size that they are drawn in."""
        rule, side = self.work.data.drawing_size, self.work.generator.token_pixels
        assert rule is not None
        parts = [torch.zeros(0, self.work.generator.mmdit.patch_dim, device=self.device)]
        for picture in pictures:
            width, height = images.target_size(picture.shape[1], picture.shape[0], rule, side)
            cut = images.resize(picture, width, height, crop=rule.crop, filter=rule.filter)
            pixels = torch.tensor(cut, device=self.device, dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
            parts.append(to_patches(encode(self.vae, pixels), self.work.generator.mmdit.patch_size)[0])
        return torch.cat(parts)


@dataclass(frozen=True)
class Asked:
    """A picture to be drawn."""

    sample: FrameSample
    """Its frames, of which the last is drawn."""
    pictures: tuple[np.ndarray, ...]
    """Those before it, uint8 (H, W, 3)."""


class Guided:
    """The guided velocity of a picture. Its conversation stands in a row k times, once per condition: words and visual
    latents, visual latents, neither. The pictures before are there in each."""

    def __init__(self, pipeline: MMCorePipeline, asked: Asked, sampler: SamplerConfig) -> None:
        self.pipeline = pipeline
        self.sampler = sampler
        scales = (sampler.guidance_scale, sampler.image_guidance_scale)
        self.num_conditions = 1 if scales == (1.0, 1.0) else 2 if scales[1] == 1.0 else 3
        row = pipeline.work.row([asked.sample])
        hidden, latents = pipeline.language_model(row.conversation, row.query_index)
        words = hidden.index_select(0, torch.from_numpy(row.word_index).to(hidden.device))
        latents = latents[-pipeline.work.vlm.num_queries :]  # those of the last picture
        clean = pipeline.clean_latents(asked.pictures)
        conditions = [
            _condition(pipeline.pathways, number, words, latents, row.condition_order)
            for number in range(self.num_conditions)
        ]
        self._rows = {
            times: _Row.build(pipeline, _repeated(row.frames, times), torch.cat(conditions[:times]), clean)
            for times in {1, self.num_conditions}
        }

    def velocity(self, state_uF: Tensor, t: float) -> Tensor:
        """``[u, F]``."""
        sampler = self.sampler
        times = self.num_conditions if guided_at(t, sampler.guidance_interval) else 1
        row = self._rows[times]
        patches = row.base.index_copy(0, row.noisy, state_uF.repeat(times, 1))
        velocity = self.pipeline.denoiser(row.laid, row.condition, patches, row.is_noisy.float() * t)
        parts = velocity.index_select(0, row.noisy).reshape(
            times, 1, *state_uF.shape
        )  # samples are an axis of guidance
        return combined(list(parts), sampler)[0]


@dataclass(frozen=True)
class _Row:
    laid: FrameRow
    condition: Tensor
    """``[k (V + Q), C]``."""
    base: Tensor
    """``[U, F]``: latents of the pictures before, zeros where there is noise."""
    noisy: Tensor
    """int64 ``[k u]``: where that is."""
    is_noisy: Tensor
    """bool, of each frame."""

    @classmethod
    def build(cls, pipeline: MMCorePipeline, frames: Frames, condition: Tensor, clean: Tensor) -> "_Row":
        laid = FrameRow.build(frames, pipeline.work.generator, pipeline.device)
        frame_is_clean = torch.from_numpy(frames.is_clean).to(pipeline.device)
        is_clean = frame_is_clean[laid.image_frame]  # [U]
        base = torch.zeros(len(is_clean), clean.shape[1], device=pipeline.device)
        base[is_clean] = clean.repeat(int(frames.sample.max()) + 1, 1)
        return cls(laid, condition, base, (~is_clean).nonzero()[:, 0], ~frame_is_clean)


def _condition(pathways: DualPathway, number: int, words: Tensor, latents: Tensor, order: np.ndarray) -> Tensor:
    """``[V + Q, C]`` of one of the k conditions."""
    text = torch.full((len(words),), number == 0, device=words.device)
    visual = torch.full((len(latents),), number < 2, device=words.device)
    return pathways(words, text, latents, visual, torch.from_numpy(order).to(words.device))


def _repeated(frames: Frames, times: int) -> Frames:
    """The frames of one conversation as those of several alike."""
    return Frames(
        sizes=np.tile(frames.sizes, (times, 1)),
        num_condition=np.tile(frames.num_condition, times),
        sample=np.repeat(np.arange(times), len(frames)),
        number=np.tile(frames.number, times),
        is_clean=np.tile(frames.is_clean, times),
    )


def _noise(seed: int, number: int, tokens: int, width: int) -> Tensor:
    """float32 ``[tokens, F]`` that a picture is drawn from, the same on every machine (``generate/painter.py``)."""
    generator = np.random.Generator(np.random.Philox(key=[seed, number]))
    return torch.from_numpy(generator.standard_normal((tokens, width), dtype=np.float32))


def _check(prompt: str, pictures: Sequence[np.ndarray]) -> None:
    """Refuse what is no prompt, or no picture.

    Raises:
        UserError: names it, and what to give.
    """
    if not prompt:
        raise UserError("prompt", "is empty; say what to draw")
    for number, picture in enumerate(pictures):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            what = f"is {picture.dtype} {list(picture.shape)}; give uint8 (height, width, 3)"
            raise UserError(f"pictures[{number}]", what)


# ---------------------------------------------------------------------------------------------- folders


def _configs(folder: Path) -> tuple[ImageGeneratorConfig, ModelConfig, dict[str, dict[str, Any]]]:
    """What a folder holds, compared tensor by tensor with what it says: the image generator, the language model, and
    how the parts beside them are built.

    Raises:
        CheckpointError: it is incomplete, damaged, or of something else.
    """
    with HfModel(folder) as found:
        generator, spoken = found.model.config, found.language_model and found.language_model.config
        if not isinstance(generator, ImageGeneratorConfig) or not isinstance(spoken, ModelConfig):
            raise CheckpointError(str(folder), "is no exported MMCORE: it has no language model beside a transformer")
        if generator.vae is None or "pathways" not in found.parts:
            raise CheckpointError(str(folder), "is no exported MMCORE: it has no pathways, or no VAE")
        return generator, spoken, found.parts


def _weights(folder: Path, device: str) -> dict[str, Tensor]:
    """Of a part, in float32."""
    return {name: tensor.float().to(device) for name, tensor in load_file(folder / WEIGHTS).items()}


def _filled(part: PartT, folder: Path, device: str) -> PartT:
    part.load_state_dict(_weights(folder, device))
    return part.eval().to(device)


def _ready(model: Any, device: str) -> Any:
    """A model of transformers or diffusers, to be computed with."""
    return model.eval().to(device)
