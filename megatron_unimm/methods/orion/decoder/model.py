"""The image decoder's network: visual tokens in, the velocity of a picture's latents out (section 3.3.2; Nexus-Gen,
arXiv 2504.21356, the generation decoder).

    picture ─ vision encoder (frozen) ─► visual tokens ─ connector ─► condition ─┐
    picture ─ VAE (frozen) ─► x_0 ─┐                                             ├─ diffusion transformer ─► velocity
                             ε ────┴─► x_t = (1 − t) x_0 + t ε ──────────────────┘

Layout: see ``models/mmdit/row.py`` for what travels between pipeline stages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_unimm.config.methods import OrionDecoderConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.flow.path import interpolate
from megatron_unimm.flow.path import velocity as flow_velocity
from megatron_unimm.methods.orion.decoder.batch import Canvas, Place, padded_to
from megatron_unimm.methods.orion.decoder.losses import flow_matching_loss
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.models.connectors import VisualTokenConnector
from megatron_unimm.models.mmdit.model import MMDiT, MMDiTInput
from megatron_unimm.models.specs import layers_backend
from megatron_unimm.models.transformer_config import DTYPES, mmdit_transformer_config, vision_transformer_config
from megatron_unimm.models.vae import build_vae, encode_patches
from megatron_unimm.models.vision import VisionInput, build_vision_encoder
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.pipeline import with_zero_gradient
from megatron_unimm.parallel.platform import Platform


@dataclass(frozen=True)
class ConditionInput:
    """What the first stage makes the condition of."""

    images: VisionInput | None
    """For the vision encoder; None where features were computed beforehand, or without any picture."""
    features: Tensor | None
    """``[V, F]`` of these."""
    kept: Tensor
    """``[V]``: 0 where a picture is drawn from no condition."""
    is_source: Tensor
    """``[V]``: 1 for tokens of source images."""
    noise: Tensor | None = None
    """``[V, H]``, added to visual tokens in training."""


@dataclass(frozen=True)
class PictureInput:
    """Pictures, for the first and the last stage."""

    pixels: Tensor | None
    """``[U, 3 side²]`` in [-1, 1]; None where latents were computed beforehand."""
    latents: Tensor | None
    """``[U, F]``."""
    grids: list[tuple[int, int]]
    """Rows and columns of image tokens of each."""
    noise: Tensor
    """``[U, F]``."""


@dataclass(frozen=True)
class LossInput:
    """What the last stage weighs its tokens by; t_image tokens of this context rank."""

    weight: Tensor
    """float32 ``[t_image]``."""
    counted: Tensor
    """float32 ``[t_image]``."""
    bins: Tensor
    """int64 ``[t_image]``."""


@dataclass(frozen=True)
class DecoderBatch:
    """One micro-batch."""

    canvas: Canvas
    timestep: Tensor
    """float32 ``[n]``, one per conditioning vector."""
    condition: ConditionInput | None
    pictures: PictureInput | None
    loss: LossInput | None


class OrionDecoderModel(StageModel):
    """One pipeline stage of the decoder.

    Parts:
        connector: visual tokens to the condition (first stage). mmdit: the diffusion transformer. vae: frozen; saved
            with the rest, so that a checkpoint draws by itself (first stage).
        base: the base model's vision encoder (first stage), and on the last stage of a pipeline a second VAE.
    """

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups, virtual_stage: int = 0) -> None:
        model, method = stage.generator, stage.method
        assert isinstance(method, OrionDecoderConfig)
        assert model is not None
        assert model.vae is not None
        config = mmdit_transformer_config(model.mmdit, stage.system, platform)
        super().__init__(config, groups, virtual_stage)
        self.stage = stage
        self.model = model
        self.embedded_guidance = method.embedded_guidance
        self.backend = layers_backend(stage.system.layers, platform, stage.system.precision.fp8 is not None)
        self.platform = platform
        self.mmdit = MMDiT(
            model.mmdit, config, self.backend, groups.collection, self.pre_process, self.post_process, self.vp_stage
        )
        if self.pre_process:
            # Its weights come from the seed alone, not from what this rank drew before: the same at every layout.
            torch.manual_seed(stage.train.seed)
            visual, mmdit = stage.model.vision_encoder.out_size, model.mmdit
            self.connector = VisualTokenConnector(method.connector, visual, mmdit.condition_size, mmdit.pooled_size)
            self.vae = build_vae(model.vae).requires_grad_(False)
            if not stage.data.feature_cache:
                tower_config = vision_transformer_config(stage.model.vision_encoder, stage.system, platform)
                self.base.vision_encoder = build_vision_encoder(
                    stage.model.vision_encoder, tower_config, self.backend, groups.alone()
                )
        elif self.post_process and not stage.data.latent_cache:
            self.base.vae = build_vae(model.vae)
        self.freeze_base()

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

    def forward(self, batch: DecoderBatch) -> Tensor:
        """The next stage's input, or on the last stage the sums of the loss terms, float32 ``[terms]``."""
        latents = self._latents(batch.pictures) if batch.pictures is not None else None  # [U, F]
        inputs = self._inputs(batch, latents) if self.pre_process else None
        output = self.mmdit(batch.canvas.row, inputs, None if self.pre_process else self.input_tensor)
        if self.post_process:
            output = self._loss(output, latents, batch)  # [terms]
        return output if self.pre_process else with_zero_gradient(output, self.input_tensor)

    # -- first and last stage

    def _latents(self, pictures: PictureInput) -> Tensor:
        """x_0."""
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

    def _inputs(self, batch: DecoderBatch, latents: Tensor | None) -> MMDiTInput:
        assert batch.pictures is not None
        assert batch.condition is not None
        assert latents is not None
        t = batch.timestep.index_select(0, batch.canvas.picture_of_token)  # [U], in float32: see flow/path.py
        noisy = interpolate(latents, batch.pictures.noise, t).to(latents.dtype)  # [U, F]
        condition = self.condition(self._visual_tokens(batch.condition), batch.condition)  # [V, C]
        return self.mmdit_input(batch.canvas, condition, noisy, batch.timestep)

    def _visual_tokens(self, condition: ConditionInput) -> Tensor:
        """``[V, H]``, of images as the base model's vision encoder sees them, without deepstack levels."""
        size = self.stage.model.vision_encoder.out_size
        if condition.features is not None:
            return condition.features[:, :size]
        if condition.images is None:
            return self.connector.linear_1.weight.new_zeros(0, size)
        with torch.no_grad():
            return self.base.vision_encoder(condition.images)[:, :size]

    def condition(self, visual_VH: Tensor, condition: ConditionInput) -> Tensor:
        """``[V, C]``; nothing is what zeros in place of visual tokens stand for."""
        if condition.noise is not None:
            visual_VH = visual_VH + condition.noise
        return self.connector(visual_VH * condition.kept[:, None].to(visual_VH.dtype), condition.is_source)

    def mmdit_input(self, canvas: Canvas, condition_VC: Tensor, noisy_UF: Tensor, timestep: Tensor) -> MMDiTInput:
        """This context rank's part of what the diffusion transformer reads."""
        ranks = self.groups.config.context
        num_text, num_image = len(canvas.text_index) * ranks, len(canvas.image_index) * ranks
        pooled = self.connector.pooled.expand(len(timestep), -1)
        guidance = torch.full_like(timestep, self.embedded_guidance) if self.model.mmdit.guidance else None
        return MMDiTInput(
            condition=padded_to(condition_VC, num_text).index_select(0, canvas.text_index),
            patches=padded_to(noisy_UF, num_image).index_select(0, canvas.image_index),
            position_index=canvas.position_index,
            timestep=timestep,
            pooled=pooled,
            guidance=guidance,
        )

    # -- last stage

    def _loss(self, velocity_tF: Tensor, latents: Tensor | None, batch: DecoderBatch) -> Tensor:
        assert batch.pictures is not None
        assert batch.loss is not None
        assert latents is not None
        target = flow_velocity(latents.float(), batch.pictures.noise.float())  # [U, F]
        num_image = len(batch.canvas.image_index) * self.groups.config.context
        target = padded_to(target, num_image).index_select(0, batch.canvas.image_index)  # [t_image, F]
        return flow_matching_loss(velocity_tF, target, batch.loss.weight, batch.loss.counted, batch.loss.bins)
