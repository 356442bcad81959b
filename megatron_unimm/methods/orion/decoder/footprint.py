"""What the image decoder's chunks ask of a rank; see ``methods/footprint.py``."""

from collections.abc import Hashable

from megatron_unimm.config.data import SampleKind
from megatron_unimm.config.methods import OrionDecoderConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.drawing import DrawingRow
from megatron_unimm.data.typical import LARGE_PHOTO, PHOTO, drawing_row, shares
from megatron_unimm.methods.drawing.flops import blocks_work, end_work, entry_works
from megatron_unimm.methods.footprint import ChunkFootprint, ChunkPlace, Flops, Traffic, exchanged
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.orion.decoder.flops import load_of, row_flops
from megatron_unimm.methods.orion.decoder.method import drawing_work, num_vectors, travelling_rows
from megatron_unimm.models.flops import Work, vision_work
from megatron_unimm.models.memory import (
    Kept,
    Spread,
    Streams,
    Weights,
    block_kinds,
    connector_weights,
    mmdit_block_kept,
    mmdit_entry_kept,
    mmdit_entry_weights,
    mmdit_exit_kept,
    mmdit_exit_weights,
    mmdit_weights,
    tower_pass,
    vae_pass,
    vae_weights,
    vision_weights,
)
from megatron_unimm.models.trainable import is_frozen


class DecoderFootprints:
    """See :class:`~megatron_unimm.methods.footprint.Footprints`."""

    def typical_row(
        self,
        stage: StageConfig,
        kinds: tuple[SampleKind, ...] | None = None,
        large: bool = False,
        pixels: bool = True,
    ) -> DrawingRow:
        work = drawing_work(stage, DataSetup({}, _no_chat))
        return drawing_row(shares(stage.data, kinds), work, LARGE_PHOTO if large else PHOTO, pixels)

    def row_flops(self, stage: StageConfig, row: DrawingRow) -> float:
        return row_flops(row, stage)

    def travelling_rows(self, stage: StageConfig) -> int:
        return travelling_rows(stage)

    def alike(self, stage: StageConfig, place: ChunkPlace) -> Hashable:
        assert stage.generator is not None
        return place.first, place.last, tuple(block_kinds(stage.generator.mmdit, place.layers).items())

    def chunk(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: DrawingRow) -> ChunkFootprint:
        return _Chunk(stage, spread, place, row).footprint()


def _no_chat() -> None:
    raise AssertionError("the decoder reads no text")


class _Chunk:
    """One chunk of one stage, and one row."""

    def __init__(self, stage: StageConfig, spread: Spread, place: ChunkPlace, row: DrawingRow) -> None:
        assert isinstance(stage.method, OrionDecoderConfig)
        assert stage.generator is not None
        assert stage.generator.vae is not None
        self.stage, self.method, self.spread, self.place, self.row = stage, stage.method, spread, place, row
        self.encoder, self.mmdit, self.vae = stage.model.vision_encoder, stage.generator.mmdit, stage.generator.vae
        self.load = load_of(row)
        rules = stage.train.trainable
        self.trains, self.connector_trains = not is_frozen("mmdit", rules), not is_frozen("connector", rules)
        self.has_gradient = self.trains or self.connector_trains
        self.sees = place.first and not stage.data.feature_cache
        self.at_an_end = place.first or place.last
        self.streams = Streams(row.num_text, self.load.num_image, num_vectors(stage) or len(row.pictures))
        self.picture_tokens = int(row.pictures.prod(axis=1).sum())
        self.pixels = self.picture_tokens * stage.generator.token_pixels**2

    def footprint(self) -> ChunkFootprint:
        tensor = self.spread.parallel.tensor
        mmdit = mmdit_weights(self.mmdit, self.spread.parallel, self.place.layers)
        connector = vae = companions = Weights()
        if self.place.first:
            mmdit = mmdit + mmdit_entry_weights(self.mmdit)
            connector = connector_weights(self.method.connector, self.encoder.out_size, self.mmdit)
            vae = vae_weights(self.vae)
        elif self.place.last and not self.stage.data.latent_cache:
            companions = companions + vae_weights(self.vae)
        if self.place.last:
            mmdit = mmdit + mmdit_exit_weights(self.mmdit, tensor)
        if self.sees:
            companions = companions + vision_weights(self.encoder, tensor)
        parts = ((mmdit, self.trains), (connector, self.connector_trains))
        forward, backward, again = self._flops()
        forward_traffic, backward_traffic = self._traffic()
        return ChunkFootprint(
            trained=sum((weights for weights, trains in parts if trains), Weights()),
            frozen=sum((weights for weights, trains in parts if not trains), vae + companions),
            companions=companions,
            kept=self._kept(),
            inputs=self._inputs(),
            largest_weight=12 * self.mmdit.hidden_size**2 // tensor if self.trains else 0,
            forward=forward,
            backward=backward,
            again=again,
            forward_traffic=forward_traffic,
            backward_traffic=backward_traffic,
        )

    def _kept(self) -> dict[str, Kept]:
        kept = {"layers": Kept(), "encoder": Kept(), "loss": Kept()} | self._messages()
        if self.has_gradient:
            for kind, count in block_kinds(self.mmdit, self.place.layers).items():
                kept["layers"] += mmdit_block_kept(self.mmdit, self.spread, self.streams, kind).times(count)
            if self.place.first:
                kept["layers"] += mmdit_entry_kept(self.mmdit, self.spread, self.streams)
                kept["layers"] += Kept(self._connector_kept())
            if self.place.last:
                kept["loss"] = mmdit_exit_kept(self.mmdit, self.spread, self.streams)
        if self.sees:
            kept["encoder"] += tower_pass(self.encoder, self.spread, float(self.row.grids.prod(axis=1).sum()))
        if self.at_an_end and not self.stage.data.latent_cache:
            kept["encoder"] += vae_pass(self.vae, self.pixels, self.spread.itemsize)
        return kept

    def _connector_kept(self) -> float:
        """Of every condition token: its input, both layers' outputs and normalised outputs, the activation."""
        inner = self.method.connector.hidden_size or self.mmdit.condition_size
        width = self.encoder.out_size + 3 * inner + self.mmdit.condition_size
        return float(self.row.num_condition.sum()) * width * self.spread.itemsize * self.connector_trains

    def _messages(self) -> dict[str, Kept]:
        """What came from the stage before, beyond the hidden states, which the first block keeps, and what went on."""
        width = self.mmdit.hidden_size * self.spread.itemsize
        rows = self.spread.between(travelling_rows(self.stage))
        mine = self.spread.between(self.row.num_tokens) if self.has_gradient else 0.0
        received = 0.0 if self.place.first else rows - mine
        return {"received": Kept(received * width), "sent": Kept(0.0 if self.place.last else rows * width)}

    def _inputs(self) -> float:
        """Angles and index arrays of the row; at the ends pixels (or latents) and noise; patches of the condition."""
        item = self.spread.itemsize
        angles = self.mmdit.head_size * 4 if self.mmdit.family == "flux" else 0
        # Which vector a token goes by, as numbers and as a matrix of ones; which tokens a segment has.
        tokens = self.spread.tokens(self.row.num_tokens)
        total = tokens * (angles + 2 * self.streams.vectors * item + 5 * 8)
        if self.at_an_end:
            latents = self.picture_tokens * self.mmdit.patch_dim
            given = latents if self.stage.data.latent_cache else 3 * self.pixels
            total += (given + latents) * item
        if self.sees:
            angles = self.encoder.hidden_size // self.encoder.num_heads
            total += float(self.row.grids.prod(axis=1).sum()) * ((self.encoder.patch_dim + angles) * item + 24)
        return total

    def _flops(self) -> tuple[Flops, Flops, Flops]:
        """Forward, backward, and of recompute. The VAE's convolutions are not counted."""
        blocks = blocks_work(self.mmdit, self.load, self.place.layers)
        works = [(blocks, (self.trains, self.has_gradient))]
        if self.place.first:
            works += entry_works(self.mmdit, self.load, self.trains, self.connector_trains)
        if self.place.last:
            works.append((end_work(self.mmdit, self.load), (self.trains, self.has_gradient)))
        if self.sees:
            tower = sum(vision_work(self.encoder, self.row.grids), Work(0.0))
            works.append((tower.times(self.spread.parallel.context), (False, False)))  # whole on every context rank
        forward = sum((Flops.forward(work) for work, _ in works), Flops())
        backward = sum((Flops.backward(work, *gradient) for work, gradient in works), Flops())
        return forward, backward, self._again(Flops.forward(blocks))

    def _again(self, blocks: Flops) -> Flops:
        recompute = self.spread.recompute
        if recompute.granularity == "full" and self.has_gradient:
            return blocks
        if recompute.granularity == "none" or not self.has_gradient:
            return Flops()
        # Of a block's 12 H² per token the MLP has 8.
        products = blocks.products * 8 / 12 if "mlp" in recompute.modules else 0.0
        return Flops(products, 0.0, blocks.attention if "core_attn" in recompute.modules else 0.0)

    def _traffic(self) -> tuple[Traffic, Traffic]:
        """As of ``methods/orion/footprint.py``; a single block gathers its input twice, for attention and MLP, and sums
        once. Keys and values are gathered from all context ranks, one for each head."""
        parallel, item = self.spread.parallel, self.spread.itemsize
        tokens = self.spread.tokens(self.row.num_tokens)
        one = exchanged(parallel.tensor) * tokens * self.mmdit.hidden_size * item
        ring = (parallel.context - 1) * tokens * 2 * self.mmdit.hidden_size / parallel.tensor * item
        forward, backward = Traffic(), Traffic()
        for kind, count in block_kinds(self.mmdit, self.place.layers).items():
            gathers, sums = (2, 2) if kind.joint else (2, 1)
            extra = gathers if parallel.sequence else 0
            forward += Traffic((gathers + sums) * one, ring).times(count)
            backward += Traffic((gathers + sums + extra) * one, ring).times(count)
        if not self.has_gradient:
            backward = Traffic()
        elif self.spread.recompute.granularity == "full":
            backward += forward
        return forward, backward
