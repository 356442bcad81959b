"""What the images of samples hold: patches of decoded files, or what was computed of them beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_unimm.data import images
from megatron_unimm.data.decode.interface import Decoder, ImageRequest
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.features import STORED, FeatureStore, image_key
from megatron_unimm.data.plan import BadSample, Laid
from megatron_unimm.errors import DataError


@dataclass(frozen=True)
class Fetched:
    """Of the images of one sample, one behind the other."""

    values: np.ndarray
    """float32 ``[P, patch_dim]`` of patches, or ``[V, width]`` of the store's rows in its type; zeros where an
    image is broken."""
    broken: list[BadSample]
    """One for each image that could not be decoded."""


def fetch_images(
    requests: Sequence[Sequence[ImageRequest]],
    laid: Sequence[Laid],
    store: FeatureStore | None,
    decoder: Decoder,
    form: images.PatchFormat,
) -> list[Fetched]:
    """Decode the images of each sample, or look them up in ``store``.

    Args:
        requests: of each sample of ``laid``.
        form: how pixels become patches.

    Raises:
        DataError: the store lacks an image.
    """
    if store is not None:
        return [_look_up(each, sample, store, form) for each, sample in zip(requests, laid, strict=True)]
    found = iter(decoder.load([request for each in requests for request in each], form))
    return [
        _collect([next(found) for _ in each], each, sample, form) for each, sample in zip(requests, laid, strict=True)
    ]


def _collect(
    found: Sequence[np.ndarray | SampleError], requests: Sequence[ImageRequest], laid: Laid, form: images.PatchFormat
) -> Fetched:
    width = images.patch_dim(form)
    parts, broken = [np.zeros((0, width), dtype=np.float32)], []
    for part, request in zip(found, requests, strict=True):
        if isinstance(part, SampleError):
            broken.append(BadSample(laid.draw.source, SampleError(laid.where, str(part), part.fault)))
            part = np.zeros((images.num_patches(request.width, request.height, form), width), dtype=np.float32)
        parts.append(part)
    return Fetched(np.concatenate(parts), broken)


def _look_up(requests: Sequence[ImageRequest], laid: Laid, store: FeatureStore, form: images.PatchFormat) -> Fetched:
    width, kind = store.meta.width, STORED[store.meta.dtype]
    parts, broken = [np.empty((0, width), kind)], []
    for request in requests:
        rows = store.get(image_key(request))
        if rows is None:
            what = f"lacks {request.file} of {laid.where}; run unimm data cache again"
            raise DataError(str(store.folder), what)
        if not len(rows):  # The cache's maker could not decode it.
            error = SampleError(laid.where, f"{request.file} could not be decoded", "unreadable image")
            broken.append(BadSample(laid.draw.source, error))
            count = images.num_patches(request.width, request.height, form) // form.spatial_merge_size**2
            rows = np.zeros((count, width), kind)
        parts.append(rows)
    return Fetched(np.concatenate(parts), broken)
