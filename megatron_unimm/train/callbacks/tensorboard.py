"""TensorBoard: every record as scalars, and as text the config, what trains, and samples.

The x axis is the stage's optimizer steps.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_unimm.config.load import dump
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.loader import StepBatch
from megatron_unimm.generate.png import picture_grid
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.callbacks.markdown import code_block
from megatron_unimm.train.callbacks.picture_samples import PictureSamples
from megatron_unimm.train.callbacks.routing_maps import RoutingMaps
from megatron_unimm.train.callbacks.text_samples import TextSamples
from megatron_unimm.train.goodput import Ledger
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.record import Record
from megatron_unimm.train.setup import describe_trainable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Callback):
    """Writes event files, on rank 0. After a resume, points of steps that will be done again are dropped.

    Args:
        folder: where the event files go; ``tensorboard --logdir`` takes it or a folder above it.
    """

    def __init__(self, stage: StageConfig, folder: Path) -> None:
        self.stage = stage
        self.folder = folder
        self._writer: SummaryWriter | None = None
        shows_text = stage.method.trunk == "backbone"
        self._samples = TextSamples(stage.train.logging.text_every_steps) if shows_text else None
        self._routing = RoutingMaps(stage.train.logging.text_every_steps) if stage.routing is not None else None
        self._pictures = PictureSamples(stage)
        self._requested = requested_shares(stage)

    def on_start(self, loop: Loop) -> None:
        if self._samples is not None:
            self._samples.start(loop)
        if self._routing is not None:
            self._routing.start(loop)
        if dist.get_rank() != 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        # The reader forgets what earlier files say of steps from here on.
        self._writer = SummaryWriter(str(self.folder), purge_step=loop.step + 1)
        modules = [chunk.module for chunk in loop.train_step.chunks]
        self._writer.add_text("config", code_block(dump(self.stage)), loop.step)
        self._writer.add_text(
            "trainable", f"{rule_table(self.stage)}\n\n{code_block(describe_trainable(modules))}", loop.step
        )
        self._writer.flush()

    def on_step(self, loop: Loop, batch: StepBatch) -> None:
        text = self._samples.after_step(loop, batch) if self._samples is not None else None
        if self._writer is not None and text is not None:
            self._writer.add_text("samples", text, loop.step)
        routing = self._routing.after_step(loop) if self._routing is not None else None
        if self._writer is not None and routing is not None:
            self._writer.add_image("routing", routing, loop.step, dataformats="HWC")
        if self._pictures.is_due(loop):
            grid = self._pictures.draw(loop)
            if self._writer is not None:
                self._writer.add_image("pictures", grid, loop.step, dataformats="HWC")

    def on_record(self, loop: Loop, record: Record) -> None:
        if self._writer is None:
            return
        if loop.rollouts is not None and loop.rollouts.figures.pictures:
            captions, pictures = zip(*loop.rollouts.figures.pictures, strict=True)
            grid = picture_grid(list(pictures), list(captions), columns=8)
            self._writer.add_image("rollout", grid, record.step, dataformats="HWC")
        for tag, value in scalars(record, self._requested, self.stage.train.logging.per_module_grad_norm).items():
            self._writer.add_scalar(tag, value, record.step)
        # A record is rare enough to be on disk at once; a job that is killed leaves all of them.
        self._writer.flush()

    def on_end(self, loop: Loop) -> None:
        if self._writer is not None:
            self._writer.close()


def scalars(record: Record, requested: Mapping[str, float], per_module: bool = True) -> dict[str, float]:
    """A record as TensorBoard's tags and values.

    Args:
        requested: share of each source in the mix, from the config.
        per_module: whether to show gradient norms by module.
    """
    values = {f"loss/{name}": value for name, value in record.losses.items()}
    values |= {f"loss_weighted/{name}": value for name, value in record.weighted.items()}
    values["loss_weighted/total"] = record.total_loss
    values |= {f"learning_rate/{name}": value for name, value in record.learning_rates.items()}
    values["gradient_norm/all"] = record.gradient_norm
    if per_module:
        values |= {f"gradient_norm/{name}": value for name, value in record.module_norms.items()}
    values["skipped_steps/all"] = record.skipped_steps
    values["skipped_steps/since_last_record"] = record.skipped_now
    values |= {
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/images_per_second": record.images_per_second,
        "speed/samples_per_second": record.samples_per_second,
        "speed/step_seconds": record.step_seconds,
        "speed/model_tflops_per_device": record.model_tflops,
    }
    if record.mfu is not None:
        values["speed/mfu"] = record.mfu
    values |= {f"time/{phase}": seconds for phase, seconds in record.times.items()}
    if record.straggler is not None:
        values |= {"straggler/ratio": record.straggler.ratio, "straggler/rank": record.straggler.rank}
    if record.ledger:
        values["goodput/share"] = Ledger(**record.ledger).share
        values |= {f"goodput/{name}": record.ledger[name] for name in ("restarts", "lost_steps")}
    values["memory/peak_gib"] = record.memory_bytes / 2**30
    return values | _data_scalars(record, requested) | record.extra


def _data_scalars(record: Record, requested: Mapping[str, float]) -> dict[str, float]:
    values = {"data/padding_share": record.padding_share, "data/faults/all": float(sum(record.faults.values()))}
    values |= {f"data/faults/{kind.replace(' ', '_')}": float(count) for kind, count in record.faults.items()}
    drawn = sum(record.draws.values())
    if drawn:
        values |= {f"data/share/{source}": count / drawn for source, count in record.draws.items()}
    return values | {f"data/share_requested/{source}": share for source, share in requested.items()}


def requested_shares(stage: StageConfig) -> dict[str, float]:
    """Share of each source in the draws that the config asks for."""
    weights = {name: source.weight for name, source in stage.data.sources.items() if source.weight > 0}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def rule_table(stage: StageConfig) -> str:
    """What trains, as the stage's config states it: a Markdown table, first match wins."""
    rate = stage.train.schedule.max_learning_rate
    lines = ["| pattern (first match wins) | highest learning rate |", "|---|---|"]
    for rule in stage.train.trainable:
        lines.append(
            f"| `{rule.pattern}` | {f'{rate * rule.learning_rate_multiplier:g}' if rule.train else 'frozen'} |"
        )
    return "\n".join(lines)
