"""The asymmetric dual-stream tokenizer (SPAR, arXiv 2606.23041, abstract and figure 2's caption).

    picture ─┬─ vision encoder ─┬─ visual tokens ─── semantic stream ─► semantic [V, D] ─┐
             │                  └─ some layers ───┐                                      ├─► latents [V, C]
             └─ pixels ───────────────────────────┴─ pixel stream ───────────────────────┘

    latents [V, C] ─┬─ decoder ─► pixels [V, 3 s²]
                    └─ readout ─► visual tokens [V, D]

"A lightweight semantic stream anchors discriminative features, while a Transformer-augmented pixel stream recovers
fine-grained visual details into a unified compact latent space." The text says no more; what the streams are made of is
our choice, and named in ``methods/spar/README.md``.

Legend  V visual tokens, which are the cells of the grid; D their width, C channels of a latent, K layers of the encoder
        that are looked at, s side of a cell in pixels.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_unimm.config.model import VisionEncoder
from megatron_unimm.config.parallel import SystemConfig
from megatron_unimm.config.tokenizer import PixelStreamConfig, StreamLayersConfig, TokenizerConfig
from megatron_unimm.models.tokenizer.decoder import PixelDecoder
from megatron_unimm.models.tokenizer.grid import CellGrids, GridLayers
from megatron_unimm.models.transformer_config import stream_transformer_config
from megatron_unimm.parallel.platform import Platform


@dataclass(frozen=True)
class Layers:
    """How layers are built."""

    system: SystemConfig
    platform: Platform
    backend: str
    groups: ProcessGroupCollection
    """Of a part that is whole on its pipeline stage."""

    def of(self, model: StreamLayersConfig) -> GridLayers:
        return GridLayers(stream_transformer_config(model, self.system, self.platform), self.backend, self.groups)


@dataclass(frozen=True)
class Encoded:
    """What a picture is to the tokenizer."""

    semantic: Tensor
    """``[V, D]``: what the semantic stream has, in the place of the encoder's visual tokens."""
    latents: Tensor
    """``[V, C]``."""


class Tokenizer(MegatronModule):
    """Everything behind the vision encoder."""

    def __init__(self, model: TokenizerConfig, encoder: VisionEncoder, layers: Layers) -> None:
        config = stream_transformer_config(model.decoder, layers.system, layers.platform)
        super().__init__(config)
        width, channels = encoder.out_size, model.latent_channels
        self.semantic = SemanticStream(model.semantic, width, layers)
        self.semantic_latents = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        self.pixel = None
        if model.pixel is not None:
            self.pixel = PixelStream(model.pixel, encoder, layers)
            self.pixel_latents = nn.Linear(model.pixel.hidden_size, channels)
        self.decoder = PixelDecoder(
            model.decoder, channels, encoder.token_pixels, config, layers.backend, layers.groups
        )
        self.readout = Readout(channels, width)
        self.statistics = LatentStatistics(channels, model.statistics_cells)

    def encode(self, features_VD: Tensor, taps: list[Tensor], pixels_VF: Tensor, grids: CellGrids) -> Encoded:
        """Both streams.

        Args:
            features_VD: visual tokens. taps: K x ``[V, merge², H]``. pixels_VF: ``[V, 3 s²]`` in [-1, 1].
        """
        semantic = self.semantic(features_VD, grids)
        latents = self.semantic_latents(semantic)
        if self.pixel is not None:
            latents = latents + self.pixel_latents(self.pixel(pixels_VF, taps, grids))
        return Encoded(semantic, latents)

    def decode(self, latents_VC: Tensor, grids: CellGrids) -> Tensor:
        """Pixels ``[V, 3 s²]``."""
        return self.decoder(latents_VC, grids)


class SemanticStream(MegatronModule):
    """Visual tokens and a correction, which is zero at the start: ``[V, D]`` to ``[V, D]``."""

    def __init__(self, model: StreamLayersConfig, width: int, layers: Layers) -> None:
        super().__init__(stream_transformer_config(model, layers.system, layers.platform))
        self.norm = nn.LayerNorm(width)
        self.entry = nn.Linear(width, model.hidden_size)
        self.layers = layers.of(model)
        self.exit = nn.Linear(model.hidden_size, width)
        nn.init.zeros_(self.exit.weight)
        nn.init.zeros_(self.exit.bias)

    def forward(self, features_VD: Tensor, grids: CellGrids) -> Tensor:
        return features_VD + self.exit(self.layers(self.entry(self.norm(features_VD)), grids))


class PixelStream(MegatronModule):
    """An embedding of the pixels under each cell, and of what the encoder has of them at K layers, then transformer
    layers: ``[V, H]``."""

    def __init__(self, model: PixelStreamConfig, encoder: VisionEncoder, layers: Layers) -> None:
        super().__init__(stream_transformer_config(model, layers.system, layers.platform))
        self.patch_embed = nn.Linear(3 * encoder.token_pixels**2, model.hidden_size)
        self.num_taps = len(model.encoder_layers)
        if self.num_taps:
            joined = self.num_taps * encoder.spatial_merge_size**2 * encoder.hidden_size
            self.tap_norm = nn.LayerNorm(encoder.hidden_size)
            self.tap_embed = nn.Linear(joined, model.hidden_size)
        self.layers = layers.of(model)

    def forward(self, pixels_VF: Tensor, taps: list[Tensor], grids: CellGrids) -> Tensor:
        hidden = self.patch_embed(pixels_VF)
        if self.num_taps:
            joined = self.tap_norm(torch.stack(taps, dim=1))  # [V, K, merge², H]
            hidden = hidden + self.tap_embed(joined.flatten(1))
        return self.layers(hidden, grids)


class Readout(nn.Module):
    """Visual tokens that a latent stands for, so that the same latents serve understanding: Linear, GELU, Linear,
    ``[n, C]`` to ``[n, D]``. Whole on every rank."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, latents_nC: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(latents_nC)))


class LatentStatistics(nn.Module):
    """Mean and variance of each channel, over the cells seen last: of all at first, so that they do not depend on how
    cells come in rows and ranks; beyond ``window`` the oldest fade. In float32, saved with the rest."""

    mean: Tensor
    variance: Tensor
    seen: Tensor

    def __init__(self, channels: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("seen", torch.zeros(1))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moved with the model, but never to its computing dtype."""
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.float())
        return self

    @torch.no_grad()
    def update(self, latents_VC: Tensor, counted_V: Tensor, group: dist.ProcessGroup) -> None:
        """Take in the cells of one micro-batch of each rank of ``group``.

        Args:
            counted_V: 1, or 0 for cells that do not count.
        """
        values, counted = latents_VC.float(), counted_V.float()
        sums = torch.stack([(values * counted[:, None]).sum(0), (values.square() * counted[:, None]).sum(0)])
        both = torch.cat([sums, counted.sum().expand(1, sums.shape[1])])  # [3, C]
        dist.all_reduce(both, group=group)
        count = both[2].clamp(min=1)
        mean = both[0] / count
        variance = (both[1] / count - mean.square()).clamp(min=0)
        share = both[2] / (self.seen + both[2]).clamp(min=1)  # [C], all alike
        step = mean - self.mean
        self.variance.copy_((1 - share) * self.variance + share * variance + share * (1 - share) * step.square())
        self.mean.add_(share * step)
        self.seen.copy_((self.seen + both[2, :1]).clamp(max=self.window))

    def normalise(self, latents_nC: Tensor) -> Tensor:
        """Of mean 0 and variance 1, as a diffusion transformer reads them."""
        return ((latents_nC.float() - self.mean) * self._scale()).to(latents_nC.dtype)

    def restore(self, normalised_nC: Tensor) -> Tensor:
        """The way back."""
        return (normalised_nC.float() / self._scale() + self.mean).to(normalised_nC.dtype)

    def _scale(self) -> Tensor:
        return (self.variance + 1e-6).rsqrt()
