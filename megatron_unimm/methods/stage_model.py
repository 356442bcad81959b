"""What the model chunks of all methods share: how the schedule feeds them, and their frozen companions."""

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_unimm.parallel.groups import ParallelGroups


class StageModel(MegatronModule):
    """One chunk of a method's model on one pipeline stage.

    Parts:
        base: frozen companions (a teacher, a tower that makes targets), never saved and never trained; each comes from
            an imported checkpoint, where it has the name that it has here.
    """

    def __init__(self, config: TransformerConfig, groups: ParallelGroups, virtual_stage: int) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder  # read by Megatron-Core's schedule
        self.groups = groups
        self.pre_process = groups.is_first_stage(virtual_stage)
        self.post_process = groups.is_last_stage(virtual_stage)
        self.vp_stage = virtual_stage if groups.config.virtual_pipeline > 1 else None
        self.share_embeddings_and_output_weights = False
        self.base = torch.nn.Module()
        self.lora_used: dict[str, set[str]] = {}
        """By section of low-rank adapters, its patterns that matched a linear of this chunk."""

    def freeze_base(self) -> None:
        """To be called once all companions are there."""
        self.base.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "StageModel":
        super().train(mode)
        self.base.eval()
        return self

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Megatron-Core's schedule hands over the previous stage's output here."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a checkpoint keeps: everything but the frozen base (which comes from its own checkpoint) and FP8
        history (rebuilt in a few steps)."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        kept = {
            key: value
            for key, value in state.items()
            if not key.startswith(f"{prefix}base.") and not key.endswith("_extra_state")
        }
        for value in kept.values():
            value.key = self.checkpoint_name(value.key)
        return kept

    def checkpoint_name(self, name: str) -> str:
        """The name in checkpoints of a tensor that has ``name`` here."""
        return name

    def imported_name(self, name: str) -> str:
        """The name, in the checkpoint that a part is taken from, of a tensor that has ``name`` in the stage's own."""
        return name

    def base_sharded_state_dict(self, part: str, metadata: dict[str, Any]) -> dict[str, Any]:
        """A frozen companion under the names that its own checkpoint has; empty where this chunk has none of it."""
        module = dict(self.base.named_children()).get(part)
        if module is None:
            return {}
        prefix, group = self.base_prefix(part), self.groups.collection.tp
        state = sharded_state_dict_default(module, prefix, metadata=metadata, tp_group=group)
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}

    def base_prefix(self, part: str) -> str:
        """What a frozen companion's tensors begin with in its own checkpoint."""
        return f"{part}."
