"""SANA as one pipeline stage holds it.

    latents ─── patches ─────────────────────► image stream ─┐                 ┌─► modulated norm ─► linear ─► velocity
    condition ─ linear, GELU, linear, norm ──► text stream ──┴─► blocks ─► … ──┘
    timestep ── vector ─► six more, which modulate all blocks; the vector itself the end

Layout: see ``models/mmdit/row.py`` and ``trunk.py``. Of a conditioning vector all seven rows travel:

    [ text | image | n vectors, and six of each of them ]
"""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_unimm.config.mmdit import SanaConfig
from megatron_unimm.models.mmdit.embedding import (
    NUM_FREQUENCIES,
    TIMESTEP_SCALE,
    LatentEmbedder,
    VectorEmbedder,
    sinusoid,
)
from megatron_unimm.models.mmdit.modulation import modulate, plain_norm
from megatron_unimm.models.mmdit.row import MMDiTRow
from megatron_unimm.models.mmdit.trunk import DiffusionTransformer, MMDiTInput, Tap
from megatron_unimm.models.sana.blocks import layer_spec, modulation_table

CONDITION_EPSILON = 1e-5


class ConditionEmbedder(nn.Module):
    """The condition's tokens: two linear layers with GELU between them, and RMSNorm."""

    def __init__(self, model: SanaConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(model.condition_size, model.hidden_size)
        self.linear_2 = nn.Linear(model.hidden_size, model.hidden_size)
        self.norm = nn.RMSNorm(model.hidden_size, eps=CONDITION_EPSILON)

    def forward(self, condition_VC: Tensor) -> Tensor:
        """``[V, H]``."""
        return self.norm(self.linear_2(F.gelu(self.linear_1(condition_VC), approximate="tanh")))


class TimestepModulation(nn.Module):
    """The vector of a timestep, and six of it that modulate all blocks."""

    def __init__(self, model: SanaConfig) -> None:
        super().__init__()
        self.timestep_embedder = VectorEmbedder(2 * NUM_FREQUENCIES, model.hidden_size)
        self.linear = nn.Linear(model.hidden_size, 6 * model.hidden_size)

    def forward(self, timestep_n: Tensor) -> Tensor:
        """``[7 n, H]``: all vectors, then six of each."""
        dtype = self.linear.weight.dtype
        vectors = self.timestep_embedder(sinusoid(timestep_n * TIMESTEP_SCALE).to(dtype))  # [n, H]
        six = self.linear(F.silu(vectors)).unflatten(1, (6, -1))  # [n, 6, H]
        return torch.cat([vectors, six.flatten(0, 1)])


class Sana(DiffusionTransformer):
    """One stage. ``backend``: see ``models/specs.py``."""

    def __init__(
        self,
        model: SanaConfig,
        config: TransformerConfig,
        backend: str,
        groups: ProcessGroupCollection,
        pre_process: bool = True,
        post_process: bool = True,
        virtual_stage: int | None = None,
        tap_after: int | None = None,
    ) -> None:
        super().__init__(model, config, groups, pre_process, post_process, tap_after)
        if pre_process:
            self.latent_embedder = LatentEmbedder(model)
            self.condition_embedder = ConditionEmbedder(model)
            self.timestep_modulation = TimestepModulation(model)
        self.blocks = self.build_blocks(partial(layer_spec, model, backend), virtual_stage)
        if post_process:
            self.final_table = modulation_table(2, config)
            self.final_linear = nn.Linear(model.hidden_size, model.patch_dim)

    def forward(
        self, row: MMDiTRow, inputs: MMDiTInput | None, received: Tensor | None, tap: Tap | None = None
    ) -> Tensor:
        if inputs is not None:
            hidden, vectors = self._embed(inputs)  # [s, 1, H], [7 n, H]
        else:
            assert received is not None
            hidden, vectors = self.unpack(received, row, tap)
        of_end, of_blocks = self._shared(vectors).split([row.num_vectors, 6 * row.num_vectors])
        hidden = self.run_blocks(self.blocks, hidden, of_blocks.unflatten(0, (-1, 6)), row, tap)  # [s, 1, H]
        if not self.post_process:
            return self.pack(hidden, vectors, tap)
        assert row.image_vectors is not None
        shift, scale = (self.final_table + of_end[:, None]).unbind(1)  # [n, H] each
        image = row.streams(hidden)[1]  # [s_image, 1, H]
        image = self.gather(modulate(plain_norm(image), shift, scale, row.image_vectors))  # [t_image, 1, H]
        return self.final_linear(image[:, 0])  # [t_image, patch dim]

    def _embed(self, inputs: MMDiTInput) -> tuple[Tensor, Tensor]:
        """Both streams ``[s, 1, H]``, and the conditioning vectors ``[7 n, H]``."""
        text = self.condition_embedder(inputs.condition)[:, None]  # [t_text, 1, H]
        image = self.latent_embedder(inputs.patches, inputs.position_index)[:, None]  # [t_image, 1, H]
        if inputs.added is not None:
            image = image + inputs.added[:, None]
        return torch.cat([self.scatter(text), self.scatter(image)]), self.timestep_modulation(inputs.timestep)

    def _shared(self, vectors: Tensor) -> Tensor:
        """The same; under sequence parallelism each rank modulates its own tokens, so that gradients are summed over
        ranks."""
        if not self.config.sequence_parallel:
            return vectors
        return copy_to_tensor_model_parallel_region(vectors, self.tp_group)
