"""Qwen3-VL's vision tower as Megatron-Core layers: patches in, visual tokens and deepstack levels out.

Layout: P patches of all images of a row, ``[P, 1, H]`` between the layers; V = P / merge² visual tokens; K levels.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_unimm.config.model import Qwen3VisionConfig
from megatron_unimm.models.specs import block_spec, layer_spec
from megatron_unimm.models.vision.input import PositionTable, VisionInput
from megatron_unimm.models.vision.merger import PatchMerger
from megatron_unimm.models.vision.tapped import TappedBlock


class Qwen3VisionEncoder(MegatronModule):
    """Patch embedding with learned positions, full attention blocks, a merger for the last layer and one for each
    deepstack level (arXiv 2511.21631, section 2; DeepStack: arXiv 2406.04334)."""

    def __init__(
        self, model: Qwen3VisionConfig, config: TransformerConfig, backend: str, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.model = model
        self.patch_embed = torch.nn.Linear(model.patch_dim, model.hidden_size)
        self.position_embed = torch.nn.Embedding(model.num_position_embeddings, model.hidden_size)
        layers = [layer_spec(backend, causal=False) for _ in range(model.num_layers)]
        self.blocks = TappedBlock(config, block_spec(backend, layers), post_layer_norm=False, pg_collection=groups)
        self.merger = PatchMerger(model, config, groups)
        self.deepstack_mergers = DeepstackMergers(model, config, groups)

    def forward(self, images: VisionInput) -> Tensor:
        """Features ``[V, (1 + K) out_size]`` of all images: the visual token, then its K deepstack levels."""
        return self.tapped(images, [])[0]

    def tapped(self, images: VisionInput, layers: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The same, and what the zero-based ``layers`` put out, each ``[V, merge², H]``: patches by visual token."""
        assert images.positions is not None
        hidden = self.patch_embed(images.patches) + self._position(images.positions)  # [P, H]
        wanted = sorted({*self.model.deepstack_layers, *layers})
        hidden, found = self.blocks.tapped(hidden[:, None], images.context, wanted)  # [P, 1, H] each
        by_layer = dict(zip(wanted, found, strict=True))
        levels = self.deepstack_mergers([by_layer[number] for number in self.model.deepstack_layers])
        features = torch.cat([self.merger(hidden), *levels], dim=-1)  # [V, (1 + K) out_size]
        unit = self.model.spatial_merge_size**2
        return features, [by_layer[number].view(-1, unit, hidden.shape[-1]) for number in layers]

    def _position(self, table: PositionTable) -> Tensor:
        return (self.position_embed(table.index) * table.weight[..., None]).sum(1)  # [P, H]


class DeepstackMergers(MegatronModule):
    """A merger for each level. (Megatron-Core's checkpoints see through its own modules, not through a ModuleList.)"""

    def __init__(self, model: Qwen3VisionConfig, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        for number in range(len(model.deepstack_layers)):
            self.add_module(str(number), PatchMerger(model, config, groups, joined_norm=True))

    def forward(self, taps_P1H: list[Tensor]) -> list[Tensor]:
        """K layers' outputs to K levels ``[V, out_size]``."""
        return [merger(tap) for merger, tap in zip(self.children(), taps_P1H, strict=True)]
