"""Counts what a model chunk really keeps: the storages that autograd saves for the backward pass."""

import weakref
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from small_decoder import SMALL_DECODER
from small_diffusion import SMALL as SMALL_DIFFUSION
from small_mmcore import SMALL as SMALL_MMCORE
from small_orion import SMALL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.footprint import ChunkPlace
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.plan.pipeline import places

ALL_TRAIN = "train.trainable=[{pattern: '*'}]"
ROWS = ("data.sequence_length=512", "data.understanding_size={min_side: 64, max_side: 64}")

DRAWING_MIX = tuple(
    f"data.sources.{kind}.weight={weight}"
    for kind, weight in (("text_to_image", 6), ("editing", 3), ("interleaved", 1))
)
"""What rows are typical of, whatever the recipe reads."""


def orion(repo: Path, *overrides: str) -> StageConfig:
    """A small ORION stage on torch layers, all of which trains."""
    settings = [*SMALL, *ROWS, ALL_TRAIN, "system.layers=torch", *overrides]
    return load_recipe(repo / "configs/orion/shapes.yaml", settings).stages["sft"]


def decoder(repo: Path, *overrides: str) -> StageConfig:
    """A small image decoder's stage."""
    settings = [*SMALL_DECODER, "system.layers=torch", *overrides]
    return load_recipe(repo / "configs/orion/shapes.yaml", settings).stages["decoder"]


def mmcore(repo: Path, *overrides: str) -> StageConfig:
    """A small stage of MMCORE's VLM, all of which trains."""
    settings = [*SMALL_MMCORE, *ROWS, "system.layers=torch", *overrides]
    return load_recipe(repo / "configs/mmcore/shapes.yaml", settings).stages["vlm"]


def diffusion(repo: Path, *overrides: str) -> StageConfig:
    """A small stage of MMCORE's diffusion transformer."""
    rows = "stages.diffusion.data.sequence_length=512"
    settings = [*SMALL_DIFFUSION, *ROWS[1:], *DRAWING_MIX, rows, "system.layers=torch", *overrides]
    return load_recipe(repo / "configs/mmcore/shapes.yaml", settings).stages["diffusion"]


def place_of(stage: StageConfig, rank: int, world_size: int, virtual_stage: int = 0) -> ChunkPlace:
    """Where a rank's chunk stands: pipeline stages are the outermost axis of ranks."""
    return places(stage)[rank // (world_size // stage.system.parallel.pipeline)][virtual_stage]


def kept_bytes(chunk: StageModel, batch: Any) -> tuple[int, Tensor]:
    """Bytes of the storages that one forward pass saves, and its output. Weights and what the batch brought do not
    count."""
    own = [*chunk.parameters(), *chunk.buffers(), *tensors_in(batch)]
    ids = {tensor.untyped_storage()._cdata for tensor in own}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ids:
            saved[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = chunk(batch)
    return sum(storage.nbytes() for storage in saved.values()), output


class Peak(TorchDispatchMode):
    """Bytes of the storages that are made and still there, at their most, besides those that were there before."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors_in(before)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tensors_in(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return output

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def storage_bytes(values: Any) -> int:
    """Of all tensors in something, each storage once."""
    return sum({id_: storage.nbytes() for id_, storage in _storages(values)}.values())


def _storages(values: Any) -> Iterator[tuple[int, Any]]:
    for tensor in tensors_in(values):
        storage = tensor.untyped_storage()
        yield storage._cdata, storage


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a batch."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from tensors_in(vars(value)[each.name])
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
