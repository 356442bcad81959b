"""What diffusion transformers have in common as one pipeline stage holds them: blocks, and what travels.

Layout: see ``row.py``. Between pipeline stages travel the hidden states and, under them, the conditioning vectors:

    [ text | image | vectors ]          (s + k n) rows, the same number on all stages

so that one stage owns what makes the vectors and their gradients come back to it through the pipeline. (Making them
anew on each stage would need copies of these weights there and a sum of their gradients over stages.) A vector takes
k rows, see ``rows_per_vector`` of a model's section.

What is worked out of the hidden states between two layers (a :class:`Tap`) travels as one more row of every rank.
"""

import copy
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
from megatron_unimm.parallel.pipeline import through_layers


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


@dataclass
class Tap:
    """A number that is worked out of the image stream after one of the layers (``tap_after``), wherever in the pipeline
    that is, for the last stage."""

    look: Callable[[Tensor], Tensor]
    """From hidden states ``[t_image, H]`` to a scalar."""
    value: Tensor | None = None
    """float32 scalar: what was found, once the layers up to here have run. In bfloat16 three numbers carry it between
    stages, so that it is the same; its gradient comes back through one of them."""

    def row(self, like_s1H: Tensor) -> Tensor:
        """``[1, 1, H]`` for the next stage; zeros before the layer."""
        row = like_s1H.new_zeros(like_s1H.shape[-1])
        if self.value is None:
            return row[None, None]
        parts, rest = [], self.value
        for _ in range(CARRIED_NUMBERS):
            parts.append(rest.to(row.dtype))
            rest = (rest - parts[-1]).detach()
        return torch.cat([torch.stack(parts), row[CARRIED_NUMBERS:]])[None, None]

    def read(self, row_11H: Tensor) -> None:
        """What the stage before sent."""
        self.value = row_11H[0, 0, :CARRIED_NUMBERS].float().sum()


CARRIED_NUMBERS = 3
"""bfloat16 has 8 bits, float32 24."""


class DiffusionTransformer(MegatronModule):
    """One stage. What enters, modulates and ends is a subclass's.

    Args:
        pre_process, post_process: the first stage, the last one.
        tap_after: the layer (1 first) whose output a :class:`Tap` looks at; None for none.
    """

    def __init__(
        self,
        model: DiffusionTransformerConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        pre_process: bool,
        post_process: bool,
        tap_after: int | None = None,
    ) -> None:
        super().__init__(config)
        self.rows_per_vector = model.rows_per_vector
        self.groups = groups
        self.tp_group = groups.tp
        self.pre_process = pre_process
        self.post_process = post_process
        self.tap_after = tap_after
        self.has_tap = False
        """Whether the layer is on this stage."""
        self.is_behind_tap = False
        self._halves: list[TransformerBlock] = []

    def forward(
        self, row: MMDiTRow, inputs: MMDiTInput | None, received: Tensor | None, tap: Tap | None = None
    ) -> Tensor:
        """The velocity ``[t_image, patch dim]`` on the last stage, else what the next one takes, ``[s + k n, 1, H]``,
        and a row more with a tap.

        Args:
            inputs: on the first stage. received: on the others.
            tap: has its value on the last stage, then.
        """
        raise NotImplementedError

    def build_blocks(self, layer: Callable[[int], ModuleSpec], virtual_stage: int | None) -> TransformerBlock:
        """This stage's layers, from the spec of each (zero-based)."""
        first = get_transformer_layer_offset(self.config, virtual_stage, self.groups.pp.rank())
        count = get_num_layers_to_build(self.config, virtual_stage, self.groups.pp.rank())
        blocks = TransformerBlock(
            self.config,
            TransformerBlockSubmodules(layer_specs=[layer(number) for number in range(first, first + count)]),
            post_layer_norm=False,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=self.groups,
            vp_stage=virtual_stage,
        )
        if self.tap_after is not None:
            self.is_behind_tap = self.tap_after <= first
            self.has_tap = first < self.tap_after <= first + count
            if self.has_tap:
                self._halves = _split(blocks, self.tap_after - first)
        return blocks

    def run_blocks(
        self, blocks: TransformerBlock, hidden: Tensor, context: Tensor, row: MMDiTRow, tap: Tap | None = None
    ) -> Tensor:
        """``[s, 1, H]`` through this stage's layers, which all get the context."""
        if tap is None or not self.has_tap:
            return self._through(blocks, hidden, context, row)
        before, behind = self._halves
        hidden = self._through(before, hidden, context, row)
        tap.value = tap.look(self.gather(row.streams(hidden)[1])[:, 0])
        return self._through(behind, hidden, context, row)

    def _through(self, blocks: TransformerBlock, hidden: Tensor, context: Tensor, row: MMDiTRow) -> Tensor:
        blocks.training = self.training
        return through_layers(blocks, hidden, context=context, packed_seq_params=row)

    def pack(self, hidden_s1H: Tensor, vectors: Tensor, tap: Tap | None = None) -> Tensor:
        """What travels, of the hidden states and all k n rows of the vectors, and a tap's row."""
        packed = torch.cat([hidden_s1H, self.scatter(vectors[:, None])])
        return packed if tap is None else torch.cat([packed, tap.row(packed)])

    def unpack(self, received: Tensor, row: MMDiTRow, tap: Tap | None = None) -> tuple[Tensor, Tensor]:
        """The way back; a tap reads its row: a number for the last stage, or zeros."""
        if tap is not None:
            received, carried = received.split([len(received) - 1, 1])
            if self.is_behind_tap:
                tap.read(carried)
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


def _split(blocks: TransformerBlock, place: int) -> list[TransformerBlock]:
    """The layers before and behind a place, as blocks that share them. Recompute asks a block for its layers by number
    when it runs backwards, so that one block cannot run one part after the other."""
    halves = []
    for layers in (blocks.layers[:place], blocks.layers[place:]):
        half = copy.copy(blocks)
        half._modules = {**blocks._modules, "layers": layers}
        half.num_layers_per_pipeline_rank = len(layers)
        halves.append(half)
    return halves
