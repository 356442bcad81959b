"""From visual tokens to pictures: an image decoder that draws, from a checkpoint at any layout or live.

Legend  n pictures, V visual tokens of one, U image tokens of one, F values of a patch of latents, k conditions that a
        guided velocity is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.methods import OrionDecoderConfig
from megatron_unimm.config.parallel import ParallelConfig, PrecisionConfig, SystemConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data import images
from megatron_unimm.data.drawing import DrawingSample
from megatron_unimm.data.packing import round_up
from megatron_unimm.errors import CheckpointError
from megatron_unimm.flow.guidance import classifier_free, guided_at, renormalised, two_condition
from megatron_unimm.flow.solvers import solve
from megatron_unimm.flow.timesteps import timestep_grid
from megatron_unimm.generate.checkpoint import no_training
from megatron_unimm.generate.staged import decoding_mode
from megatron_unimm.generate.stages import StageLink
from megatron_unimm.methods.orion.decoder.model import ConditionInput, OrionDecoderModel
from megatron_unimm.models.mmdit.canvas import Canvas
from megatron_unimm.models.mmdit.frames import Frames
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.models.vae import decode, encode, from_patches
from megatron_unimm.models.vision import VisionInput, VisionTower
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train.state import load_average, load_base

PICTURES_AT_A_TIME = 32


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


class Painter:
    """Draws; every method is called on all ranks of a layout with the same arguments.

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
        assert isinstance(stage.method, OrionDecoderConfig)
        assert stage.generator is not None
        self.chunks = chunks
        self.stage = stage
        self.config = stage.method
        self.generator = stage.generator
        self.groups = groups
        self.origin = origin
        self.device = platform.device
        self.dtype = DTYPES[stage.system.precision.dtype]
        self.link = StageLink(groups, platform.device, self.dtype, stage.generator.mmdit.hidden_size)
        self.first = chunks[0] if chunks[0].pre_process else None
        """The chunk with connector and VAE, on the ranks of the first stage."""

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
                done |= dict(zip(chosen, self._pictures(latents, size), strict=True))
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

    def vae_round_trip(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures (uint8 (H, W, 3)) at the size that they are drawn at through the VAE and back, on every rank: the
        best that a decoder can do."""
        found = []
        for picture in map(self._at_drawing_size, pictures):
            height, width = picture.shape[:2]
            pixels = torch.zeros(1, 3, height, width, dtype=self.dtype, device=self.device)
            if self.first is not None:
                scaled = torch.tensor(picture, device=self.device, dtype=self.dtype) / 127.5 - 1
                with torch.no_grad():
                    pixels = decode(self.first.vae, encode(self.first.vae, scaled.permute(2, 0, 1)[None]))
            found += self._shared(pixels)
        return found

    def _at_drawing_size(self, picture: np.ndarray) -> np.ndarray:
        """As training reads a picture that is drawn."""
        rule = self.stage.data.drawing_size
        assert rule is not None
        width, height = images.target_size(picture.shape[1], picture.shape[0], rule, self.generator.token_pixels)
        return images.resize(picture, width, height, crop=rule.crop, filter=rule.filter)

    # -- drawing

    def latents(
        self, requests: Sequence[PaintRequest], size: tuple[int, int], sampler: SamplerConfig, seed: int
    ) -> Tensor:
        """Latents of pictures of one size, as patches ``[n, U, F]``, on every rank."""
        side = self.generator.token_pixels
        columns, rows = size[0] // side, size[1] // side
        width = self.generator.mmdit.patch_dim
        noise = torch.stack([_noise(seed, request.number, rows * columns, width) for request in requests])
        grid = timestep_grid(sampler.steps, sampler.shift, rows * columns, sampler.spacing)
        with decoding_mode(self.chunks):
            guided = _Guided(self, requests, (rows, columns), sampler)
            # The state stays in float32: many small steps would be lost in bfloat16.
            return solve(guided.velocity, noise.to(self.device), grid.tolist(), sampler.solver)

    def run(self, canvas: Canvas, condition: Tensor | None, state_UF: Tensor, timestep: Tensor) -> Tensor:
        """The velocity of all pictures of a canvas, ``[U, F]``, through all stages, on every rank.

        Args:
            condition: ``[V, C]`` on the first stage.
        """
        output = torch.empty_like(state_UF, dtype=self.dtype)
        num_rows = len(canvas.text_index) + len(canvas.image_index) + canvas.row.num_vectors
        for chunk in self.chunks:
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

    def _pictures(self, latents_nUF: Tensor, size: tuple[int, int]) -> list[np.ndarray]:
        side = self.generator.token_pixels
        count = len(latents_nUF)
        pixels = torch.zeros(count, 3, size[1], size[0], dtype=self.dtype, device=self.device)
        if self.first is not None:
            grids = from_patches(latents_nUF, size[1] // side, size[0] // side, self.generator.mmdit.patch_size)
            with torch.no_grad():
                pixels = torch.cat([decode(self.first.vae, grid) for grid in grids.to(self.dtype).split(8)])
        return self._shared(pixels)

    def _shared(self, pixels_BCHW: Tensor) -> list[np.ndarray]:
        """What the first stage drew, on every rank, as uint8 (H, W, 3)."""
        pixels_BCHW = pixels_BCHW.contiguous()
        self.link.broadcast(pixels_BCHW, stage=0)
        scaled = ((pixels_BCHW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return list(scaled.permute(0, 2, 3, 1).cpu().numpy())


class _Guided:
    """The guided velocity of pictures of one size. Pictures stand in a row k times, once per condition:

    classifier-free     [ condition | nothing ]
    with sources        [ condition and sources | sources | nothing ]
    """

    def __init__(
        self, painter: Painter, requests: Sequence[PaintRequest], picture: tuple[int, int], sampler: SamplerConfig
    ) -> None:
        self.painter = painter
        self.sampler = sampler
        with_sources = painter.takes_sources and any(request.sources for request in requests)
        scales = (sampler.guidance_scale, sampler.image_guidance_scale if with_sources else 1.0)
        self.num_conditions = 1 if scales == (1.0, 1.0) else 3 if with_sources else 2
        self.count = len(requests)
        visual, kept, is_source, counts = _conditions(requests, painter.takes_sources)
        per_picture = picture[0] * picture[1]
        self._rows = {}
        for times in {1, self.num_conditions}:
            pictures = np.tile(np.array(picture, dtype=np.int64), (times * self.count, 1))
            ranks = painter.groups.config.context
            num_text = round_up(times * int(counts.sum()), ranks)
            num_image = round_up(len(pictures) * per_picture, ranks)
            canvas = Canvas.build(
                Frames.single(pictures, np.tile(counts, times)),
                num_text,
                num_text + num_image,
                painter.generator,
                painter.chunks[0].place(None),
            )
            self._rows[times] = canvas, self._condition(visual, kept[:times], is_source, times)

    def _condition(self, visual: Tensor, kept: Tensor, is_source: Tensor, times: int) -> Tensor | None:
        """``[times V, C]`` on the first stage."""
        first, device = self.painter.first, self.painter.device
        if first is None:
            return None
        repeated = visual.to(device, self.painter.dtype).repeat(times, 1)
        inputs = ConditionInput(
            None, None, kept.reshape(-1).to(device, self.painter.dtype), is_source.repeat(times).to(device)
        )
        return first.condition(repeated, inputs)

    def velocity(self, state_nUF: Tensor, t: float) -> Tensor:
        """``[n, U, F]`` float32."""
        times = self.num_conditions if guided_at(t, self.sampler.guidance_interval) else 1
        canvas, condition = self._rows[times]
        timestep = torch.full((times * self.count,), t, dtype=torch.float32, device=state_nUF.device)
        flat = self.painter.run(canvas, condition, state_nUF.repeat(times, 1, 1).flatten(0, 1), timestep)
        parts = flat.float().reshape(times, *state_nUF.shape)
        if times == 1:
            return parts[0]
        if times == 2:
            guided = classifier_free(parts[0], parts[1], self.sampler.guidance_scale)
        else:
            guided = two_condition(
                unconditional=parts[2],
                image=parts[1],
                image_and_text=parts[0],
                image_scale=self.sampler.image_guidance_scale,
                text_scale=self.sampler.guidance_scale,
            )
        if self.sampler.guidance_renorm_min is None:
            return guided
        return renormalised(guided, parts[0], self.sampler.guidance_renorm_min)


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


def _noise(seed: int, number: int, tokens: int, width: int) -> Tensor:
    """float32 ``[U, F]``, the same on every machine and rank."""
    generator = np.random.Generator(np.random.Philox(key=[seed, number]))
    return torch.from_numpy(generator.standard_normal((tokens, width), dtype=np.float32))


def _stage_of(directory: Path, meta: dict, groups: ParallelGroups, dtype: Literal["float32"] | None) -> StageConfig:
    """The stage that trained a decoder, at the layout of ``groups`` and with nothing in it that only training needs."""
    if "connector" not in meta or "config" not in meta:
        raise CheckpointError(
            str(directory), "is no image decoder's checkpoint; train one (method.name: orion_decoder)"
        )
    stage = StageConfig.model_validate(yaml.safe_load(meta["config"]))
    assert stage.generator is not None
    parallel = groups.config
    chunks = parallel.pipeline * parallel.virtual_pipeline
    stage.system = SystemConfig(
        platform="auto",
        parallel=ParallelConfig(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline,
            context=parallel.context,
            layers_per_stage=_shared_out(stage.generator.mmdit.num_blocks, chunks),
        ),
        precision=PrecisionConfig(dtype=dtype or stage.system.precision.dtype),
        timeout_minutes=stage.system.timeout_minutes,
    )
    stage.data.latent_cache = "none"  # nothing is compared with, so that the last stage needs no VAE
    stage.data.sequence_length += -stage.data.sequence_length % parallel.context  # as in generation_stage()
    stage.train = no_training(groups.world_size)
    return stage


def _shared_out(layers: int, chunks: int) -> list[int] | None:
    """Layers of each of the chunks where they have not all as many; the first ones have one more."""
    if layers % chunks == 0:
        return None
    return [layers // chunks + (number < layers % chunks) for number in range(chunks)]
