"""The callbacks of every stage."""

from pathlib import Path

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.callbacks.metrics_file import MetricsFile


def default_callbacks(stage: StageConfig, folder: Path) -> list[Callback]:
    """In the order in which they run."""
    return [MetricsFile(folder / "metrics.jsonl")]
