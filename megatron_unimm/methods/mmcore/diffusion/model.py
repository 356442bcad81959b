"""MMCORE's diffusion transformer with the VLM before it (figure 5; section 3.2).

    conversation ─ VLM (frozen) ─┬─► hidden states at words ─ text pathway ───────┐
                                 └─► visual latents at queries ─ visual pathway ──┴─► condition ─┐
    pictures before ─ VAE (frozen) ─► clean tokens ──────────────────────────────────────────────┤
    picture ─ VAE ─► x_0 ─┐                                                                      ├─ MMDiT ─► velocity
                     ε ───┴─► x_t = (1 − t) x_0 + t ε ───────────────────────────────────────────┘

Attention is block-causal over the frames of a conversation (figure 6; ``models/mmdit/visibility.py``). The VLM is whole
on the first pipeline stage, tensor and context parallel as the rest. Where it is frozen, what it says may have been
computed beforehand (``data/conditions.py``), and it is only kept.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megatron_unimm.config.methods import MMCoreDrawing, PathwayDiffusionConfig
from megatron_unimm.config.mmdit import Sd3Config
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow
from megatron_unimm.methods.drawing.model import Condition, DrawingBatch, DrawingModel
from megatron_unimm.methods.mmcore.model import MMCoreVlm
from megatron_unimm.methods.vlm.model import FrozenParts
from megatron_unimm.methods.vlm.queries import VLM, QueryBatch, build_condition_batch, vlm_stage
from megatron_unimm.models.lora import add_lora
from megatron_unimm.models.mmdit.canvas import Canvas
from megatron_unimm.models.pathways import DualPathway
from megatron_unimm.models.vit_features import FeaturePlaces, VitFeatures
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


@dataclass(frozen=True)
class ConditionInput:
    """What the first stage makes the condition of."""

    conversation: QueryBatch | None
    """For the VLM; None where what it says was computed beforehand."""
    word_index: Tensor | None
    """int64 ``[V]``: in its row."""
    order: Tensor
    """int64 ``[V + Q]``: of the text stream, places among the words, then the visual latents."""
    text_kept: Tensor
    """``[V]``: 0 where words are left out."""
    visual_kept: Tensor
    """``[Q]``."""
    words: Tensor | None = None
    """``[V, H]``, computed beforehand, as the next."""
    latents: Tensor | None = None
    """``[Q, D]``."""
    features: FeaturePlaces | None = None
    """Where the VLM's visual tokens go, for a model that adds them to clean tokens."""


@dataclass(frozen=True)
class DiffusionBatch(DrawingBatch):
    """One micro-batch."""

    condition: ConditionInput | None


class MMCoreDiffusionModel(DrawingModel):
    """One pipeline stage.

    Parts, beside a drawing model's (first stage):
        vlm: the VLM of the first stage of training; saved with the rest, so that a checkpoint answers by itself.
        pathways: words and visual latents to the condition.
        frame_embedding: tells frames apart where positions do not (SD3).
        vit_features: what the VLM sees of earlier pictures, to their clean tokens (where the recipe asks for it).
    """

    def __init__(
        self,
        stage: StageConfig,
        platform: Platform,
        groups: ParallelGroups,
        frozen: FrozenParts,
        virtual_stage: int = 0,
        tap_after: int | None = None,
    ) -> None:
        super().__init__(stage, platform, groups, virtual_stage, tap_after)
        method, queries, mmdit = stage.method, stage.queries, self.model.mmdit
        assert isinstance(method, MMCoreDrawing)
        assert queries is not None
        if method.lora is not None:
            used = add_lora(self.mmdit, method.lora, self.backend, groups.collection, stage.train.seed)
            self.lora_used["method.lora"] = used
        if self.pre_process:
            self.vlm = self.new_vlm(frozen)
            self.lora_used |= self.vlm.lora_used
            # Its weights come from the seed alone, not from what this rank drew before: the same at every layout.
            torch.manual_seed(stage.train.seed)
            self.pathways = DualPathway(
                stage.model.backbone.hidden_size,
                queries.latent_size(stage.model),
                queries.grid,
                mmdit.condition_size,
                mmdit.pooled_size,
            )
            if isinstance(mmdit, Sd3Config):
                self.frame_embedding = torch.nn.Embedding(method.max_frames, mmdit.hidden_size)
                torch.nn.init.zeros_(self.frame_embedding.weight)
            if isinstance(method, PathwayDiffusionConfig) and method.vit_features:
                self.vit_features = VitFeatures(stage.model.vision_encoder.out_size, mmdit.hidden_size)
        self.freeze_base()

    def new_vlm(self, frozen: FrozenParts) -> MMCoreVlm:
        """Whole on this pipeline stage."""
        return build_vlm(self.stage, self.platform, self.groups, frozen)

    def checkpoint_name(self, name: str) -> str:
        return name.removeprefix(VLM)

    # -- first stage

    def conditions(self, batch: DrawingBatch) -> Condition:
        assert isinstance(batch, DiffusionBatch)
        assert batch.condition is not None
        words, latents, image = batch.condition.words, batch.condition.latents, None
        if words is None or latents is None:
            assert batch.condition.conversation is not None
            assert batch.condition.word_index is not None
            hidden, latents = self.vlm.condition(batch.condition.conversation)  # [T, H], [Q, D]
            words = hidden.index_select(0, batch.condition.word_index)
            image = self.image_condition(batch.condition.conversation, batch.condition.features)
        return Condition(self.condition(words, latents, batch.condition), image)

    def image_condition(self, conversation: QueryBatch, places: FeaturePlaces | None) -> Tensor | None:
        """``[U, H]``, to be added to image tokens; None for nothing."""
        return None if places is None else self.vit_features(self.vlm.visual_tokens(conversation), places)

    def condition(self, words_VH: Tensor, latents_QD: Tensor, condition: ConditionInput) -> Tensor:
        """``[V + Q, C]`` in the order of the text stream."""
        return self.pathways(words_VH, condition.text_kept, latents_QD, condition.visual_kept, condition.order)

    def pooled(self, num_vectors: int) -> Tensor:
        return self.pathways.pooled.expand(num_vectors, -1)

    def added(self, canvas: Canvas) -> Tensor | None:
        """What tells frames apart."""
        return self.frame_embedding(canvas.frame_number) if isinstance(self.model.mmdit, Sd3Config) else None


VlmT = TypeVar("VlmT", bound=MMCoreVlm)


def build_vlm(
    stage: StageConfig,
    platform: Platform,
    groups: ParallelGroups,
    frozen: FrozenParts,
    kind: type[VlmT] = MMCoreVlm,
) -> VlmT:
    """The VLM of a stage, whole on each of its pipeline stages."""
    assert stage.queries is not None
    whole = groups.without_pipeline()
    return kind(vlm_stage(stage), stage.queries, platform, whole, frozen, with_teacher=False)


def conversation_of(vlm: MMCoreVlm, row: FrameRow) -> QueryBatch:
    """What a VLM reads of a row."""
    return build_condition_batch(row.conversation, row.query_index, vlm.stage.model, vlm.role())


def condition_of(vlm: MMCoreVlm, row: FrameRow) -> tuple[Tensor, Tensor]:
    """What a VLM says of a row: states at its words ``[V, H]``, and visual latents ``[Q, D]``."""
    hidden, latents = vlm.condition(conversation_of(vlm, row))
    return hidden.index_select(0, torch.from_numpy(row.word_index).to(hidden.device)), latents
