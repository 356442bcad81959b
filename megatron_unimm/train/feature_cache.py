"""Computes what a stage's frozen parts make of its images beforehand: ``unimm data cache``."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_unimm.checkpoint.store import load
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.decode.build import build_decoder
from megatron_unimm.data.decode.interface import Decoder, ImageRequest
from megatron_unimm.data.drawing import DrawingWork
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.features import STORED, FeatureMeta, FeatureWriter, finish_cache, image_key
from megatron_unimm.data.images import PatchFormat
from megatron_unimm.data.mix import Draw
from megatron_unimm.data.plan import BadSample, Laid
from megatron_unimm.data.sources.opening import open_sources
from megatron_unimm.data.workers import ConversationWork, SampleWork
from megatron_unimm.errors import CheckpointError
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.registry import build_method
from megatron_unimm.models.specs import layers_backend
from megatron_unimm.models.transformer_config import DTYPES, vision_transformer_config
from megatron_unimm.models.vae import build_vae, encode_patches
from megatron_unimm.models.vision import VisionInput, build_vision_encoder
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.caches import TOWER, VAE, feature_meta, latent_meta
from megatron_unimm.train.state import base_directory, generator_directory, sharding_metadata

logger = logging.getLogger(__name__)

IMAGES_AT_A_TIME = 32
FEATURES, LATENTS = "features", "latents"
"""Folders of the two, for a stage that has both."""


@dataclass(frozen=True)
class Maker:
    """A frozen part, and which images it reads."""

    folder: Path
    meta: FeatureMeta
    form: PatchFormat
    requests: Callable[[Laid], Sequence[ImageRequest]]
    run: Callable[[np.ndarray, np.ndarray], list[Tensor]]
    """From patches ``[P, F]`` and grids (int64 ``[N, 2]``, rows and columns of patches) to rows of each image."""


def make_cache(stage: StageConfig, folder: Path) -> int:
    """Run the stage's frozen parts over every image of its sources, on the ranks that torchrun started; each takes its
    share. Returns the number of images in the cache, twins counted once per rank.

    A stage of the language model has the features of its vision encoder, in ``folder``; one that draws has these in
    ``folder/features``, and the latents of its pictures in ``folder/latents``.

    Raises:
        CheckpointError: the folder exists already, or a base model is not there.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(str(folder), "exists already; choose another name or delete it")
    platform, groups = setup.enter(stage)
    try:
        active = {name: source for name, source in stage.data.sources.items() if source.weight > 0}
        sources = open_sources(active, stage.data.index_cache)
        work = build_method(stage, platform, groups).work(DataSetup(sources, lambda: setup.chat_format(stage)))
        total = 0
        for maker in _makers(stage, folder, work, platform, groups):
            total += _fill(maker, stage, work, {name: len(source) for name, source in sources.items()}, groups)
        return total
    finally:
        destroy_groups()


def _makers(
    stage: StageConfig, folder: Path, work: SampleWork, platform: Platform, groups: ParallelGroups
) -> Iterator[Maker]:
    if isinstance(work, ConversationWork):
        yield _tower_maker(stage, folder, work.requests, platform, groups)
    else:
        assert isinstance(work, DrawingWork)
        yield _tower_maker(stage, folder / FEATURES, work.condition_requests, platform, groups)
        yield _vae_maker(stage, folder / LATENTS, work, platform, groups)


def _tower_maker(
    stage: StageConfig,
    folder: Path,
    requests: Callable[[Laid], Sequence[ImageRequest]],
    platform: Platform,
    groups: ParallelGroups,
) -> Maker:
    encoder, dtype = stage.model.vision_encoder, DTYPES[stage.system.precision.dtype]
    config = vision_transformer_config(encoder, stage.system, platform)
    backend = layers_backend(stage.system.layers, platform, fp8=False)
    tower = build_vision_encoder(encoder, config, backend, groups.alone()).to(platform.device, dtype).eval()
    state = tower.sharded_state_dict(prefix=TOWER, metadata=sharding_metadata(groups))
    load(state, base_directory(stage), may_be_unread=("*",), may_be_absent=("*._extra_state",))

    def run(patches: np.ndarray, grids: np.ndarray) -> list[Tensor]:
        whole = np.concatenate([np.ones((len(grids), 1), dtype=np.int64), grids], axis=1)
        features = tower(VisionInput.build(patches, whole, encoder, platform.device, dtype))
        return list(features.split((grids.prod(axis=1) // encoder.spatial_merge_size**2).tolist()))

    return Maker(folder, feature_meta(stage), encoder, requests, run)


def _vae_maker(
    stage: StageConfig, folder: Path, work: DrawingWork, platform: Platform, groups: ParallelGroups
) -> Maker:
    generator, dtype = work.generator, DTYPES[stage.system.precision.dtype]
    assert generator.vae is not None
    vae = build_vae(generator.vae).to(platform.device, dtype).eval()
    metadata = sharding_metadata(groups)
    state = sharded_state_dict_default(vae, VAE, metadata=metadata, tp_group=groups.collection.tp)
    load(state, generator_directory(stage), may_be_unread=("*",))

    def run(patches: np.ndarray, grids: np.ndarray) -> list[Tensor]:
        sizes = [(int(rows), int(columns)) for rows, columns in grids]
        pixels = torch.from_numpy(patches).to(platform.device, dtype)
        latents = encode_patches(vae, pixels, sizes, generator.token_pixels, generator.mmdit.patch_size)
        return list(latents.split([rows * columns for rows, columns in sizes]))

    return Maker(folder, latent_meta(stage), work.pixel_format, lambda laid: [work.picture_request(laid)], run)


def _fill(maker: Maker, stage: StageConfig, work: SampleWork, counts: dict[str, int], groups: ParallelGroups) -> int:
    tensor, data = groups.collection.tp, stage.data
    # Ranks of one tower compute together; the first of them writes.
    number, count = dist.get_rank() // tensor.size(), dist.get_world_size() // tensor.size()
    writer = FeatureWriter(maker.folder, number, maker.meta) if tensor.rank() == 0 else None
    with build_decoder(
        data.decoder, max_pixels=data.max_image_pixels, threads=data.prefetch_workers, device=None
    ) as decoder:
        requests = _requests(maker, work, counts, number, count)
        while batch := tuple(islice(requests, IMAGES_AT_A_TIME)):
            _compute(batch, maker, decoder, writer)
    images = torch.tensor([writer.finish() if writer is not None else 0])
    dist.all_reduce(images, group=groups.host)
    if dist.get_rank() == 0:
        finish_cache(maker.folder, maker.meta)
    return int(images.item())


def _requests(
    maker: Maker, work: SampleWork, counts: dict[str, int], number: int, count: int
) -> Iterator[ImageRequest]:
    """Every ``count``-th sample's images, at the sizes that training gives them; bad samples are left to training."""
    for name, size in counts.items():
        for index in range(number, size, count):
            laid = work.lay_out(Draw(name, index, 0))
            if not isinstance(laid, BadSample):
                yield from maker.requests(laid)
        logger.info("%s: %d samples of %s looked through", maker.folder.name, size, name)


def _compute(requests: tuple[ImageRequest, ...], maker: Maker, decoder: Decoder, writer: FeatureWriter | None) -> None:
    decoded = decoder.load(requests, maker.form)
    good = [i for i, patches in enumerate(decoded) if not isinstance(patches, SampleError)]
    parts: dict[int, np.ndarray] = {}
    if good:
        side = maker.form.patch_size
        grids = np.array([[requests[i].height // side, requests[i].width // side] for i in good], dtype=np.int64)
        patches = np.concatenate([part for part in decoded if not isinstance(part, SampleError)])
        with torch.no_grad():
            parts = {i: _stored(rows) for i, rows in zip(good, maker.run(patches, grids), strict=True)}
    if writer is None:
        return
    for i, request in enumerate(requests):
        key = image_key(request)
        if key not in writer:
            # No rows say that the image cannot be decoded.
            writer.add(key, parts.get(i, np.empty((0, writer.meta.width), STORED[writer.meta.dtype])))


def _stored(features: Tensor) -> np.ndarray:
    rows = features.cpu()
    bits = rows.view(torch.int16) if rows.dtype is torch.bfloat16 else rows
    return bits.contiguous().numpy()
