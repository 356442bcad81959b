"""From latents to pixels: layers over the grid, as in RAE's decoder (arXiv 2510.11690), and convolutions behind them.

Legend  V cells, C channels of a latent, H hidden size, s side of a cell in pixels, c channels of the convolutions.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_unimm.config.tokenizer import PixelDecoderConfig
from megatron_unimm.models.tokenizer.grid import CellGrids, GridLayers
from megatron_unimm.models.vae import to_patches


class PixelDecoder(MegatronModule):
    """``[V, C]`` to pixels ``[V, 3 s²]`` in about [-1, 1].

    A linear layer writes each cell's place in a picture of half the resolution, where residual blocks look across the
    borders of cells; the last convolution makes 2 x 2 pixels of each place. Everything but the layers is whole on
    every rank.
    """

    def __init__(
        self,
        model: PixelDecoderConfig,
        latent_channels: int,
        cell_pixels: int,
        config: TransformerConfig,
        backend: str,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.half_side = cell_pixels // 2
        self.entry = nn.Linear(latent_channels, model.hidden_size)
        self.layers = GridLayers(config, backend, groups)
        self.places = nn.Linear(model.hidden_size, model.channels * self.half_side**2)
        blocks = [ResidualBlock(model.channels, model.norm_groups) for _ in range(model.num_blocks)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(model.norm_groups, model.channels)
        self.last = nn.Conv2d(model.channels, 3 * 4, 3, padding=1)

    def forward(self, latents_VC: Tensor, grids: CellGrids) -> Tensor:
        places = self.places(self.layers(self.entry(latents_VC), grids))  # [V, c (s / 2)²]
        cells = {
            size: to_patches(self._drawn(pictures), 2 * self.half_side)
            for size, pictures in grids.pictures(places, self.half_side).items()
        }
        return grids.cells(cells)

    def _drawn(self, places_BchW: Tensor) -> Tensor:
        hidden = self.blocks(places_BchW)  # (B, c, H / 2, W / 2)
        return F.pixel_shuffle(self.last(F.silu(self.norm(hidden))), 2)  # (B, 3, H, W)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.GroupNorm(norm_groups, channels) for _ in range(2))
        self.convolution_1, self.convolution_2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        inside = self.convolution_1(F.silu(self.norm_1(hidden)))
        return hidden + self.convolution_2(F.silu(self.norm_2(inside)))


class PatchDiscriminator(nn.Module):
    """Tells pictures from what a decoder makes of them, patch by patch (arXiv 1611.07004, section 3.2.2; as in VQGAN,
    arXiv 2012.09841): convolutions that halve the picture, and one that answers. Whole on every rank."""

    def __init__(self, channels: list[int], norm_groups: int) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for number, (wide, to) in enumerate(zip([3, *channels], channels, strict=False)):
            steps.append(nn.Conv2d(wide, to, 4, stride=2, padding=1))
            if number:
                steps.append(nn.GroupNorm(norm_groups, to))
            steps.append(nn.LeakyReLU(0.2))
        self.steps = nn.Sequential(*steps, nn.Conv2d(channels[-1], 1, 3, padding=1))

    def forward(self, pictures_B3HW: Tensor) -> Tensor:
        """Logits ``[B, patches]``, above 0 for what looks real."""
        return self.steps(pictures_B3HW).flatten(1)


def frozen_logits(discriminator: PatchDiscriminator, pictures_B3HW: Tensor) -> Tensor:
    """The same, where the pictures learn and the discriminator does not."""
    weights = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return torch.func.functional_call(discriminator, weights, (pictures_B3HW,))
