"""What ORION's chunks ask of a rank; see ``methods/footprint.py``."""

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.methods import OrionConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow
from megatron_unimm.data.typical import LARGE_PHOTO, PHOTO, conversation_row, shares
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace, Flops, Traffic, exchanged
from megatron_unimm.methods.orion.flops import frozen_parts, row_flops, vision_head_work
from megatron_unimm.methods.orion.method import travelling_rows
from megatron_unimm.methods.vlm.layout import alignment
from megatron_unimm.models.flops import Work, causal_pairs, decoder_work, logits_work, vision_work
from megatron_unimm.models.memory import (
    Kept,
    LayerShape,
    Spread,
    Weights,
    decoder_layer_weights,
    final_norm_kept,
    kl_kept,
    layer_kept,
    logits_kept,
    num_mixtures,
    tower_kept,
    tower_pass,
    vision_head_kept,
    vision_head_weights,
    vision_weights,
    vocabulary_weights,
)


@dataclass(frozen=True)
class Load:
    """What a row holds, as far as it costs."""

    tokens: int
    pairs: float
    num_text: int
    num_vision: int
    patches: int
    """Of all images."""
    read_patches: int
    grids: np.ndarray
    is_target: np.ndarray
    from_cache: bool

    @classmethod
    def of(cls, row: PackedRow, stage: StageConfig) -> "Load":
        assert isinstance(stage.method, OrionConfig)
        sizes = row.grids.prod(axis=1)
        learns_text = bool(stage.method.loss_weights.cross_entropy)
        return cls(
            tokens=len(row.input_ids),
            pairs=causal_pairs(row.segment_bounds),
            num_text=int((row.labels != IGNORED_LABEL).sum()) if learns_text else 0,
            num_vision=len(row.predict_index),
            patches=int(sizes.sum()),
            read_patches=int(sizes[~row.is_target].sum()),
            grids=row.grids,
            is_target=row.is_target,
            from_cache=bool(stage.data.feature_cache),
        )


class OrionFootprints:
    """See :class:`~megatron_unimm.methods.footprint.Footprints`."""

    def typical_row(
        self,
        stage: StageConfig,
        kinds: tuple[SampleKind, ...] | None = None,
        large: bool = False,
        pixels: bool = True,
    ) -> PackedRow:
        photo = LARGE_PHOTO if large else PHOTO
        return conversation_row(shares(stage.data, kinds), stage.model, stage.data, alignment(stage), photo, pixels)

    def row_flops(self, stage: StageConfig, row: PackedRow) -> float:
        return row_flops(row, stage, frozen_parts(stage))

    def travelling_rows(self, stage: StageConfig) -> int:
        return travelling_rows(stage)

    def alike(self, stage: StageConfig, place: ChunkPlace) -> Hashable:
        mixtures = num_mixtures(stage.model.backbone, place.layers)
        return place.first, place.last, len(place.layers), mixtures

    def chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: PackedRow) -> ChunkFootprint:
        return _Chunk(stage, spread, place, Load.of(row, stage)).footprint()


class _Chunk:
    """One chunk of one stage, and one row."""

    def __init__(self, stage: StageConfig, spread: Spread, place: ChunkPlace, load: Load) -> None:
        assert isinstance(stage.method, OrionConfig)
        self.stage, self.method, self.spread, self.place, self.load = stage, stage.method, spread, place, load
        self.backbone, self.encoder = stage.model.backbone, stage.model.vision_encoder
        frozen = frozen_parts(stage)
        self.tower_trains, self.backbone_trains = "vision_encoder" not in frozen, "backbone" not in frozen
        self.head_trains = "vision_head" not in frozen
        self.has_gradient = self.tower_trains or self.backbone_trains
        self.has_teacher = self.method.loss_weights.kl > 0
        # Layers of each kind, with experts and without.
        mixtures = num_mixtures(self.backbone, place.layers)
        self.layers = [(True, mixtures), (False, len(place.layers) - mixtures)]
        # Where the last stage is not the first it makes its targets itself, with a tower of its own.
        self.second_tower = place.last and not place.first and not stage.data.feature_cache
        self.target_tower = self.second_tower or (place.first and self.tower_trains)

    def footprint(self) -> ChunkFootprint:
        trained, frozen = Weights(), Weights()
        for weights, trains in (
            (self._tower_weights(), self.tower_trains),
            (self._backbone_weights(), self.backbone_trains),
            (self._head_weights(), self.head_trains),
        ):
            trained, frozen = (trained + weights, frozen) if trains else (trained, frozen + weights)
        companions = self._backbone_weights() if self.has_teacher else Weights()
        if self.target_tower:
            companions = companions + vision_weights(self.encoder, self.spread.parallel.tensor)
        forward, backward, again = self._flops()
        forward_traffic, backward_traffic = self._traffic()
        return ChunkFootprint(
            trained=trained,
            frozen=frozen + companions,
            companions=companions,
            kept=self._kept(),
            inputs=self._inputs(),
            largest_weight=self._largest_weight(),
            forward=forward,
            backward=backward,
            again=again,
            forward_traffic=forward_traffic,
            backward_traffic=backward_traffic,
        )

    # -- weights

    def _tower_weights(self) -> Weights:
        return vision_weights(self.encoder, self.spread.parallel.tensor) if self.place.first else Weights()

    def _head_weights(self) -> Weights:
        if not self.place.last:
            return Weights()
        return vision_head_weights(self.method.vision_head, self.backbone.hidden_size, self.spread.parallel.tensor)

    def _backbone_weights(self) -> Weights:
        parallel, place = self.spread.parallel, self.place
        layers = [
            decoder_layer_weights(self.backbone, parallel, experts).times(count)
            for experts, count in self.layers
            if count
        ]
        vocabulary = vocabulary_weights(self.backbone, parallel.tensor)
        # A tied output layer is a copy, unless the embedding is on the same chunk.
        copies = place.first + (place.last and not (place.first and self.backbone.tie_embeddings))
        norm = Weights(self.backbone.hidden_size * place.last)
        return sum(layers, vocabulary.times(copies) + norm)

    def _largest_weight(self) -> int:
        hidden, tensor = self.backbone.hidden_size, self.spread.parallel.tensor
        sizes = [0]
        if self.backbone_trains:
            sizes.append(2 * hidden * self.backbone.mlp_size // tensor)
            if self.place.first or self.place.last:
                sizes.append(vocabulary_weights(self.backbone, tensor).dense)
        if self.head_trains and self.place.last:
            sizes.append(self._head_weights().dense // 2)
        return max(sizes)

    # -- activations

    def _kept(self) -> dict[str, Kept]:
        kept = {"layers": Kept(), "encoder": Kept(), "loss": Kept()} | self._messages()
        if self.has_gradient:
            if self.place.first:
                # The first layer's input is a part of what deepstack levels stand in, too.
                levels = len(self.encoder.deepstack_layers) * self.spread.between(self.load.tokens)
                kept["layers"] += Kept(levels * self.backbone.hidden_size * self.spread.itemsize)
            shape = LayerShape.of_backbone(self.backbone)
            for experts, count in self.layers:
                moe = self.backbone.moe if experts else None
                layer = layer_kept(shape, self.spread, self.load.tokens, trains=self.backbone_trains, moe=moe)
                kept["layers"] += layer.times(count)
            if self.place.last:
                kept["layers"] += final_norm_kept(self.backbone, self.spread, self.load.tokens, self.backbone_trains)
        if not self.load.from_cache:
            kept["encoder"] = self._encoder_kept() + self._visual_tokens_kept()
        if self.place.last:
            kept["loss"] = self._loss_kept()
        return kept

    def _encoder_kept(self) -> Kept:
        kept = Kept()
        if self.place.first and self.tower_trains:
            kept += tower_kept(
                self.encoder, self.spread, max(self.load.read_patches, self.encoder.spatial_merge_size**2)
            )
            kept += tower_pass(self.encoder, self.spread, self.load.patches if self.load.num_vision else 0)
        elif self.place.first:
            kept += tower_pass(self.encoder, self.spread, self.load.patches)
        if self.second_tower:
            kept += tower_pass(self.encoder, self.spread, self.load.patches - self.load.read_patches)
        return kept

    def _visual_tokens_kept(self) -> Kept:
        """Those that were put among the words, and those that were read among those that are to be generated."""
        if not (self.place.first and self.has_gradient):
            return Kept()
        units, levels = self.encoder.spatial_merge_size**2, len(self.encoder.deepstack_layers)
        tokens = self.load.patches / units + (1 + levels) * self.tower_trains * self.load.read_patches / units
        return Kept(tokens * self.backbone.hidden_size * self.spread.itemsize)

    def _loss_kept(self) -> Kept:
        """Positions are spread over context ranks, unevenly: a rank has two chunks of every sample, and may have in
        them all that is learned."""
        share = min(1.0, 2 / self.spread.parallel.context)
        text, vision = self.load.num_text * share, self.load.num_vision * share
        parts = []
        if self.head_trains or self.has_gradient:
            head = self.method.vision_head
            parts.append(vision_head_kept(head, self.backbone.hidden_size, self.spread, max(vision, 1)))
        if self.has_gradient and text:
            parts.append(logits_kept(self.backbone, self.spread, text))
        if self.has_gradient and self.has_teacher and vision:
            parts.append(kl_kept(self.backbone, self.spread, vision))
        # All that a loss needs while it is worked out is there until all are, and so is what they read: the last
        # hidden states of student and teacher, of whole sequences.
        models = 1 + self.has_teacher
        hidden = models * self.spread.tokens(self.load.tokens) * self.backbone.hidden_size * self.spread.itemsize
        return Kept(sum(part.bytes for part in parts), sum(part.again for part in parts) + hidden)

    def _messages(self) -> dict[str, Kept]:
        """What came from the stage before, beyond the student's hidden states, which the first layer keeps; and what
        went to the next, which Megatron-Core's schedule holds until its gradient comes."""
        width = self.backbone.hidden_size * self.spread.itemsize
        rows = self.spread.between(travelling_rows(self.stage))
        mine = self.spread.between(self.load.tokens) if self.has_gradient else 0.0
        received = 0.0 if self.place.first else rows - mine
        return {"received": Kept(received * width), "sent": Kept(0.0 if self.place.last else rows * width)}

    def _inputs(self) -> float:
        """Token ids, angles and index arrays of the row; patches, angles and index arrays of images."""
        item, load = self.spread.itemsize, self.load
        row = load.tokens * 8 + self.spread.tokens(load.tokens) * (self.backbone.head_size * item + 24)
        if load.from_cache:
            return row
        patches = 0
        if self.place.first:
            seen = load.patches if load.num_vision or not self.tower_trains else 0
            patches = seen + (load.read_patches if self.tower_trains else 0)
        elif self.place.last:
            patches = load.patches - load.read_patches
        angles = self.encoder.hidden_size // self.encoder.num_heads
        return row + patches * ((self.encoder.patch_dim + angles) * item + 24)

    # -- FLOPs

    def _flops(self) -> tuple[Flops, Flops, Flops]:
        """Forward, backward, and of recompute."""
        forward, backward, again = self._decoder_flops()
        for work, trains, passes in self._other_works():
            forward += Flops.forward(work)
            backward += Flops.backward(work, trains, passes)
        return forward, backward, again

    def _decoder_flops(self) -> tuple[Flops, Flops, Flops]:
        share = self._expert_share()
        work = _layers_work(self.stage, self.place, self.load)
        forward = Flops.forward(work, share)
        backward = Flops.backward(work, self.backbone_trains, self.has_gradient, share)
        again = _again(work, share, self.spread) if self.has_gradient else Flops()
        if self.has_teacher and (self.load.num_vision or self.spread.parallel.expert > 1):
            forward += forward
        return forward, backward, again

    def _other_works(self) -> list[tuple[Work, bool, bool]]:
        """Everything but the decoder's layers: (work, weights train, gradient passes). Every context rank works on all
        images."""
        load, works = self.load, []
        none, ranks = Work(0.0), self.spread.parallel.context
        if self.place.first and not load.from_cache:
            embedding, rest = vision_work(self.encoder, load.grids[~load.is_target])
            if self.tower_trains:
                works += [(embedding.times(ranks), True, False), (rest.times(ranks), True, True)]
            if not self.tower_trains or load.num_vision:
                works.append((sum(vision_work(self.encoder, load.grids), none).times(ranks), False, False))
        if self.second_tower and load.num_vision:
            targets = sum(vision_work(self.encoder, load.grids[load.is_target]), none)
            works.append((targets.times(ranks), False, False))
        if self.place.last:
            gradient = (self.backbone_trains, self.has_gradient)
            works.append((logits_work(self.backbone, load.num_text), *gradient))
            if self.has_teacher and load.num_vision:
                works.append((logits_work(self.backbone, load.num_vision), *gradient))
                works.append((logits_work(self.backbone, load.num_vision), False, False))
            head = vision_head_work(self.method.vision_head, self.backbone.hidden_size, load.num_vision)
            works += [(work, self.head_trains, self._passes(inner)) for work, inner in head]
        return works

    def _passes(self, inner: bool) -> bool:
        """Whether a product of the head gets a gradient for its input."""
        return self.has_gradient or (inner and self.head_trains)

    def _expert_share(self) -> float:
        """Of the decoder's products, those of routed experts: by weights of matrices that a token meets, over H."""
        model, moe = self.backbone, self.backbone.moe
        if moe is None:
            return 0.0
        routed = 3 * moe.expert_mlp_size * moe.top_k
        attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_size
        return routed / (routed + attention + moe.num_experts + 3 * moe.shared_expert_size)

    # -- traffic

    def _traffic(self) -> tuple[Traffic, Traffic]:
        """Forward and backward, of the student; the teacher's forward is added to the student's."""
        forward, backward = Traffic(), Traffic()
        for experts, count in self.layers:
            if count:
                sent, returned = _layer_traffic(self.stage, self.spread, self.load, experts)
                forward += sent.times(count)
                backward += returned.times(count)
        if self.has_teacher:
            forward = forward.times(2)
        if not self.has_gradient:
            backward = Traffic()
        elif self.spread.recompute.granularity == "full":
            backward += forward.times(0.5 if self.has_teacher else 1.0)
        return forward + self._tower_traffic(), backward

    def _tower_traffic(self) -> Traffic:
        """Two sums per layer of all patches, forward; backward as much again, which is counted here."""
        if not self.place.first or self.load.from_cache:
            return Traffic()
        patches = self.load.patches + (2 * self.load.read_patches if self.tower_trains else 0)
        per_layer = 4 * exchanged(self.spread.parallel.tensor) * patches * self.encoder.hidden_size
        return Traffic(tensor=per_layer * self.spread.itemsize * self.encoder.num_layers)


def _layers_work(stage: StageConfig, place: ChunkPlace, load: Load) -> Work:
    """Of the chunk's decoder layers."""
    if not place.layers:
        return Work(0.0)
    part = stage.model.backbone.model_copy(update={"num_layers": len(place.layers)})
    return decoder_work(part, load.tokens, load.pairs)


def _again(work: Work, expert_share: float, spread: Spread) -> Flops:
    """What recompute adds: the whole forward pass of the layers, or attention, or the modules that are named."""
    recompute, forward = spread.recompute, Flops.forward(work, expert_share)
    if recompute.granularity == "full":
        return forward
    if recompute.granularity == "none":
        return Flops()
    attention = forward.attention if "core_attn" in recompute.modules else 0.0
    experts = forward.experts if "moe" in recompute.modules else 0.0
    # The MLP is about three quarters of a dense layer's products.
    products = 0.75 * forward.products if "mlp" in recompute.modules and not expert_share else 0.0
    return Flops(products, experts, attention)


def _layer_traffic(stage: StageConfig, spread: Spread, load: Load, experts: bool) -> tuple[Traffic, Traffic]:
    """Bytes that a rank sends for one decoder layer, forward and backward.

    Tensor: attention and a dense MLP each gather (g) and sum (r) t H once in the forward pass, and the other way round
    in the backward pass; under sequence parallelism gathers bring the inputs back once more for the weights' gradients
    (3 g or r for each). A sum of whole tensors is r and g. Experts have no such exchange.
    Context: keys and values go round the ring once, in the backward pass with their gradients.
    Expert: every token goes to its k experts and comes back, in either pass.
    """
    parallel, model, item = spread.parallel, stage.model.backbone, spread.itemsize
    tokens, hidden = spread.tokens(load.tokens), model.hidden_size
    one = exchanged(parallel.tensor) * tokens * hidden * item
    blocks = 1 if experts else 2
    forward, backward = 2 * blocks * one, (3 if parallel.sequence else 2) * blocks * one
    keys = 2 * max(1.0, model.num_kv_heads / parallel.tensor) * model.head_size
    ring = (parallel.context - 1) * tokens * keys * item
    routed = 0.0
    if experts:
        assert model.moe is not None
        sent = spread.between(load.tokens) * model.moe.top_k * hidden * item
        routed = 2 * exchanged(parallel.expert) * sent
    return Traffic(forward, ring, routed), Traffic(backward, 2 * ring, routed)
