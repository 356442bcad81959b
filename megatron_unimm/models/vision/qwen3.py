"""Qwen3-VL's vision tower as Megatron-Core layers: patches in, visual tokens and deepstack levels out.

Layout: P patches of all images of a row, ``[P, 1, H]`` between the layers; V = P / merge² visual tokens; K levels.
"""

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_unimm.config.model import Qwen3VisionConfig
from megatron_unimm.models.attention import PackedContext
from megatron_unimm.models.specs import block_spec, layer_spec
from megatron_unimm.models.vision.input import PositionTable, VisionInput
from megatron_unimm.models.vision.merger import PatchMerger


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
        assert images.positions is not None
        hidden = self.patch_embed(images.patches) + self._position(images.positions)  # [P, H]
        hidden, taps = self.blocks(hidden[:, None], images.context, self.model.deepstack_layers)  # [P, 1, H] each
        levels = self.deepstack_mergers(taps)  # K x [V, out_size]
        return torch.cat([self.merger(hidden), *levels], dim=-1)  # [V, (1 + K) out_size]

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


class TappedBlock(TransformerBlock):
    """A stack of layers that also gives out what some of them put out.

    Megatron-Core's block returns its last layer's output only. This one has none of its pipeline and FP8 handling,
    which a tower does not use.
    """

    def forward(self, hidden_P1H: Tensor, context: PackedContext, taps: list[int]) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        """The last layer's output, and those of the zero-based layers ``taps``; all ``[P, 1, H]``."""
        tapped: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            hidden_P1H = self._through(layer, hidden_P1H, context)
            if number in taps:
                tapped.append(hidden_P1H)
        return hidden_P1H, tapped

    def _through(self, layer: torch.nn.Module, hidden_P1H: Tensor, context: PackedContext) -> Tensor:
        def run(hidden: Tensor) -> Tensor:
            return layer(hidden, attention_mask=None, packed_seq_params=context)[0]

        if self.config.recompute_granularity == "full" and self.training and hidden_P1H.requires_grad:
            return tensor_parallel.checkpoint(run, False, hidden_P1H)
        return run(hidden_P1H)
