"""HieraQuery (section 3, figure 2): a frozen VLM reads queries at several scales, coarse to fine, and a diffusion
transformer draws the picture at each scale from what it says at that scale's.

    conversation, queries ─ VLM (frozen) ─► hidden states at the queries ─ MLP ─ connector ─ MLP ─► condition ─┐
    pictures before, at the scale ─ VAE (frozen) ─► clean tokens ──────────────────────────────────────────────┤
    picture at the scale ─ VAE ─► x_0 ─┐                                                                       │
                                  ε ───┴─► x_t = (1 − t) x_0 + t ε ────────────────────────── velocity ◄─ DiT ─┘
    picture ─ vision encoder (frozen) ─► features, interpolated ◄─ cosine ─ projector ◄─ after layer L ─┘

Every scale of a picture is a frame of its own, with the same weights; earlier pictures of the conversation are in its
context, clean and at the same scale (``data/frames.py``, ``models/mmdit/visibility.py``). The VLM and the connector are
whole on the first pipeline stage. The alignment of section 3.2 is worked out on the stage that has layer L.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_unimm.config.methods import HieraQueryConfig
from megatron_unimm.config.mmdit import Sd3Config
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow
from megatron_unimm.methods.drawing.alignment import Targets, alignment_loss
from megatron_unimm.methods.drawing.model import Condition, DrawingBatch, DrawingModel
from megatron_unimm.methods.vlm.model import FrozenParts
from megatron_unimm.methods.vlm.queries import VLM, QueryBatch, QueryVlm, build_condition_batch, vlm_stage
from megatron_unimm.models.mmdit.canvas import Canvas
from megatron_unimm.models.mmdit.trunk import Tap
from megatron_unimm.models.scale_connector import ScaleConnector
from megatron_unimm.models.scales import AlignmentProjector, ScaleAdapters, ScaleQueries
from megatron_unimm.models.transformer_config import (
    language_connector_transformer_config,
    vision_transformer_config,
)
from megatron_unimm.models.vision import VisionInput, build_vision_encoder
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


@dataclass(frozen=True)
class ConditionInput:
    """What the first stage makes the condition of."""

    conversation: QueryBatch | None
    """For the VLM; None where what it says was computed beforehand."""
    hidden: Tensor | None
    """``[Q, H]``: its last hidden states at the queries, computed beforehand."""
    order: Tensor
    """int64 ``[Q]``: of the text stream, places among the queries."""
    kept: Tensor
    """``[Q]``: 0 where a condition is left out."""
    frame_of_token: Tensor
    """int64 ``[Q]``: of the text stream."""


@dataclass(frozen=True)
class HieraQueryBatch(DrawingBatch):
    """One micro-batch."""

    condition: ConditionInput | None
    targets: Targets | None


class ScaleVlm(QueryVlm):
    """The VLM, whole on the first pipeline stage."""

    def condition(self, batch: QueryBatch) -> Tensor:
        """The last hidden states at the queries ``[Q, H]``, whole on every rank."""
        hidden = self.last_hidden(batch).index_select(0, batch.queries.local_index)  # [q, H]
        if batch.local_index is None:
            return hidden
        return self.whole(hidden, batch.queries.rows, len(batch.queries.index))


class HieraQueryModel(DrawingModel):
    """One pipeline stage.

    Parts, beside a drawing model's (first stage):
        vlm: the VLM with the queries; saved with the rest, so that a checkpoint answers by itself.
        scale_connector: layers over the queries of a scale. scale_adapters: what stands around it.
        frame_embedding: tells pictures of a conversation apart where positions do not (SD3).
    On the stage that has the layer that is aligned:
        alignment_projector.
        base: the vision encoder, where the VLM with it is not here.
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
        method, scales = stage.method, stage.hieraquery
        assert isinstance(method, HieraQueryConfig)
        assert scales is not None
        self.method, self.queries = method, scales.picture_scales.queries
        layer = None if method.alignment is None else method.alignment.layer
        super().__init__(stage, platform, groups, virtual_stage, tap_after=layer)
        mmdit = self.model.mmdit
        if self.pre_process:
            self.vlm = build_vlm(stage, platform, groups, frozen)
            config = language_connector_transformer_config(scales.connector, stage.system, platform)
            # Weights come from the seed alone, not from what this rank drew before: the same at every layout.
            torch.manual_seed(stage.train.seed)
            self.scale_connector = ScaleConnector(scales.connector, config, self.backend, groups.alone())
            torch.manual_seed(stage.train.seed)
            hidden = stage.model.backbone.hidden_size
            self.scale_adapters = ScaleAdapters(scales, hidden, mmdit.condition_size, mmdit.pooled_size)
            if isinstance(mmdit, Sd3Config):
                self.frame_embedding = torch.nn.Embedding(method.max_frames, mmdit.hidden_size)
                torch.nn.init.zeros_(self.frame_embedding.weight)
        self.has_own_encoder = self.pre_process and frozen.vision_encoder
        if method.alignment is not None and self.mmdit.has_tap:
            torch.manual_seed(stage.train.seed)
            encoder = stage.model.vision_encoder
            self.alignment_projector = AlignmentProjector(
                mmdit.hidden_size, method.alignment.projector_size, encoder.out_size
            )
            if with_base and not stage.data.feature_cache and not self.has_own_encoder:
                tower = vision_transformer_config(encoder, stage.system, platform)
                self.base.vision_encoder = build_vision_encoder(encoder, tower, self.backend, groups.alone())
        self.freeze_base()

    def checkpoint_name(self, name: str) -> str:
        return name.removeprefix(VLM)

    # -- first stage

    def conditions(self, batch: DrawingBatch) -> Condition:
        assert isinstance(batch, HieraQueryBatch)
        assert batch.condition is not None
        found = batch.condition
        hidden = found.hidden
        if hidden is None:
            assert found.conversation is not None
            hidden = self.vlm.condition(found.conversation)  # [Q, H]
        tokens = self.tokens(hidden, self.queries) * found.kept[:, None].to(hidden.dtype)  # [Q, C]
        return self.condition(tokens.index_select(0, found.order), found.frame_of_token, len(batch.timestep))

    def tokens(self, hidden_QH: Tensor, queries: tuple[int, ...]) -> Tensor:
        """Tokens of the condition ``[Q, C]`` of what the VLM says at the queries of pictures.

        Args:
            queries: of each scale, of all scales.
        """
        refined = self.scale_connector.refine(self.scale_adapters.inward(hidden_QH), queries)
        return self.scale_adapters.condition(refined)

    def condition(self, tokens_VC: Tensor, frame_of_token: Tensor, num_frames: int) -> Condition:
        """Of the text stream. Nothing is zeros (Ming-Lite-Omni's unconditional input).

        Args:
            frame_of_token: int64 ``[V]``.
        """
        return Condition(tokens_VC, pooled=self.scale_adapters.pool(tokens_VC, frame_of_token, num_frames))

    def pooled(self, num_vectors: int) -> Tensor | None:
        """None: only of a transformer without one does a row not say it."""
        return None

    def added(self, canvas: Canvas) -> Tensor | None:
        """What tells frames apart."""
        return self.frame_embedding(canvas.frame_number) if isinstance(self.model.mmdit, Sd3Config) else None

    # -- the stage with the layer that is aligned

    def tap(self, batch: DrawingBatch) -> Tap | None:
        """The alignment loss (section 3.2), its sum over this rank's tokens."""
        assert isinstance(batch, HieraQueryBatch)
        if self.method.alignment is None:
            return None
        return Tap(lambda hidden: self._alignment(hidden, batch.targets))

    def _alignment(self, hidden_tH: Tensor, targets: Targets | None) -> Tensor:
        assert targets is not None
        # Without deepstack levels.
        width = self.stage.model.vision_encoder.out_size
        return alignment_loss(self.alignment_projector, hidden_tH, targets, width, self._seen)

    def _seen(self, images: VisionInput) -> Tensor:
        """What the vision encoder sees of pictures."""
        return self.vlm.vision_encoder(images) if self.has_own_encoder else self.base.vision_encoder(images)


def build_vlm(stage: StageConfig, platform: Platform, groups: ParallelGroups, frozen: FrozenParts) -> ScaleVlm:
    """The VLM of a stage, whole on each of its pipeline stages."""
    scales = stage.hieraquery
    assert scales is not None
    whole, hidden = groups.without_pipeline(), stage.model.backbone.hidden_size
    return ScaleVlm(
        vlm_stage(stage), platform, whole, frozen, lambda vlm: ScaleQueries(scales, hidden, vlm.config.params_dtype)
    )


def conversation_of(vlm: ScaleVlm, row: FrameRow) -> QueryBatch:
    """What a VLM reads of a row."""
    return build_condition_batch(row.conversation, row.query_index, vlm.stage.model, vlm.role())


def said_of(vlm: ScaleVlm, row: FrameRow) -> tuple[Tensor, Tensor]:
    """What a VLM says of a row: of words nothing, which pictures are not drawn from, ``[0, H]``, and the last hidden
    states at its queries ``[Q, H]``."""
    hidden = vlm.condition(conversation_of(vlm, row))
    return hidden[:0], hidden
