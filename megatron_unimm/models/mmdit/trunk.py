"""What diffusion transformers have in common as one pipeline stage holds them: blocks, and what travels.

Layout: see ``row.py``. Between pipeline stages travel the hidden states and, under them, the conditioning vectors:

    [ text | image | vectors ]          (s + k n) rows, the same number on all stages

so that one stage owns what makes the vectors and their gradients come back to it through the pipeline. (Making them
anew on each stage would need copies of these weights there and a sum of their gradients over stages.) A vector takes
k rows, see ``rows_per_vector`` of a model's section.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_unimm.config.mmdit import DiffusionTransformerConfig
from megatron_unimm.models.mmdit.row import MMDiTRow


@dataclass(frozen=True)
class MMDiTInput:
    """What the first stage reads of a row; t tokens of this context rank."""

    condition: Tensor
    """``[t_text, condition size]``."""
    patches: Tensor
    """``[t_image, patch dim]``: noisy latents; a patch is (channel, row, column)."""
    position_index: Tensor | None
    """int64 ``[t_image]``: rows of SD3's table of positions."""
    timestep: Tensor
    """float32 ``[n]`` in [0, 1]; 1 is noise."""
    pooled: Tensor | None
    """``[n, pooled size]``, for models that have one."""
    guidance: Tensor | None = None
    """float32 ``[n]``: guidance scale, for models that were distilled with it."""
    added: Tensor | None = None
    """``[t_image, H]``: added to the tokens of patches."""


class DiffusionTransformer(MegatronModule):
    """One stage. What enters, modulates and ends is a subclass's.

    Args:
        pre_process, post_process: the first stage, the last one.
    """

    def __init__(
        self,
        model: DiffusionTransformerConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        pre_process: bool,
        post_process: bool,
    ) -> None:
        super().__init__(config)
        self.rows_per_vector = model.rows_per_vector
        self.groups = groups
        self.tp_group = groups.tp
        self.pre_process = pre_process
        self.post_process = post_process

    def forward(self, row: MMDiTRow, inputs: MMDiTInput | None, received: Tensor | None) -> Tensor:
        """The velocity ``[t_image, patch dim]`` on the last stage, else what the next one takes, ``[s + k n, 1, H]``.

        Args:
            inputs: on the first stage. received: on the others.
        """
        raise NotImplementedError

    def build_blocks(self, layer: Callable[[int], ModuleSpec], virtual_stage: int | None) -> TransformerBlock:
        """This stage's layers, from the spec of each (zero-based)."""
        first = get_transformer_layer_offset(self.config, virtual_stage, self.groups.pp.rank())
        count = get_num_layers_to_build(self.config, virtual_stage, self.groups.pp.rank())
        return TransformerBlock(
            self.config,
            TransformerBlockSubmodules(layer_specs=[layer(number) for number in range(first, first + count)]),
            post_layer_norm=False,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=self.groups,
            vp_stage=virtual_stage,
        )

    def run_blocks(self, blocks: TransformerBlock, hidden: Tensor, context: Tensor, row: MMDiTRow) -> Tensor:
        """``[s, 1, H]`` through this stage's layers, which all get the context."""
        # Megatron-Core reads a later stage's input from a field that its schedule sets; ours is cut up first.
        blocks.input_tensor = hidden
        return blocks(hidden, attention_mask=None, context=context, packed_seq_params=row)

    def pack(self, hidden_s1H: Tensor, vectors: Tensor) -> Tensor:
        """What travels, of the hidden states and all k n rows of the vectors."""
        return torch.cat([hidden_s1H, self.scatter(vectors[:, None])])

    def unpack(self, received: Tensor, row: MMDiTRow) -> tuple[Tensor, Tensor]:
        """The way back."""
        count = self.rows_per_vector * row.num_vectors // (self.tp_group.size() if self.config.sequence_parallel else 1)
        hidden, vectors = received.split([len(received) - count, count])
        return hidden, self.gather(vectors)[:, 0]

    def scatter(self, rows_t1H: Tensor) -> Tensor:
        """This rank's part under sequence parallelism."""
        if not self.config.sequence_parallel:
            return rows_t1H
        return scatter_to_sequence_parallel_region(rows_t1H, group=self.tp_group)

    def gather(self, rows_s1H: Tensor) -> Tensor:
        """All of them again; what follows is the same on all tensor-parallel ranks."""
        if not self.config.sequence_parallel:
            return rows_s1H
        return gather_from_sequence_parallel_region(rows_s1H, tensor_parallel_output_grad=False, group=self.tp_group)
