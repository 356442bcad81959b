"""A multimodal diffusion transformer as one pipeline stage holds it: SD3, SD3.5 and FLUX.1.

    latents  ── patches ──► image stream ─┐                                    ┌─► modulated norm ─► linear ─► velocity
    condition ── linear ──► text stream  ─┴─► blocks ─► … ─► blocks ─► …      ─┘
    timestep, pooled, guidance ─► conditioning vectors, which modulate all blocks and the end

Layout: see ``row.py`` and ``trunk.py``.
"""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_unimm.config.mmdit import FluxConfig, Sd3Config
from megatron_unimm.models.mmdit.blocks import layer_spec
from megatron_unimm.models.mmdit.embedding import ConditioningVector, LatentEmbedder
from megatron_unimm.models.mmdit.modulation import Modulation, modulate, plain_norm
from megatron_unimm.models.mmdit.row import MMDiTRow
from megatron_unimm.models.mmdit.trunk import DiffusionTransformer, MMDiTInput, Tap


class MMDiT(DiffusionTransformer):
    """One stage. ``backend``: see ``models/specs.py``."""

    def __init__(
        self,
        model: Sd3Config | FluxConfig,
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
            self.condition_embedder = torch.nn.Linear(model.condition_size, model.hidden_size)
            self.conditioning_vector = ConditioningVector(model, model.guidance)
        self.blocks = self.build_blocks(partial(layer_spec, model, backend), virtual_stage)
        if post_process:
            self.final_modulation = Modulation(2, config, groups)
            self.final_linear = torch.nn.Linear(model.hidden_size, model.patch_dim)

    def forward(
        self, row: MMDiTRow, inputs: MMDiTInput | None, received: Tensor | None, tap: Tap | None = None
    ) -> Tensor:
        if inputs is not None:
            hidden, vectors = self._embed(inputs)  # [s, 1, H], [n, H]
        else:
            assert received is not None
            hidden, vectors = self.unpack(received, row, tap)
        activated = F.silu(vectors)
        hidden = self.run_blocks(self.blocks, hidden, activated, row, tap)  # [s, 1, H]
        if not self.post_process:
            return self.pack(hidden, vectors, tap)
        scale, shift = self.final_modulation(activated)
        image = row.streams(hidden)[1]  # [s_image, 1, H]
        image = self.gather(modulate(plain_norm(image), shift, scale, row.image_vectors))  # [t_image, 1, H]
        return self.final_linear(image[:, 0])  # [t_image, patch dim]

    def _embed(self, inputs: MMDiTInput) -> tuple[Tensor, Tensor]:
        """Both streams ``[s, 1, H]``, and the conditioning vectors ``[n, H]``."""
        assert inputs.pooled is not None
        text = self.condition_embedder(inputs.condition)[:, None]  # [t_text, 1, H]
        image = self.latent_embedder(inputs.patches, inputs.position_index)[:, None]  # [t_image, 1, H]
        if inputs.added is not None:
            image = image + inputs.added[:, None]
        vectors = self.conditioning_vector(inputs.timestep, inputs.pooled, inputs.guidance)  # [n, H]
        return torch.cat([self.scatter(text), self.scatter(image)]), vectors
