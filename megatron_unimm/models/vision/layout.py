"""Where each patch of a batch of images stands: rotary positions, attention windows, segment bounds. Host side, once
per micro-batch.

Patches come in the order of the Qwen processors: image by image, and inside an image merge unit by merge unit (a
unit is the ``spatial_merge_size``² patches that become one visual token), units row by row.
"""

from dataclasses import dataclass

import numpy as np

from megatron_unimm.config.model import Qwen25VisionConfig


@dataclass(frozen=True)
class WindowLayout:
    """P patches that make V visual tokens, in windows. Arrays named *_windowed are in the order in which the tower
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


def window_layout(grids: np.ndarray, config: Qwen25VisionConfig) -> WindowLayout:
    """Lay out images of patch grids ``[N, 3]`` (time, height, width; in patches, whole merge units).

    Source of the scheme: Qwen2.5-VL technical report (arXiv 2502.13923, section 2.1.1), window attention with
        windows of ``window_size`` pixels.
    """
    merge = config.spatial_merge_size
    window = config.window_size // config.token_pixels
    units, window_lengths = [], []
    first_unit = 0
    for frames, height, width in grids.tolist():
        rows, columns = height // merge, width // merge
        numbers = np.arange(frames * rows * columns).reshape(frames, rows, columns)
        for frame in range(frames):
            for top in range(0, rows, window):
                for left in range(0, columns, window):
                    inside = numbers[frame, top : top + window, left : left + window].reshape(-1)
                    units.append(first_unit + inside)
                    window_lengths.append(inside.size * merge**2)
        first_unit += numbers.size
    to_windows = np.concatenate(units)
    by_unit = patch_positions(grids, merge).reshape(2, -1, merge**2)
    return WindowLayout(
        positions_windowed=by_unit[:, to_windows].reshape(2, -1),
        to_windows=to_windows,
        from_windows=np.argsort(to_windows),
        image_bounds=frame_bounds(grids),
        window_bounds=_bounds(window_lengths),
    )


def patch_positions(grids: np.ndarray, merge: int) -> np.ndarray:
    """Row and column of each patch of images of grids ``[N, 3]`` in its image: int64 ``[2, P]``."""
    parts = [np.tile(_positions(height, width, merge), (1, frames)) for frames, height, width in grids.tolist()]
    return np.concatenate(parts, axis=1)


def frame_bounds(grids: np.ndarray) -> np.ndarray:
    """Where the patches of each frame of each image begin and end: int64 ``[frames + 1]``."""
    return _bounds([height * width for frames, height, width in grids.tolist() for _ in range(frames)])


@dataclass(frozen=True)
class Interpolation:
    """Learned positions of a square grid, read between its points: each patch's is a weighted sum of four."""

    index: np.ndarray
    """int64 ``[P, 4]``: rows of the table."""
    weight: np.ndarray
    """float32 ``[P, 4]``."""


def interpolate_positions(grids: np.ndarray, merge: int, side: int) -> Interpolation:
    """Bilinear, with the corners of image and table on each other (arXiv 2511.21631; transformers' qwen3_vl).

    Args:
        grids: int64 ``[N, 3]``.
        side: points per side of the table.
    """
    counts = grids.prod(axis=1)
    row, column = patch_positions(grids, merge)
    low_row, high_row, along_row = _between(row, np.repeat(grids[:, 1], counts), side)
    low_column, high_column, along_column = _between(column, np.repeat(grids[:, 2], counts), side)
    rows, columns = np.stack([low_row, low_row, high_row, high_row]), np.stack([low_column, high_column] * 2)
    weight = np.stack([1 - along_row, 1 - along_row, along_row, along_row])
    weight = weight * np.stack([1 - along_column, along_column] * 2)
    return Interpolation(index=(rows * side + columns).T, weight=weight.T.astype(np.float32))


def _between(place: np.ndarray, length: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The table's points below and above a place of ``length``, and how far it is from the one to the other."""
    scaled = place * (side - 1) / np.maximum(length - 1, 1)
    low = np.floor(scaled).astype(np.int64)
    return low, np.minimum(low + 1, side - 1), scaled - low


def _positions(height: int, width: int, merge: int) -> np.ndarray:
    """Row and column of every patch of one frame, in merge-unit order: int64 ``[2, height * width]``."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    both = np.stack([rows, columns])
    units = both.reshape(2, height // merge, merge, width // merge, merge).transpose(0, 1, 3, 2, 4)
    return units.reshape(2, -1)


def _bounds(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
