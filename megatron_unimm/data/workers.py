"""The work on single samples, in threads or in processes: laying out, and decoding.

What is done to a sample depends on what a stage teaches: conversations become tokens (:class:`ConversationWork`),
pictures to be drawn become latents and conditions (``data/drawing.py``). The loader knows neither.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from megatron_unimm.config.data import DataConfig
from megatron_unimm.data.chat import ChatFormat, image_order, layout_sample
from megatron_unimm.data.decode.build import build_decoder
from megatron_unimm.data.decode.interface import Decoder, ImageRequest
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.features import FeatureStore
from megatron_unimm.data.fetch import fetch_images
from megatron_unimm.data.in_flight import InFlight
from megatron_unimm.data.mix import Draw, draw_key
from megatron_unimm.data.packing import build_row
from megatron_unimm.data.plan import BadSample, Laid, Layout
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow, Sample, TokenizedSample
from megatron_unimm.data.sources.source import Source
from megatron_unimm.errors import DataError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

PER_PROCESS = 4
"""Samples that a worker process loads at a time."""


class Row(Protocol):
    """A packed row, one micro-batch, as far as the loop counts what is in it."""

    @property
    def num_tokens(self) -> int:
        """Positions that are computed, padding included."""
        ...

    @property
    def num_padding(self) -> int:
        """Those that belong to no sample."""
        ...

    @property
    def num_images(self) -> int: ...

    @property
    def sample_ids(self) -> tuple[str, ...]: ...


class SampleWork(Protocol):
    """What is done to samples. Can be sent to another process."""

    @property
    def data(self) -> DataConfig:
        """The stage's settings."""
        ...

    @property
    def sources(self) -> Mapping[str, Source]:
        """Where samples come from, by name."""
        ...

    @property
    def room(self) -> int:
        """Tokens of samples that fit into a row."""
        ...

    def lay_out(self, draw: Draw) -> Laid | BadSample:
        """Read what a sample says, and the headers of its images."""
        ...

    def load(self, laid: Sequence[Laid], decoder: Decoder) -> list[tuple[Any, list[BadSample]]]:
        """Decode the images of samples; where one is broken, nothing is learned from its sample."""
        ...

    def row(self, samples: Sequence[Any], step: int = 0) -> Any:
        """Samples as :meth:`load` gives them, or their layouts on ranks that read no images, in one row.

        Args:
            step: steps before the one that it is for, where something changes in the course of a stage.
        """
        ...


def laid_out(sources: Mapping[str, Source], draw: Draw, lay_out: Callable[[Sample], Layout]) -> Laid | BadSample:
    """A draw's sample with its layout, or what is wrong with it."""
    source = sources[draw.source]
    where = source.where(draw.index)
    try:
        sample = source[draw.index]
        return Laid(draw, where, sample, lay_out(sample))
    except SampleError as error:
        named = error if error.where == where else SampleError(where, str(error), error.fault)
        return BadSample(draw.source, named)


@dataclass(frozen=True)
class ConversationWork:
    """Conversations to tokens and patches."""

    chat: ChatFormat
    sources: Mapping[str, Source]
    features: FeatureStore | None = None
    """Computed beforehand; images are then looked up instead of decoded."""
    alignment: int = 1
    """Each sample takes up a multiple of this many tokens."""
    seed: int = 0
    """Of what is random about samples."""

    @property
    def data(self) -> DataConfig:
        return self.chat.data

    @property
    def room(self) -> int:
        return self.chat.data.sequence_length

    def lay_out(self, draw: Draw) -> Laid | BadSample:
        """Read a sample's text and the headers of its images."""
        # Room for one more per image below the 64 bits of a random generator's seed.
        seed = draw_key(self.seed, draw) % 2**62
        return laid_out(self.sources, draw, lambda sample: replace(layout_sample(sample, self.chat), noise_seed=seed))

    def row(self, samples: Sequence[TokenizedSample], step: int = 0) -> PackedRow:
        """One behind the other."""
        return build_row(
            samples,
            sequence_length=self.chat.data.sequence_length,
            alignment=self.alignment,
            pad_id=self.chat.tokenizer.token_ids.pad,
            patch_dim=self.chat.encoder.patch_dim,
        )

    def load(self, laid: Sequence[Laid], decoder: Decoder) -> list[tuple[TokenizedSample, list[BadSample]]]:
        """Decode the images of samples, or look their features up; where one is broken it is grey, and nothing is
        learned from its sample."""
        requests = [self.requests(each) for each in laid]
        fetched = fetch_images(requests, laid, self.features, decoder, self.chat.encoder)
        field = "patches" if self.features is None else "features"
        done = []
        for each, found in zip(laid, fetched, strict=True):
            layout = void(each.layout) if found.broken else each.layout
            done.append((replace(layout, **{field: found.values}), found.broken))
        return done

    def requests(self, laid: Laid) -> list[ImageRequest]:
        """The images of a sample in the order in which they stand, at the sizes of their grids."""
        data, layout = self.chat.data, laid.layout
        return [
            ImageRequest.of_grid(
                laid.sample.images[index],
                grid,
                self.chat.encoder,
                data.generation_size if drawn else data.understanding_size,
            )
            for index, grid, drawn in zip(image_order(laid.sample.turns), layout.grids, layout.is_target, strict=True)
        ]


def void(sample: TokenizedSample) -> TokenizedSample:
    """The sample with nothing to learn from: no labels, no targets."""
    return replace(
        sample,
        labels=np.full_like(sample.labels, IGNORED_LABEL),
        is_target=np.zeros_like(sample.is_target),
        predict_index=sample.predict_index[:0],
        target_index=sample.target_index[:0],
    )


class Workers(AbstractContextManager["Workers"]):
    """Does :class:`SampleWork` on many samples at a time, in order.

    Threads share one decoder, which gets the images of all samples at once; each process has its own, and gets those of
    a few samples at a time.

    Args:
        kind: threads share what they read; processes have each their own and are not slowed by each other's Python.
        count: 0 works in the thread that asks.
        device: number of the GPU that may decode; processes decode on the CPU.
    """

    def __init__(
        self, work: SampleWork, kind: Literal["thread", "process"], count: int, device: int | None = None
    ) -> None:
        self.work = work
        self._in_flight = InFlight()
        self._in_processes = kind == "process" and count > 0
        self._pool: Executor | None = None
        self._decoder: Decoder | None = None
        if self._in_processes:
            # Not forked: a fork of a process with threads (and CUDA) may hang.
            self._pool = ProcessPoolExecutor(count, get_context("spawn"), _set_up, (work,))
            return
        self._decoder = _decoder(work, count, device)
        if count:
            self._pool = ThreadPoolExecutor(count, "data-sample")

    def lay_out(self, draws: Sequence[Draw]) -> list[Laid | BadSample]:
        """:meth:`SampleWork.lay_out` of each."""
        return self._map(_lay_out if self._in_processes else self.work.lay_out, draws)

    def load(self, laid: Sequence[Laid]) -> list[tuple[Any, list[BadSample]]]:
        """:meth:`SampleWork.load` of each."""
        if self._decoder is not None:
            with self._in_flight.during(laid):
                return self.work.load(laid, self._decoder)
        batches = [laid[start : start + PER_PROCESS] for start in range(0, len(laid), PER_PROCESS)]
        return [done for batch in self._map(_load, batches) for done in batch]

    def waiting_for(self) -> str:
        """The place of what has been read for longest, and since when; empty while nothing is being read."""
        files = self._decoder.in_flight.oldest() if self._decoder is not None else None
        oldest = files or self._in_flight.oldest()
        return f"{self._place(oldest[1])}, for {oldest[0]:.0f} s" if oldest is not None else ""

    def _place(self, item: object) -> str:
        if isinstance(item, Draw):
            return self.work.sources[item.source].where(item.index)
        if isinstance(item, Sequence):  # samples that were laid out
            more = f" and {len(item) - 1} more samples" if len(item) > 1 else ""
            return f"images of {item[0].where}{more}" if item else "no samples"
        return str(item)

    def _map(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> list[ResultT]:
        answers = map(function, items) if self._pool is None else self._pool.map(function, items)
        done = []
        try:
            for item in items:
                with self._in_flight.during(item):
                    done.append(next(answers))
            return done
        except BrokenProcessPool as error:
            raise DataError(
                "data.workers",
                "a worker process died (killed, perhaps for lack of memory); lower data.prefetch_workers or "
                "data.max_image_pixels, or use data.workers=thread",
            ) from error

    def close(self) -> None:
        """End the workers, once what they are doing is done."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._decoder is not None:
            self._decoder.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _decoder(work: SampleWork, threads: int, device: int | None) -> Decoder:
    """The decoder that ``data.decoder`` names."""
    data = work.data
    return build_decoder(data.decoder, max_pixels=data.max_image_pixels, threads=threads, device=device)


_here: list[tuple[SampleWork, Decoder]] = []
"""A worker process's work: executors hand arguments to functions of modules only."""


def _set_up(work: SampleWork) -> None:
    _here[:] = [(work, _decoder(work, 0, None))]


def _lay_out(draw: Draw) -> Any:
    return _here[0][0].lay_out(draw)


def _load(laid: Sequence[Laid]) -> Any:
    work, decoder = _here[0]
    return work.load(laid, decoder)
