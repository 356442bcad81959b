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
from dataclasses import dataclass
from functools import partial
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
from megatron_unimm.data.sample import Turn
from megatron_unimm.data.sizes import new_size
from megatron_unimm.errors import CheckpointError, UserError
from megatron_unimm.flow.guidance import num_conditions
from megatron_unimm.flow.guided import FrameState, GuidedFrames, GuidedRow
from megatron_unimm.flow.solvers import solve, starting_noise
from megatron_unimm.flow.timesteps import timestep_grid
from megatron_unimm.hub.denoiser import Denoiser, FrameRow
from megatron_unimm.hub.language_model import Connector, LanguageModel
from megatron_unimm.models.pathways import DualPathway
from megatron_unimm.models.vae import decode, from_patches, picture_patches, to_pictures

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
        work = FrameWork(generator, chat, vlm.scales, {}, 0, NO_DROPOUT, NO_DROPOUT, settings["max_frames"])
        hidden, latent, mmdit = spoken.backbone.hidden_size, vlm.latent_size(spoken), generator.mmdit
        connector = _filled(
            Connector(vlm.connector, vlm.num_queries, hidden, latent), folder / "query_connector", device
        )
        pathways = _filled(
            DualPathway(hidden, latent, vlm.grid, mmdit.condition_size, mmdit.pooled_size),
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
        return to_pictures(decode(self.vae, grid))[0]

    @torch.no_grad()
    def latents(
        self, prompt: str, pictures: Sequence[np.ndarray] = (), *, seed: int = 0, number: int = 0, **sampler: Any
    ) -> tuple[Tensor, tuple[int, int]]:
        """Patches of latents ``[u, F]`` of the picture, and its rows and columns of these; arguments as a call's."""
        settings = SamplerConfig.model_validate({**self.sampler.model_dump(), **sampler})
        asked = self._lay_out(prompt, pictures)
        rows, columns = (int(count) for count in asked.sample.sizes[-1])
        noise = starting_noise(seed, number, rows * columns, self.work.generator.mmdit.patch_dim).to(self.device)
        grid = timestep_grid(settings.steps, settings.shift, rows * columns, settings.spacing)
        guided = self._guided(asked, settings)
        return solve(guided.velocity, noise[None], grid.tolist(), settings.solver)[0], (rows, columns)

    # -- what is asked

    def _lay_out(self, prompt: str, pictures: Sequence[np.ndarray]) -> "Asked":
        _check(prompt, pictures)
        work = self.work
        sizes = [(picture.shape[1], picture.shape[0]) for picture in pictures]
        new = new_size(sizes[-1] if sizes else None, work.data.generation_size, work.chat.encoder.token_pixels)
        sample = work.frames_to_draw([Turn("user", (*range(len(pictures)), prompt))], [*sizes, new])
        return Asked(work.with_patches(sample, pictures), tuple(pictures))

    def clean_latents(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Patches of latents of pictures, one behind the other, at the size that they are drawn in."""
        rule, generator = self.work.data.drawing_size, self.work.generator
        assert rule is not None
        cut = [images.brought_to(picture, rule, generator.token_pixels) for picture in pictures]
        mmdit = generator.mmdit
        return picture_patches(self.vae, cut, mmdit.patch_size, mmdit.patch_dim, torch.float32, self.device)

    def _guided(self, asked: "Asked", sampler: SamplerConfig) -> GuidedFrames:
        """Its conversation stands in a row once per condition, with the pictures before in each."""
        row, generator = self.work.row([asked.sample]), self.work.generator
        hidden, latents = self.language_model(row.conversation, row.query_index)
        words = hidden.index_select(0, torch.from_numpy(row.word_index).to(hidden.device))
        latents = latents[-self.work.scales.queries[-1] :]  # those of the last picture
        spoken, shown = (torch.ones(len(each), dtype=torch.bool, device=words.device) for each in (words, latents))
        order = torch.from_numpy(row.condition_order).to(words.device)
        clean = self.clean_latents(asked.pictures)

        def lay(times: int) -> GuidedRow:
            frames = row.frames.tiled(times)
            condition = self.pathways.guided(words, spoken, latents, shown, order, times)
            state = FrameState.build(frames, clean.repeat(times, 1), generator.mmdit.patch_dim, self.device)
            return GuidedRow(state, partial(self.denoiser, FrameRow.build(frames, generator, self.device), condition))

        return GuidedFrames(lay, num_conditions(sampler), sampler)


@dataclass(frozen=True)
class Asked:
    """A picture to be drawn."""

    sample: FrameSample
    """Its frames, of which the last is drawn."""
    pictures: tuple[np.ndarray, ...]
    """Those before it, uint8 (H, W, 3)."""


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
