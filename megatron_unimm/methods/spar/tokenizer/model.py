"""SPAR's tokenizer in training (figure 2): a picture, what is made of it, and who judges that.

    picture ─ vision encoder ─ tokenizer ─┬─► semantic stream ─► cosine to the encoder as it was at first
                                          └─► latents ─┬─► the same of what is read out of them
                                                       └─► picture again ─► L1, L2, perceptual, discriminator

Legend  V cells of all pictures, D width of a visual token, F numbers of a cell's pixels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_unimm.config.methods import SparTokenizerConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.alignment import cosine_distances
from megatron_unimm.methods.spar.tokenizer import losses
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.models.specs import layers_backend
from megatron_unimm.models.tokenizer.decoder import PatchDiscriminator, frozen_logits
from megatron_unimm.models.tokenizer.grid import CellGrids
from megatron_unimm.models.tokenizer.model import Encoded, Layers, Tokenizer
from megatron_unimm.models.tokenizer.pixels import patches_of_pixels, pixels_of_patches
from megatron_unimm.models.trainable import is_frozen
from megatron_unimm.models.transformer_config import stream_transformer_config, vision_transformer_config
from megatron_unimm.models.vision import VisionInput, VisionTower, build_vision_encoder
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


@dataclass(frozen=True)
class TokenizerBatch:
    """One micro-batch."""

    images: VisionInput
    grids: CellGrids
    counted: Tensor
    """float32 ``[V]``: 0 for cells of broken pictures."""
    counted_pictures: Tensor
    """float32 ``[N]``."""


class SparTokenizerModel(StageModel):
    """Parts:
    vision_encoder: the base model's. tokenizer. discriminator: where there is an adversarial loss.
    base.vision_encoder: the encoder as it was at first, where it trains.
    """

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> None:
        assert isinstance(stage.method, SparTokenizerConfig)
        assert stage.tokenizer is not None
        super().__init__(stream_transformer_config(stage.tokenizer.decoder, stage.system, platform), groups, 0)
        self.stage, self.method = stage, stage.method
        self.encoder = stage.model.vision_encoder
        self.frozen_encoder = is_frozen("vision_encoder", stage.train.trainable)
        self.layers = Layers(
            stage.system,
            platform,
            layers_backend(stage.system.layers, platform, stage.system.precision.fp8 is not None),
            groups.alone(),
        )
        self.pixel_taps = [] if stage.tokenizer.pixel is None else stage.tokenizer.pixel.encoder_layers
        self.vision_encoder = self._new_tower()
        # New weights come from the seed alone, not from what this rank drew before: the same at every layout.
        torch.manual_seed(stage.train.seed)
        self.tokenizer = Tokenizer(stage.tokenizer, self.encoder, self.layers)
        if self.method.adversarial is not None:
            self.discriminator = PatchDiscriminator(
                self.method.adversarial.channels, self.method.adversarial.norm_groups
            )
        if not self.frozen_encoder:
            self.base.vision_encoder = self._new_tower()
        self.freeze_base()

    def _new_tower(self) -> VisionTower:
        config = vision_transformer_config(self.encoder, self.layers.system, self.layers.platform)
        return build_vision_encoder(self.encoder, config, self.layers.backend, self.layers.groups)

    def forward(self, batch: TokenizerBatch) -> Tensor:
        """The sums of the loss terms, float32 in the order of ``losses.TERMS``."""
        true = pixels_of_patches(batch.images.patches, self.encoder)  # [V, F]
        encoded, original = self.encode(batch.images, batch.grids)
        drawn = self.tokenizer.decode(encoded.latents, batch.grids)  # [V, F]
        if self.training and torch.is_grad_enabled():
            self.tokenizer.statistics.update(encoded.latents, batch.counted, self.groups.collection.dp)
        pixels = losses.pixel_losses(drawn, true, batch.counted)  # [2]
        return torch.stack(
            [
                *pixels,
                self._perceptual(drawn, original, batch),
                (cosine_distances(encoded.semantic, original.tokens) * batch.counted).sum(),
                (cosine_distances(self.tokenizer.readout(encoded.latents), original.tokens) * batch.counted).sum(),
                *self._adversarial(drawn, true, pixels, batch),
            ]
        )

    def encode(self, images: VisionInput, grids: CellGrids) -> tuple[Encoded, "Original"]:
        """What the tokenizer makes of pictures, and what the encoder as it was at first sees in them."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_encoder):
            taps = sorted({*self.pixel_taps, *(self.method.perceptual_layers if self.frozen_encoder else [])})
            features, found = self.vision_encoder.tapped(images, taps)
        tokens, by_layer = features[:, : self.encoder.out_size], dict(zip(taps, found, strict=True))
        pixels = pixels_of_patches(images.patches, self.encoder)
        encoded = self.tokenizer.encode(tokens, [by_layer[layer] for layer in self.pixel_taps], pixels, grids)
        if self.frozen_encoder:
            return encoded, Original(tokens, [by_layer[layer] for layer in self.method.perceptual_layers])
        with torch.no_grad():
            features, found = self.base.vision_encoder.tapped(images, self.method.perceptual_layers)
        return encoded, Original(features[:, : self.encoder.out_size], found)

    # -- losses

    def _perceptual(self, drawn_VF: Tensor, original: "Original", batch: TokenizerBatch) -> Tensor:
        if not self.method.loss_weights.perceptual:
            return drawn_VF.new_zeros((), dtype=torch.float32)
        tower = self.vision_encoder if self.frozen_encoder else self.base.vision_encoder
        again = replace(batch.images, patches=patches_of_pixels(drawn_VF, self.encoder))
        features, found = tower.tapped(again, self.method.perceptual_layers)
        tokens = features[:, : self.encoder.out_size]
        return losses.feature_distance(
            [*found, tokens[:, None]], [*original.taps, original.tokens[:, None]], batch.counted
        )

    def _adversarial(
        self, drawn_VF: Tensor, true_VF: Tensor, pixels: Tensor, batch: TokenizerBatch
    ) -> tuple[Tensor, Tensor]:
        """For the pictures, and for the discriminator."""
        settings, side = self.method.adversarial, self.encoder.token_pixels
        zero = drawn_VF.new_zeros((), dtype=torch.float32)
        if settings is None:
            return zero, zero
        real, drawn = batch.grids.pictures(true_VF, side), batch.grids.pictures(drawn_VF, side)
        for_pictures, for_discriminator = zero, zero
        for size, numbers in batch.grids.by_size().items():
            counted = batch.counted_pictures[numbers]
            fooled = frozen_logits(self.discriminator, drawn[size]).float().mean(1)  # [B]
            for_pictures = for_pictures - (fooled * counted).sum()
            told = losses.hinge_loss(self.discriminator(real[size]), self.discriminator(drawn[size].detach()))
            for_discriminator = for_discriminator + (told * counted).sum()
        if settings.adaptive and torch.is_grad_enabled():
            weights = self.method.loss_weights
            both = (weights.l1 * pixels[0] + weights.l2 * pixels[1]) / batch.counted.sum().clamp(min=1)
            mean = for_pictures / batch.counted_pictures.sum().clamp(min=1)
            last = self.tokenizer.decoder.last.weight
            for_pictures = for_pictures * losses.adaptive_weight(both, mean, last)
        return for_pictures, for_discriminator


@dataclass(frozen=True)
class Original:
    """What the encoder as it was at first sees; nothing learns there."""

    tokens: Tensor
    """``[V, D]``."""
    taps: list[Tensor]
    """Each ``[V, merge², H]``."""
