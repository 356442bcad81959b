"""Scores the model while it trains, with the suites that the recipe names."""

import logging
import time
from pathlib import Path

import torch.distributed as dist

from megatron_unimm.checkpoint.manifest import find_checkpoint
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.errors import ConfigError
from megatron_unimm.evaluate.suite import SuiteResult
from megatron_unimm.evaluate.suites import suite_of
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.paint import Painter
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.callbacks.live import live_generator
from megatron_unimm.train.json_lines import append_line, keep_lines
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.optimizer import gathered_parameters
from megatron_unimm.train.record import Record

logger = logging.getLogger(__name__)


class Evaluator(Callback):
    """Runs ``train.evaluation.suites`` on the live model every ``every_steps`` and after the last; all ranks take part.

    It runs at the first logging interval at or after its step, outside what the throughput counts, and adds its scores
    to that record as ``evaluation/<suite>/<score>``: put it before the callbacks that write records. Every evaluation
    is also a line of ``evaluation.jsonl``. The last one comes after the final checkpoint, so that nothing it meets can
    cost training.

    Args:
        folder: the stage's, for ``evaluation.jsonl``.

    Raises:
        ConfigError: an unknown suite, or a setting that decoding cannot switch off.
    """

    def __init__(self, stage: StageConfig, folder: Path) -> None:
        self.settings = stage.train.evaluation
        self.path = folder / "evaluation.jsonl"
        self.tensorboard = folder / "tensorboard" if stage.train.logging.tensorboard else None
        self.suites = [suite_of(name, "train.evaluation.suites") for name in self.settings.suites]
        data = Path(self.settings.data) if self.settings.data else None
        self.samples = {suite.name: suite.load(data, self.settings.num_samples) for suite in self.suites}
        self._done_at = 0
        self.painter: Painter | None = None
        apart = [suite.name for suite in self.suites if suite.of_tokenizers]
        if apart:
            what = f"{apart[0]} scores a tokenizer's checkpoint, not a training; take `unimm evaluate`"
            raise ConfigError("train.evaluation.suites", what)
        painting = [suite.name for suite in self.suites if suite.needs_pixels]
        self.draws_itself = stage.method.trunk == "mmdit"
        if painting and not (self.draws_itself or stage.train.logging.decoder):
            raise ConfigError(
                "train.evaluation.suites",
                f"{', '.join(painting)} judges pixels; give an image decoder's checkpoint as train.logging.decoder",
            )
        self._generator: Generator | None = None
        if self.suites and stage.system.overlap.tensor_parallel:
            raise ConfigError(
                "train.evaluation.suites",
                "given, but system.overlap.tensor_parallel is true, whose buffers have the length of a training row; "
                "leave one of them out (unimm evaluate scores checkpoints)",
            )

    def on_start(self, loop: Loop) -> None:
        self._done_at = loop.step
        if dist.get_rank() == 0:
            # After a resume, lines of steps that will be done again are dropped.
            keep_lines(self.path, lambda line: line["step"] <= loop.step)
        if self.settings.at_start and loop.step == 0:
            self._show(self._evaluate(loop), loop.step)

    def on_record(self, loop: Loop, record: Record) -> None:
        every = self.settings.every_steps
        is_due = every is not None and loop.step // every > self._done_at // every
        if is_due and loop.step < loop.total_steps:
            record.extra.update(self._evaluate(loop))

    def on_end(self, loop: Loop) -> None:
        # A signal leaves no time for it.
        if loop.step >= loop.total_steps > self._done_at:
            self._show(self._evaluate(loop), loop.step)

    def _show(self, scores: dict[str, float], step: int) -> None:
        """The last scores have no record to go with."""
        if self.tensorboard is None or dist.get_rank() != 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.tensorboard)) as writer:
            for name, score in scores.items():
                writer.add_scalar(name, score, step)

    def _evaluate(self, loop: Loop) -> dict[str, float]:
        self._done_at = loop.step
        scores: dict[str, float] = {}
        with gathered_parameters(loop.train_step.chunks):
            for suite in self.suites:
                started = time.perf_counter()
                result = suite.run(self._live(loop), self.samples[suite.name])
                scores |= {f"evaluation/{suite.name}/{name}": score for name, score in result.scores.items()}
                self._write(loop.step, suite.name, result, time.perf_counter() - started)
        return scores

    def _write(self, step: int, suite: str, result: SuiteResult, seconds: float) -> None:
        if dist.get_rank() != 0:
            return
        line = {
            "step": step,
            "suite": suite,
            "scores": result.scores,
            "counts": result.counts,
            "seconds": round(seconds, 3),
        }
        append_line(self.path, line)
        shown = "  ".join(f"{name} {score:.3f}" for name, score in result.scores.items())
        logger.info("step %d, %s: %s (%.1f s)", step, suite, shown, seconds)

    def _live(self, loop: Loop) -> Generator:
        if self._generator is None:
            if any(suite.needs_pixels for suite in self.suites) and not self.draws_itself:
                self.painter = load_painter(loop)
            self._generator = live_generator(loop, self.painter)
        return self._generator


def load_painter(loop: Loop) -> Painter:
    """The decoder that ``train.logging.decoder`` names, at the layout of the training."""
    directory = find_checkpoint(Path(loop.stage.train.logging.decoder))
    return Painter.load(directory, loop.groups, loop.platform, None if loop.platform.is_gpu else "float32")
