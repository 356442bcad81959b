"""HieraQuery from an exported folder: transformers' VLM, diffusers' diffusion transformer and VAE, and the parts
between them.

    pipeline = HieraQueryPipeline.from_pretrained("exported")
    picture = pipeline("a red circle left of a blue square")  # uint8 (H, W, 3), at the finest scale
    coarse, middle, fine = pipeline.all_scales("a red circle left of a blue square")
    edited = pipeline("Make the circle green.", [picture])

It draws what ``unimm generate`` draws of the checkpoint, without Megatron-Core; on a CPU in float32 to the last bit
(``hub/order.py``). The folder holds data only: no code comes from it.

Legend  Q queries of all pictures, N of each, n of them of a scale; H hidden size of the VLM, H' of the connector, C
        width of the condition.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.hieraquery import LanguageConnectorConfig, MultiScaleConfig
from megatron_unimm.config.methods import DropoutSchedule
from megatron_unimm.data.frames import FrameRow, FrameWork
from megatron_unimm.flow.guidance import num_of_one_condition
from megatron_unimm.hub.connector import ConnectorLayers, LayerSizes
from megatron_unimm.hub.denoiser import Denoiser
from megatron_unimm.hub.folder import ExportedFolder
from megatron_unimm.hub.language_model import LanguageModel
from megatron_unimm.hub.pipeline import Condition, FramePipeline
from megatron_unimm.models.rotary import inverse_frequencies
from megatron_unimm.models.scales import ScaleAdapters, ScaleQueries

NO_DROPOUT = DropoutSchedule(start=0.0, end=0.0)


class HieraQueryPipeline(FramePipeline[Tensor]):
    """See :class:`~megatron_unimm.hub.pipeline.FramePipeline`. Said are tokens of the condition ``[n, C]``."""

    def __init__(
        self,
        language_model: LanguageModel,
        connector: "LanguageConnector",
        adapters: ScaleAdapters,
        denoiser: Denoiser,
        vae: AutoencoderKL,
        work: FrameWork,
        sampler: SamplerConfig,
    ) -> None:
        super().__init__(language_model, denoiser, vae, work, sampler)
        self.connector = connector
        self.adapters = adapters

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "HieraQueryPipeline":
        """Load a folder that ``unimm convert export`` wrote, in float32.

        Raises:
            CheckpointError: it is incomplete, damaged, of something else, or has a language model or a diffusion
                transformer that the libraries cannot run.
            ConfigError: its tokenizer does not fit its language model.
        """
        found = ExportedFolder.open(Path(folder), device, "HieraQuery", "scale_adapters")
        scales, hidden, mmdit = (
            MultiScaleConfig.model_validate(found.parts["query_tokens"]),
            found.spoken.backbone.hidden_size,
            found.generator.mmdit,
        )
        work = FrameWork(
            found.generator,
            found.chat(),
            scales.picture_scales,
            {},
            0,
            NO_DROPOUT,
            NO_DROPOUT,
            found.settings["max_frames"],
            pathways="visual",
            shows_sources=found.settings["shows_sources"],
        )
        queries = found.filled(ScaleQueries(scales, hidden, torch.float32), "query_tokens")
        adapters = ScaleAdapters(scales, hidden, mmdit.condition_size, mmdit.pooled_size)
        return cls(
            found.language_model(lambda words, index: queries(words[:, None], index)[:, 0]),
            found.filled(LanguageConnector(scales.connector), "scale_connector"),
            found.filled(adapters, "scale_adapters"),
            found.denoiser(),
            found.vae(),
            work,
            found.sampler,
        )

    def all_scales(
        self, prompt: str, pictures: Sequence[np.ndarray] = (), *, seed: int = 0, number: int = 0, **sampler: Any
    ) -> list[np.ndarray]:
        """Pictures of all scales, coarse to fine; arguments as a call's."""
        return [
            self(prompt, pictures, seed=seed, number=number, scale=scale, **sampler)
            for scale in range(len(self.work.scales.queries))
        ]

    def num_conditions(self, sampler: SamplerConfig) -> int:
        return num_of_one_condition(sampler)

    def said(self, row: FrameRow, scale: int) -> Tensor:
        queries = self.work.scales.queries
        _, hidden = self.language_model(row.conversation, row.query_index)  # [Q, H], of earlier pictures too
        refined = self.connector.refine(self.adapters.inward(hidden[-sum(queries) :]), queries)  # [N, H']
        return self.adapters.condition(refined).split(queries)[scale]

    def condition(self, said: Tensor, row: FrameRow, times: int) -> Condition:
        frames = row.frames.tiled(times)
        frame_of_token = torch.from_numpy(np.repeat(np.arange(len(frames)), frames.num_condition)).to(said.device)
        tokens = torch.cat([said, *(torch.zeros_like(said) for _ in range(times - 1))])
        pooled = self.adapters.pool(tokens, frame_of_token, len(frames))
        assert pooled is not None, "of SD3 and FLUX"
        return Condition(tokens, pooled)


class LanguageConnector(ConnectorLayers):
    """As ``models/scale_connector.py``: the queries of a scale see one another."""

    def __init__(self, model: LanguageConnectorConfig) -> None:
        sizes = LayerSizes(
            hidden=model.hidden_size,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            head_size=model.head_size,
            mlp=model.mlp_size,
            qkv_bias=True,
            epsilon=model.norm_epsilon,
        )
        super().__init__(model.num_layers, sizes)
        self.model = model

    def refine(self, hidden_QH: Tensor, queries: Sequence[int]) -> Tensor:
        """``[Q, H']`` of one picture.

        Args:
            queries: of each scale.
        """
        positions = torch.cat([torch.arange(length, device=hidden_QH.device) for length in queries])
        frequencies = inverse_frequencies(self.model.head_size, self.model.rope_theta, hidden_QH.device)
        angles = positions[:, None].float() * frequencies
        return self(hidden_QH, queries, (angles.cos(), angles.sin()))
