"""Qwen2.5-VL's vision tower, which is Ming-Lite-Omni's too, as Megatron-Core layers: patches in, visual tokens out.

Layout: P patches of all images of a row, ``[P, 1, H]`` between the layers; V = P / merge² visual tokens.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_unimm.config.model import Qwen25VisionConfig
from megatron_unimm.models.specs import block_spec, layer_spec
from megatron_unimm.models.vision.input import VisionInput
from megatron_unimm.models.vision.merger import PatchMerger, Projector
from megatron_unimm.models.vision.tapped import TappedBlock


class Qwen25VisionEncoder(MegatronModule):
    """Patch embedding, windowed and full attention blocks, merger (arXiv 2502.13923, figure 1), perhaps a projector."""

    def __init__(
        self, model: Qwen25VisionConfig, config: TransformerConfig, backend: str, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.model = model
        self.patch_embed = torch.nn.Linear(model.patch_dim, model.hidden_size, bias=False)
        layers = [
            layer_spec(backend, causal=False, kind="full" if number in model.full_attention_layers else "window")
            for number in range(model.num_layers)
        ]
        self.blocks = TappedBlock(config, block_spec(backend, layers), post_layer_norm=False, pg_collection=groups)
        self.merger = PatchMerger(model, config, groups)
        self.projector = None
        if model.projector is not None:
            self.projector = Projector(model.projector, model.out_size, config, groups)

    def forward(self, images: VisionInput) -> Tensor:
        """Visual tokens ``[V, out_size]`` of all images, in their order."""
        assert images.windows is not None
        hidden = self._embedded(images)
        hidden = self.blocks(hidden, attention_mask=None, packed_seq_params=images.context)  # [P, 1, H]
        return self._merged(hidden, images.windows.from_windows)

    def tapped(self, images: VisionInput, layers: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The same, and what the zero-based ``layers`` put out, each ``[V, merge², H]``: patches by visual token."""
        assert images.windows is not None
        order = images.windows.from_windows
        hidden, found = self.blocks.tapped(self._embedded(images), images.context, layers)  # [P, 1, H] each
        return self._merged(hidden, order), [self._by_unit(tap[:, 0])[order] for tap in found]

    def _embedded(self, images: VisionInput) -> Tensor:
        """``[P, 1, H]``, windows together."""
        assert images.windows is not None
        hidden = self.patch_embed(images.patches)  # [P, H]
        return self._by_unit(hidden)[images.windows.to_windows].flatten(0, 1)[:, None]

    def _merged(self, hidden_P1H: Tensor, from_windows: Tensor) -> Tensor:
        tokens = self.merger(hidden_P1H)[from_windows]  # [V, merged size]
        return tokens if self.projector is None else self.projector(tokens)  # [V, out_size]

    def _by_unit(self, hidden_PH: Tensor) -> Tensor:
        return hidden_PH.view(-1, self.model.spatial_merge_size**2, hidden_PH.shape[-1])
