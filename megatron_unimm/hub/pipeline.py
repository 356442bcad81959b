"""What pipelines of exported folders have in common: a picture from a prompt and the pictures before.

Legend  u image tokens of the picture, U of all frames, F values of a patch of latents, V tokens of the condition of all
        frames, C its width, P of the pooled condition, H hidden size of the VLM, n frames.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.data.frames import FrameRow as ConversationRow
from megatron_unimm.data.frames import FrameSample, FrameWork
from megatron_unimm.data.sample import Turn
from megatron_unimm.data.sizes import new_size
from megatron_unimm.errors import UserError
from megatron_unimm.flow.guided import FrameState, GuidedFrames, GuidedRow
from megatron_unimm.flow.solvers import solve, starting_noise
from megatron_unimm.flow.timesteps import timestep_grid
from megatron_unimm.hub.denoiser import Denoiser, FrameRow
from megatron_unimm.hub.language_model import LanguageModel
from megatron_unimm.models.vae import decode, from_patches, picture_patches, to_pictures

SaidT = TypeVar("SaidT")


class Condition(NamedTuple):
    """What frames are drawn from."""

    text: Tensor
    """``[V, C]``."""
    pooled: Tensor
    """``[n, P]``, or ``[P]`` of all frames."""


@dataclass(frozen=True)
class Asked:
    """A picture to be drawn."""

    sample: FrameSample
    """Its frames, of which the last is drawn."""
    pictures: tuple[np.ndarray, ...]
    """Those before it, uint8 (H, W, 3)."""
    scale: int
    """At which of the model's scales."""


class FramePipeline(ABC, Generic[SaidT]):
    """Draws pictures of prompts, one at a time.

    Args:
        work: how conversations become frames, without any source.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        denoiser: Denoiser,
        vae: AutoencoderKL,
        work: FrameWork,
        sampler: SamplerConfig,
    ) -> None:
        self.language_model = language_model
        self.denoiser = denoiser
        self.vae = vae
        self.work = work
        self.sampler = sampler
        """What the checkpoint's recipe draws with."""
        self.device = language_model.device

    # -- a method's own

    @abstractmethod
    def num_conditions(self, sampler: SamplerConfig) -> int:
        """Velocities that a guided one is made of.

        Raises:
            UserError: guidance by something that the model does not have.
        """

    @abstractmethod
    def said(self, row: ConversationRow, scale: int) -> SaidT:
        """What the VLM says of a conversation."""

    @abstractmethod
    def condition(self, said: SaidT, row: ConversationRow, times: int) -> Condition:
        """``times`` that of the conversation, each less conditioned than the one before."""

    # -- drawing

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        pictures: Sequence[np.ndarray] = (),
        *,
        seed: int = 0,
        number: int = 0,
        scale: int = -1,
        **sampler: Any,
    ) -> np.ndarray:
        """The picture, uint8 (H, W, 3), that answers a prompt with pictures (uint8 (H, W, 3)) before it.

        Args:
            seed, number: fix the noise.
            scale: at which of the model's scales it is drawn; the last is the finest.
            sampler: fields of ``SamplerConfig`` in place of the recipe's: ``steps``, ``guidance_scale``, …

        Raises:
            UserError: no prompt, something that is no picture, more pictures than the model can tell apart, or a scale
                that it has not.
        """
        latents, (rows, columns) = self.latents(prompt, pictures, seed=seed, number=number, scale=scale, **sampler)
        grid = from_patches(latents[None], rows, columns, self.work.generator.mmdit.patch_size)
        return to_pictures(decode(self.vae, grid))[0]

    @torch.no_grad()
    def latents(
        self,
        prompt: str,
        pictures: Sequence[np.ndarray] = (),
        *,
        seed: int = 0,
        number: int = 0,
        scale: int = -1,
        **sampler: Any,
    ) -> tuple[Tensor, tuple[int, int]]:
        """Patches of latents ``[u, F]`` of the picture, and its rows and columns of these; arguments as a call's."""
        settings = SamplerConfig.model_validate({**self.sampler.model_dump(), **sampler})
        self.num_conditions(settings)  # what cannot be guided is refused before anything is worked out
        asked = self._lay_out(prompt, pictures, scale)
        rows, columns = (int(count) for count in asked.sample.sizes[-1])
        noise = starting_noise(seed, number, rows * columns, self.work.generator.mmdit.patch_dim).to(self.device)
        grid = timestep_grid(settings.steps, settings.shift, rows * columns, settings.spacing)
        guided = self._guided(asked, settings)
        return solve(guided.velocity, noise[None], grid.tolist(), settings.solver)[0], (rows, columns)

    def _lay_out(self, prompt: str, pictures: Sequence[np.ndarray], scale: int) -> Asked:
        _check(prompt, pictures, scale, len(self.work.scales.queries))
        work = self.work
        sizes = [(picture.shape[1], picture.shape[0]) for picture in pictures]
        new = new_size(sizes[-1] if sizes else None, work.data.generation_size, work.chat.encoder.token_pixels)
        sample = work.frames_to_draw([Turn("user", (*range(len(pictures)), prompt))], [*sizes, new], scale)
        return Asked(work.with_patches(sample, pictures), tuple(pictures), scale)

    def _guided(self, asked: Asked, sampler: SamplerConfig) -> GuidedFrames:
        """Its conversation stands in a row once per condition, with the pictures before in each."""
        row, generator = self.work.row([asked.sample]), self.work.generator
        said, clean = self.said(row, asked.scale), self._clean_latents(asked)

        def lay(times: int) -> GuidedRow:
            frames, condition = row.frames.tiled(times), self.condition(said, row, times)
            state = FrameState.build(frames, clean.repeat(times, 1), generator.mmdit.patch_dim, self.device)
            laid = FrameRow.build(frames, generator, self.device)
            return GuidedRow(state, partial(self.denoiser, laid, condition.text, condition.pooled))

        return GuidedFrames(lay, self.num_conditions(sampler), sampler)

    def _clean_latents(self, asked: Asked) -> Tensor:
        """Patches of latents of the pictures before, one behind the other."""
        mmdit = self.work.generator.mmdit
        pictures = self.work.pictures_before(asked.sample, asked.pictures)
        return picture_patches(self.vae, pictures, mmdit.patch_size, mmdit.patch_dim, torch.float32, self.device)


def _check(prompt: str, pictures: Sequence[np.ndarray], scale: int, num_scales: int) -> None:
    """Refuse what is no prompt, no picture, or no scale.

    Raises:
        UserError: names it, and what to give.
    """
    if not prompt:
        raise UserError("prompt", "is empty; say what to draw")
    for number, picture in enumerate(pictures):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            what = f"is {picture.dtype} {list(picture.shape)}; give uint8 (height, width, 3)"
            raise UserError(f"pictures[{number}]", what)
    if not -num_scales <= scale < num_scales:
        raise UserError("scale", f"is {scale}, but the model has {num_scales}, counted from 0, coarse to fine")
