"""A model that answers: from a checkpoint at any layout, or a live one that is training."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_unimm.checkpoint.folder import HF_FOLDER
from megatron_unimm.checkpoint.manifest import find_checkpoint, latest, read_meta
from megatron_unimm.config.data import ImageSize
from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.parallel import ParallelConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data import images
from megatron_unimm.data.chat import ChatFormat, ChatTokenizer, concat_patches, image_order, prompt_tokens
from megatron_unimm.data.sample import Turn
from megatron_unimm.data.sizes import new_size
from megatron_unimm.errors import CheckpointError, UserError
from megatron_unimm.generate.checkpoint import generation_stage
from megatron_unimm.generate.decode import Answer, GeneratedImage, Prompt, Stream, decode
from megatron_unimm.generate.paint import Painter, PaintRequest
from megatron_unimm.generate.sampling import DecodeSettings
from megatron_unimm.generate.staged import SpeakingChunk, StagedModel, decoding_mode
from megatron_unimm.methods.registry import build_method
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform, select_platform
from megatron_unimm.train import setup
from megatron_unimm.train.state import check_architecture, load_base, load_weights

logger = logging.getLogger(__name__)


class Generator:
    """A model ready to answer; every method that answers is called on all ranks of a layout with the same arguments.

    Use it as a context manager when it came from :meth:`load`: leaving takes the process groups down.

    Args:
        chunks: this rank's model chunks, unwrapped.
        draws: whether the model has learned to generate images.
        painter: makes pictures of the visual tokens that are generated; None leaves it at these.
        origin: checkpoint, for messages.
    """

    def __init__(
        self,
        chunks: Sequence[SpeakingChunk],
        stage: StageConfig,
        groups: ParallelGroups,
        platform: Platform,
        chat: ChatFormat,
        *,
        draws: bool,
        origin: str,
        painter: Painter | None = None,
    ) -> None:
        self.chunks = chunks
        self.stage = stage
        self.groups = groups
        self.platform = platform
        self.chat = chat
        self.draws = draws
        self.origin = origin
        self.painter = painter
        self.staged = StagedModel(chunks, stage.model, groups, platform.device, DTYPES[stage.system.precision.dtype])

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        context: int = 1,
        with_targets: bool = False,
        base: Path | None = None,
        decoder: Path | None = None,
    ) -> "Generator":
        """Build a checkpoint's model on the ranks that torchrun or srun started (one without them) and fill it.

        Args:
            model_dir: a checkpoint (imported base model or ``step_…``), or a stage's or run's folder: their newest.
            tensor, pipeline, context: layout; ranks beyond ``tensor * pipeline * context`` are replicas. Ranks of
                ``context`` share the drawing of pictures, and decode each for itself.
            with_targets: load the base model's vision encoder too, for :meth:`target_features`.
            base: the base model's checkpoint; None takes the one that the training used.
            decoder: an image decoder's checkpoint or stage; None takes the one in the run's folder, if it has one.

        Raises:
            CheckpointError: no checkpoint there, or a damaged or foreign one.
            ConfigError: a layout that the model cannot have.
            UserError: ranks of ``context``, but no pictures for them to share.
        """
        directory = find_language_model(model_dir)
        meta = read_meta(directory)
        decoder_dir = _find_decoder(model_dir, decoder)
        if context > 1 and decoder_dir is None:
            what = f"has no image decoder beside it, so that nothing is shared by {context} context-parallel ranks"
            raise UserError(str(directory), f"{what}; leave --context out, or give one with --decoder")
        trained = meta.get("kind") == "training"
        with_base = with_targets and (trained or base is not None)
        # Numbers below float32 are slow on a CPU and save nothing there.
        dtype = None if select_platform().is_gpu else "float32"
        stage = generation_stage(
            meta,
            ParallelConfig(tensor=tensor, pipeline=pipeline, context=context),
            world_size=setup.world_size(),
            dtype=dtype,
            with_base=with_base,
        )
        base_dir = _base_directory(stage, base) if with_base else None
        platform, groups = setup.enter(stage)
        try:
            chunks = _fill(
                build_method(stage, platform, groups).build(0, with_base), directory, base_dir, stage, platform, groups
            )
            tokenizer = ChatTokenizer(stage.data.tokenizer or directory / HF_FOLDER, stage.model)
            painter = Painter.load(decoder_dir, groups, platform, dtype, base) if decoder_dir is not None else None
        except BaseException:
            destroy_groups()
            raise
        chat = ChatFormat(tokenizer, stage.model.vision_encoder, stage.data)
        draws = "vision_head" in meta
        return cls(chunks, stage, groups, platform, chat, draws=draws, origin=str(directory), painter=painter)

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

    @property
    def paints(self) -> bool:
        """Whether generated images get pixels."""
        return self.painter is not None

    @property
    def reconstructs(self) -> bool:
        """Whether :meth:`reconstruct` has something true to draw pictures from."""
        return self.paints

    @property
    def num_scales(self) -> int:
        """At which it draws every picture."""
        return 1

    @property
    def sampler(self) -> SamplerConfig | None:
        """How pictures are drawn unless the settings say otherwise; None where there are none."""
        return None if self.painter is None else self.painter.config.sampler

    @property
    def drawn_by(self) -> str:
        """The checkpoint that pictures come from."""
        return "" if self.painter is None else self.painter.origin

    def agree(self, read: Callable[[], str]) -> str:
        """What ``read`` gives on the rank that talks to people, on every rank."""
        words = [read() if self.is_main else ""]
        dist.broadcast_object_list(words, src=0, group=self.groups.host)
        return words[0]

    # -- prompts -------------------------------------------------------------------------------------------------------

    def prompt(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[np.ndarray | GeneratedImage] = (),
        *,
        open_image: bool = False,
        number: int = 0,
    ) -> Prompt:
        """A conversation without its answer.

        Args:
            turns: their integer parts count into ``pictures``.
            pictures: uint8 (H, W, 3), or images that the model generated before, which it sees as it made them.
            open_image: the answer begins with an image.
            number: with the seed of the settings, fixes the random numbers of the answer.

        Raises:
            UserError: ``open_image``, but the model cannot generate images.
        """
        if open_image and not self.draws:
            raise UserError(
                self.origin,
                "is a model without a vision head: it answers in text and cannot generate images; "
                "take a trained checkpoint",
            )
        order = image_order(turns)
        pixels = [self._blank(p) if isinstance(p, GeneratedImage) else p for p in pictures]
        seen = [p for i in order if not isinstance(p := pictures[i], GeneratedImage)]
        return Prompt(
            tokens=prompt_tokens(turns, pixels, self.chat, open_image=open_image),
            grid=self._grid(seen[-1] if seen else None),
            number=number,
            given={
                place: p.visual_tokens for place, i in enumerate(order) if isinstance(p := pictures[i], GeneratedImage)
            },
            pictures=tuple(pictures[i] for i in order),
        )

    def _grid(self, like: np.ndarray | None, rule: ImageSize | None = None) -> np.ndarray:
        """Grid of an image to be generated, or of another rule: of the shape of the last one given (edits keep it),
        else a square."""
        limits, encoder = rule or self.chat.data.generation_size, self.chat.encoder
        width, height = new_size(None if like is None else (like.shape[1], like.shape[0]), limits, encoder.token_pixels)
        return np.array([1, height // encoder.patch_size, width // encoder.patch_size], dtype=np.int64)

    def _blank(self, image: GeneratedImage) -> np.ndarray:
        """Pixels that hold the place of a generated image."""
        _, rows, columns = image.grid * self.chat.encoder.patch_size
        return np.zeros((rows, columns, 3), dtype=np.uint8)

    # -- answers -------------------------------------------------------------------------------------------------------

    def answer(self, prompts: Sequence[Prompt], settings: DecodeSettings, batch_size: int = 64) -> list[Answer]:
        """Answers in the order of the prompts; they do not depend on which prompts share a batch."""
        if not self.draws and settings.images:
            settings = replace(settings, images=False)
        # Prompts of like length share a batch: the cache pads all to the longest.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
        answers: dict[int, Answer] = {}
        with decoding_mode(self._modules()):
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                streams = decode(
                    self.staged, [prompts[i] for i in places], settings, self.stage.model.backbone.max_position
                )
                answers |= {i: self._answer(stream) for i, stream in zip(places, streams, strict=True)}
        found = [answers[i] for i in range(len(prompts))]
        if self.painter is None or not settings.pixels:
            return found
        return self._painted(prompts, found, self.painter, settings)

    def reconstruct(
        self, pictures: Sequence[np.ndarray], sampler: SamplerConfig | None = None, seed: int = 0
    ) -> list[np.ndarray]:
        """What the image decoder makes of the true visual tokens of pictures (uint8 (H, W, 3)), on every rank.

        Raises:
            CheckpointError: the base model, whose vision encoder makes these tokens, is not there.
        """
        painter = self._need_painter()
        grids = np.stack([self._grid(picture) for picture in pictures])
        tokens = painter.visual_tokens(pictures, grids)
        requests = [
            PaintRequest(tokens, grid, number) for number, (tokens, grid) in enumerate(zip(tokens, grids, strict=True))
        ]
        return painter.paint(requests, sampler, seed)

    def vae_round_trip(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures through the image decoder's VAE alone, on every rank."""
        return self._need_painter().vae_round_trip(pictures)

    def _need_painter(self) -> Painter:
        if self.painter is None:
            raise UserError(
                self.origin, "has no image decoder beside it; train one (stage decoder), or give one with --decoder"
            )
        return self.painter

    def _painted(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], painter: Painter, settings: DecodeSettings
    ) -> list[Answer]:
        """The answers with pictures of their images."""
        sources = self._sources(prompts, answers, painter)
        requests = [
            PaintRequest(image.visual_tokens, image.grid, prompt.number, sources[place])
            for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            for image in answer.images
        ]
        pixels = iter(painter.paint(requests, settings.sampler, settings.seed))
        return [
            replace(answer, images=tuple(replace(image, pixels=next(pixels)) for image in answer.images))
            for answer in answers
        ]

    def _sources(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], painter: Painter
    ) -> list[tuple[Tensor, ...]]:
        """Visual tokens of the images that each prompt's pictures are edits of; those that were generated as they were
        made."""
        if not painter.takes_sources:
            return [()] * len(prompts)
        wanted = [prompt.pictures if answer.images else () for prompt, answer in zip(prompts, answers, strict=True)]
        given = [picture for pictures in wanted for picture in pictures if not isinstance(picture, GeneratedImage)]
        rule = self.chat.data.understanding_size
        seen = iter(painter.visual_tokens(given, np.stack([self._grid(p, rule) for p in given])) if given else ())
        return [
            tuple(p.visual_tokens if isinstance(p, GeneratedImage) else next(seen) for p in pictures)
            for pictures in wanted
        ]

    def target_features(self, pictures: Sequence[np.ndarray], batch_size: int = 64) -> list[Tensor]:
        """The visual tokens ``[V, H]`` of each image as the model learns to generate them, on every rank.

        Args:
            pictures: uint8 (H, W, 3).
        """
        features: list[Tensor] = []
        with decoding_mode(self._modules()):
            for start in range(0, len(pictures), batch_size):
                features += self._features(pictures[start : start + batch_size])
        return features

    def _features(self, pictures: Sequence[np.ndarray]) -> list[Tensor]:
        encoder = self.chat.encoder
        grids = np.stack([self._grid(picture) for picture in pictures])
        patches = [
            images.patchify(
                images.resize(picture, int(grid[2]) * encoder.patch_size, int(grid[1]) * encoder.patch_size), encoder
            )[0]
            for picture, grid in zip(pictures, grids, strict=True)
        ]
        features = self.staged.target_features(concat_patches(patches, encoder), grids)
        return list(features.split((grids.prod(axis=1) // encoder.spatial_merge_size**2).tolist()))

    def _answer(self, stream: Stream) -> Answer:
        parts = tuple(self._parts(stream.ids, len(stream.images)))
        text = "".join(part for part in parts if isinstance(part, str))
        return Answer(stream.ids, text, parts, tuple(stream.images), stream.complete)

    def _parts(self, ids: Sequence[int], num_images: int) -> list[str | int]:
        """Text and images in their order. An image is known by its end, since one may have begun in the prompt."""
        special = set(self.chat.tokenizer.token_ids.model_dump().values())
        parts: list[str | int] = []
        text: list[int] = []
        seen = 0
        for token in ids:
            if token == self.chat.tokenizer.token_ids.vision_end:
                parts += [self.chat.tokenizer.decode(text)] * bool(text) + [seen]
                text, seen = [], seen + 1
            elif token not in special:
                text.append(token)
        assert seen == num_images, f"{seen} image ends for {num_images} images"
        return parts + [self.chat.tokenizer.decode(text)] * bool(text)

    def _modules(self) -> list[torch.nn.Module]:
        return [chunk for chunk in self.chunks if isinstance(chunk, torch.nn.Module)]


def find_language_model(model_dir: Path) -> Path:
    """The checkpoint that answers: the one that a folder is, or the newest of a stage's or run's folder.

    Raises:
        UserError: it is one that can only draw.
        CheckpointError: there is none.
    """
    directory = find_checkpoint(model_dir, lambda meta: not _draws_only(meta))
    if _draws_only(read_meta(directory)):
        raise UserError(
            str(directory), "is an image decoder alone; give the run's folder, or a language model and --decoder"
        )
    return directory


def _draws_only(meta: dict[str, Any]) -> bool:
    return "mmdit" in meta.get("architecture", {}) and "language_model" not in meta


def _is_decoder(meta: dict[str, Any]) -> bool:
    return "connector" in meta and _draws_only(meta)


def _find_decoder(model_dir: Path, decoder: Path | None) -> Path | None:
    """The image decoder's checkpoint that was named, or that of a run."""
    if decoder is not None:
        return find_checkpoint(decoder, _is_decoder)
    found = [step for stage in sorted(model_dir.glob("*/checkpoints")) if (step := latest(stage)) is not None]
    return find_checkpoint(model_dir, _is_decoder) if any(_is_decoder(read_meta(step)) for step in found) else None


def _fill(
    chunk: StageModel,
    directory: Path,
    base_dir: Path | None,
    stage: StageConfig,
    platform: Platform,
    groups: ParallelGroups,
) -> list[Any]:
    """Move a chunk to the device and read its weights, and those of its frozen base where it has one."""
    chunks = [chunk.to(platform.device, DTYPES[stage.system.precision.dtype])]
    load_weights(chunks, directory, groups)
    if base_dir is not None:
        check_architecture(base_dir, stage)
        load_base(chunks, {"vision_encoder": base_dir}, groups)
    return chunks


def _base_directory(stage: StageConfig, base: Path | None) -> Path:
    directory = base if base is not None else Path(stage.base_checkpoint)
    if not directory.is_dir():
        raise CheckpointError(
            str(directory),
            "the base model whose vision encoder made the training targets is not there; give its folder with --base",
        )
    return directory
