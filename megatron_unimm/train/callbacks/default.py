"""The callbacks of every stage."""

from pathlib import Path

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.callbacks.console import Console
from megatron_unimm.train.callbacks.evaluator import Evaluator
from megatron_unimm.train.callbacks.metrics_file import MetricsFile
from megatron_unimm.train.callbacks.moe_balance import MoEBalance
from megatron_unimm.train.callbacks.quarantine import Quarantine
from megatron_unimm.train.callbacks.tensorboard import TensorBoard


def default_callbacks(stage: StageConfig, folder: Path) -> list[Callback]:
    """In the order in which they run: what adds to a record stands before what shows it."""
    callbacks: list[Callback] = [
        MoEBalance(),
        Evaluator(stage, folder),
        MetricsFile(folder / "metrics.jsonl"),
        Quarantine(folder / "quarantine.jsonl"),
    ]
    if stage.train.logging.tensorboard:
        callbacks.append(TensorBoard(stage, folder / "tensorboard"))
    return [*callbacks, Console()]
