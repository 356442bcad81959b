"""What draws with a diffusion transformer of a method: its chunks as one function, whatever the layout, and its VAE.

Legend  n pictures, U image tokens of a row, F values of a patch of latents.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data import images
from megatron_unimm.generate.stages import StageLink
from megatron_unimm.methods.drawing.model import Condition, DrawingModel
from megatron_unimm.models.mmdit.canvas import Canvas
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.models.vae import decode, encode, from_patches, to_pictures, to_pixels
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform

PICTURES_AT_A_TIME = 32


class BasePainter:
    """Every method is called on all ranks of a layout with the same arguments.

    Args:
        chunks: this rank's chunks, in the order in which hidden states pass them.
        stage: the stage that trained them.
        origin: checkpoint, for messages and files.
    """

    def __init__(
        self,
        chunks: Sequence[DrawingModel],
        stage: StageConfig,
        groups: ParallelGroups,
        platform: Platform,
        *,
        origin: str,
    ) -> None:
        assert stage.generator is not None
        self.stages = chunks
        self.stage = stage
        self.generator = stage.generator
        self.groups = groups
        self.origin = origin
        self.device = platform.device
        self.dtype = DTYPES[stage.system.precision.dtype]
        self.link = StageLink(groups, platform.device, self.dtype, stage.generator.mmdit.hidden_size)
        self.vae = chunks[0].vae if chunks[0].pre_process else None
        """On the ranks of the first stage."""

    def vae_round_trip(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures (uint8 (H, W, 3)) at the size that they are drawn at through the VAE and back, on every rank: the
        best that a decoder can do."""
        found = []
        for picture in map(self.at_drawing_size, pictures):
            height, width = picture.shape[:2]
            pixels = torch.zeros(1, 3, height, width, dtype=self.dtype, device=self.device)
            if self.vae is not None:
                with torch.no_grad():
                    pixels = decode(self.vae, encode(self.vae, to_pixels(picture, self.dtype, self.device)))
            found += self.shared(pixels)
        return found

    def at_drawing_size(self, picture: np.ndarray) -> np.ndarray:
        """A picture as training reads those that are drawn."""
        rule = self.stage.data.drawing_size
        assert rule is not None
        return images.brought_to(picture, rule, self.generator.token_pixels)

    def run(self, canvas: Canvas, condition: Condition | None, state_UF: Tensor, timestep: Tensor) -> Tensor:
        """The velocity of all pictures of a canvas, ``[U, F]``, through all stages, on every rank.

        Args:
            condition: on the first stage.
        """
        output = torch.empty_like(state_UF, dtype=self.dtype)
        vectors = canvas.row.num_vectors * self.generator.mmdit.rows_per_vector
        num_rows = len(canvas.text_index) + len(canvas.image_index) + vectors
        for chunk in self.stages:
            inputs = received = None
            if chunk.pre_process:
                assert condition is not None
                inputs = chunk.mmdit_input(canvas, condition, state_UF.to(self.dtype), timestep)
            else:
                received = self.link.receive(num_rows)
            hidden = chunk.mmdit(canvas.row, inputs, received)
            if chunk.post_process:
                output = self._whole(hidden)[: len(state_UF)].contiguous()
            else:
                self.link.send(hidden)
        self.link.broadcast(output, stage=self.groups.config.pipeline - 1)
        return output

    def _whole(self, rows_tF: Tensor) -> Tensor:
        """The image stream of all context ranks, which hold slices of it one behind the other."""
        group = self.groups.collection.cp
        if group.size() == 1:
            return rows_tF
        parts = [torch.empty_like(rows_tF) for _ in range(group.size())]
        dist.all_gather(parts, rows_tF.contiguous(), group=group)
        return torch.cat(parts)

    def pictures(self, latents_nUF: Tensor, size: tuple[int, int]) -> list[np.ndarray]:
        """Pictures uint8 (H, W, 3) of latents of one size (width and height in pixels), on every rank."""
        side = self.generator.token_pixels
        count = len(latents_nUF)
        pixels = torch.zeros(count, 3, size[1], size[0], dtype=self.dtype, device=self.device)
        if self.vae is not None:
            grids = from_patches(latents_nUF, size[1] // side, size[0] // side, self.generator.mmdit.patch_size)
            with torch.no_grad():
                pixels = torch.cat([decode(self.vae, grid) for grid in grids.to(self.dtype).split(8)])
        return self.shared(pixels)

    def shared(self, pixels_BCHW: Tensor) -> list[np.ndarray]:
        """What the first stage drew, on every rank, as uint8 (H, W, 3)."""
        pixels_BCHW = pixels_BCHW.contiguous()
        self.link.broadcast(pixels_BCHW, stage=0)
        return to_pictures(pixels_BCHW)
