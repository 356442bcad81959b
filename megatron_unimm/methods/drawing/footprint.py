"""What a diffusion transformer that learns to draw asks of a rank, for the footprints of methods that train one; see
``methods/footprint.py``."""

from dataclasses import dataclass

from megatron_unimm.config.methods import RepresentationAlignmentConfig
from megatron_unimm.config.mmdit import DcAeConfig, MMDiT, SanaConfig, VaeConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.drawing.flops import MMDiTLoad, blocks_work, end_work, entry_works, mlp_share
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace, Flops, Traffic, exchanged
from megatron_unimm.models.flops import Work
from megatron_unimm.models.memory import (
    Kept,
    Spread,
    Streams,
    Weights,
    block_kinds,
    mmdit_block_kept,
    mmdit_entry_kept,
    mmdit_entry_weights,
    mmdit_exit_kept,
    mmdit_exit_weights,
    mmdit_weights,
    vae_pass,
    vae_weights,
)
from megatron_unimm.models.trainable import is_frozen


@dataclass(frozen=True)
class DrawingLoad:
    """What a row holds, as far as it costs."""

    mmdit: MMDiTLoad
    vectors: int
    """Conditioning vectors that are computed, n."""
    pictures: int
    """Image tokens of pictures, each once: U'."""
    drawn: int
    """Image tokens without padding, U."""
    travelling: int
    """Rows of hidden states between pipeline stages."""


class DrawingChunk:
    """One chunk of one stage, and one row, as far as all methods have it. Methods override what makes the condition, on
    the first chunk.

    Args:
        condition_trains: something does that makes the condition.
    """

    def __init__(
        self, stage: StageConfig, spread: Spread, place: ChunkPlace, load: DrawingLoad, condition_trains: bool
    ) -> None:
        assert stage.generator is not None
        assert stage.generator.vae is not None
        self.stage, self.spread, self.place, self.load = stage, spread, place, load
        self.space = stage.generator.vae
        self.mmdit = stage.generator.mmdit
        self.trains = not is_frozen("mmdit", stage.train.trainable)
        self.condition_trains = condition_trains
        self.has_gradient = self.trains or condition_trains
        self.at_an_end = place.first or place.last
        self.streams = Streams(load.mmdit.num_text, load.mmdit.num_image, load.vectors)
        self.pixels = load.pictures * stage.generator.token_pixels**2

    def footprint(self) -> ChunkFootprint:
        trained = frozen = Weights()
        for weights, trains in self.parts():
            trained, frozen = (trained + weights, frozen) if trains else (trained, frozen + weights)
        companions = self.companions()
        forward, backward, again = self.flops()
        forward_traffic, backward_traffic = self.traffic()
        return ChunkFootprint(
            trained=trained,
            frozen=frozen + companions,
            companions=companions,
            kept=self.kept(),
            inputs=self.inputs(),
            largest_weight=12 * self.mmdit.hidden_size**2 // self.spread.parallel.tensor if self.trains else 0,
            forward=forward,
            backward=backward,
            again=again,
            forward_traffic=forward_traffic,
            backward_traffic=backward_traffic,
        )

    # -- weights

    def parts(self) -> list[tuple[Weights, bool]]:
        """The model's, each with whether it trains."""
        mmdit = mmdit_weights(self.mmdit, self.spread.parallel, self.place.layers)
        mmdit += mmdit_entry_weights(self.mmdit) if self.place.first else Weights()
        mmdit += mmdit_exit_weights(self.mmdit, self.spread.parallel.tensor) if self.place.last else Weights()
        return [(mmdit, self.trains), *([(self.autoencoder_weights(), False)] if self.place.first else [])]

    def companions(self) -> Weights:
        """Frozen ones beside the model."""
        has_own_vae = self.place.last and not self.place.first and not self.stage.data.latent_cache
        return self.autoencoder_weights() if has_own_vae else Weights()

    def autoencoder_weights(self) -> Weights:
        """Between pictures and latents."""
        assert isinstance(self.space, VaeConfig | DcAeConfig)
        return vae_weights(self.space)

    # -- activations

    def kept(self) -> dict[str, Kept]:
        kept = {"layers": Kept(), "encoder": Kept(), "loss": Kept()} | self._messages()
        if self.has_gradient:
            for kind, count in block_kinds(self.mmdit, self.place.layers).items():
                kept["layers"] += mmdit_block_kept(self.mmdit, self.spread, self.streams, kind).times(count)
            if self.place.first:
                kept["layers"] += mmdit_entry_kept(self.mmdit, self.spread, self.streams)
            if self.place.last:
                kept["loss"] = mmdit_exit_kept(self.mmdit, self.spread, self.streams)
        if self.at_an_end and not self.stage.data.latent_cache:
            kept["encoder"] += self.autoencoder_pass()
        return kept

    def autoencoder_pass(self) -> Kept:
        """All pictures to latents."""
        assert isinstance(self.space, VaeConfig | DcAeConfig)
        return vae_pass(self.space, self.pixels, self.spread.itemsize)

    def _messages(self) -> dict[str, Kept]:
        """What came from the stage before, beyond the hidden states, which the first block keeps, and what went on."""
        width = self.mmdit.hidden_size * self.spread.itemsize
        rows = self.spread.between(self.load.travelling)
        mine = self.spread.between(self.streams.tokens) if self.has_gradient else 0.0
        received = 0.0 if self.place.first else rows - mine
        return {"received": Kept(received * width), "sent": Kept(0.0 if self.place.last else rows * width)}

    def inputs(self) -> float:
        """Angles and index arrays of the row; at the ends pixels (or latents) and noise."""
        item = self.spread.itemsize
        angles = self.mmdit.head_size * 4 if self.mmdit.family == "flux" else 0
        # Which vector a token goes by, as numbers and as a matrix of ones; which tokens a segment has.
        tokens = self.spread.tokens(self.streams.tokens)
        total = tokens * (angles + 2 * self.streams.vectors * item + 5 * 8)
        if self.at_an_end:
            width = self.mmdit.patch_dim
            given = self.load.pictures * width if self.stage.data.latent_cache else 3 * self.pixels
            total += (given + self.load.drawn * width) * item
        return total

    # -- FLOPs

    def flops(self) -> tuple[Flops, Flops, Flops]:
        """Forward, backward, and of recompute. The VAE's convolutions are not counted."""
        mmdit = self.load.mmdit
        blocks = blocks_work(self.mmdit, mmdit, self.place.layers)
        works = [(blocks, (self.trains, self.has_gradient)), *self.other_works()]
        if self.place.first:
            works += entry_works(self.mmdit, mmdit, self.trains, self.condition_trains)
        if self.place.last:
            works.append((end_work(self.mmdit, mmdit), (self.trains, self.has_gradient)))
        forward = sum((Flops.forward(work) for work, _ in works), Flops())
        backward = sum((Flops.backward(work, *gradient) for work, gradient in works), Flops())
        return forward, backward, self._again(Flops.forward(blocks))

    def other_works(self) -> list[tuple[Work, tuple[bool, bool]]]:
        """Beside the diffusion transformer's, each with (its weights train, a gradient passes through)."""
        return []

    def _again(self, blocks: Flops) -> Flops:
        recompute = self.spread.recompute
        if recompute.granularity == "full" and self.has_gradient:
            return blocks
        if recompute.granularity == "none" or not self.has_gradient:
            return Flops()
        products = blocks.products * mlp_share(self.mmdit) if "mlp" in recompute.modules else 0.0
        return Flops(products, 0.0, blocks.attention if "core_attn" in recompute.modules else 0.0)

    # -- traffic

    def traffic(self) -> tuple[Traffic, Traffic]:
        """As of ``methods/vlm/footprint.py``; a single block gathers its input twice, for attention and MLP, and sums
        once. Keys and values are gathered from all context ranks, one for each head. SANA gathers its image three times
        and its text once, and sums the image three times."""
        parallel, item = self.spread.parallel, self.spread.itemsize
        tokens = self.spread.tokens(self.streams.tokens)
        one = exchanged(parallel.tensor) * tokens * self.mmdit.hidden_size * item
        ring = (parallel.context - 1) * tokens * 2 * self.mmdit.hidden_size / parallel.tensor * item
        forward, backward = Traffic(), Traffic()
        for kind, count in block_kinds(self.mmdit, self.place.layers).items():
            gathers, sums = (2.0, 2.0) if kind.joint else (2.0, 1.0)
            if isinstance(self.mmdit, SanaConfig):
                share = self.streams.image / self.streams.tokens
                gathers, sums = 1 + 2 * share, 3 * share
            extra = gathers if parallel.sequence else 0
            forward += Traffic((gathers + sums) * one, ring).times(count)
            backward += Traffic((gathers + sums + extra) * one, ring).times(count)
        if not self.has_gradient:
            backward = Traffic()
        elif self.spread.recompute.granularity == "full":
            backward += forward
        return forward, backward


def projector_weights(mmdit: MMDiT, alignment: RepresentationAlignmentConfig, width: int) -> Weights:
    """Of an alignment loss: three linear layers, to features of ``width``."""
    inner = alignment.projector_size
    return Weights((mmdit.hidden_size + 1) * inner + (inner + 1) * inner + (inner + 1) * width)


def alignment_kept(
    mmdit: MMDiT, alignment: RepresentationAlignmentConfig, width: int, spread: Spread, tokens: float
) -> Kept:
    """The projector's input and both hidden layers before and after the activation; both sides of the cosine in fp32,
    normalised.

    Args:
        tokens: image tokens that are aligned, over all context ranks.
    """
    numbers = mmdit.hidden_size + 4 * alignment.projector_size
    return Kept(tokens / spread.parallel.context * (numbers * spread.itemsize + 2 * 4 * width))


def aligns_here(alignment: RepresentationAlignmentConfig | None, place: ChunkPlace) -> bool:
    """Whether a chunk has the layer after which hidden states are aligned."""
    return alignment is not None and alignment.layer - 1 in place.layers
