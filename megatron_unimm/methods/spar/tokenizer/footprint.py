"""What the tokenizer asks of a rank; see ``methods/footprint.py``.

Weights are exact. Of activations the layers are counted as everywhere, and of the rest what is largest: places and
convolutions of the decoder, at half the picture's resolution, and of the discriminator, at its first layer's.
"""

from collections.abc import Hashable
from functools import lru_cache

import torch

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.methods import AdversarialConfig, SparTokenizerConfig
from megatron_unimm.config.model import VisionEncoder
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.config.tokenizer import StreamLayersConfig, TokenizerConfig
from megatron_unimm.data.pictures import PictureRow
from megatron_unimm.data.typical import picture_row, shares
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace, Flops, Traffic, exchanged
from megatron_unimm.methods.spar.tokenizer.flops import row_flops, works
from megatron_unimm.models.memory import (
    Kept,
    LayerShape,
    Spread,
    Weights,
    layer_kept,
    layer_weights,
    tower_kept,
    tower_pass,
    vision_weights,
)
from megatron_unimm.models.tokenizer.decoder import PatchDiscriminator
from megatron_unimm.models.trainable import is_frozen


class TokenizerFootprints:
    """See :class:`~megatron_unimm.methods.footprint.Footprints`."""

    def typical_row(
        self,
        stage: StageConfig,
        kinds: tuple[SampleKind, ...] | None = None,
        large: bool = False,
        pixels: bool = True,
    ) -> PictureRow:
        return picture_row(shares(stage.data, kinds), stage.model.vision_encoder, stage.data, pixels)

    def row_flops(self, stage: StageConfig, row: PictureRow) -> float:
        return row_flops(row.grids, stage)

    def travelling_rows(self, stage: StageConfig) -> int:
        return stage.data.sequence_length

    def alike(self, stage: StageConfig, place: ChunkPlace) -> Hashable:
        return ()

    def chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: PictureRow) -> ChunkFootprint:
        return _Chunk(stage, spread, row).footprint()


class _Chunk:
    """The whole tokenizer, and one row."""

    def __init__(self, stage: StageConfig, spread: Spread, row: PictureRow) -> None:
        assert isinstance(stage.method, SparTokenizerConfig)
        assert stage.tokenizer is not None
        self.stage, self.spread, self.row = stage, spread, row
        self.method, self.model, self.encoder = stage.method, stage.tokenizer, stage.model.vision_encoder
        self.sees = not is_frozen("vision_encoder", stage.train.trainable)
        self.learns = not is_frozen("tokenizer", stage.train.trainable)
        self.patches = float(row.grids.prod(axis=1).sum())
        self.cells = self.patches / self.encoder.spatial_merge_size**2
        self.pixels = self.cells * self.encoder.token_pixels**2

    def footprint(self) -> ChunkFootprint:
        trained = frozen = Weights()
        for weights, trains in self._parts():
            trained, frozen = (trained + weights, frozen) if trains else (trained, frozen + weights)
        tower = vision_weights(self.encoder, self.spread.parallel.tensor)
        companions = tower if self.sees else Weights()
        found = works(self.row.grids, self.stage)
        traffic = self._traffic()
        nothing = Kept()
        item = self.spread.itemsize
        return ChunkFootprint(
            trained=trained,
            frozen=frozen + companions,
            companions=companions,
            kept={
                "layers": self._layers(),
                "encoder": self._encoder(),
                "loss": self._loss(),
                "received": nothing,
                "sent": nothing,
            },
            inputs=self.patches * (self.encoder.patch_dim * item + 24),
            largest_weight=max(2 * part.hidden_size * part.mlp_size for part in streams_of(self.model)),
            forward=sum((Flops.forward(work) for work, _ in found), Flops()),
            backward=sum((Flops.backward(work, *gradient) for work, gradient in found), Flops()),
            forward_traffic=traffic,
            backward_traffic=traffic,
        )

    # -- weights

    def _parts(self) -> list[tuple[Weights, bool]]:
        tensor, rules = self.spread.parallel.tensor, self.stage.train.trainable
        tokenizer = tokenizer_weights(self.model, self.encoder, tensor)
        found = [(vision_weights(self.encoder, tensor), self.sees), (tokenizer, self.learns)]
        if self.method.adversarial is not None:
            weights = discriminator_weights(self.method.adversarial.model_dump_json())
            found.append((Weights(weights), not is_frozen("discriminator", rules)))
        return found

    # -- activations

    def _layers(self) -> Kept:
        if not self.learns:
            return Kept()
        kept = Kept()
        for part in streams_of(self.model):
            kept += layer_kept(_shape(part), self.spread, self.cells, trains=True).times(part.num_layers)
        return kept

    def _encoder(self) -> Kept:
        if self.sees:
            return tower_kept(self.encoder, self.spread, self.patches)
        return tower_pass(self.encoder, self.spread, self.patches)

    def _loss(self) -> Kept:
        """A residual block keeps, of each half, what comes in, that normalised and that activated; the last norm
        likewise. The perceptual loss keeps a tower's layers; a discriminator its first layer's outputs three times."""
        item, decoder = self.spread.itemsize, self.model.decoder
        places = self.pixels / 4 * decoder.channels * item
        kept = Kept((6 * decoder.num_blocks + 3) * places + 3 * 3 * self.pixels * item)
        if self.method.loss_weights.perceptual:
            kept += tower_kept(self.encoder, self.spread, self.patches)
        if self.method.adversarial is not None:
            kept += Kept(3 * 2 * self.pixels / 4 * self.method.adversarial.channels[0] * item)
        return kept

    def _traffic(self) -> Traffic:
        """Two sums per layer, of cells or patches."""
        tensor, item = exchanged(self.spread.parallel.tensor), self.spread.itemsize
        cells = sum(4 * self.cells * part.hidden_size * part.num_layers for part in streams_of(self.model))
        towers = 1 + self.sees + bool(self.method.loss_weights.perceptual)
        patches = 4 * towers * self.patches * self.encoder.hidden_size * self.encoder.num_layers
        return Traffic(tensor=tensor * item * (cells + patches))


def streams_of(model: TokenizerConfig) -> list[StreamLayersConfig]:
    """What has transformer layers."""
    return [model.semantic, *([] if model.pixel is None else [model.pixel]), model.decoder]


def tokenizer_weights(model: TokenizerConfig, encoder: VisionEncoder, tensor: int) -> Weights:
    """Everything behind the vision encoder."""
    width, channels, inner = encoder.out_size, model.latent_channels, model.semantic.hidden_size
    layers = sum((stream_weights(part, tensor) for part in streams_of(model)), Weights())
    rest = 2 * width + _linear(width, inner) + _linear(inner, width)  # semantic stream
    rest += 2 * width + _linear(width, channels)
    if model.pixel is not None:
        pixel = model.pixel
        rest += _linear(3 * encoder.token_pixels**2, pixel.hidden_size) + _linear(pixel.hidden_size, channels)
        if pixel.encoder_layers:
            joined = len(pixel.encoder_layers) * encoder.spatial_merge_size**2 * encoder.hidden_size
            rest += 2 * encoder.hidden_size + _linear(joined, pixel.hidden_size)
    rest += _decoder_ends(model, encoder.token_pixels)
    return layers + Weights(rest + _linear(channels, width) + _linear(width, width))


def _linear(wide: int, to: int) -> int:
    return (wide + 1) * to


def _shape(model: StreamLayersConfig) -> LayerShape:
    return LayerShape(
        hidden=model.hidden_size,
        heads=model.num_heads,
        kv_heads=model.num_heads,
        head_size=model.hidden_size // model.num_heads,
        mlp=model.mlp_size,
        gated=False,
        rms_norm=False,
        qk_norm=False,
        qkv_bias=True,
        bias=True,
    )


def stream_weights(model: StreamLayersConfig, tensor: int) -> Weights:
    """Layers and the norm behind them."""
    return layer_weights(_shape(model), tensor).times(model.num_layers) + Weights(2 * model.hidden_size)


def _decoder_ends(model: TokenizerConfig, cell_pixels: int) -> int:
    """Before and behind the decoder's layers."""
    decoder = model.decoder
    convolution = (9 * decoder.channels + 1) * decoder.channels
    blocks = decoder.num_blocks * (2 * convolution + 4 * decoder.channels)
    last = 2 * decoder.channels + (9 * decoder.channels + 1) * 12
    places = _linear(decoder.hidden_size, decoder.channels * cell_pixels**2 // 4)
    return _linear(model.latent_channels, decoder.hidden_size) + places + blocks + last


@lru_cache
def discriminator_weights(config: str) -> int:
    """Of the section as JSON, counted by building it without memory."""
    settings = AdversarialConfig.model_validate_json(config)
    with torch.device("meta"):
        network = PatchDiscriminator(settings.channels, settings.norm_groups)
    return sum(parameter.numel() for parameter in network.parameters())
