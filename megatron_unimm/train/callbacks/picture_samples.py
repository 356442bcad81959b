"""Pictures in monitoring: what the model draws while it trains, always of the same prompts or pictures."""

import numpy as np

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.decode.build import build_decoder
from megatron_unimm.data.drawing import DrawingWork
from megatron_unimm.data.mix import Draw
from megatron_unimm.data.plan import BadSample, Laid
from megatron_unimm.data.sample import Turn
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.paint import Painter, PaintRequest
from megatron_unimm.generate.png import picture_grid
from megatron_unimm.generate.sampling import DecodeSettings
from megatron_unimm.train.callbacks.evaluator import load_painter
from megatron_unimm.train.callbacks.live import live_generator
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.optimizer import gathered_parameters


class PictureSamples:
    """Draws every ``train.logging.pictures_every_steps``, and after the last step; all ranks take part.

    A stage that trains an image decoder draws the first pictures of its sources again, each beside the true one. Other
    stages draw ``train.logging.picture_prompts``: by themselves, or a language model with the decoder
    ``train.logging.decoder``.
    """

    def __init__(self, stage: StageConfig) -> None:
        self.logging = stage.train.logging
        self.draws_itself = stage.method.trunk == "mmdit"
        self.draws_again = self.draws_itself and not stage.method.query_section
        self._painter: Painter | None = None
        self._generator: Generator | None = None
        self._truth: list[tuple[np.ndarray, PaintRequest]] = []

    def is_due(self, loop: Loop) -> bool:
        """Whether pictures of the step that has just ended are wanted."""
        every = self.logging.pictures_every_steps
        if every is None or not (
            self.draws_again or (self.logging.picture_prompts and (self.draws_itself or self.logging.decoder))
        ):
            return False
        return loop.step % every == 0 or loop.step == loop.total_steps

    def draw(self, loop: Loop) -> np.ndarray:
        """A grid of pictures, uint8 (H, W, 3)."""
        with gathered_parameters(loop.train_step.chunks):
            return self._draw_again(loop) if self.draws_again else self._draw_prompts(loop)

    def _draw_again(self, loop: Loop) -> np.ndarray:
        if self._painter is None:
            chunks = [wrapped.module for wrapped in loop.train_step.chunks]
            self._painter = Painter(chunks, loop.stage, loop.groups, loop.platform, origin=loop.stage.name)
            self._truth = _first_pictures(loop, self._painter, self.logging.num_pictures)
        drawn = self._painter.paint([request for _, request in self._truth])
        pairs = [picture for (truth, _), again in zip(self._truth, drawn, strict=True) for picture in (truth, again)]
        return picture_grid(pairs, ["true", "drawn"] * len(drawn), columns=8)

    def _draw_prompts(self, loop: Loop) -> np.ndarray:
        if self._generator is None:
            painter = None if self.draws_itself else load_painter(loop)
            self._generator = live_generator(loop, painter)
        prompts = self.logging.picture_prompts
        asked = [
            self._generator.prompt([Turn("user", (prompt,))], open_image=True, number=number)
            for number, prompt in enumerate(prompts)
        ]
        answers = self._generator.answer(asked, DecodeSettings(stop_after_image=True))
        pictures = [answer.images[0].pixels for answer in answers]
        return picture_grid([picture for picture in pictures if picture is not None], prompts, columns=8)


def _first_pictures(loop: Loop, painter: Painter, count: int) -> list[tuple[np.ndarray, PaintRequest]]:
    """The first pictures that the stage's sources have in turn, with what the decoder draws them from."""
    work = loop.loader.work
    assert isinstance(work, DrawingWork)
    found: list[Laid] = []
    for index in range(2 * count):
        for name, source in work.sources.items():
            laid = work.lay_out(Draw(name, index % len(source), 0))
            if not isinstance(laid, BadSample) and len(found) < count:
                found.append(laid)
    data = loop.stage.data
    with build_decoder("pillow", max_pixels=data.max_image_pixels, threads=0, device=None) as decoder:
        samples = [sample for sample, _ in work.load(found, decoder)]
        truths = decoder.pixels([work.picture_request(laid) for laid in found])
    tokens = painter.tokens_of(samples)
    return [
        (truth, PaintRequest(own, sample.grids[0], number, tuple(sources)))
        for number, (truth, sample, (own, *sources)) in enumerate(zip(truths, samples, tokens, strict=True))
        if isinstance(truth, np.ndarray)
    ]
