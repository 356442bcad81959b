"""Conversations without their last drawing: what a model draws to learn from rewards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_unimm.config.data import DataConfig, SampleKind
from megatron_unimm.data.decode.interface import Decoder
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.frames import FrameSample, FrameWork, up_to_last_drawing
from megatron_unimm.data.mix import Draw, draw_key
from megatron_unimm.data.plan import BadSample, Laid
from megatron_unimm.data.sample import Sample, Turn


@dataclass(frozen=True)
class PromptSample:
    """A conversation up to where the assistant draws."""

    id: str
    kind: SampleKind
    turns: tuple[Turn, ...]
    """Without the drawing."""
    size: tuple[int, int]
    """Width and height in pixels of the record's own drawing, whose shape the new one takes."""
    num_tokens: int
    key: int
    """128 bits for what is random about its drawings."""
    metadata: dict[str, Any]
    pictures: tuple[np.ndarray, ...] | None = None
    """uint8 (H, W, 3) of all images of the sample but that drawing, at the size at which they are drawn; None on ranks
    that read none."""
    learned: bool = True
    """False where an image is broken."""

    @property
    def text(self) -> str:
        """What was asked for last."""
        return " ".join(part for part in self.turns[-1].parts if isinstance(part, str))

    def __len__(self) -> int:
        return self.num_tokens


@dataclass(frozen=True)
class PromptRow:
    """Prompts of one rank's share of a rollout."""

    samples: tuple[PromptSample, ...]
    num_tokens: int

    @property
    def num_padding(self) -> int:
        return max(0, self.num_tokens - sum(len(sample) for sample in self.samples))

    @property
    def num_images(self) -> int:
        return len(self.samples)

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return tuple(sample.id for sample in self.samples)

    @property
    def kinds(self) -> tuple[SampleKind, ...]:
        return tuple(sample.kind for sample in self.samples)


@dataclass(frozen=True)
class PromptWork:
    """Samples to prompts; see ``data/workers.py``."""

    frames: FrameWork

    @property
    def data(self) -> DataConfig:
        return self.frames.data

    @property
    def sources(self) -> Any:
        return self.frames.sources

    @property
    def room(self) -> int:
        return self.frames.room

    def lay_out(self, draw: Draw) -> Laid | BadSample:
        """Read a sample's text and the headers of its images."""
        laid = self.frames.lay_out(draw)
        if isinstance(laid, BadSample):
            return laid
        return replace(laid, layout=self._prompt(laid.sample, laid.layout, draw))

    def _prompt(self, sample: Sample, frames: FrameSample, draw: Draw) -> PromptSample:
        turns = up_to_last_drawing(sample.turns)
        last, side = turns[-1], self.frames.generator.token_pixels
        before = replace(last, parts=last.parts[:-1])
        rows, columns = (int(count) for count in frames.sizes[-1])
        return PromptSample(
            id=sample.id,
            kind=sample.kind,
            turns=(*turns[:-1], *([before] if before.parts else [])),
            size=(columns * side, rows * side),
            num_tokens=len(frames),
            key=draw_key(self.frames.seed, draw),
            metadata=dict(sample.metadata),
        )

    def load(self, laid: Sequence[Laid], decoder: Decoder) -> list[tuple[PromptSample, list[BadSample]]]:
        """Decode the pictures before; nothing is learned from a sample with a broken one."""
        done = []
        for each in laid:
            frames = self.frames.frames_of_sample(each.sample, each.draw)
            asked = self.frames.picture_requests(replace(each, layout=frames))[:-1]
            pictures: dict[int, np.ndarray] = {}
            broken: list[BadSample] = []
            for index, request, found in zip(frames.image_index, asked, decoder.pixels(asked), strict=False):
                if isinstance(found, SampleError):
                    broken.append(BadSample(each.draw.source, SampleError(each.where, str(found), found.fault)))
                    found = np.zeros((request.height, request.width, 3), dtype=np.uint8)
                pictures[index] = found
            last = frames.image_index[-1]
            order = [index for index in range(len(each.sample.images)) if index < last]
            shown = tuple(pictures.get(index, np.zeros((1, 1, 3), dtype=np.uint8)) for index in order)
            done.append((replace(each.layout, pictures=shown, learned=not broken), broken))
        return done

    def row(self, samples: Sequence[PromptSample], step: int = 0) -> PromptRow:
        """One behind the other."""
        return PromptRow(tuple(samples), self.data.sequence_length)
