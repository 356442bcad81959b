"""Positions of a picture's patches, row by row, made on the host."""

import numpy as np

from megatron_unimm.errors import ConfigError

NUM_AXES = 3
"""FLUX's axes of position: picture, row, column. Its text has zeros on all."""


def table_index(rows: int, columns: int, grid: int) -> np.ndarray:
    """Rows of SD3's table of ``grid`` x ``grid`` positions, of which a picture takes the middle (arXiv 2403.03206,
    section 5.3.2): int64 ``[rows * columns]``.

    Raises:
        ConfigError: the picture is larger than the table.
    """
    if max(rows, columns) > grid:
        raise ConfigError(
            "generator.mmdit.position_grid",
            f"is {grid} patches per side, but a picture has {rows} x {columns}; draw smaller pictures",
        )
    top, left = (grid - rows) // 2, (grid - columns) // 2
    return ((top + np.arange(rows))[:, None] * grid + left + np.arange(columns)).reshape(-1)


def flux_positions(rows: int, columns: int, picture: int = 0) -> np.ndarray:
    """Positions that FLUX rotates by: int64 ``[3, rows * columns]``."""
    row, column = np.indices((rows, columns)).reshape(2, -1)
    return np.stack([np.full_like(row, picture), row, column])
