"""The callbacks of every stage."""

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.train.attempt import AttemptLog
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.callbacks.console import Console
from megatron_unimm.train.callbacks.evaluator import Evaluator
from megatron_unimm.train.callbacks.metrics_file import MetricsFile
from megatron_unimm.train.callbacks.moe_balance import MoEBalance
from megatron_unimm.train.callbacks.profiler import Profiler
from megatron_unimm.train.callbacks.progress import Progress
from megatron_unimm.train.callbacks.quarantine import Quarantine
from megatron_unimm.train.callbacks.straggler_watch import StragglerWatch
from megatron_unimm.train.callbacks.tensorboard import TensorBoard
from megatron_unimm.train.goodput import METRICS


def default_callbacks(stage: StageConfig, attempt: AttemptLog) -> list[Callback]:
    """In the order in which they run: what adds to a record stands before what shows it."""
    folder = attempt.folder
    callbacks: list[Callback] = [
        Progress(attempt),
        MoEBalance(),
        Evaluator(stage, folder),
        MetricsFile(folder / METRICS),
        Quarantine(folder / "quarantine.jsonl"),
        StragglerWatch(stage.train.logging, attempt.events),
    ]
    if stage.train.profile is not None:
        callbacks.insert(0, Profiler(stage.train.profile, folder / "profile"))
    if stage.train.logging.tensorboard:
        callbacks.append(TensorBoard(stage, folder / "tensorboard"))
    return [*callbacks, Console()]
