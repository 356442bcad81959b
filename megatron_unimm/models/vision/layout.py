"""Where each patch of a batch of images stands: rotary positions, attention windows, segment bounds. Host side, once
per micro-batch.

Patches come in the order of the Qwen processors: image by image, and inside an image merge unit by merge unit (a
unit is the ``spatial_merge_size``² patches that become one visual token), units row by row.
"""

from dataclasses import dataclass

import numpy as np

from megatron_unimm.config.model import VisionEncoderConfig


@dataclass(frozen=True)
class PatchLayout:
    """The layout of P patches that make V visual tokens. Arrays named *_windowed are in the order in which the tower
    computes."""

    positions_windowed: np.ndarray
    """int64 ``[2, P]``: row and column of each patch in its image."""
    to_windows: np.ndarray
    """int64 ``[V]``: merge units in window order."""
    from_windows: np.ndarray
    """int64 ``[V]``: the inverse."""
    image_bounds: np.ndarray
    """int64 ``[frames + 1]``: patches of one frame of one image attend to one another in the full layers."""
    window_bounds: np.ndarray
    """int64 ``[windows + 1]``."""


def patch_layout(grids: np.ndarray, config: VisionEncoderConfig) -> PatchLayout:
    """Lay out images of patch grids ``[N, 3]`` (time, height, width; in patches, whole merge units).

    Source of the scheme: Qwen2.5-VL technical report (arXiv 2502.13923, section 2.1.1), window attention with
        windows of ``window_size`` pixels.
    """
    merge = config.spatial_merge_size
    window = config.window_size // config.token_pixels
    positions, units, window_lengths, frame_lengths = [], [], [], []
    first_unit = 0
    for frames, height, width in grids.tolist():
        rows, columns = height // merge, width // merge
        positions.append(np.tile(_positions(height, width, merge), (1, frames)))
        numbers = np.arange(frames * rows * columns).reshape(frames, rows, columns)
        for frame in range(frames):
            for top in range(0, rows, window):
                for left in range(0, columns, window):
                    inside = numbers[frame, top : top + window, left : left + window].reshape(-1)
                    units.append(first_unit + inside)
                    window_lengths.append(inside.size * merge**2)
        frame_lengths += [height * width] * frames
        first_unit += numbers.size
    to_windows = np.concatenate(units)
    by_unit = np.concatenate(positions, axis=1).reshape(2, -1, merge**2)
    return PatchLayout(
        positions_windowed=by_unit[:, to_windows].reshape(2, -1),
        to_windows=to_windows,
        from_windows=np.argsort(to_windows),
        image_bounds=_bounds(frame_lengths),
        window_bounds=_bounds(window_lengths),
    )


def _positions(height: int, width: int, merge: int) -> np.ndarray:
    """Row and column of every patch of one frame, in merge-unit order: int64 ``[2, height * width]``."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    both = np.stack([rows, columns])
    units = both.reshape(2, height // merge, merge, width // merge, merge).transpose(0, 1, 3, 2, 4)
    return units.reshape(2, -1)


def _bounds(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
