"""The chunks of a model as one function, whatever the layout: tokens in, the last hidden states and what follows out.

Layouts: t tokens of all sequences one after another, ``[t, 1, H]`` between stages; n chosen positions; V visual tokens.

Tensor-parallel ranks compute the same; context- and data-parallel ranks each decode for themselves. Between pipeline
stages hidden states travel with send and receive, and what the last stage finds out goes back to all by broadcast.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_unimm.config.model import ModelConfig
from megatron_unimm.data.sample import TokenizedSample
from megatron_unimm.generate.cache import SequenceCache
from megatron_unimm.generate.stages import StageLink
from megatron_unimm.models.attention import PackedContext
from megatron_unimm.models.backbone.deepstack import travelling_levels
from megatron_unimm.models.gates import modality_mask
from megatron_unimm.models.rotary import token_angles
from megatron_unimm.models.vision import VisionInput
from megatron_unimm.parallel.groups import ParallelGroups


class SpeakingChunk(Protocol):
    """What decoding of words asks of a method's model chunk (a torch module)."""

    pre_process: bool
    """Whether it embeds tokens and holds the vision encoder."""
    post_process: bool
    """Whether it holds the heads."""

    def see(self, images: VisionInput) -> Tensor:
        """Features ``[V, F]`` of images that are read: visual tokens, F = H, and what else the tower saw of each."""
        ...

    def embed_tokens(self, input_ids: Tensor, features_VF: Tensor | None, visual_index: Tensor | None) -> Tensor:
        """Rows ``[r, 1, H]`` of token ids int64 ``[t]``, with visual tokens at the positions ``visual_index``; their
        features are those that were seen, or visual tokens ``[V, H]`` that were predicted."""
        ...

    def advance(self, rows_r1H: Tensor, context: PackedContext) -> Tensor:
        """Through the chunk's layers: ``[r, 1, H]``, at the end of the last chunk ``[t, 1, H]``."""
        ...

    def text_logits(self, hidden_nH: Tensor) -> Tensor:
        """``[n, vocab / tensor]``."""
        ...


@runtime_checkable
class GenerativeChunk(SpeakingChunk, Protocol):
    """One that generates images as visual tokens, too."""

    def target_features(self, images: VisionInput) -> Tensor:
        """Visual tokens ``[V, H]`` of images as the model learns to generate them."""
        ...

    def next_visual(self, hidden_nH: Tensor) -> Tensor:
        """The visual tokens ``[n, H]`` that follow."""
        ...


@dataclass(frozen=True)
class Step:
    """New tokens of all sequences."""

    counts: list[int]
    """Of each sequence."""
    input_ids: np.ndarray
    """int64 ``[t]``."""
    position_ids: np.ndarray
    """int64 ``[3, t]``."""
    visual_index: np.ndarray
    """int64 ``[V]``: positions of visual tokens."""


class StagedModel:
    """This rank's chunks, and the ranks that hold the others.

    Args:
        chunks: in the order in which a token passes them.
        dtype: of hidden states.
    """

    def __init__(
        self,
        chunks: Sequence[SpeakingChunk],
        model: ModelConfig,
        groups: ParallelGroups,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.chunks = chunks
        self.model = model
        self.groups = groups
        self.device = device
        self.dtype = dtype
        self.hidden_size = model.backbone.hidden_size
        self.link = StageLink(groups, device, dtype, self.hidden_size)
        self._blocks = 1 + travelling_levels(model, groups.config)
        self.is_first = chunks[0].pre_process
        self.is_last = chunks[-1].post_process

    # -- images --------------------------------------------------------------------------------------------------------

    def see(self, prompts: Sequence[TokenizedSample]) -> Tensor | None:
        """Features ``[V, F]`` of the images of all prompts, on the first stage; None elsewhere, or without any."""
        patches = np.concatenate([prompt.patches for prompt in prompts])
        if not self.is_first or not len(patches):
            return None
        grids = np.concatenate([prompt.grids for prompt in prompts])
        return self.chunks[0].see(self._vision_input(patches, grids))

    def target_features(self, patches: np.ndarray, grids: np.ndarray) -> Tensor:
        """Visual tokens ``[V, H]`` of images as the model learns to generate them, on every stage."""
        num_visual = int(grids.prod(axis=1).sum()) // self.model.vision_encoder.spatial_merge_size**2
        features = torch.empty(num_visual, self.hidden_size, dtype=self.dtype, device=self.device)
        if self.is_first:
            first = self.chunks[0]
            assert isinstance(first, GenerativeChunk)
            features = first.target_features(self._vision_input(patches, grids)).contiguous()
        self.link.broadcast(features, stage=0)
        return features

    def _vision_input(self, patches: np.ndarray, grids: np.ndarray) -> VisionInput:
        return VisionInput.build(patches, grids, self.model.vision_encoder, self.device, self.dtype)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def run(self, step: Step, features_VF: Tensor | None, cache: SequenceCache) -> Tensor | None:
        """New tokens through all stages.

        Args:
            features_VF: of the visual tokens among them, on the first stage.

        Returns:
            ``[B, H]`` on the last stage: the hidden state of each sequence's last token. None elsewhere.
        """
        cache.grow(step.counts)
        context = self._context(step, cache)
        hidden = None
        for chunk in self.chunks:
            if chunk.pre_process:
                index = self._tensor(step.visual_index) if len(step.visual_index) else None
                hidden = chunk.embed_tokens(
                    self._tensor(step.input_ids), features_VF if index is not None else None, index
                )
            else:
                hidden = self.link.receive(len(step.input_ids) * self._blocks)
            hidden = chunk.advance(hidden, context)
            if not chunk.post_process:
                self.link.send(hidden)
        if not self.is_last:
            return None
        assert hidden is not None
        return hidden[self._tensor(np.cumsum(step.counts) - 1), 0]

    def logits(self, hidden_nH: Tensor) -> Tensor:
        """``[n, vocab]`` float32; on the last stage."""
        mine = self.chunks[-1].text_logits(hidden_nH).float().contiguous()
        group = self.groups.collection.tp
        if group.size() == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(parts, mine, group=group)
        return torch.cat(parts, dim=-1)

    def share_tokens(self, tokens: Tensor | None, count: int) -> list[int]:
        """What the last stage chose (int64 ``[count]``, None elsewhere), on every rank: a step's one host sync."""
        shared = tokens if tokens is not None else torch.empty(count, dtype=torch.int64, device=self.device)
        self.link.broadcast(shared, stage=self.groups.config.pipeline - 1)
        return shared.tolist()

    def share_visual(self, hidden_nH: Tensor | None, count: int) -> Tensor:
        """The visual tokens ``[count, H]`` that follow hidden states of the last stage (None elsewhere), on all
        ranks."""
        if hidden_nH is not None:
            last = self.chunks[-1]
            assert isinstance(last, GenerativeChunk)
            visual = last.next_visual(hidden_nH).to(self.dtype).contiguous()
        else:
            visual = torch.empty(count, self.hidden_size, dtype=self.dtype, device=self.device)
        self.link.broadcast(visual, stage=self.groups.config.pipeline - 1)
        return visual

    def _context(self, step: Step, cache: SequenceCache) -> PackedContext:
        backbone = self.model.backbone
        sequential = backbone.positions == "sequential"
        positions = cache.slots.expand(3, -1) if sequential else self._tensor(step.position_ids)
        return PackedContext.with_angles(
            token_angles(positions, backbone),
            self.dtype,
            modality=modality_mask(self._tensor(step.input_ids), self.model),
            cache=cache,
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


@contextmanager
def decoding_mode(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients, sequence parallelism and FP8; a model that trains leaves it as it came.

    A step of decoding has as many tokens as sequences: they neither divide over tensor-parallel ranks nor fill FP8's
    blocks. The weights are the same with and without; Megatron-Core's layers read the two switches when they run.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    switches: list[tuple[object, str, object]] = []
    # The configuration objects are shared by many modules; found by identity, since they have no hash.
    configs = {
        id(config): config for module in modules if isinstance(config := vars(module).get("config"), TransformerConfig)
    }
    for config in configs.values():
        switches += [(config, "sequence_parallel", False), (config, "fp8", None)]
    # Linears of Megatron-Core and of Transformer Engine keep a copy of the switch.
    switches += [
        (module, "sequence_parallel", False) for module in modules if vars(module).get("sequence_parallel") is True
    ]
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in switches]
    training = [(module, module.training) for module in modules]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        for module, mode in training:
            module.training = mode
