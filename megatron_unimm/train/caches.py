"""What was computed beforehand (features, latents, conditions): whose it is, and whether it belongs to a stage's
model."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from megatron_unimm.checkpoint.ranks import Ranks
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.base import Section, as_now
from megatron_unimm.config.methods import HieraQueryConfig, MMCoreDrawing, PathwayDiffusionConfig
from megatron_unimm.config.mmdit import TokenizerSpaceConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.conditions import ConditionStore
from megatron_unimm.data.features import FeatureMeta, FeatureStore
from megatron_unimm.errors import CheckpointError, ConfigError
from megatron_unimm.methods.vlm.queries import VLM
from megatron_unimm.models.trainable import is_frozen
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.train.state import base_directory, generator_directory, tokenizer_directory

TOWER, VAE, TOKENIZER = "vision_encoder.", "vae.", "tokenizer."
"""Prefixes of the tensors of what makes features and latents."""
QUERIES = "query_tokens."
VLM_PARTS = {
    "queries": ("backbone.", QUERIES, "query_connector.", TOWER),
    "hieraquery": ("backbone.", QUERIES, TOWER),
}
"""Likewise of conditions, by the stage's section of queries."""
TEXT_HEAD = "backbone.output_layer."
"""Comes after what conditions are made of."""


def feature_meta(stage: StageConfig) -> FeatureMeta:
    """What features of the stage's base model are made by."""
    encoder = stage.model.vision_encoder
    return FeatureMeta(
        encoder=encoder.model_dump(mode="json"),
        weights=_hash_of({TOWER: base_directory(stage)}),
        dtype=stage.system.precision.dtype,
        width=encoder.out_size * (1 + len(encoder.deepstack_layers)),
    )


def latent_meta(stage: StageConfig) -> FeatureMeta:
    """What latents of the stage's image generator are made by."""
    assert stage.generator is not None
    assert stage.generator.vae is not None
    encoder: dict[str, Any] = stage.generator.vae.model_dump(mode="json")
    if isinstance(stage.generator.vae, TokenizerSpaceConfig):
        assert stage.tokenizer is not None
        encoder["tokenizer"] = stage.tokenizer.model_dump(mode="json")
        encoder["vision_encoder"] = stage.model.vision_encoder.model_dump(mode="json")
        directory = tokenizer_directory(stage)
        weights = _hash_of({TOKENIZER: directory, TOWER: directory})
    else:
        weights = _hash_of({VAE: generator_directory(stage)})
    return FeatureMeta(
        encoder=encoder,
        weights=weights,
        dtype=stage.system.precision.dtype,
        width=stage.generator.mmdit.patch_dim,
    )


def condition_metas(stage: StageConfig, start: Path) -> tuple[FeatureMeta, FeatureMeta]:
    """What the words and the visual latents of the stage's VLM are made by.

    Args:
        start: the checkpoint that the stage starts from, or goes on from. The VLM's tensors have the same names in
            those of all stages, and the same numbers where it is frozen.

    Raises:
        CheckpointError: its VLM has not learned to draw.
    """
    parts = VLM_PARTS[stage.method.query_section]
    with Reader(start) as reader:
        lacking = [part for part in parts if not any(key.startswith(part) for key in reader.tensors)]
    if QUERIES in lacking:
        what = "holds no query tokens, and what a VLM says at new ones is nothing to keep; train them first"
        raise CheckpointError(str(start), what)
    weights = _hash_of(
        {part: base_directory(stage) if part in lacking else start for part in parts},
        DTYPES[stage.system.precision.dtype],
    )
    hidden = stage.model.backbone.hidden_size
    sections: dict[str, Section] = {"model": stage.model}
    if stage.method.query_section == "hieraquery":
        assert stage.hieraquery is not None
        sections["hieraquery"], unread, latent = stage.hieraquery, {"connector", "connector_checkpoint"}, hidden
    else:
        assert stage.queries is not None
        sections["queries"], unread, latent = stage.queries, {"teacher"}, stage.queries.latent_size(stage.model)
        if stage.routing is not None:
            sections["routing"] = stage.routing
    configs = {name: section.model_dump(mode="json", exclude=unread) for name, section in sections.items()}
    words, visual = (FeatureMeta(configs, weights, stage.system.precision.dtype, width) for width in (hidden, latent))
    return words, visual


def open_caches(
    stage: StageConfig, start: Path, groups: ParallelGroups
) -> tuple[FeatureStore | None, FeatureStore | None, ConditionStore | None]:
    """The stage's features, latents and conditions, where it has any computed.

    Args:
        start: the checkpoint that it starts from, or goes on from.

    Raises:
        ConfigError: what makes them trains or is needed, or the stage has no use for them.
        DataError: a folder is no finished cache.
        CheckpointError: another model made it.
    """
    data, ranks = stage.data, Ranks.of(groups.host)
    features = latents = conditions = None
    if data.feature_cache:
        _check_features(stage)
        features = FeatureStore(Path(data.feature_cache))
        encoder = as_now(features.meta.encoder, stage.model.vision_encoder)
        _check(features, encoder, ranks.from_first(lambda: feature_meta(stage)))
    if data.latent_cache:
        if stage.generator is None:
            what = f"set, but stage {stage.name} draws no pictures; leave it empty"
            raise ConfigError("data.latent_cache", what)
        latents = FeatureStore(Path(data.latent_cache))
        _check(latents, latents.meta.encoder, ranks.from_first(lambda: latent_meta(stage)))
    if data.condition_cache:
        _check_conditions(stage)
        conditions = ConditionStore(Path(data.condition_cache))
        words, visual = ranks.from_first(lambda: condition_metas(stage, start))
        for store, expected in ((conditions.words, words), (conditions.visual, visual)):
            encoder = store.meta.encoder
            model = as_now(encoder.get("model", {}), stage.model)
            _check(store, {**encoder, "model": model}, expected)
    return features, latents, conditions


def _check_features(stage: StageConfig) -> None:
    field = "data.feature_cache"
    if isinstance(stage.method, MMCoreDrawing):
        what = f"set, but the vision encoder of stage {stage.name} is its VLM's own; leave it empty"
        raise ConfigError(field, f"{what}, see data.condition_cache")
    if stage.method.trunk == "backbone" and not is_frozen("vision_encoder", stage.train.trainable):
        what = f"set, but the vision encoder trains in stage {stage.name}; its features change, leave it empty"
        raise ConfigError(field, what)


def _check_conditions(stage: StageConfig) -> None:
    field = "data.condition_cache"
    if not isinstance(stage.method, PathwayDiffusionConfig | HieraQueryConfig):
        what = f"set, but method {stage.method.name} of stage {stage.name} learns from no such conditions"
        raise ConfigError(field, f"{what}; leave it empty")
    if need := need_of_vlm(stage):
        raise ConfigError(field, f"set, but {need}; leave it empty")


def need_of_vlm(stage: StageConfig) -> str:
    """Why a stage that trains a diffusion transformer behind a VLM must run it; empty where what it says will do."""
    if not is_frozen(VLM.removesuffix("."), stage.train.trainable):
        return f"the VLM trains in stage {stage.name}, and what it says changes"
    if isinstance(stage.method, PathwayDiffusionConfig) and stage.method.vit_features:
        return f"method.vit_features of stage {stage.name} takes what its vision encoder sees, which no cache has"
    return ""


def _check(store: FeatureStore, encoder: dict[str, Any], expected: FeatureMeta) -> None:
    """Args:
    encoder: the store's, as a configuration of today says it.
    """
    for field, theirs in (vars(store.meta) | {"encoder": encoder}).items():
        ours = vars(expected)[field]
        if ours != theirs:
            in_words = field in ("dtype", "width")
            what = f"{field} differs: " + (f"{theirs} there, {ours} here" if in_words else "of another model")
            raise CheckpointError(str(store.folder), f"{what}; make it again with unimm data cache")


def _hash_of(places: dict[str, Path], dtype: torch.dtype | None = None) -> str:
    """sha256 of all tensors with certain prefixes, by name, but for the text head.

    Args:
        places: the checkpoint of each prefix.
        dtype: of what is computed with: numbers are taken as they are in it. None takes them as they were saved.
    """
    digest = hashlib.sha256()
    for prefix, directory in places.items():
        with Reader(directory) as reader:
            for key in sorted(reader.tensors):
                if not key.startswith(prefix) or key.startswith(TEXT_HEAD):
                    continue
                tensor = reader.read(key)
                tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
