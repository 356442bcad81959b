"""The reference decoder: Pillow in threads, with the pixels of transformers' processors."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from megatron_unimm.data.decode.interface import Decoder, Finish, ImageRequest
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.images import decode_image, fit

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Threads:
    """A pool of threads; with none, the work is done where it is asked for."""

    def __init__(self, number: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(number, name) if number else None

    def map(self, function: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
        if self._pool is None:
            return [function(item) for item in items]
        return list(self._pool.map(function, items))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class PillowDecoder(Decoder):
    """Decodes each image in a thread of its own.

    Args:
        max_pixels: larger images are refused before decoding.
        threads: 0 decodes in the caller's thread.
    """

    def __init__(self, *, max_pixels: int, threads: int) -> None:
        super().__init__()
        self._max_pixels = max_pixels
        self._threads = Threads(threads, "decode")

    def _run(self, requests: Sequence[ImageRequest], finish: Finish) -> list[np.ndarray | SampleError]:
        def one(index: int) -> np.ndarray | SampleError:
            with self.in_flight.during(requests[index].file):
                return decode_with_pillow(index, requests[index], self._max_pixels, finish)

        return self._threads.map(one, range(len(requests)))

    def close(self) -> None:
        self._threads.close()


def decode_with_pillow(index: int, request: ImageRequest, max_pixels: int, finish: Finish) -> np.ndarray | SampleError:
    """What ``finish`` makes of image ``index``, or why it cannot be used."""
    try:
        image = decode_image(request.file, max_pixels)
    except SampleError as fault:
        return fault.with_traceback(None)  # The traceback would keep the pixels of its frames alive.
    return finish(
        index, np.asarray(fit(image, request.width, request.height, crop=request.crop, filter=request.filter))
    )
