"""Qwen2.5-VL's vision tower as Megatron-Core layers: patches in, visual tokens out.

Layout: P patches of all images of a row, ``[P, 1, H]`` between the layers; V = P / merge² visual tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_unimm.config.model import VisionEncoderConfig
from megatron_unimm.models.attention import PackedContext, Segments
from megatron_unimm.models.rotary import grid_angles
from megatron_unimm.models.specs import block_spec, layer_spec
from megatron_unimm.models.vision.layout import patch_layout


@dataclass(frozen=True)
class VisionInput:
    """Images of one row on the device."""

    patches: Tensor
    """``[P, patch_dim]`` in the computing dtype."""
    to_windows: Tensor
    """int64 ``[V]``."""
    from_windows: Tensor
    """int64 ``[V]``."""
    context: PackedContext

    @classmethod
    def build(
        cls,
        patches: np.ndarray,
        grids: np.ndarray,
        config: VisionEncoderConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "VisionInput":
        """From the loader's arrays: patches float32 ``[P, patch_dim]``, grids int64 ``[N, 3]``."""
        layout = patch_layout(grids, config)
        segments = {
            "full": Segments.build(layout.image_bounds, causal=False, device=device),
            "window": Segments.build(layout.window_bounds, causal=False, device=device),
        }
        positions = torch.from_numpy(layout.positions_windowed).to(device)
        angles = grid_angles(positions, config.hidden_size // config.num_heads)
        return cls(
            patches=torch.from_numpy(patches).to(device, dtype, non_blocking=True),
            to_windows=torch.from_numpy(layout.to_windows).to(device),
            from_windows=torch.from_numpy(layout.from_windows).to(device),
            context=PackedContext.with_angles(angles, dtype, segments=segments),
        )


class PatchMerger(MegatronModule):
    """Joins the patches of a merge unit to one visual token: norm, then an MLP over their concatenation."""

    def __init__(self, model: VisionEncoderConfig, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.joined_size = model.hidden_size * model.spatial_merge_size**2
        linear = dict(config=config, init_method=config.init_method, bias=True, tp_group=groups.tp)
        self.norm = torch.nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)
        self.linear_fc1 = ColumnParallelLinear(
            self.joined_size, self.joined_size, gather_output=False, skip_bias_add=False, **linear
        )
        self.linear_fc2 = RowParallelLinear(
            self.joined_size, model.out_size, input_is_parallel=True, skip_bias_add=False, **linear
        )

    def forward(self, hidden_P1H: Tensor) -> Tensor:
        """``[P, 1, H]`` to ``[V, out_size]``."""
        joined = self.norm(hidden_P1H).view(-1, self.joined_size)
        return self.linear_fc2(F.gelu(self.linear_fc1(joined)[0]))[0]


class Qwen25VisionEncoder(MegatronModule):
    """Patch embedding, windowed and full attention blocks, merger (arXiv 2502.13923, figure 1)."""

    def __init__(
        self, model: VisionEncoderConfig, config: TransformerConfig, backend: str, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.model = model
        self.patch_embed = torch.nn.Linear(model.patch_dim, model.hidden_size, bias=False)
        layers = [
            layer_spec(backend, causal=False, kind="full" if number in model.full_attention_layers else "window")
            for number in range(model.num_layers)
        ]
        self.blocks = TransformerBlock(config, block_spec(backend, layers), post_layer_norm=False, pg_collection=groups)
        self.merger = PatchMerger(model, config, groups)

    def forward(self, images: VisionInput) -> Tensor:
        """Visual tokens ``[V, out_size]`` of all images, in their order."""
        hidden = self.patch_embed(images.patches)  # [P, H]
        hidden = self._by_unit(hidden)[images.to_windows].flatten(0, 1)  # [P, H], windows together
        hidden = self.blocks(hidden[:, None], attention_mask=None, packed_seq_params=images.context)  # [P, 1, H]
        return self.merger(hidden)[images.from_windows]  # [V, out_size]

    def _by_unit(self, hidden_PH: Tensor) -> Tensor:
        return hidden_PH.view(-1, self.model.spatial_merge_size**2, hidden_PH.shape[-1])
