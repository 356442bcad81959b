"""A diffusion transformer that learns to draw, as one pipeline stage holds it. What it is conditioned on is a method's.

    condition ───────────────────────────────────────────────────┐
    picture ─ VAE (frozen) ─► x_0 ─┐                             ├─ diffusion transformer ─► velocity
                             ε ────┴─► x_t = (1 − t) x_0 + t ε ──┘

Layout: see ``models/mmdit/row.py`` for what travels between pipeline stages.

Legend  n frames of the row, V condition tokens, U image tokens, both without padding; t tokens of this context rank,
        t_text and t_image of its streams; F values of a patch of latents, C width of the condition.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.flow.path import interpolate
from megatron_unimm.flow.path import velocity as flow_velocity
from megatron_unimm.methods.drawing.autoencoder import build_autoencoder
from megatron_unimm.methods.drawing.losses import flow_matching_loss
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.models.diffusion import build_diffusion_transformer
from megatron_unimm.models.mmdit.canvas import Canvas, Place, padded_to
from megatron_unimm.models.mmdit.trunk import MMDiTInput, Tap
from megatron_unimm.models.specs import layers_backend
from megatron_unimm.models.transformer_config import DTYPES, mmdit_transformer_config
from megatron_unimm.models.vae import encode_patches
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.pipeline import with_zero_gradient
from megatron_unimm.parallel.platform import Platform


@dataclass(frozen=True)
class PictureInput:
    """Pictures, for the first and the last stage."""

    pixels: Tensor | None
    """``[U', 3 side²]`` in [-1, 1]; None where latents were computed beforehand."""
    latents: Tensor | None
    """``[U', F]``."""
    grids: list[tuple[int, int]]
    """Rows and columns of image tokens of each."""
    noise: Tensor
    """``[U, F]``."""
    token_of: Tensor | None = None
    """int64 ``[U]``: which of the U' tokens each of the row's is of, where a picture is there twice; None where U' is
    U."""


@dataclass(frozen=True)
class LossInput:
    """What the last stage weighs its tokens by; t_image tokens of this context rank."""

    weight: Tensor
    """float32 ``[t_image]``."""
    counted: Tensor
    """float32 ``[t_image]``."""
    bins: Tensor
    """int64 ``[t_image]``."""


class Condition(NamedTuple):
    """What a row is drawn from, beside noise."""

    text: Tensor
    """``[V, C]``."""
    image: Tensor | None = None
    """``[U, H]``, to be added to the tokens of patches; None for nothing."""
    pooled: Tensor | None = None
    """The pooled condition ``[n, P]`` of each frame; None where :meth:`DrawingModel.pooled` has it."""


@dataclass(frozen=True)
class DrawingBatch:
    """One micro-batch, as every method that draws has it."""

    canvas: Canvas
    timestep: Tensor
    """float32 ``[n]``, one per conditioning vector."""
    pictures: PictureInput | None
    loss: LossInput | None


class DrawingModel(StageModel):
    """One pipeline stage.

    Parts:
        mmdit: the diffusion transformer. vae: frozen, or a tokenizer in its place; saved with the rest, so that a
            checkpoint draws by itself (first stage).
        base: on the last stage of a pipeline a second one.

    Args:
        tap_after: see :meth:`tap`.
    """

    def __init__(
        self,
        stage: StageConfig,
        platform: Platform,
        groups: ParallelGroups,
        virtual_stage: int = 0,
        tap_after: int | None = None,
    ) -> None:
        model = stage.generator
        assert model is not None
        assert model.vae is not None
        config = mmdit_transformer_config(model.mmdit, stage.system, platform)
        super().__init__(config, groups, virtual_stage)
        self.stage = stage
        self.model = model
        self.backend = layers_backend(stage.system.layers, platform, stage.system.precision.fp8 is not None)
        self.platform = platform
        self.mmdit = build_diffusion_transformer(
            model.mmdit,
            config,
            self.backend,
            groups.collection,
            self.pre_process,
            self.post_process,
            self.vp_stage,
            tap_after,
        )
        if self.pre_process:
            self.vae = build_autoencoder(stage, platform, groups)
        elif self.post_process and not stage.data.latent_cache:
            self.base.vae = build_autoencoder(stage, platform, groups)

    def place(self, num_vectors: int | None) -> Place:
        """Where this chunk stands, for laying out rows."""
        tensor = self.groups.collection.tp
        return Place(
            backend=self.backend,
            device=self.platform.device,
            dtype=DTYPES[self.stage.system.precision.dtype],
            context=(self.groups.context_rank, self.groups.config.context),
            sequence=(tensor.rank(), tensor.size()) if self.config.sequence_parallel else (0, 1),
            num_vectors=num_vectors,
        )

    def conditions(self, batch: DrawingBatch) -> Condition:
        """Of a micro-batch (first stage)."""
        raise NotImplementedError

    def pooled(self, num_vectors: int) -> Tensor | None:
        """The pooled condition ``[n, P]`` of each conditioning vector, where a row's own condition does not say it
        (first stage); None where the transformer has none."""
        raise NotImplementedError

    def added(self, canvas: Canvas) -> Tensor | None:
        """``[t_image, H]``, to be added to the tokens of patches whatever the condition (first stage); None for
        nothing."""
        return None

    def tap(self, batch: DrawingBatch) -> Tap | None:
        """What is worked out of the hidden states after layer ``tap_after``: one more loss term, the last; None for
        nothing. On every stage, though only one looks."""
        return None

    def forward(self, batch: DrawingBatch) -> Tensor:
        """The next stage's input, or on the last stage the sums of the loss terms, float32 ``[terms]``."""
        latents = self._latents(batch.pictures) if batch.pictures is not None else None  # [U, F]
        inputs = self._inputs(batch, latents) if self.pre_process else None
        tap = self.tap(batch)
        output = self.mmdit(batch.canvas.row, inputs, None if self.pre_process else self.input_tensor, tap)
        if self.post_process:
            output = self._loss(output, latents, batch)  # [terms]
            if tap is not None:
                assert tap.value is not None
                output = torch.cat([output, tap.value[None]])
        return output if self.pre_process else with_zero_gradient(output, self.input_tensor)

    # -- first and last stage

    def _latents(self, pictures: PictureInput) -> Tensor:
        """x_0 of every image token of the row."""
        latents = self._encoded(pictures)  # [U', F]
        return latents if pictures.token_of is None else latents.index_select(0, pictures.token_of)

    def _encoded(self, pictures: PictureInput) -> Tensor:
        if pictures.latents is not None:
            return pictures.latents
        assert pictures.pixels is not None
        if not pictures.grids:
            return pictures.noise
        vae = self.vae if self.pre_process else self.base.vae
        return encode_patches(
            vae, pictures.pixels, pictures.grids, self.model.token_pixels, self.model.mmdit.patch_size
        )

    # -- first stage

    def _inputs(self, batch: DrawingBatch, latents: Tensor | None) -> MMDiTInput:
        assert batch.pictures is not None
        assert latents is not None
        t = batch.timestep.index_select(0, batch.canvas.frame_of_token)  # [U], in float32: see flow/path.py
        noisy = interpolate(latents, batch.pictures.noise, t).to(latents.dtype)  # [U, F]
        return self.mmdit_input(batch.canvas, self.conditions(batch), noisy, batch.timestep)

    def mmdit_input(self, canvas: Canvas, condition: Condition, noisy_UF: Tensor, timestep: Tensor) -> MMDiTInput:
        """This context rank's part of what the diffusion transformer reads."""
        ranks = self.groups.config.context
        num_text, num_image = len(canvas.text_index) * ranks, len(canvas.image_index) * ranks
        guidance, count = None, len(timestep)
        if self.model.mmdit.guidance:
            guidance = torch.full_like(timestep, self.stage.method.embedded_guidance)
        added = self.added(canvas)
        if condition.image is not None:
            image = padded_to(condition.image, num_image).index_select(0, canvas.image_index)
            added = image if added is None else added + image
        return MMDiTInput(
            condition=padded_to(condition.text, num_text).index_select(0, canvas.text_index),
            patches=padded_to(noisy_UF, num_image).index_select(0, canvas.image_index),
            position_index=canvas.position_index,
            timestep=timestep,
            pooled=self.pooled(count) if condition.pooled is None else padded_to(condition.pooled, count),
            guidance=guidance,
            added=added,
        )

    # -- last stage

    def _loss(self, velocity_tF: Tensor, latents: Tensor | None, batch: DrawingBatch) -> Tensor:
        assert batch.pictures is not None
        assert batch.loss is not None
        assert latents is not None
        target = flow_velocity(latents.float(), batch.pictures.noise.float())  # [U, F]
        num_image = len(batch.canvas.image_index) * self.groups.config.context
        target = padded_to(target, num_image).index_select(0, batch.canvas.image_index)  # [t_image, F]
        return flow_matching_loss(velocity_tF, target, batch.loss.weight, batch.loss.counted, batch.loss.bins)
