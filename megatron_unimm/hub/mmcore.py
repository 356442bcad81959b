"""MMCORE (arXiv 2604.19902) from an exported folder: transformers' VLM, diffusers' diffusion transformer and VAE, and
the parts between them.

    pipeline = MMCorePipeline.from_pretrained("exported")
    picture = pipeline("a red circle left of a blue square")  # uint8 (H, W, 3)
    edited = pipeline("Make the circle green.", [picture])

It draws what ``unimm generate`` draws of the checkpoint, without Megatron-Core; on a CPU in float32 to the last bit
(``hub/order.py``). The folder holds data only: no code comes from it.

Legend  V words and Q visual latents of all pictures, H hidden size of the VLM, D width of a visual latent.
"""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.methods import DropoutSchedule
from megatron_unimm.config.queries import (
    CONNECTOR_HEAD_SIZE,
    CONNECTOR_MLP_RATIO,
    QueryConnectorConfig,
    QueryVlmConfig,
)
from megatron_unimm.data.frames import FrameRow, FrameWork
from megatron_unimm.flow.guidance import num_conditions
from megatron_unimm.hub.connector import ConnectorLayers, LayerSizes
from megatron_unimm.hub.denoiser import Denoiser
from megatron_unimm.hub.folder import ExportedFolder
from megatron_unimm.hub.language_model import LanguageModel
from megatron_unimm.hub.pipeline import Condition, FramePipeline
from megatron_unimm.models.pathways import DualPathway

NO_DROPOUT = DropoutSchedule(start=0.0, end=0.0)


class Said(NamedTuple):
    """What the VLM says."""

    words: Tensor
    """``[V, H]``."""
    latents: Tensor
    """``[N, D]``: those of the last picture."""


class MMCorePipeline(FramePipeline[Said]):
    """See :class:`~megatron_unimm.hub.pipeline.FramePipeline`."""

    def __init__(
        self,
        language_model: LanguageModel,
        connector: "Connector",
        pathways: DualPathway,
        denoiser: Denoiser,
        vae: AutoencoderKL,
        work: FrameWork,
        sampler: SamplerConfig,
    ) -> None:
        super().__init__(language_model, denoiser, vae, work, sampler)
        self.connector = connector
        self.pathways = pathways

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "MMCorePipeline":
        """Load a folder that ``unimm convert export`` wrote, in float32.

        Raises:
            CheckpointError: it is incomplete, damaged, or of something else.
            ConfigError: its tokenizer does not fit its language model.
        """
        found = ExportedFolder.open(Path(folder), device, "MMCORE", "pathways")
        vlm, spoken, mmdit = (
            QueryVlmConfig.model_validate(found.parts["query_tokens"]),
            found.spoken,
            found.generator.mmdit,
        )
        frames = found.settings["max_frames"]
        work = FrameWork(found.generator, found.chat(), vlm.scales, {}, 0, NO_DROPOUT, NO_DROPOUT, frames)
        hidden, latent = spoken.backbone.hidden_size, vlm.latent_size(spoken)
        connector = Connector(vlm.connector, vlm.num_queries, hidden, latent)
        pathways = DualPathway(hidden, latent, vlm.grid, mmdit.condition_size, mmdit.pooled_size)
        queries = found.weights("query_tokens")["weight"]  # [N, H]

        def put_queries(words_TH: Tensor, index: Tensor) -> Tensor:
            return words_TH.index_copy(0, index, queries.repeat(len(index) // len(queries), 1))

        return cls(
            found.language_model(put_queries),
            found.filled(connector, "query_connector"),
            found.filled(pathways, "pathways"),
            found.denoiser(),
            found.vae(),
            work,
            found.sampler,
        )

    def num_conditions(self, sampler: SamplerConfig) -> int:
        return num_conditions(sampler)

    def said(self, row: FrameRow, scale: int) -> Said:
        hidden, at_queries = self.language_model(row.conversation, row.query_index)
        words = hidden.index_select(0, torch.from_numpy(row.word_index).to(hidden.device))
        return Said(words, self.connector(at_queries)[-self.work.scales.queries[-1] :])

    def condition(self, said: Said, row: FrameRow, times: int) -> Condition:
        spoken, shown = (torch.ones(len(each), dtype=torch.bool, device=each.device) for each in said)
        order = torch.from_numpy(row.condition_order).to(said.words.device)
        text = self.pathways.guided(said.words, spoken, said.latents, shown, order, times)
        return Condition(text, self.pathways.pooled)


class Connector(nn.Module):
    """From hidden states at the queries to visual latents: ``[Q, H]`` to ``[Q, D]`` (``models/queries.py``).

    Its parameters have the names and shapes of a checkpoint, so that they load as they are.
    """

    def __init__(self, model: QueryConnectorConfig, num_queries: int, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.num_queries = num_queries
        widths = [hidden_size, latent_size] if model.projection == "linear" else [hidden_size, hidden_size, latent_size]
        heads = hidden_size // CONNECTOR_HEAD_SIZE
        sizes = LayerSizes(hidden_size, heads, heads, CONNECTOR_HEAD_SIZE, CONNECTOR_MLP_RATIO * hidden_size)
        self.layers = ConnectorLayers(model.num_layers, sizes) if model.num_layers else None
        self.projection = nn.ModuleList(nn.Linear(wide, to) for wide, to in pairwise(widths))

    def forward(self, hidden_QH: Tensor) -> Tensor:
        hidden = hidden_QH
        if self.layers is not None:
            hidden = self.layers(hidden, [self.num_queries] * (len(hidden) // self.num_queries))
        for number, linear in enumerate(self.projection):
            hidden = linear(F.gelu(hidden) if number else hidden)
        return hidden
