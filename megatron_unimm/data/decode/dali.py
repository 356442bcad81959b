"""Decodes with NVIDIA DALI, on the CPU or on the GPU; the only file that imports it.

DALI decodes to the same bytes as Pillow. The difference lies in resizing, where each rounds in its own way between two
passes: on average over an image 0.25/255 at most, typically below 0.05/255, and at most 2/255 in a pixel; where DALI
resizes itself 0.21/255 and 3/255 (measured on the images and sizes of the tests).

On the CPU DALI only decodes. Its own resize takes as long as Pillow's (9.6 against 7.6 ms for an image of 0.4
megapixels); torch's for bytes, with the vector instructions of the CPU, takes 1.8 ms.

On a GPU the bytes come from nvJPEG, whose rounding is its own; how far they are from Pillow's was not measured.

One damaged image ends a DALI pipeline for good. So what is known to go wrong is found in the header and left to Pillow;
where DALI fails all the same, its batch is done again with Pillow and the pipeline is built anew.
"""

import logging
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import nvidia.dali.fn as fn
import torch
from nvidia.dali import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

from megatron_unimm.config.data import ResizeFilter
from megatron_unimm.data.decode.header import EncodedImage, in_memory, read_encoded
from megatron_unimm.data.decode.interface import Decoder, Finish, ImageRequest
from megatron_unimm.data.decode.pillow import Threads, decode_with_pillow
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.images import upright_size
from megatron_unimm.data.sizes import crop_box
from megatron_unimm.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_BATCH = 64
MAX_BATCH_PIXELS = 64_000_000
"""Decoded at a time, as DALI's buffers grow to the largest batch and stay so; one image may exceed it."""

INTERPOLATIONS: dict[ResizeFilter, DALIInterpType] = {
    "bicubic": DALIInterpType.INTERP_CUBIC,
    "bilinear": DALIInterpType.INTERP_LINEAR,
}
TURN = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: image.transpose(1, 0, 2)[::-1],
}
"""What makes an image (H, W, 3) upright, by its EXIF orientation."""


class DaliDecoder(Decoder):
    """Decodes with DALI what it decodes as Pillow does, and the rest with Pillow.

    Args:
        max_pixels: larger images are refused before decoding.
        threads: of DALI, and as many again for what comes before and after it; at least 1.
        device: number of the GPU to decode and resize on; None for the CPU.
        resize_in_graph: let DALI resize; by default on the GPU only.
    """

    def __init__(
        self, *, max_pixels: int, threads: int, device: int | None = None, resize_in_graph: bool | None = None
    ) -> None:
        super().__init__()
        self.num_failures = 0
        """Batches that DALI gave up on; they were done again with Pillow."""
        self._max_pixels = max_pixels
        self._num_threads = max(1, threads)
        self._device = device
        self._resize_in_graph = device is not None if resize_in_graph is None else resize_in_graph
        self._threads = Threads(threads, "decode")
        self._pipelines: dict[ResizeFilter, Pipeline] = {}
        self._lock = threading.Lock()  # A pipeline runs one batch at a time.

    def _run(self, requests: Sequence[ImageRequest], finish: Finish) -> list[np.ndarray | SampleError]:
        answers: dict[int, np.ndarray | SampleError] = {}
        ready: dict[int, EncodedImage] = {}

        def begin(index: int) -> None:
            """Reads the file; what is not for DALI is done here and now."""
            request = requests[index]
            with self.in_flight.during(request.file):
                encoded = read_encoded(request.file, self._max_pixels)
            if isinstance(encoded, SampleError):
                answers[index] = encoded
            elif self._is_for_pillow(request, encoded):
                answers[index] = self._pillow(index, request, encoded, finish)
            else:
                ready[index] = encoded

        self._threads.map(begin, range(len(requests)))
        for batch in self._batches(requests, ready):
            answers.update(zip(batch, self._run_batch(batch, requests, ready, finish), strict=True))
        return [answers[index] for index in range(len(requests))]

    def close(self) -> None:
        self._threads.close()
        with self._lock:
            self._pipelines.clear()

    def _is_for_pillow(self, request: ImageRequest, encoded: EncodedImage) -> bool:
        # The graph crops in stored coordinates, where the centre of an odd margin is another pixel.
        return bool(encoded.only_pillow) or (self._resize_in_graph and request.crop and encoded.orientation != 1)

    def _pillow(
        self, index: int, request: ImageRequest, encoded: EncodedImage, finish: Finish
    ) -> np.ndarray | SampleError:
        file = in_memory(request, encoded)
        same = ImageRequest(file, request.width, request.height, request.crop, request.filter)
        return decode_with_pillow(index, same, self._max_pixels, finish)

    def _batches(self, requests: Sequence[ImageRequest], ready: dict[int, EncodedImage]) -> Iterator[list[int]]:
        """Images that are decoded at a time: of one filter, within the limits of number and pixels."""
        for filter in INTERPOLATIONS:
            batch, pixels = [], 0
            for index in sorted(ready):
                if requests[index].filter != filter:
                    continue
                more = ready[index].width * ready[index].height
                if batch and (len(batch) == MAX_BATCH or pixels + more > MAX_BATCH_PIXELS):
                    yield batch
                    batch, pixels = [], 0
                batch.append(index)
                pixels += more
            if batch:
                yield batch

    def _run_batch(
        self, batch: list[int], requests: Sequence[ImageRequest], ready: dict[int, EncodedImage], finish: Finish
    ) -> list[np.ndarray | SampleError]:
        filter = requests[batch[0]].filter

        def end(place: int) -> np.ndarray | SampleError:
            index, image = batch[place], decoded[place]
            request, encoded = requests[index], ready[index]
            if not self._resize_in_graph and image.shape[:2] != (encoded.height, encoded.width):
                # A part of the file that Pillow does not show, such as a thumbnail: it may be another picture.
                return self._pillow(index, request, encoded, finish)
            image = TURN.get(encoded.orientation, lambda image: image)(image)
            if not self._resize_in_graph:
                image = resize(image, request)
            return finish(index, np.ascontiguousarray(image))

        with self._lock:
            if filter not in self._pipelines:
                self._pipelines[filter] = self._build(filter)
            try:
                decoded = self._decode([(requests[index], ready[index]) for index in batch], self._pipelines[filter])
            except RuntimeError as error:
                del self._pipelines[filter]
                self._report(error, [requests[index] for index in batch])
                decoded = []
        if not decoded:
            return self._threads.map(lambda i: self._pillow(i, requests[i], ready[i], finish), batch)
        return self._threads.map(end, range(len(batch)))

    def _decode(self, batch: list[tuple[ImageRequest, EncodedImage]], pipeline: Pipeline) -> list[np.ndarray]:
        """Decoded images as they are stored, not turned: uint8 (H, W, 3); resized where the graph does that."""
        pipeline.feed_input("encoded", [np.frombuffer(image.data, dtype=np.uint8) for _, image in batch])
        if self._resize_in_graph:
            boxes = [_stored_box(request, image) for request, image in batch]
            pipeline.feed_input("start", [np.array([top, left], np.int32) for left, top, _, _ in boxes])
            pipeline.feed_input("extent", [np.array([b - t, r - l], np.int32) for l, t, r, b in boxes])  # noqa: E741
            pipeline.feed_input("size", [_stored_size(request, image) for request, image in batch])
        (outputs,) = pipeline.run()
        outputs = outputs if self._device is None else outputs.as_cpu()
        return [np.asarray(outputs.at(place)) for place in range(len(batch))]

    def _build(self, filter: ResizeFilter) -> Pipeline:
        pipeline = Pipeline(
            batch_size=MAX_BATCH,
            num_threads=self._num_threads,
            device_id=self._device,
            # Each batch is fed, run and taken out before the next: nothing is lost with a pipeline that fails.
            exec_async=False,
            exec_pipelined=False,
            prefetch_queue_depth=1,
        )
        with pipeline:
            images = fn.decoders.image(
                fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1),
                device="cpu" if self._device is None else "mixed",
                output_type=DALIImageType.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # as libjpeg does for Pillow
            )
            if self._resize_in_graph:
                start = fn.external_source(name="start", dtype=DALIDataType.INT32, ndim=1)
                extent = fn.external_source(name="extent", dtype=DALIDataType.INT32, ndim=1)
                images = fn.resize(
                    fn.slice(images, start, extent, axes=[0, 1]),
                    size=fn.external_source(name="size", dtype=DALIDataType.FLOAT, ndim=1),
                    interp_type=INTERPOLATIONS[filter],
                    antialias=True,
                )
            pipeline.set_outputs(images)
        try:
            pipeline.build()
        except RuntimeError as error:
            what = f"DALI does not start ({_reason(error)}); mend that, or set data.decoder=pillow"
            raise ConfigError("data.decoder", what) from error
        return pipeline

    def _report(self, error: RuntimeError, requests: list[ImageRequest]) -> None:
        """Logs the first failure; the others are counted."""
        self.num_failures += 1
        if self.num_failures == 1:
            logger.warning(
                "data: DALI failed on a batch of %d images from %s on (%s); it and further such batches are decoded "
                "with Pillow, more slowly; data.decoder=pillow avoids DALI",
                *(len(requests), requests[0].file, _reason(error)),
            )


def resize(image: np.ndarray, request: ImageRequest) -> np.ndarray:
    """Crops and resizes an upright image with torch's kernels for bytes, antialiased: uint8 (H, W, 3) in and out."""
    height, width = image.shape[:2]
    if request.crop:
        left, top, right, bottom = crop_box(width, height, request.width, request.height)
        image = image[top:bottom, left:right]
    if image.shape[:2] == (request.height, request.width):
        return image
    # (1, 3, H, W), channels last; permuted with the batch axis in place, or torch does not see the layout and copies.
    pixels = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    size = (request.height, request.width)
    resized = torch.nn.functional.interpolate(pixels, size=size, mode=request.filter, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _stored_box(request: ImageRequest, image: EncodedImage) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the part of the stored image that is used."""
    if not request.crop:
        return 0, 0, image.width, image.height
    return crop_box(image.width, image.height, request.width, request.height)


def _stored_size(request: ImageRequest, image: EncodedImage) -> np.ndarray:
    """Height and width of the target before it is turned upright: float32 [2]."""
    width, height = upright_size((request.width, request.height), image.orientation)
    return np.array([height, width], dtype=np.float32)


def _reason(error: RuntimeError) -> str:
    """One line of DALI's many: the last that is not about the consequences."""
    lines = [line for line in str(error).splitlines() if line and "no longer valid" not in line]
    return lines[-1] if lines else "no reason given"
