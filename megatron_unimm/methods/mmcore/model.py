"""MMCORE's VLM (figure 5, bottom): a language model that answers in words and, at query tokens, in visual latents.

    words, images, queries ─► backbone ─┬─► text head ─► L_llm
                                        └─► (at the queries) connector ─► visual latents ─┐
    picture ─ SigLIP, or the vision encoder (frozen) ─► patches, pooled to a grid ────────┴─► L_vis

Layout: as ``methods/vlm/model.py``.
"""

import torch
from torch import Tensor

from megatron_unimm.config.queries import QueryVlmConfig, SiglipTeacher
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.alignment import cosine_loss
from megatron_unimm.methods.mmcore import losses
from megatron_unimm.methods.mmcore.batch import Alignment, MMCoreBatch
from megatron_unimm.methods.vlm.model import FrozenParts
from megatron_unimm.methods.vlm.queries import Queries, QueryBatch, QueryVlm
from megatron_unimm.models.lora import add_lora
from megatron_unimm.models.queries import QueryConnector, QueryTokens, pooled_to_grid
from megatron_unimm.models.transformer_config import connector_transformer_config, vision_transformer_config
from megatron_unimm.models.vision import VisionInput
from megatron_unimm.models.vision.siglip import SiglipInput, SiglipVisionEncoder
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.pipeline import with_zero_gradient
from megatron_unimm.parallel.platform import Platform


class MMCoreVlm(QueryVlm):
    """One pipeline stage of the VLM.

    Parts:
        vision_encoder, query_tokens (first stage). backbone. query_connector: from hidden states to visual latents
            (last stage).
        base: the frozen teacher (last stage): ``base.siglip``, or ``base.vision_encoder``, unless the student's own
            vision encoder is there and is the base's.
    """

    def __init__(
        self,
        stage: StageConfig,
        vlm: QueryVlmConfig,
        platform: Platform,
        groups: ParallelGroups,
        frozen: FrozenParts,
        virtual_stage: int = 0,
        with_teacher: bool = True,
    ) -> None:
        super().__init__(
            stage, platform, groups, frozen, lambda model: QueryTokens(vlm.num_queries, model.config), virtual_stage
        )
        self.vlm = vlm
        self.has_own_teacher = self.pre_process and keeps_vision_encoder(stage, frozen)
        if vlm.lora is not None:
            used = add_lora(self.backbone, vlm.lora, self.backend, groups.collection, stage.train.seed)
            self.lora_used["queries.lora"] = used
        if self.post_process:
            # As its queries: the same at every layout.
            torch.manual_seed(stage.train.seed)
            hidden, layers, config = stage.model.backbone.hidden_size, vlm.connector.num_layers, self.config
            if layers:
                config = connector_transformer_config(hidden, layers, stage.system, platform)
            self.query_connector = QueryConnector(
                vlm.connector,
                vlm.num_queries,
                vlm.latent_size(stage.model),
                config,
                self.backend,
                groups.alone(),
                groups.collection.cp,
            )
        if with_teacher and self.post_process:
            self._add_teacher()
        self.freeze_base()

    def _add_teacher(self) -> None:
        teacher = self.vlm.teacher
        if isinstance(teacher, SiglipTeacher):
            config = vision_transformer_config(teacher.encoder, self.stage.system, self.platform)
            self.base.siglip = SiglipVisionEncoder(teacher.encoder, config, self.backend, self.groups.alone())
        elif not self.stage.data.feature_cache and not self.has_own_teacher:
            self.base.vision_encoder = self.new_tower()

    def base_prefix(self, part: str) -> str:
        """A SigLIP checkpoint holds nothing but the tower."""
        return "" if part == "siglip" else super().base_prefix(part)

    def forward(self, batch: MMCoreBatch) -> Tensor:
        """The next stage's input, or on the last stage the sums of the loss terms, float32 ``[2]``."""
        rows = self.enter(batch) if self.pre_process else self.input_tensor  # [r, 1, H]
        output = self.student(rows, batch.context)  # [r, 1, H]; on the last stage [t, 1, H]
        if self.post_process:
            output = self._losses(output, batch)  # [2]
        return output if self.pre_process else with_zero_gradient(output, self.input_tensor)

    # -- last stage

    def _losses(self, rows_r1H: Tensor, batch: MMCoreBatch) -> Tensor:
        """Eq. 1 and the cross entropy, the sums over this rank's positions."""
        assert batch.words is not None
        assert batch.alignment is not None
        hidden, for_latents = self.states(rows_r1H)  # [T / context, H]
        llm = self.text_loss(hidden, batch.words)
        latents = self.visual_latents(for_latents, batch.queries)  # [q, D]
        if not batch.alignment.sizes:
            # The connector takes part with nothing, so that its gradients are there on every rank.
            nothing = self.query_connector(hidden[:1], batch.queries.index.new_zeros(1), self.vlm.num_queries)
            return losses.stack_terms(llm, nothing.sum() * 0.0)
        wanted = self._targets(batch.alignment)  # [Q, D]
        chosen = batch.alignment.learned
        rows = batch.queries.rows.index_select(0, chosen)
        vis = cosine_loss(latents.index_select(0, chosen), wanted.index_select(0, rows))
        return losses.stack_terms(llm, vis)

    def states(self, rows_r1H: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens of this context rank, ``[T / context, H]`` each: what words are read off, and visual
        latents."""
        hidden = self.backbone.gather(rows_r1H)[:, 0]
        return hidden, hidden

    def visual_latents(self, hidden_tH: Tensor, queries: Queries) -> Tensor:
        """F_θ(Q_i), ``[q, D]``, of this context rank's queries."""
        chosen = hidden_tH.index_select(0, queries.local_index)  # [q, H]
        return self.query_connector(chosen, queries.rows, len(queries.index))

    @torch.no_grad()
    def _targets(self, alignment: Alignment) -> Tensor:
        """v of eq. 1, ``[Q, D]``: the teacher's features, pooled to the queries' grid."""
        features = alignment.features
        if features is None:
            assert alignment.images is not None
            features = self._teacher(alignment.images)
        width = self.vlm.latent_size(self.stage.model)
        return pooled_to_grid(features[:, :width], alignment.sizes, self.vlm.grid)

    def _teacher(self, images: VisionInput | SiglipInput) -> Tensor:
        if isinstance(images, SiglipInput):
            return self.base.siglip(images)
        return self.vision_encoder(images) if self.has_own_teacher else self.base.vision_encoder(images)

    # -- beside a diffusion transformer, whole on one stage

    def condition(self, batch: QueryBatch) -> tuple[Tensor, Tensor]:
        """What the VLM says of a row: states of its tokens ``[T, H]``, and visual latents ``[Q, D]``, both whole on
        every rank."""
        rows = self.student(self.enter(batch), batch.context)
        hidden, for_latents = self.condition_states(rows)  # [T / context, H]
        latents = self.visual_latents(for_latents, batch.queries)  # [q, D]
        if batch.local_index is not None:
            hidden = self.whole(hidden, batch.local_index, len(batch.input_ids))
            latents = self.whole(latents, batch.queries.rows, len(batch.queries.index))
        return hidden, latents

    def condition_states(self, rows_r1H: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`states`, of what pictures are drawn from."""
        return self.states(rows_r1H)


def keeps_vision_encoder(stage: StageConfig, frozen: FrozenParts) -> bool:
    """Whether the student's vision encoder is the base's, and remains so: stages before this one may have changed
    it."""
    return frozen.vision_encoder and stage.after is None
