"""Computes what a stage's frozen parts make of its samples beforehand: ``unimm data cache``."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_unimm.checkpoint.ranks import Ranks
from megatron_unimm.checkpoint.store import load
from megatron_unimm.config.methods import HieraQueryConfig, MMCoreDrawing, SparConfig
from megatron_unimm.config.mmdit import TokenizerSpaceConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.conditions import VISUAL, WORDS
from megatron_unimm.data.decode.build import build_decoder
from megatron_unimm.data.decode.interface import Decoder, ImageRequest
from megatron_unimm.data.drawing import DrawingWork
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.features import STORED, FeatureMeta, FeatureWriter, Key, finish_cache, image_key
from megatron_unimm.data.frames import FrameRow, FrameWork
from megatron_unimm.data.images import PatchFormat
from megatron_unimm.data.mix import Draw
from megatron_unimm.data.plan import BadSample, Laid
from megatron_unimm.data.queries import QueryWork
from megatron_unimm.data.sources.opening import open_sources
from megatron_unimm.data.workers import ConversationWork, SampleWork
from megatron_unimm.errors import CheckpointError, ConfigError
from megatron_unimm.methods.drawing.autoencoder import build_autoencoder
from megatron_unimm.methods.drawing.frames import model_parts
from megatron_unimm.methods.hieraquery.model import build_vlm as build_scale_vlm
from megatron_unimm.methods.hieraquery.model import said_of as said_at_scales
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.diffusion.model import build_vlm, condition_of
from megatron_unimm.methods.mmcore.model import MMCoreVlm
from megatron_unimm.methods.registry import build_method
from megatron_unimm.methods.spar.alignment.model import SparVlm
from megatron_unimm.methods.vlm.queries import QueryVlm, frozen_vlm
from megatron_unimm.models.specs import layers_backend
from megatron_unimm.models.transformer_config import DTYPES, vision_transformer_config
from megatron_unimm.models.vae import encode_patches
from megatron_unimm.models.vision import VisionInput, build_vision_encoder
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.caches import TOWER, VAE, condition_metas, feature_meta, latent_meta, need_of_vlm
from megatron_unimm.train.state import (
    base_directory,
    beginning,
    generator_directory,
    load_weights,
    sharding_metadata,
    tokenizer_directory,
)

logger = logging.getLogger(__name__)

IMAGES_AT_A_TIME = 32
FEATURES, LATENTS, CONDITIONS = "features", "latents", "conditions"
"""Folders of each, for a stage that has several."""

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Maker(Generic[ItemT]):
    """A frozen part, what it is run on, and what it writes."""

    folder: Path
    stores: Mapping[Path, FeatureMeta]
    """Each gets its own rows of every item."""
    items: Callable[[Laid], Sequence[ItemT]]
    """Of a sample: its images, or the sample."""
    key: Callable[[ItemT], Key]
    run: Callable[[Sequence[ItemT], Decoder], list[tuple[Tensor, ...] | None]]
    """Rows of each item for each store; None where an image is broken."""
    size: Callable[[ItemT], int]
    room: int
    """Of the items of one run."""
    together: bool = False
    """All ranks run it as often as one another, if need be on nothing."""


def make_cache(stage: StageConfig, folder: Path, run_dir: Path) -> dict[Path, int]:
    """Run the stage's frozen parts over all samples of its sources, on the ranks that torchrun started; each takes its
    share. Returns how many images or conversations each folder has, twins counted once per rank.

    A stage of the language model has the features of its vision encoder, in ``folder``. One that draws has the latents
    of its pictures in ``folder/latents``, and beside them these features (``folder/features``), or what a frozen VLM
    says (``folder/conditions``).

    Args:
        run_dir: folder of all stages of the run; of a stage with a VLM of its own, the one before must be there.

    Raises:
        CheckpointError: the folder exists already, or a model is not there.
        ConfigError: the stage has no parts whose work can be done beforehand.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(str(folder), "exists already; choose another name or delete it")
    platform, groups = setup.enter(stage)
    try:
        active = {name: source for name, source in stage.data.sources.items() if source.weight > 0}
        sources = open_sources(active, stage.data.index_cache)
        work = build_method(stage, platform, groups).work(DataSetup(sources, lambda: setup.chat_format(stage)))
        sizes = {name: len(source) for name, source in sources.items()}
        return {
            maker.folder: _fill(maker, stage, work, sizes, groups)
            for maker in _makers(stage, folder, run_dir, work, platform, groups)
        }
    finally:
        destroy_groups()


def _makers(
    stage: StageConfig, folder: Path, run_dir: Path, work: SampleWork, platform: Platform, groups: ParallelGroups
) -> "Iterator[Maker[ImageRequest] | Maker[Laid]]":
    if isinstance(work, ConversationWork | QueryWork):
        yield _tower_maker(stage, folder, work.requests, platform, groups)
    elif isinstance(work, DrawingWork):
        yield _tower_maker(stage, folder / FEATURES, work.condition_requests, platform, groups)
        yield _vae_maker(
            stage, folder / LATENTS, work.pixel_format, lambda laid: [work.picture_request(laid)], platform, groups
        )
    elif isinstance(work, FrameWork):
        if need := need_of_vlm(stage):
            logger.info("what the VLM says is not computed beforehand: %s", need)
        else:
            yield _condition_maker(stage, folder / CONDITIONS, run_dir, work, platform, groups)
        yield _vae_maker(stage, folder / LATENTS, work.pixel_format, work.picture_requests, platform, groups)
        if work.with_targets and not isinstance(stage.method, MMCoreDrawing):  # their VLM's own encoder is the teacher
            yield _tower_maker(stage, folder / FEATURES, work.target_requests, platform, groups)
    else:
        raise ConfigError("--stage", f"{stage.name} learns from what it draws itself; nothing can be made beforehand")


def _tower_maker(
    stage: StageConfig,
    folder: Path,
    requests: Callable[[Laid], Sequence[ImageRequest]],
    platform: Platform,
    groups: ParallelGroups,
) -> Maker[ImageRequest]:
    encoder, dtype = stage.model.vision_encoder, DTYPES[stage.system.precision.dtype]
    config = vision_transformer_config(encoder, stage.system, platform)
    backend = layers_backend(stage.system.layers, platform, fp8=False)
    tower = build_vision_encoder(encoder, config, backend, groups.alone()).to(platform.device, dtype).eval()
    state = tower.sharded_state_dict(prefix=TOWER, metadata=sharding_metadata(groups))
    load(state, base_directory(stage), may_be_unread=("*",), may_be_absent=("*._extra_state",))

    def run(patches: np.ndarray, grids: np.ndarray) -> Sequence[Tensor]:
        whole = np.concatenate([np.ones((len(grids), 1), dtype=np.int64), grids], axis=1)
        features = tower(VisionInput.build(patches, whole, encoder, platform.device, dtype))
        return features.split((grids.prod(axis=1) // encoder.spatial_merge_size**2).tolist())

    return _image_maker(folder, feature_meta(stage), encoder, requests, run)


def _vae_maker(
    stage: StageConfig,
    folder: Path,
    form: PatchFormat,
    requests: Callable[[Laid], Sequence[ImageRequest]],
    platform: Platform,
    groups: ParallelGroups,
) -> Maker[ImageRequest]:
    generator, dtype = stage.generator, DTYPES[stage.system.precision.dtype]
    assert generator is not None
    assert generator.vae is not None
    vae = build_autoencoder(stage, platform, groups).to(platform.device, dtype).eval()
    # A tokenizer has the names of its own checkpoint.
    prefix, directory = VAE, generator_directory
    if isinstance(generator.vae, TokenizerSpaceConfig):
        prefix, directory = "", tokenizer_directory
    metadata = sharding_metadata(groups)
    state = sharded_state_dict_default(vae, prefix, metadata=metadata, tp_group=groups.collection.tp)
    load(state, directory(stage), may_be_unread=("*",), may_be_absent=("*._extra_state",))

    def run(patches: np.ndarray, grids: np.ndarray) -> Sequence[Tensor]:
        sizes = [(int(rows), int(columns)) for rows, columns in grids]
        pixels = torch.from_numpy(patches).to(platform.device, dtype)
        latents = encode_patches(vae, pixels, sizes, generator.token_pixels, generator.mmdit.patch_size)
        return latents.split([rows * columns for rows, columns in sizes])

    return _image_maker(folder, latent_meta(stage), form, requests, run)


def _image_maker(
    folder: Path,
    meta: FeatureMeta,
    form: PatchFormat,
    requests: Callable[[Laid], Sequence[ImageRequest]],
    part: Callable[[np.ndarray, np.ndarray], Sequence[Tensor]],
) -> Maker[ImageRequest]:
    """Of a part that sees images one by one.

    Args:
        part: from patches ``[P, F]`` and grids (int64 ``[N, 2]``, rows and columns of patches) to rows of each image.
    """

    def run(asked: Sequence[ImageRequest], decoder: Decoder) -> list[tuple[Tensor, ...] | None]:
        decoded = decoder.load(asked, form)
        good = [i for i, patches in enumerate(decoded) if not isinstance(patches, SampleError)]
        answers: list[tuple[Tensor, ...] | None] = [None] * len(asked)
        if good:
            side = form.patch_size
            grids = np.array([[asked[i].height // side, asked[i].width // side] for i in good], dtype=np.int64)
            patches = np.concatenate([each for each in decoded if not isinstance(each, SampleError)])
            for i, rows in zip(good, part(patches, grids), strict=True):
                answers[i] = (rows,)
        return answers

    return Maker(folder, {folder: meta}, requests, image_key, run, size=lambda _: 1, room=IMAGES_AT_A_TIME)


def _condition_maker(
    stage: StageConfig, folder: Path, run_dir: Path, work: FrameWork, platform: Platform, groups: ParallelGroups
) -> Maker[Laid]:
    """Of the VLM that the stage starts with, on rows of conversations as training packs them."""
    ranks, parallel = Ranks.of(groups.host), stage.system.parallel
    start = ranks.from_first(lambda: beginning(stage, run_dir)).directory
    words, visual = ranks.from_first(lambda: condition_metas(stage, start))
    system = stage.system.model_copy(update={"parallel": parallel.model_copy(update={"context": 1})})
    alone = stage.model_copy(update={"system": system})
    vlm, say = _speaker(alone, platform, groups.without_context())
    vlm = vlm.to(platform.device, DTYPES[stage.system.precision.dtype]).eval()
    load_weights([vlm], start, groups, model_parts(stage), unread=("*",))

    def run(laid: Sequence[Laid], decoder: Decoder) -> list[tuple[Tensor, ...] | None]:
        samples, broken = zip(*work.read(laid, decoder), strict=True) if laid else ((), ())
        # All words, whatever the stage draws from: one that takes them finds the same conversations.
        row = work.row([replace(sample, has_words=True) for sample in samples])
        layouts = [sample.layout for sample in samples]
        said = say(row)
        words = [sum(map(len, layout.text_index)) if len(said[0]) else 0 for layout in layouts]
        counts = words, [len(each.query_index) for each in layouts]
        parts = zip(*(rows.split(count) for rows, count in zip(said, counts, strict=True)), strict=True)
        return [None if bad else part for part, bad in zip(parts, broken, strict=True)]

    return Maker(
        folder,
        {folder / WORDS: words, folder / VISUAL: visual},
        items=lambda laid: [laid],
        key=work.condition_key,
        run=run,
        size=lambda laid: len(laid.layout),
        room=work.room,
        together=parallel.expert > 1,  # experts of one rank work for others
    )


def _speaker(
    stage: StageConfig, platform: Platform, groups: ParallelGroups
) -> tuple[QueryVlm, Callable[[FrameRow], tuple[Tensor, Tensor]]]:
    """The VLM of a stage, and what it says of a row: words, where the method has any, and at queries."""
    if isinstance(stage.method, HieraQueryConfig):
        scales = build_scale_vlm(stage, platform, groups, frozen_vlm(stage))
        return scales, partial(said_at_scales, scales)
    kind = SparVlm if isinstance(stage.method, SparConfig) else MMCoreVlm
    vlm = build_vlm(stage, platform, groups, frozen_vlm(stage), kind)
    return vlm, partial(condition_of, vlm)


def _fill(
    maker: Maker[ItemT], stage: StageConfig, work: SampleWork, sizes: dict[str, int], groups: ParallelGroups
) -> int:
    tensor, data = groups.collection.tp, stage.data
    # Ranks of one tensor group compute together; the first of them writes.
    number, count = dist.get_rank() // tensor.size(), dist.get_world_size() // tensor.size()
    writes = tensor.rank() == 0
    writers = [FeatureWriter(folder, number, meta) for folder, meta in maker.stores.items()] if writes else []
    batches = _batches(maker, _items(maker, work, sizes, number, count))
    with (
        build_decoder(
            data.decoder, max_pixels=data.max_image_pixels, threads=data.prefetch_workers, device=None
        ) as decoder,
        torch.no_grad(),
    ):
        for batch in _as_often(batches, groups) if maker.together else batches:
            _write(batch, maker, maker.run(batch, decoder), writers)
    written = torch.tensor([writer.finish() for writer in writers][:1] or [0])
    dist.all_reduce(written, group=groups.host)
    if dist.get_rank() == 0:
        for folder, meta in maker.stores.items():
            finish_cache(folder, meta)
    return int(written.item())


def _items(maker: Maker[ItemT], work: SampleWork, sizes: dict[str, int], number: int, count: int) -> Iterator[ItemT]:
    """Of every ``count``-th sample, as training lays it out; bad samples are left to training."""
    for name, size in sizes.items():
        for index in range(number, size, count):
            laid = work.lay_out(Draw(name, index, 0))
            if not isinstance(laid, BadSample):
                yield from maker.items(laid)
        logger.info("%s: %d samples of %s looked through", maker.folder.name, size, name)


def _batches(maker: Maker[ItemT], items: Iterator[ItemT]) -> Iterator[list[ItemT]]:
    """As many as there is room for, at least one."""
    batch: list[ItemT] = []
    filled = 0
    for item in items:
        if batch and filled + maker.size(item) > maker.room:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += maker.size(item)
    if batch:
        yield batch


def _as_often(batches: Iterator[list[ItemT]], groups: ParallelGroups) -> Iterator[list[ItemT]]:
    """Empty ones at the end where other ranks have more."""
    while True:
        batch = next(batches, [])
        left = torch.tensor(len(batch))
        dist.all_reduce(left, dist.ReduceOp.MAX, group=groups.host)
        if not left:
            return
        yield batch


def _write(
    batch: Sequence[ItemT],
    maker: Maker[ItemT],
    answers: Sequence[tuple[Tensor, ...] | None],
    writers: Sequence[FeatureWriter],
) -> None:
    for item, answer in zip(batch, answers, strict=True) if writers else ():
        key = maker.key(item)
        if key in writers[0]:
            continue
        for place, writer in enumerate(writers):
            # No rows say that an image cannot be decoded.
            none = np.empty((0, writer.meta.width), STORED[writer.meta.dtype])
            writer.add(key, none if answer is None else _stored(answer[place]))


def _stored(features: Tensor) -> np.ndarray:
    rows = features.cpu()
    bits = rows.view(torch.int16) if rows.dtype is torch.bfloat16 else rows
    return bits.contiguous().numpy()
