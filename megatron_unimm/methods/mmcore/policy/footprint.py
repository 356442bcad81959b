"""What the chunks of the policy ask of a rank in an update: those of the diffusion stage on rows as long, whose VLM has
done its work in the rollout. See ``methods/footprint.py``."""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace
from megatron_unimm.methods.mmcore.diffusion.footprint import DiffusionFootprints
from megatron_unimm.methods.mmcore.footprint import vlm_of
from megatron_unimm.methods.mmcore.policy.rows import PolicyRow
from megatron_unimm.models.memory import Spread


@dataclass(frozen=True)
class TypicalRow(PolicyRow):
    """A row as rollouts would fill it, and the one of the diffusion stage that is like it."""

    like: FrameRow

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Of that."""
        return self.like.sample_ids


class PolicyFootprints(DiffusionFootprints):
    """See :class:`~megatron_unimm.methods.footprint.Footprints`."""

    def typical_row(  # type: ignore[override]
        self,
        stage: StageConfig,
        kinds: tuple[SampleKind, ...] | None = None,
        large: bool = False,
        pixels: bool = True,
    ) -> TypicalRow:
        return _typical(stage, super().typical_row(stage, kinds, large, pixels))

    def row_flops(self, stage: StageConfig, row: TypicalRow) -> float:  # type: ignore[override]
        return super().row_flops(stage, row.like)

    def chunk(  # type: ignore[override]
        self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: TypicalRow
    ) -> ChunkFootprint:
        return super().chunk(stage, spread, place, row.like)


def _typical(stage: StageConfig, like: FrameRow) -> TypicalRow:
    """Each drawing of the row is a pair."""
    assert stage.generator is not None
    frames, width = like.frames, stage.generator.mmdit.patch_dim
    counts = frames.counts[~frames.is_clean]
    pairs, tokens = len(counts), int(counts[0]) if len(counts) else 0
    assert (counts == tokens).all(), "drawings of a typical row have one size"
    own = np.flatnonzero(np.repeat(~frames.is_clean, frames.counts))
    states, ones = torch.zeros(pairs, tokens, width), np.ones(pairs)
    return TypicalRow(
        num_text=like.num_text,
        num_tokens=like.num_tokens,
        frames=frames,
        timestep=np.where(frames.is_clean, 0.0, 0.5),
        state=torch.zeros(int(frames.counts.sum()), width),
        words=torch.zeros(len(like.text_kept), stage.model.backbone.hidden_size),
        latents=torch.zeros(len(like.visual_kept), vlm_of(stage).latent_size(stage.model)),
        condition_order=like.condition_order,
        text_kept=like.text_kept,
        visual_kept=like.visual_kept,
        places=own[None],
        guided=ones.astype(bool),
        before=states,
        after=states,
        reference=states,
        keep=ones,
        pull=ones,
        std=ones,
        kl_std=ones,
        old_log_prob=torch.zeros(pairs),
        advantage=ones,
        like=like,
    )
