"""A multimodal diffusion transformer as one pipeline stage holds it: SD3, SD3.5 and FLUX.1.

    latents  ── patches ──► image stream ─┐                                    ┌─► modulated norm ─► linear ─► velocity
    condition ── linear ──► text stream  ─┴─► blocks ─► … ─► blocks ─► …      ─┘
    timestep, pooled, guidance ─► conditioning vectors, which modulate all blocks and the end

Layout: see ``row.py``. Between pipeline stages travel the hidden states and, under them, the conditioning vectors:

    [ text | image | vectors ]          (s + n) rows, the same number on all stages

so that one stage owns what makes the vectors and their gradients come back to it through the pipeline. (Making them
anew on each stage would need copies of these weights there and a sum of their gradients over stages.)

What is worked out of the hidden states between two layers (a :class:`Tap`) travels as one more row of every rank.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_unimm.config.mmdit import MMDiT as MMDiTSection
from megatron_unimm.models.mmdit.blocks import layer_specs
from megatron_unimm.models.mmdit.embedding import ConditioningVector, LatentEmbedder
from megatron_unimm.models.mmdit.modulation import Modulation, modulate, plain_norm
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
    pooled: Tensor
    """``[n, pooled size]``."""
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


class MMDiT(MegatronModule):
    """One stage.

    Args:
        backend: see ``models/specs.py``.
        tap_after: the layer (1 first) whose output a :class:`Tap` looks at; None for none.
    """

    def __init__(
        self,
        model: MMDiTSection,
        config: TransformerConfig,
        backend: str,
        groups: ProcessGroupCollection,
        pre_process: bool = True,
        post_process: bool = True,
        virtual_stage: int | None = None,
        tap_after: int | None = None,
    ) -> None:
        super().__init__(config)
        self.tp_group = groups.tp
        self.pre_process = pre_process
        self.post_process = post_process
        if pre_process:
            self.latent_embedder = LatentEmbedder(model)
            self.condition_embedder = torch.nn.Linear(model.condition_size, model.hidden_size)
            self.conditioning_vector = ConditioningVector(model, model.guidance)
        first = get_transformer_layer_offset(config, virtual_stage, groups.pp.rank())
        count = get_num_layers_to_build(config, virtual_stage, groups.pp.rank())
        self.blocks = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=layer_specs(model, backend, first, count)),
            post_layer_norm=False,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=virtual_stage,
        )
        self.has_tap = tap_after is not None and first < tap_after <= first + count
        """Whether the layer is on this stage."""
        self.is_behind_tap = tap_after is not None and tap_after <= first
        self._halves = [] if tap_after is None or not self.has_tap else _split(self.blocks, tap_after - first)
        if post_process:
            self.final_modulation = Modulation(2, config, groups)
            self.final_linear = torch.nn.Linear(model.hidden_size, model.patch_dim)

    def forward(
        self, row: MMDiTRow, inputs: MMDiTInput | None, received: Tensor | None, tap: Tap | None = None
    ) -> Tensor:
        """The velocity ``[t_image, patch dim]`` on the last stage, else what the next one takes, ``[s + n, 1, H]``,
        and a row more with a tap.

        Args:
            inputs: on the first stage. received: on the others.
            tap: has its value on the last stage, then.
        """
        if inputs is not None:
            hidden, vectors = self._embed(inputs)  # [s, 1, H], [n, H]
        else:
            assert received is not None
            if tap is not None:
                # A number for the last stage, or zeros.
                received, carried = received.split([len(received) - 1, 1])
                if self.is_behind_tap:
                    tap.read(carried)
            hidden, vectors = self._unpack(received, row)
        activated = F.silu(vectors)
        if tap is not None and self.has_tap:
            before, behind = self._halves
            hidden = self._through(before, hidden, activated, row)
            tap.value = tap.look(self._gather(row.streams(hidden)[1])[:, 0])
            hidden = self._through(behind, hidden, activated, row)
        else:
            hidden = self._through(self.blocks, hidden, activated, row)  # [s, 1, H]
        if not self.post_process:
            packed = self._pack(hidden, vectors)
            return packed if tap is None else torch.cat([packed, tap.row(packed)])
        scale, shift = self.final_modulation(activated)
        image = row.streams(hidden)[1]  # [s_image, 1, H]
        image = self._gather(modulate(plain_norm(image), shift, scale, row.image_vectors))  # [t_image, 1, H]
        return self.final_linear(image[:, 0])  # [t_image, patch dim]

    def _through(self, blocks: TransformerBlock, hidden: Tensor, activated: Tensor, row: MMDiTRow) -> Tensor:
        blocks.training = self.blocks.training
        # Megatron-Core reads a later stage's input from a field that its schedule sets; ours is cut up first.
        blocks.input_tensor = hidden
        return blocks(hidden, attention_mask=None, context=activated, packed_seq_params=row)

    def _embed(self, inputs: MMDiTInput) -> tuple[Tensor, Tensor]:
        """Both streams ``[s, 1, H]``, and the conditioning vectors ``[n, H]``."""
        text = self.condition_embedder(inputs.condition)[:, None]  # [t_text, 1, H]
        image = self.latent_embedder(inputs.patches, inputs.position_index)[:, None]  # [t_image, 1, H]
        if inputs.added is not None:
            image = image + inputs.added[:, None]
        vectors = self.conditioning_vector(inputs.timestep, inputs.pooled, inputs.guidance)  # [n, H]
        return torch.cat([self._scatter(text), self._scatter(image)]), vectors

    def _pack(self, hidden: Tensor, vectors: Tensor) -> Tensor:
        return torch.cat([hidden, self._scatter(vectors[:, None])])

    def _unpack(self, received: Tensor, row: MMDiTRow) -> tuple[Tensor, Tensor]:
        num_vectors = row.num_vectors // (self.tp_group.size() if self.config.sequence_parallel else 1)
        hidden, vectors = received.split([len(received) - num_vectors, num_vectors])
        return hidden, self._gather(vectors)[:, 0]

    def _scatter(self, rows_t1H: Tensor) -> Tensor:
        """This rank's part under sequence parallelism."""
        if not self.config.sequence_parallel:
            return rows_t1H
        return scatter_to_sequence_parallel_region(rows_t1H, group=self.tp_group)

    def _gather(self, rows_s1H: Tensor) -> Tensor:
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
