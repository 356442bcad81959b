"""A generator without a model: what a suite asks of one, answered by functions."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from megatron_unimm.data.sample import Turn
from megatron_unimm.generate.decode import Answer, GeneratedImage
from megatron_unimm.generate.sampling import DecodeSettings


@dataclass(frozen=True)
class Asked:
    """A prompt as the suite gave it."""

    text: str
    pictures: tuple[np.ndarray, ...]
    open_image: bool
    number: int


def same(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A decoder, or a VAE, that loses nothing."""
    return list(pictures)


class FakeGenerator:
    """One rank of a layout of replicas; the process group must be there."""

    def __init__(
        self,
        paint: Callable[[Asked], np.ndarray],
        say: Callable[[Asked], str] = lambda asked: "",
        reconstruct: Callable[[Sequence[np.ndarray]], list[np.ndarray]] = same,
        vae_round_trip: Callable[[Sequence[np.ndarray]], list[np.ndarray]] = same,
        paints: bool = True,
        origin: str = "runs/fake",
        decoder: str = "runs/fake/decoder",
        reconstructs: bool = True,
        coarser: Callable[[np.ndarray], tuple[np.ndarray, ...]] = lambda finest: (),
    ) -> None:
        self.paint, self.say = paint, say
        self.reconstruct, self.vae_round_trip = reconstruct, vae_round_trip
        self.paints, self.draws, self.origin = paints, True, origin
        self.reconstructs, self.coarser = reconstructs, coarser
        self.num_scales = 1 + len(coarser(np.zeros((64, 64, 3), np.uint8)))
        self.drawn_by = decoder if paints else ""
        self.asked: list[Asked] = []
        self.groups = SimpleNamespace(
            config=SimpleNamespace(expert=1),
            data_rank=dist.get_rank(),
            data_size=dist.get_world_size(),
            tensor_rank=0,
            context_rank=0,
            pipeline_rank=0,
            host=dist.group.WORLD,
        )

    @property
    def is_main(self) -> bool:
        return dist.get_rank() == 0

    def agree(self, read: Callable[[], str]) -> str:
        words = [read() if self.is_main else ""]
        dist.broadcast_object_list(words, src=0)
        return words[0]

    def prompt(
        self, turns: Sequence[Turn], pictures: Sequence[np.ndarray] = (), *, open_image: bool = False, number: int = 0
    ) -> Asked:
        text = "".join(part for part in turns[0].parts if isinstance(part, str))
        return Asked(text, tuple(pictures), open_image, number)

    def answer(self, prompts: Sequence[Asked], settings: DecodeSettings) -> list[Answer]:
        self.asked += prompts
        return [self._answer(asked, settings.all_scales) for asked in prompts]

    def _answer(self, asked: Asked, all_scales: bool) -> Answer:
        if not asked.open_image:
            return Answer([], self.say(asked), (), (), True)
        pixels = self.paint(asked) if self.paints else None
        coarser = self.coarser(pixels) if all_scales and pixels is not None else ()
        picture = GeneratedImage(torch.zeros(1, 1), np.array([1, 2, 2]), pixels, coarser)
        return Answer([], "", (0,), (picture,), True)


_WORLDS = itertools.count()


def enter_world(folder: Path, rank: int = 0, size: int = 1) -> None:
    """Join a world of gloo ranks that meet in a folder."""
    name = next(_WORLDS) if size == 1 else "shared"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store_{name}", rank=rank, world_size=size)
