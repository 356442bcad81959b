"""From visual tokens to pictures: an image decoder that draws, from a checkpoint at any layout or live.

Legend  n pictures, V visual tokens of one, U image tokens of one, F values of a patch of latents, k conditions that a
        guided velocity is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.methods import OrionDecoderConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data import images
from megatron_unimm.data.drawing import DrawingSample
from megatron_unimm.data.packing import round_up
from megatron_unimm.errors import CheckpointError
from megatron_unimm.flow.guided import FrameState, GuidedFrames, GuidedRow
from megatron_unimm.flow.solvers import solve, starting_noise
from megatron_unimm.flow.timesteps import timestep_grid
from megatron_unimm.generate.checkpoint import drawing_stage
from megatron_unimm.generate.painter import PICTURES_AT_A_TIME, BasePainter
from megatron_unimm.generate.staged import decoding_mode
from megatron_unimm.methods.drawing.model import Condition
from megatron_unimm.methods.orion.decoder.model import ConditionInput, OrionDecoderModel
from megatron_unimm.models.mmdit.canvas import Canvas
from megatron_unimm.models.mmdit.frames import Frames
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.models.vision import VisionInput, VisionTower
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train.state import load_average, load_base


@dataclass(frozen=True)
class PaintRequest:
    """A picture to be drawn."""

    visual_tokens: Tensor
    """``[V, H]``: what it shows."""
    grid: np.ndarray
    """int64 ``[3]``: patches of the vision encoder along time, height, width; gives the picture its shape."""
    number: int = 0
    """With the seed, fixes the noise."""
    sources: tuple[Tensor, ...] = field(default=())
    """Visual tokens ``[V', H]`` of images that it is an edit of, for decoders that take them."""


class Painter(BasePainter):
    """Draws what visual tokens say.

    Args:
        chunks: this rank's chunks of the decoder, in the order in which hidden states pass them.
        stage: the stage that trained it.
        origin: checkpoint, for messages and files.
    """

    def __init__(
        self,
        chunks: Sequence[OrionDecoderModel],
        stage: StageConfig,
        groups: ParallelGroups,
        platform: Platform,
        *,
        origin: str,
    ) -> None:
        super().__init__(chunks, stage, groups, platform, origin=origin)
        assert isinstance(stage.method, OrionDecoderConfig)
        self.chunks = chunks
        self.config = stage.method
        self.first = chunks[0] if chunks[0].pre_process else None
        """The chunk with the connector, on the ranks of the first stage."""

    @classmethod
    def load(
        cls,
        directory: Path,
        groups: ParallelGroups,
        platform: Platform,
        dtype: Literal["float32"] | None,
        base: Path | None = None,
    ) -> "Painter":
        """Build a checkpoint's decoder at the layout of ``groups``, with the running average of its weights where there
        is one. The layout may be that of a language model in training.

        Args:
            dtype: None for the checkpoint's own.
            base: the language model's imported checkpoint, whose vision encoder the decoder was trained behind; None
                takes the one that the training used, and goes without if that is not there any more.

        Raises:
            CheckpointError: it is no decoder's checkpoint, or damaged.
            ConfigError: a layout that the decoder cannot have.
        """
        meta = read_meta(directory)
        stage = _stage_of(directory, meta, groups, dtype)
        check_layout(stage, groups.world_size)
        base_dir = base if base is not None else Path(stage.base_checkpoint)
        has_tower = base_dir.is_dir()
        # A cache of features is what a stage without a vision encoder has.
        stage.data.feature_cache = "" if has_tower else "none"
        chunks = [
            OrionDecoderModel(stage, platform, groups, number).to(platform.device, DTYPES[stage.system.precision.dtype])
            for number in range(groups.config.virtual_pipeline)
        ]
        load_average(chunks, directory, groups)
        if has_tower:
            load_base(chunks, {"vision_encoder": base_dir}, groups)
        return cls(chunks, stage, groups, platform, origin=str(directory))

    @property
    def takes_sources(self) -> bool:
        """Whether images that a picture is an edit of join its condition."""
        return self.config.connector.sources

    def size_of(self, grid: np.ndarray) -> tuple[int, int]:
        """Width and height in pixels of a picture whose visual tokens have a grid."""
        assert self.stage.data.drawing_size is not None
        _, rows, columns = (int(count) * self.stage.model.vision_encoder.patch_size for count in grid)
        return images.target_size(columns, rows, self.stage.data.drawing_size, self.generator.token_pixels)

    def paint(
        self, requests: Sequence[PaintRequest], sampler: SamplerConfig | None = None, seed: int = 0
    ) -> list[np.ndarray]:
        """Pictures uint8 (H, W, 3) in the order of the requests, on every rank. They depend on seed and numbers, and
        not on which requests share a batch.

        Args:
            sampler: None for the recipe's.
        """
        sampler = sampler or self.config.sampler
        done: dict[int, np.ndarray] = {}
        by_size: dict[tuple[int, int], list[int]] = {}
        for place, request in enumerate(requests):
            by_size.setdefault(self.size_of(request.grid), []).append(place)
        for size, places in by_size.items():
            for start in range(0, len(places), PICTURES_AT_A_TIME):
                chosen = places[start : start + PICTURES_AT_A_TIME]
                latents = self.latents([requests[place] for place in chosen], size, sampler, seed)
                done |= dict(zip(chosen, self.pictures(latents, size), strict=True))
        return [done[place] for place in range(len(requests))]

    def visual_tokens(self, pictures: Sequence[np.ndarray], grids: np.ndarray) -> list[Tensor]:
        """Visual tokens ``[V, H]`` of pictures (uint8 (H, W, 3)) at the sizes of their grids (int64 ``[n, 3]``), as the
        decoder learned to read them.

        Raises:
            CheckpointError: the base model is not there.
        """
        encoder = self.stage.model.vision_encoder
        if self.stage.data.feature_cache:
            raise CheckpointError(
                self.stage.base_checkpoint or "base_checkpoint",
                "the base model whose vision encoder the decoder was trained behind is not there; give it with --base",
            )
        side = encoder.patch_size
        patches = [
            images.patchify(images.resize(picture, int(grid[2]) * side, int(grid[1]) * side), encoder)[0]
            for picture, grid in zip(pictures, grids, strict=True)
        ]
        return self._see(np.concatenate(patches), grids)

    def tokens_of(self, samples: Sequence[DrawingSample]) -> list[list[Tensor]]:
        """Of each sample the visual tokens ``[V, H]`` of its picture, and those of each of its sources."""
        size = self.stage.model.vision_encoder.out_size
        grids = np.concatenate([sample.grids for sample in samples])
        features = [sample.features for sample in samples if sample.features is not None]
        if features:
            stored = torch.from_numpy(np.concatenate(features))
            values = stored.view(torch.bfloat16) if stored.dtype == torch.int16 else stored
            found = values[:, :size].to(self.device, self.dtype).split(self._token_counts(grids))
        else:
            patches = [sample.patches for sample in samples if sample.patches is not None]
            found = self._see(np.concatenate(patches), grids)
        each = iter(found)
        return [[next(each) for _ in sample.grids] for sample in samples]

    def _see(self, patches: np.ndarray, grids: np.ndarray) -> list[Tensor]:
        """Through the vision encoder of the first stage, to every rank."""
        encoder, counts = self.stage.model.vision_encoder, self._token_counts(grids)
        features = torch.empty(sum(counts), encoder.out_size, dtype=self.dtype, device=self.device)
        if self.first is not None:
            tower = self.first.base.vision_encoder
            assert isinstance(tower, VisionTower)
            with decoding_mode(self.chunks):
                seen = tower(VisionInput.build(patches, grids, encoder, self.device, self.dtype))
            features = seen[:, : encoder.out_size].contiguous()
        self.link.broadcast(features, stage=0)
        return list(features.split(counts))

    def _token_counts(self, grids: np.ndarray) -> list[int]:
        return (grids.prod(axis=1) // self.stage.model.vision_encoder.spatial_merge_size**2).tolist()

    # -- drawing

    def latents(
        self, requests: Sequence[PaintRequest], size: tuple[int, int], sampler: SamplerConfig, seed: int
    ) -> Tensor:
        """Latents of pictures of one size, as patches ``[n, U, F]``, on every rank."""
        side = self.generator.token_pixels
        columns, rows = size[0] // side, size[1] // side
        width = self.generator.mmdit.patch_dim
        noise = torch.stack([starting_noise(seed, request.number, rows * columns, width) for request in requests])
        grid = timestep_grid(sampler.steps, sampler.shift, rows * columns, sampler.spacing)
        with decoding_mode(self.chunks):
            guided = _Guided(self, requests, (rows, columns), sampler)
            # The state stays in float32: many small steps would be lost in bfloat16.
            return solve(guided.velocity, noise.to(self.device), grid.tolist(), sampler.solver)


class _Guided(GuidedFrames):
    """The guided velocity of pictures of one size. Pictures stand in a row k times, once per condition:

    classifier-free     [ condition | nothing ]
    with sources        [ condition and sources | sources | nothing ]
    """

    def __init__(
        self, painter: Painter, requests: Sequence[PaintRequest], picture: tuple[int, int], sampler: SamplerConfig
    ) -> None:
        self.painter = painter
        self.picture = np.array(picture, dtype=np.int64)
        self.visual, self.kept, self.is_source, self.counts = _conditions(requests, painter.takes_sources)
        with_sources = painter.takes_sources and any(request.sources for request in requests)
        scales = (sampler.guidance_scale, sampler.image_guidance_scale if with_sources else 1.0)
        super().__init__(self._lay, 1 if scales == (1.0, 1.0) else 3 if with_sources else 2, sampler)

    def _lay(self, times: int) -> GuidedRow:
        painter, counts = self.painter, np.tile(self.counts, times)
        frames = Frames.single(np.tile(self.picture, (len(counts), 1)), counts)
        ranks = painter.groups.config.context
        num_text = round_up(int(counts.sum()), ranks)
        num_image = round_up(int(frames.counts.sum()), ranks)
        place = painter.chunks[0].place(None)
        canvas = Canvas.build(frames, num_text, num_text + num_image, painter.generator, place)
        state = FrameState.build(frames, None, painter.generator.mmdit.patch_dim, painter.device)
        return GuidedRow(state, partial(painter.run, canvas, self._condition(times)))

    def _condition(self, times: int) -> Condition | None:
        """Of ``times`` V tokens, on the first stage."""
        first, device, dtype = self.painter.first, self.painter.device, self.painter.dtype
        if first is None:
            return None
        kept = self.kept[:times].reshape(-1).to(device, dtype)
        inputs = ConditionInput(None, None, kept, self.is_source.repeat(times).to(device))
        return Condition(first.condition(self.visual.to(device, dtype).repeat(times, 1), inputs))


def _conditions(requests: Sequence[PaintRequest], with_sources: bool) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """Visual tokens of all requests ``[V, H]``, sources behind each picture's own; what each of up to three conditions
    keeps of them ``[3, V]``; which are of sources ``[V]``; tokens of each request int64 ``[n]``."""
    visual, is_source, counts = [], [], []
    for request in requests:
        sources = request.sources if with_sources else ()
        own = len(request.visual_tokens)
        visual += [request.visual_tokens, *sources]
        behind = sum(len(source) for source in sources)
        is_source.append(torch.cat([torch.zeros(own), torch.ones(behind)]))
        counts.append(own + behind)
    of_source = torch.cat(is_source)
    nothing = torch.zeros_like(of_source)
    # Without sources the second condition is nothing, as classifier-free guidance wants it.
    kept = torch.stack([torch.ones_like(of_source), of_source if of_source.any() else nothing, nothing])
    return torch.cat(visual), kept, of_source, np.array(counts, dtype=np.int64)


def _stage_of(directory: Path, meta: dict, groups: ParallelGroups, dtype: Literal["float32"] | None) -> StageConfig:
    """The stage that trained a decoder, at the layout of ``groups``."""
    if "connector" not in meta or "config" not in meta:
        raise CheckpointError(
            str(directory), "is no image decoder's checkpoint; train one (method.name: orion_decoder)"
        )
    return drawing_stage(meta, groups.config, groups.world_size, dtype)
