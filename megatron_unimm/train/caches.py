"""Features and latents computed beforehand: whose they are, and whether they belong to a stage's model."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.features import FeatureMeta, FeatureStore
from megatron_unimm.errors import CheckpointError, ConfigError
from megatron_unimm.models.trainable import is_frozen
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.train.state import base_directory, generator_directory

TOWER, VAE = "vision_encoder.", "vae."
"""Prefixes of the tensors of what makes features and latents."""


def feature_meta(stage: StageConfig) -> FeatureMeta:
    """What features of the stage's base model are made by."""
    encoder = stage.model.vision_encoder
    return FeatureMeta(
        encoder=encoder.model_dump(mode="json"),
        weights=_hash_of(base_directory(stage), TOWER),
        dtype=stage.system.precision.dtype,
        width=encoder.out_size * (1 + len(encoder.deepstack_layers)),
    )


def latent_meta(stage: StageConfig) -> FeatureMeta:
    """What latents of the stage's image generator are made by."""
    assert stage.generator is not None
    assert stage.generator.vae is not None
    return FeatureMeta(
        encoder=stage.generator.vae.model_dump(mode="json"),
        weights=_hash_of(generator_directory(stage), VAE),
        dtype=stage.system.precision.dtype,
        width=stage.generator.mmdit.patch_dim,
    )


def open_caches(stage: StageConfig, groups: ParallelGroups) -> tuple[FeatureStore | None, FeatureStore | None]:
    """The stage's features and latents, where it has any computed.

    Raises:
        ConfigError: its vision encoder trains, or there is no picture to have latents.
        DataError: a folder is no finished cache.
        CheckpointError: another model made it.
    """
    features = latents = None
    if stage.data.feature_cache:
        trunk_is_backbone = stage.method.trunk == "backbone"
        if trunk_is_backbone and not is_frozen("vision_encoder", stage.train.trainable):
            raise ConfigError(
                "data.feature_cache",
                f"set, but the vision encoder trains in stage {stage.name}; its features change, leave it empty",
            )
        meta = _on_one_rank(lambda: feature_meta(stage), groups)
        features = _open(stage.data.feature_cache, meta)
    if stage.data.latent_cache:
        if stage.generator is None:
            what = f"set, but stage {stage.name} draws no pictures; leave it empty"
            raise ConfigError("data.latent_cache", what)
        meta = _on_one_rank(lambda: latent_meta(stage), groups)
        latents = _open(stage.data.latent_cache, meta)
    return features, latents


def _open(folder: str, expected: FeatureMeta) -> FeatureStore:
    store = FeatureStore(Path(folder))
    for field in ("encoder", "weights", "dtype", "width"):
        ours, theirs = vars(expected)[field], vars(store.meta)[field]
        if ours != theirs:
            in_words = field in ("dtype", "width")
            what = f"{field} differs: " + (f"{theirs} there, {ours} here" if in_words else "of another model")
            raise CheckpointError(str(store.folder), f"{what}; make it again with unimm data cache")
    return store


def _on_one_rank(find: Callable[[], FeatureMeta], groups: ParallelGroups) -> FeatureMeta:
    """One rank reads the weights for all."""
    found: list[FeatureMeta | None] = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0, group=groups.host)
    assert found[0] is not None
    return found[0]


def _hash_of(directory: Path, prefix: str) -> str:
    digest = hashlib.sha256()
    with Reader(directory) as reader:
        for key in sorted(key for key in reader.tensors if key.startswith(prefix)):
            tensor = reader.read(key)
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
