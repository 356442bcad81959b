"""What a vision encoder and a decoder ask of a rank, for the footprints of methods that train them; see
``methods/footprint.py``."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from megatron_unimm.config.lora import LoraConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace, Flops, Traffic, exchanged
from megatron_unimm.methods.vlm.layout import travelling_rows
from megatron_unimm.models.flops import Work, causal_pairs, decoder_work, logits_work, vision_work
from megatron_unimm.models.lora_shapes import AdaptedLinear, adapted_linears
from megatron_unimm.models.memory import (
    Kept,
    LayerShape,
    Spread,
    Weights,
    decoder_layer_weights,
    final_norm_kept,
    layer_kept,
    layer_pass,
    logits_kept,
    num_mixtures,
    tower_kept,
    tower_pass,
    vision_weights,
    vocabulary_weights,
)

LayerKind = tuple[bool, tuple[AdaptedLinear, ...]]
"""Whether a decoder layer has experts, and its adapters."""


def layer_kinds(stage: StageConfig, layers: range, lora: LoraConfig | None = None) -> Counter[LayerKind]:
    """How many of the decoder's layers (zero-based) are of each kind."""
    model = stage.model.backbone
    return Counter((bool(num_mixtures(model, range(n, n + 1))), adapted_linears(model, lora, n)) for n in layers)


@dataclass(frozen=True)
class VlmLoad:
    """What a row holds, as far as it costs."""

    tokens: int
    pairs: float
    num_text: int
    patches: int
    """Of all images that stand in the row."""
    read_patches: int
    read_grids: np.ndarray
    """int64 ``[N, 3]``: of images that are read."""
    from_cache: bool

    @classmethod
    def of(cls, row: PackedRow, stage: StageConfig) -> "VlmLoad":
        read = row.grids[~row.is_target]
        return cls(
            tokens=row.num_tokens,
            pairs=causal_pairs(row.segment_bounds),
            num_text=int((row.labels != IGNORED_LABEL).sum()),
            patches=int(row.grids.prod(axis=1).sum()),
            read_patches=int(read.prod(axis=1).sum()),
            read_grids=read,
            from_cache=bool(stage.data.feature_cache),
        )


@dataclass(frozen=True)
class Trained:
    """In which parts weights train."""

    tower: bool
    backbone: bool
    inputs: bool = False
    """What a method puts among the decoder's inputs."""
    adapters: bool = False

    @property
    def up_to_layers(self) -> bool:
        """Whether a gradient passes through the decoder's layers."""
        return self.tower or self.backbone or self.inputs or self.adapters


class VlmChunk:
    """One chunk of one stage, and one row, as far as all methods have it: the tower on the first chunk, layers, the
    text loss on the last. Methods override what they add to.

    Args:
        forward_passes: of the decoder for each row; those beyond the first are of a frozen copy.
    """

    def __init__(
        self,
        stage: StageConfig,
        spread: Spread,
        place: ChunkPlace,
        load: VlmLoad,
        trained: Trained,
        lora: LoraConfig | None = None,
        forward_passes: int = 1,
    ) -> None:
        self.stage, self.spread, self.place, self.load, self.trained = stage, spread, place, load, trained
        self.backbone, self.encoder = stage.model.backbone, stage.model.vision_encoder
        self.layers = layer_kinds(stage, place.layers, lora)
        self.forward_passes = forward_passes
        self.has_gradient = trained.up_to_layers
        # Positions are spread over context ranks, unevenly: a rank has two chunks of every sample, and may have in them
        # all that is learned.
        self.most_positions = min(1.0, 2 / spread.parallel.context)

    def footprint(self) -> ChunkFootprint:
        trained, frozen = Weights(), Weights()
        for weights, trains in self.parts():
            trained, frozen = (trained + weights, frozen) if trains else (trained, frozen + weights)
        companions = self.companions()
        forward, backward, again = self._flops()
        forward_traffic, backward_traffic = self._traffic()
        return ChunkFootprint(
            trained=trained,
            frozen=frozen + companions,
            companions=companions,
            kept=self._kept(),
            inputs=self.inputs(),
            largest_weight=max([0, *self.large_weights()]),
            forward=forward,
            backward=backward,
            again=again,
            forward_traffic=forward_traffic,
            backward_traffic=backward_traffic,
        )

    # -- weights

    def parts(self) -> list[tuple[Weights, bool]]:
        """The model's, each with whether it trains."""
        adapters = sum(
            each.weights(self.spread.parallel.tensor) * count
            for (_, adapted), count in self.layers.items()
            for each in adapted
        )
        return [
            (self.tower_weights() if self.place.first else Weights(), self.trained.tower),
            (self.backbone_weights(), self.trained.backbone),
            (Weights(adapters), self.trained.adapters),
        ]

    def companions(self) -> Weights:
        """Frozen copies beside the model."""
        return Weights()

    def tower_weights(self) -> Weights:
        return vision_weights(self.encoder, self.spread.parallel.tensor)

    def backbone_weights(self) -> Weights:
        parallel, place = self.spread.parallel, self.place
        layers = [
            decoder_layer_weights(self.backbone, parallel, experts).times(count)
            for (experts, _), count in self.layers.items()
        ]
        vocabulary = vocabulary_weights(self.backbone, parallel.tensor)
        # A tied output layer is a copy, unless the embedding is on the same chunk.
        copies = place.first + (place.last and not (place.first and self.backbone.tie_embeddings))
        norm = Weights(self.backbone.hidden_size * place.last)
        return sum(layers, vocabulary.times(copies) + norm)

    def large_weights(self) -> list[int]:
        """Numbers of the largest weights that train."""
        hidden, tensor = self.backbone.hidden_size, self.spread.parallel.tensor
        if not self.trained.backbone:
            return []
        ends = [vocabulary_weights(self.backbone, tensor).dense] * (self.place.first or self.place.last)
        return [2 * hidden * self.backbone.mlp_size // tensor, *ends]

    # -- activations

    def _kept(self) -> dict[str, Kept]:
        encoder = self.encoder_kept()
        if not self.load.from_cache:
            encoder += self.visual_tokens_kept()
        return {
            "layers": self._layers_kept(),
            "encoder": encoder,
            "loss": self.loss_kept() if self.place.last else Kept(),
            **self._messages(),
        }

    def _layers_kept(self) -> Kept:
        kept, shape = Kept(), LayerShape.of_backbone(self.backbone)
        if not self.has_gradient:
            for experts, _ in self.layers:
                kept += layer_pass(shape, self.spread, self.load.tokens, self.backbone.moe if experts else None)
            return kept
        if self.place.first:
            # The first layer's input is a part of what deepstack levels stand in, too.
            levels = len(self.encoder.deepstack_layers) * self.spread.between(self.load.tokens)
            kept += Kept(levels * self.backbone.hidden_size * self.spread.itemsize)
        for (experts, adapted), count in self.layers.items():
            moe = self.backbone.moe if experts else None
            layer = layer_kept(
                shape, self.spread, self.load.tokens, trains=self.trained.backbone, moe=moe, adapted=adapted
            )
            kept += layer.times(count)
        if self.place.last:
            kept += final_norm_kept(self.backbone, self.spread, self.load.tokens, self.trained.backbone)
        return kept

    def encoder_kept(self) -> Kept:
        """Of vision encoders."""
        if not self.place.first or self.load.from_cache:
            return Kept()
        if self.trained.tower:
            # A blank image takes part where none is read.
            patches = max(self.load.read_patches, self.encoder.spatial_merge_size**2)
            return tower_kept(self.encoder, self.spread, patches)
        return tower_pass(self.encoder, self.spread, self.load.patches)

    def visual_tokens_kept(self) -> Kept:
        """What is put among the words."""
        raise NotImplementedError

    def loss_kept(self) -> Kept:
        """On the last chunk."""
        raise NotImplementedError

    def sum_of_losses(self, parts: list[Kept]) -> Kept:
        """All that a loss needs while it is worked on is there until all are, and so is what they read: the last hidden
        states, of whole sequences."""
        width = self.backbone.hidden_size * self.spread.itemsize
        hidden = self.forward_passes * self.spread.tokens(self.load.tokens) * width
        return Kept(sum(part.bytes for part in parts), sum(part.again for part in parts) + hidden)

    def text_loss_kept(self) -> list[Kept]:
        """The cross entropy's."""
        text = self.load.num_text * self.most_positions
        return [logits_kept(self.backbone, self.spread, text)] if self.has_gradient and text else []

    def _messages(self) -> dict[str, Kept]:
        """What came from the stage before, beyond the hidden states that the first layer keeps; and what went to the
        next, which Megatron-Core's schedule holds until its gradient comes."""
        width = self.backbone.hidden_size * self.spread.itemsize
        rows = self.spread.between(travelling_rows(self.stage) * self.forward_passes)
        mine = self.spread.between(self.load.tokens) if self.has_gradient else 0.0
        received = 0.0 if self.place.first else rows - mine
        return {"received": Kept(received * width), "sent": Kept(0.0 if self.place.last else rows * width)}

    def inputs(self) -> float:
        """Token ids, angles and index arrays of the row; patches, angles and index arrays of images, or their
        features."""
        load, item = self.load, self.spread.itemsize
        row = load.tokens * 8 + self.spread.tokens(load.tokens) * (self.backbone.head_size * item + 24)
        if not load.from_cache:
            return row + self.patch_inputs(self.seen_patches())
        width = self.encoder.out_size * (1 + len(self.encoder.deepstack_layers))
        return row + self.cached_patches() / self.encoder.spatial_merge_size**2 * width * item

    def seen_patches(self) -> int:
        """Of images on this chunk, for the vision encoder."""
        return self.load.read_patches if self.place.first else 0

    def cached_patches(self) -> int:
        """Of images on this chunk whose features were computed beforehand."""
        return self.load.patches if self.place.first else 0

    def patch_inputs(self, patches: float) -> float:
        """Bytes of so many."""
        angles = self.encoder.hidden_size // self.encoder.num_heads
        return patches * ((self.encoder.patch_dim + angles) * self.spread.itemsize + 24)

    # -- FLOPs

    def _flops(self) -> tuple[Flops, Flops, Flops]:
        """Forward, backward, and of recompute."""
        forward, backward, again = self._decoder_flops()
        for work, trains, passes in self.other_works():
            forward += Flops.forward(work)
            backward += Flops.backward(work, trains, passes)
        return forward, backward, again

    def _decoder_flops(self) -> tuple[Flops, Flops, Flops]:
        share = self._expert_share()
        work = _layers_work(self.stage, self.place, self.load)
        once = Flops.forward(work, share)
        backward = Flops.backward(work, self.trained.backbone, self.has_gradient, share)
        again = _again(work, share, self.spread) if self.has_gradient else Flops()
        return sum([once] * (self.copies_run() - 1), once), backward, again

    def copies_run(self) -> int:
        """Forward passes of the decoder that this row needs."""
        return self.forward_passes

    def other_works(self) -> list[tuple[Work, bool, bool]]:
        """Everything but the decoder's layers: (work, weights train, gradient passes). Every context rank works on all
        images."""
        works = []
        if self.place.first and not self.load.from_cache:
            works += self.tower_works()
        if self.place.last:
            works.append((logits_work(self.backbone, self.load.num_text), self.trained.backbone, self.has_gradient))
        return works

    def tower_works(self) -> list[tuple[Work, bool, bool]]:
        """The vision encoder on images that are read."""
        ranks, trains = self.spread.parallel.context, self.trained.tower
        embedding, rest = vision_work(self.encoder, self.load.read_grids)
        return [(embedding.times(ranks), trains, False), (rest.times(ranks), trains, trains)]

    def _expert_share(self) -> float:
        """Of the chunk's products in decoder layers, those of routed experts: by weights of matrices that a token
        meets, over H."""
        model, moe = self.backbone, self.backbone.moe
        num_sparse = sum(count for (experts, _), count in self.layers.items() if experts)
        if moe is None or not num_sparse:
            return 0.0
        attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_size
        dense = (self.layers.total() - num_sparse) * (attention + 3 * model.mlp_size)
        routed = num_sparse * 3 * moe.expert_mlp_size * moe.top_k
        routers = (1 + len(moe.gates)) * moe.num_experts
        return routed / (routed + dense + num_sparse * (attention + routers + 3 * moe.shared_expert_size))

    # -- traffic

    def _traffic(self) -> tuple[Traffic, Traffic]:
        """Forward and backward, of the student; the forward passes of frozen copies are added to its own. What adapters
        exchange is r / H of it and left out."""
        once, backward = Traffic(), Traffic()
        for (experts, _), count in self.layers.items():
            sent, returned = _layer_traffic(self.stage, self.spread, self.load, experts)
            once += sent.times(count)
            backward += returned.times(count)
        if not self.has_gradient:
            backward = Traffic()
        elif self.spread.recompute.granularity == "full":
            backward += once
        return once.times(self.forward_passes) + self._tower_traffic(), backward

    def _tower_traffic(self) -> Traffic:
        """Two sums per layer of all patches, forward; backward as much again, which is counted here."""
        if not self.place.first or self.load.from_cache:
            return Traffic()
        patches = self.load.patches + (2 * self.load.read_patches if self.trained.tower else 0)
        per_layer = 4 * exchanged(self.spread.parallel.tensor) * patches * self.encoder.hidden_size
        return Traffic(tensor=per_layer * self.spread.itemsize * self.encoder.num_layers)


def _layers_work(stage: StageConfig, place: ChunkPlace, load: VlmLoad) -> Work:
    """Of the chunk's decoder layers."""
    return decoder_work(stage.model.backbone, load.tokens, load.pairs, place.layers)


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


def _layer_traffic(stage: StageConfig, spread: Spread, load: VlmLoad, experts: bool) -> tuple[Traffic, Traffic]:
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
