"""Images of a packed row on the device, as the vision towers read them. Made once per micro-batch.

Layout: P patches of all images, V = P / merge² visual tokens.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.model import Qwen3VisionConfig, Qwen25VisionConfig, VisionEncoder
from megatron_unimm.models.attention import PackedContext, Segments
from megatron_unimm.models.rotary import grid_angles
from megatron_unimm.models.vision.layout import frame_bounds, interpolate_positions, patch_positions, window_layout


@dataclass(frozen=True)
class VisionInput:
    """Images of one row. The last two fields are Qwen2.5-VL's order of windows and Qwen3-VL's learned positions."""

    patches: Tensor
    """``[P, patch_dim]`` in the computing dtype."""
    context: PackedContext
    windows: "WindowOrder | None" = None
    positions: "PositionTable | None" = None

    @classmethod
    def build(
        cls, patches: np.ndarray, grids: np.ndarray, config: VisionEncoder, device: torch.device, dtype: torch.dtype
    ) -> "VisionInput":
        """From the loader's arrays: patches float32 ``[P, patch_dim]``, grids int64 ``[N, 3]``."""
        return cls.of(torch.from_numpy(patches).to(device, dtype, non_blocking=True), grids, config)

    @classmethod
    def of(cls, patches: Tensor, grids: np.ndarray, config: VisionEncoder) -> "VisionInput":
        """From patches that are on the device."""
        if isinstance(config, Qwen25VisionConfig):
            return cls._in_windows(patches, grids, config)
        return cls._with_positions(patches, grids, config)

    @classmethod
    def _in_windows(cls, patches: Tensor, grids: np.ndarray, config: Qwen25VisionConfig) -> "VisionInput":
        layout = window_layout(grids, config)
        bounds = {"full": layout.image_bounds, "window": layout.window_bounds}
        context = _context(layout.positions_windowed, bounds, config, patches)
        order = WindowOrder(_to_device(layout.to_windows, patches), _to_device(layout.from_windows, patches))
        return cls(patches, context, windows=order)

    @classmethod
    def _with_positions(cls, patches: Tensor, grids: np.ndarray, config: Qwen3VisionConfig) -> "VisionInput":
        merge = config.spatial_merge_size
        places = patch_positions(grids, merge)
        context = _context(places, {"full": frame_bounds(grids)}, config, patches)
        table = interpolate_positions(grids, merge, math.isqrt(config.num_position_embeddings))
        return cls(
            patches,
            context,
            positions=PositionTable(
                _to_device(table.index, patches), _to_device(table.weight, patches).to(patches.dtype)
            ),
        )


@dataclass(frozen=True)
class WindowOrder:
    """The order of merge units in which windows are together, int64 ``[V]``, and its inverse."""

    to_windows: Tensor
    from_windows: Tensor


@dataclass(frozen=True)
class PositionTable:
    """Which learned positions make each patch's: rows int64 ``[P, 4]`` and weights ``[P, 4]``."""

    index: Tensor
    weight: Tensor


def _context(
    positions: np.ndarray, bounds: dict[str, np.ndarray], config: VisionEncoder, patches: Tensor
) -> PackedContext:
    angles = grid_angles(_to_device(positions, patches), config.hidden_size // config.num_heads)
    segments = {kind: Segments.build(ends, causal=False, device=patches.device) for kind, ends in bounds.items()}
    return PackedContext.with_angles(angles, patches.dtype, segments=segments)


def _to_device(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, non_blocking=True)
