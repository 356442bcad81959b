"""SPAR's unified model as it learns to draw (arXiv 2606.23041, figure 3): MMCORE's diffusion transformer behind a VLM,
with three differences.

    conversation ─ VLM ─┬─► layers mixed at words ─── text pathway ────┐
                        └─► layers mixed at queries ─ visual pathway ──┴─► condition ──────┐
    pictures before ─ tokenizer (frozen) ─► clean latents ─────────────────────────────────┤
    picture ─ tokenizer ─► x_0 ─┐                                                          ├─ DiT ─► velocity
                           ε ───┴─► x_t = (1 − t) x_0 + t ε ───────────────────────────────┘   │
    picture ─ tokenizer's semantic stream ─► cosine ◄─ projector ◄─ hidden states after layer L┘

The latents are the tokenizer's, normalised by its statistics; what words and queries say is what Dynamic Token Routing
mixes of the language model's layers; and the tokenizer's semantic stream is the teacher of REPA's loss ("leverages the
unified tokenizer as an internal alignment teacher for the diffusion model").
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_unimm.config.methods import SparConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.drawing.alignment import Targets, alignment_loss
from megatron_unimm.methods.drawing.autoencoder import build_autoencoder
from megatron_unimm.methods.drawing.model import DrawingBatch
from megatron_unimm.methods.mmcore.diffusion.model import DiffusionBatch, MMCoreDiffusionModel, build_vlm
from megatron_unimm.methods.spar.alignment.model import SparVlm
from megatron_unimm.methods.vlm.model import FrozenParts
from megatron_unimm.models.mmdit.trunk import Tap
from megatron_unimm.models.scales import AlignmentProjector
from megatron_unimm.models.tokenizer.codec import TokenizerCodec
from megatron_unimm.models.transformer_config import vision_transformer_config
from megatron_unimm.models.vision import VisionInput, build_vision_encoder
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform

CODEC = "vae."
"""Before the names of the tokenizer and its vision encoder here; in the tokenizer's checkpoints they have none."""


@dataclass(frozen=True)
class SparBatch(DiffusionBatch):
    """One micro-batch."""

    targets: Targets | None


class SparModel(MMCoreDiffusionModel):
    """One pipeline stage.

    Parts, beside those of MMCORE's (first stage):
        vae: the tokenizer with its vision encoder.
        vlm: SPAR's, with routers.
    On the stage that has the layer that is aligned:
        alignment_projector.
        base: the teacher, where it is not here: the tokenizer, or the base model's vision encoder.
    """

    def __init__(
        self,
        stage: StageConfig,
        platform: Platform,
        groups: ParallelGroups,
        frozen: FrozenParts,
        virtual_stage: int = 0,
        with_base: bool = True,
    ) -> None:
        method = stage.method
        assert isinstance(method, SparConfig)
        self.self_alignment = method.alignment
        layer = None if method.alignment is None else method.alignment.layer
        super().__init__(stage, platform, groups, frozen, virtual_stage, layer)
        self.has_own_encoder = self.pre_process and frozen.vision_encoder
        if method.alignment is not None and self.mmdit.has_tap:
            torch.manual_seed(stage.train.seed)
            self.alignment_projector = AlignmentProjector(
                self.model.mmdit.hidden_size, method.alignment.projector_size, stage.model.vision_encoder.out_size
            )
            if with_base:
                self._add_teacher(method.alignment.teacher == "internal")
        self.freeze_base()

    def _add_teacher(self, is_internal: bool) -> None:
        if is_internal:
            if not self.pre_process and "vae" not in dict(self.base.named_children()):
                self.base.vae = build_autoencoder(self.stage, self.platform, self.groups)
        elif not self.has_own_encoder:
            encoder = self.stage.model.vision_encoder
            config = vision_transformer_config(encoder, self.stage.system, self.platform)
            self.base.vision_encoder = build_vision_encoder(encoder, config, self.backend, self.groups.alone())

    def new_vlm(self, frozen: FrozenParts) -> SparVlm:
        return build_vlm(self.stage, self.platform, self.groups, frozen, SparVlm)

    def imported_name(self, name: str) -> str:
        return name.removeprefix(CODEC)

    def base_prefix(self, part: str) -> str:
        return "" if part == "vae" else super().base_prefix(part)

    # -- the stage with the layer that is aligned

    def tap(self, batch: DrawingBatch) -> Tap | None:
        """The self-alignment loss, its sum over this rank's tokens."""
        assert isinstance(batch, SparBatch)
        if self.self_alignment is None:
            return None
        return Tap(lambda hidden: self._alignment(hidden, batch.targets))

    def _alignment(self, hidden_tH: Tensor, targets: Targets | None) -> Tensor:
        assert targets is not None
        assert self.self_alignment is not None
        width, grids = self.stage.model.vision_encoder.out_size, targets.feature_grids
        teacher = self._seen
        if self.self_alignment.teacher == "internal":
            codec = self.vae if self.pre_process else self.base.vae
            assert isinstance(codec, TokenizerCodec)

            def teacher(images: VisionInput) -> Tensor:
                return codec.semantic_of(images, grids)

        return alignment_loss(self.alignment_projector, hidden_tH, targets, width, teacher)

    def _seen(self, images: VisionInput) -> Tensor:
        """What the base model's vision encoder sees."""
        return self.vlm.vision_encoder(images) if self.has_own_encoder else self.base.vision_encoder(images)
