"""Computes the features of a stage's images beforehand, and checks that features belong to the stage's model."""

import hashlib
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_unimm.checkpoint.store import load
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.decode.build import build_decoder
from megatron_unimm.data.decode.interface import Decoder, ImageRequest
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.features import STORED, FeatureMeta, FeatureStore, FeatureWriter, finish_cache, image_key
from megatron_unimm.data.mix import Draw
from megatron_unimm.data.plan import BadSample
from megatron_unimm.data.sources.opening import open_sources
from megatron_unimm.data.workers import SampleWork
from megatron_unimm.errors import CheckpointError, ConfigError
from megatron_unimm.models.specs import layers_backend
from megatron_unimm.models.trainable import is_frozen
from megatron_unimm.models.transformer_config import DTYPES, vision_transformer_config
from megatron_unimm.models.vision import VisionInput, VisionTower, build_vision_encoder
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.state import base_directory, sharding_metadata

logger = logging.getLogger(__name__)

PREFIX = "vision_encoder."
IMAGES_AT_A_TIME = 32


def make_cache(stage: StageConfig, folder: Path) -> int:
    """Run the base model's vision encoder over every image of the stage's sources, on the ranks that torchrun started;
    each takes its share. Returns the number of images in the cache, twins counted once per rank.

    Raises:
        CheckpointError: the folder exists already, or the base model is not there.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(str(folder), "exists already; choose another name or delete it")
    platform, groups = setup.enter(stage)
    try:
        tower = _tower(stage, platform, groups)
        meta = feature_meta(stage, base_directory(stage))
        tensor = groups.collection.tp
        # Ranks of one tower compute together; the first of them writes.
        number, count = dist.get_rank() // tensor.size(), dist.get_world_size() // tensor.size()
        writer = FeatureWriter(folder, number, meta) if tensor.rank() == 0 else None
        data = stage.data
        with build_decoder(
            data.decoder, max_pixels=data.max_image_pixels, threads=data.prefetch_workers, device=None
        ) as decoder:
            requests = _requests(stage, number, count)
            while batch := tuple(islice(requests, IMAGES_AT_A_TIME)):
                _compute(batch, tower, decoder, stage, platform, writer)
        images = torch.tensor([writer.finish() if writer is not None else 0], device=platform.device)
        dist.all_reduce(images)
        if dist.get_rank() == 0:
            finish_cache(folder, meta)
        return int(images.item())
    finally:
        destroy_groups()


def _tower(stage: StageConfig, platform: Platform, groups: ParallelGroups) -> VisionTower:
    config = vision_transformer_config(stage.model.vision_encoder, stage.system, platform)
    backend = layers_backend(stage.system.layers, platform, fp8=False)
    tower = build_vision_encoder(stage.model.vision_encoder, config, backend, groups.alone())
    tower = tower.to(platform.device, DTYPES[stage.system.precision.dtype]).eval()
    state = tower.sharded_state_dict(prefix=PREFIX, metadata=sharding_metadata(groups))
    load(state, base_directory(stage), may_be_unread=("*",), may_be_absent=("*._extra_state",))
    return tower


def _requests(stage: StageConfig, number: int, count: int) -> Iterator[ImageRequest]:
    """Every ``count``-th sample's images, at the sizes that training gives them; bad samples are left to training."""
    active = {name: source for name, source in stage.data.sources.items() if source.weight > 0}
    sources = open_sources(active, stage.data.index_cache)
    work = SampleWork(setup.chat_format(stage), sources)
    for name, source in sources.items():
        for index in range(number, len(source), count):
            laid = work.lay_out(Draw(name, index, 0))
            if not isinstance(laid, BadSample):
                yield from work.requests(laid)
        logger.info("features: %d samples of %s looked through", len(source), name)


def _compute(
    requests: tuple[ImageRequest, ...],
    tower: VisionTower,
    decoder: Decoder,
    stage: StageConfig,
    platform: Platform,
    writer: FeatureWriter | None,
) -> None:
    encoder, dtype = stage.model.vision_encoder, DTYPES[stage.system.precision.dtype]
    keys = [image_key(request) for request in requests]
    decoded = decoder.load(requests, encoder)
    good = [i for i, patches in enumerate(decoded) if not isinstance(patches, SampleError)]
    parts: dict[int, np.ndarray] = {}
    if good:
        patch = encoder.patch_size
        grids = np.array([[1, requests[i].height // patch, requests[i].width // patch] for i in good])
        patches = np.concatenate([part for part in decoded if not isinstance(part, SampleError)])
        with torch.no_grad():
            features = tower(VisionInput.build(patches, grids, encoder, platform.device, dtype))
        tokens = (grids.prod(axis=1) // encoder.spatial_merge_size**2).tolist()
        parts = {i: _stored(part) for i, part in zip(good, features.cpu().split(tokens), strict=True)}
    if writer is None:
        return
    for i, key in enumerate(keys):
        if key not in writer:
            # No rows say that the image cannot be decoded.
            writer.add(key, parts.get(i, np.empty((0, writer.meta.width), STORED[writer.meta.dtype])))


def _stored(features: Tensor) -> np.ndarray:
    bits = features.view(torch.int16) if features.dtype is torch.bfloat16 else features
    return bits.contiguous().numpy()


def feature_meta(stage: StageConfig, base: Path) -> FeatureMeta:
    """What features of the stage's base model are made by."""
    encoder = stage.model.vision_encoder
    return FeatureMeta(
        encoder=encoder.model_dump(mode="json"),
        weights=_hash_of_tower(base),
        dtype=stage.system.precision.dtype,
        width=encoder.out_size * (1 + len(encoder.deepstack_layers)),
    )


def _hash_of_tower(base: Path) -> str:
    digest = hashlib.sha256()
    with Reader(base) as reader:
        for key in sorted(key for key in reader.tensors if key.startswith(PREFIX)):
            tensor = reader.read(key)
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_cache(stage: StageConfig, groups: ParallelGroups) -> FeatureStore | None:
    """The stage's features, if it has any computed.

    Raises:
        ConfigError: its vision encoder trains.
        DataError: the folder is no finished cache.
        CheckpointError: another model made it.
    """
    if not stage.data.feature_cache:
        return None
    if not is_frozen("vision_encoder", stage.train.trainable):
        raise ConfigError(
            "data.feature_cache",
            f"set, but the vision encoder trains in stage {stage.name}; its features change, leave it empty",
        )
    store = FeatureStore(Path(stage.data.feature_cache))
    # One rank reads the tower's weights for all.
    found: list[FeatureMeta | None] = [None]
    if dist.get_rank() == 0:
        found = [feature_meta(stage, base_directory(stage))]
    dist.broadcast_object_list(found, src=0, group=groups.host)
    expected = found[0]
    assert expected is not None
    for field in ("encoder", "weights", "dtype"):
        ours, theirs = vars(expected)[field], vars(store.meta)[field]
        if ours != theirs:
            what = f"{field} differs: " + (f"{theirs} there, {ours} here" if field == "dtype" else "of another model")
            raise CheckpointError(str(store.folder), f"{what}; make it again with unimm data cache")
    return store
