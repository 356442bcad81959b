"""A tokenizer's checkpoint at work: pictures to latents and back, and what its streams see in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from megatron_unimm.checkpoint.manifest import find_checkpoint, read_meta
from megatron_unimm.config.parallel import ParallelConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data import images
from megatron_unimm.data.pictures import PictureSample, PictureWork
from megatron_unimm.errors import CheckpointError, UserError
from megatron_unimm.generate.checkpoint import generation_stage
from megatron_unimm.generate.staged import decoding_mode
from megatron_unimm.methods.spar.tokenizer.method import SparTokenizer
from megatron_unimm.methods.spar.tokenizer.model import SparTokenizerModel
from megatron_unimm.models.trainable import is_frozen
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.models.vae import to_pictures
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import select_platform
from megatron_unimm.train import setup
from megatron_unimm.train.state import check_architecture, load_base, load_weights


@dataclass(frozen=True)
class Looked:
    """Of some pictures."""

    true: list[np.ndarray]
    """uint8 (H, W, 3), at the size that the tokenizer reads."""
    drawn: list[np.ndarray]
    """What it makes of them."""
    features: dict[str, Tensor]
    """float32 ``[n, D]`` each, averaged over a picture's cells: ``original``, visual tokens of the encoder as it was at
    first; ``semantic``, of the semantic stream; ``readout``, read out of the latents."""


class PictureTokenizer:
    """Opened by :meth:`open`; a context manager."""

    def __init__(
        self, method: SparTokenizer, model: SparTokenizerModel, stage: StageConfig, groups: ParallelGroups, origin: str
    ) -> None:
        self.method, self.model, self.stage, self.groups, self.origin = method, model, stage, groups, origin

    @classmethod
    def open(cls, model_dir: Path, tensor: int = 1, base: Path | None = None) -> "PictureTokenizer":
        """Build a checkpoint's tokenizer on the ranks that torchrun or srun started (one without them) and fill it.

        Args:
            model_dir: a checkpoint, or a stage's or run's folder: their newest of a tokenizer.
            base: the base model, whose encoder the tokenizer began with; None takes the training's.

        Raises:
            CheckpointError: no checkpoint there, or a damaged or foreign one.
            UserError: it is none of a tokenizer's stage.
        """
        directory = find_checkpoint(model_dir, _is_tokenizer)
        meta = read_meta(directory)
        if not _is_tokenizer(meta):
            raise UserError(str(directory), "is no tokenizer's; give the checkpoint of a stage that trains one")
        trained = StageConfig.model_validate(yaml.safe_load(meta["config"]))
        has_base = not is_frozen("vision_encoder", trained.train.trainable)
        stage = generation_stage(
            meta,
            ParallelConfig(tensor=tensor),
            world_size=setup.world_size(),
            # Numbers below float32 are slow on a CPU and save nothing there.
            dtype=None if select_platform().is_gpu else "float32",
            with_base=has_base,
        )
        base_dir = base or Path(stage.base_checkpoint)
        if has_base and not base_dir.is_dir():
            raise CheckpointError(str(base_dir), "the base model is not there; give its folder with --base")
        platform, groups = setup.enter(stage)
        try:
            method = SparTokenizer(stage, platform, groups)
            model = method.build(0).to(platform.device, DTYPES[stage.system.precision.dtype])
            load_weights([model], directory, groups)
            if has_base:
                check_architecture(base_dir, stage)
                load_base([model], {"vision_encoder": base_dir}, groups)
        except BaseException:
            destroy_groups()
            raise
        return cls(method, model, stage, groups, str(directory))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        destroy_groups()

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that talks to people and writes files."""
        return dist.get_rank() == 0

    def look(self, pictures: Sequence[np.ndarray], batch_size: int = 32) -> Looked:
        """Through the tokenizer, on every rank alike.

        Args:
            pictures: uint8 (H, W, 3) of any size.
        """
        encoder, size = self.stage.model.vision_encoder, self.stage.data.generation_size
        true = [images.brought_to(picture, size, encoder.token_pixels) for picture in pictures]
        drawn: list[np.ndarray] = []
        found: dict[str, list[Tensor]] = {"original": [], "semantic": [], "readout": []}
        with decoding_mode([self.model]):
            for start in range(0, len(true), batch_size):
                some, features = self._look(true[start : start + batch_size])
                drawn += some
                for name, rows in features.items():
                    found[name].append(rows)
        return Looked(true, drawn, {name: torch.cat(parts) for name, parts in found.items()})

    def _look(self, pictures: Sequence[np.ndarray]) -> tuple[list[np.ndarray], dict[str, Tensor]]:
        encoder, side = self.stage.model.vision_encoder, self.stage.model.vision_encoder.token_pixels
        patches, grids = zip(*(images.patchify(picture, encoder) for picture in pictures), strict=True)
        cells = [int(grid.prod()) // encoder.spatial_merge_size**2 for grid in grids]
        work = PictureWork(encoder, self.stage.data, {})
        row = work.row(
            [
                PictureSample("", "reconstruction", grid[None], count, patches=part)
                for part, grid, count in zip(patches, grids, cells, strict=True)
            ]
        )
        batch = self.method.batch(row, self.model, next(self.model.parameters()).device)
        encoded, original = self.model.encode(batch.images, batch.grids)
        pixels = self.model.tokenizer.decode(encoded.latents, batch.grids)
        drawn: dict[int, np.ndarray] = {}
        for size, whole in batch.grids.pictures(pixels, side).items():
            drawn |= dict(zip(batch.grids.by_size()[size], to_pictures(whole), strict=True))
        readout = self.model.tokenizer.readout(encoded.latents)
        features = {"original": original.tokens, "semantic": encoded.semantic, "readout": readout}
        pooled = {
            name: torch.stack([part.float().mean(0) for part in rows.split(cells)]).cpu()
            for name, rows in features.items()
        }
        return [drawn[number] for number in range(len(pictures))], pooled


def _is_tokenizer(meta: dict[str, Any]) -> bool:
    return "tokenizer" in meta
