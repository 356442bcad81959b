"""SPAR's tokenizer as a diffusion transformer sees it: between pictures and normalised latents, everything frozen.

Legend  B pictures of one size, V cells of all, h x w of one, C channels of a latent, D width of a visual token, s side
        of a cell in pixels.
"""

import numpy as np
import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_unimm.config.model import VisionEncoder
from megatron_unimm.config.tokenizer import TokenizerConfig
from megatron_unimm.models.tokenizer.grid import CellGrids
from megatron_unimm.models.tokenizer.model import Encoded, Layers, Tokenizer
from megatron_unimm.models.tokenizer.pixels import patches_of_pixels
from megatron_unimm.models.transformer_config import stream_transformer_config, vision_transformer_config
from megatron_unimm.models.vae import PictureCodec, from_patches, to_patches
from megatron_unimm.models.vision import VisionInput, build_vision_encoder


class TokenizerCodec(MegatronModule, PictureCodec):
    """Parts have the names that they have in the tokenizer's checkpoints: vision_encoder, tokenizer.

    Args:
        layers: how they are built, whole on this pipeline stage.
    """

    def __init__(self, model: TokenizerConfig, encoder: VisionEncoder, layers: Layers) -> None:
        super().__init__(stream_transformer_config(model.decoder, layers.system, layers.platform))
        self.encoder = encoder
        self.taps = [] if model.pixel is None else model.pixel.encoder_layers
        parallel = layers.system.parallel
        self.multiple = parallel.tensor if parallel.sequence else 1
        tower = vision_transformer_config(encoder, layers.system, layers.platform)
        self.vision_encoder = build_vision_encoder(encoder, tower, layers.backend, layers.groups)
        self.tokenizer = Tokenizer(model, encoder, layers)

    def latents_of(self, pictures_BCHW: Tensor) -> Tensor:
        side = self.encoder.token_pixels
        rows, columns = pictures_BCHW.shape[2] // side, pictures_BCHW.shape[3] // side
        pixels = to_patches(pictures_BCHW, side).flatten(0, 1)  # [V, 3 s²]
        latents = self._encoded(pixels, len(pictures_BCHW), rows, columns).latents  # [V, C]
        normalised = self.tokenizer.statistics.normalise(latents)
        return from_patches(normalised.unflatten(0, (len(pictures_BCHW), -1)), rows, columns, 1)

    def pictures_of(self, latents_BChw: Tensor) -> Tensor:
        count, _, rows, columns = latents_BChw.shape
        cells = to_patches(latents_BChw, 1).flatten(0, 1)  # [V, C]
        grids = self._grids(count, rows, columns, cells.device)
        pixels = self.tokenizer.decode(self.tokenizer.statistics.restore(cells), grids)  # [V, 3 s²]
        return from_patches(pixels.unflatten(0, (count, -1)), rows, columns, self.encoder.token_pixels)

    def semantic_of(self, images: VisionInput, grids: list[tuple[int, int]]) -> Tensor:
        """What the semantic stream has of pictures, ``[V, D]``.

        Args:
            grids: rows and columns of cells of each.
        """
        tokens = self.vision_encoder(images)[:, : self.encoder.out_size]
        cells = CellGrids.build(np.array(grids, dtype=np.int64), self.multiple, tokens.device)
        return self.tokenizer.semantic(tokens, cells)

    def _encoded(self, pixels_VF: Tensor, count: int, rows: int, columns: int) -> Encoded:
        merge = self.encoder.spatial_merge_size
        grid = np.tile(np.array([[1, rows * merge, columns * merge]], dtype=np.int64), (count, 1))
        images = VisionInput.of(patches_of_pixels(pixels_VF, self.encoder), grid, self.encoder)
        features, taps = self.vision_encoder.tapped(images, self.taps)
        tokens = features[:, : self.encoder.out_size]
        return self.tokenizer.encode(tokens, taps, pixels_VF, self._grids(count, rows, columns, pixels_VF.device))

    def _grids(self, count: int, rows: int, columns: int, device: torch.device) -> CellGrids:
        return CellGrids.build(np.tile(np.array([[rows, columns]], dtype=np.int64), (count, 1)), self.multiple, device)
