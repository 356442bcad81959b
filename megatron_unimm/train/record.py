"""What is measured between two logging points, kept on the device until then."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_unimm.data.loader import StepBatch
from megatron_unimm.data.workers import Row
from megatron_unimm.train.step import StepResult
from megatron_unimm.train.stragglers import Straggler


@dataclass(frozen=True)
class Record:
    """Means over the steps since the last record. The same on every rank, but for memory."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    losses: dict[str, float]
    """Mean of each term, unweighted."""
    weighted: dict[str, float]
    """The same times its weight."""
    total_loss: float
    learning_rates: dict[str, float]
    """By multiplier of the trainable table."""
    gradient_norm: float
    """Of the last step, before clipping."""
    module_norms: dict[str, float]
    skipped_steps: int
    """Since the stage began."""
    skipped_now: int
    """Since the last record."""
    step_seconds: float
    tokens_per_second: float
    """Tokens of samples, over all ranks; padding not counted."""
    images_per_second: float
    samples_per_second: float
    model_tflops: float
    """Model TFLOP/s of one device (``train/flops.py``), the mean over all."""
    mfu: float | None
    """The same as a share of the device's peak; None where that is not known."""
    padding_share: float
    """Part of the computed positions that belong to no sample."""
    draws: dict[str, int]
    """Samples drawn per source since the stage began."""
    faults: dict[str, int]
    """Samples passed over since the stage began, by kind."""
    memory_bytes: int
    """Peak of this rank so far."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds of a step by what they went to (``train/timers.py``), the mean over ranks; they add up to the step's."""
    useful_seconds: float = 0.0
    """Of the time since the last record, what made optimizer steps."""
    straggler: Straggler | None = None
    """The slowest rank; None where no rank has its like."""
    ledger: dict[str, float] = field(default_factory=dict)
    """What became of the stage's time so far (``train/goodput.py``); filled in on rank 0."""
    extra: dict[str, float] = field(default_factory=dict)
    """Whatever a method or a callback adds."""


@dataclass
class Window:
    """Collects steps until the next record."""

    device: torch.device
    num_terms: int
    row_flops: Callable[[Row], float]
    losses: Tensor = field(init=False)
    good_steps: Tensor = field(init=False)
    skipped: Tensor = field(init=False)
    last: StepResult | None = None
    steps: int = 0
    tokens: int = 0
    positions: int = 0
    images: int = 0
    samples: int = 0
    broken_images: Counter[str] = field(default_factory=Counter)
    """By source."""
    flops: float = 0.0
    """Of this rank's rows, shared by all ranks that hold a part of them."""
    started: float = 0.0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.losses = torch.zeros(self.num_terms, device=self.device)
        self.good_steps = torch.zeros((), device=self.device)
        self.skipped = torch.zeros((), device=self.device)
        self.steps = self.tokens = self.positions = self.images = self.samples = 0
        self.broken_images = Counter()
        self.flops = 0.0
        self.started = time.perf_counter()

    def add(self, result: StepResult, batch: StepBatch) -> None:
        """Take in one step without waiting for the device."""
        finite = result.losses.isfinite().all()
        self.losses += torch.where(finite, result.losses, torch.zeros_like(result.losses))
        self.good_steps += finite
        self.skipped += result.skip
        self.last = result
        self.steps += 1
        self.broken_images.update(bad.source for bad in batch.voided)
        for row in batch.rows:
            self.tokens += row.num_tokens - row.num_padding
            self.positions += row.num_tokens
            self.images += row.num_images
            self.samples += len(row.sample_ids)
            self.flops += self.row_flops(row)


class Totals:
    """Counters over the whole stage, saved with its checkpoints."""

    def __init__(self) -> None:
        self.draws: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    def add(self, batch: StepBatch) -> None:
        self.draws.update(batch.counts)
        self.faults.update(f"{bad.source}/{bad.error.fault}" for bad in batch.bad)

    def add_broken_images(self, source: str, count: int) -> None:
        """Images that turned out broken when decoded, of all ranks; each rank finds only those of its own rows."""
        if count:
            self.faults[f"{source}/broken image"] += count

    def state_dict(self) -> dict[str, dict[str, int]]:
        return {"draws": dict(self.draws), "faults": dict(self.faults)}

    def load_state_dict(self, state: dict[str, dict[str, int]]) -> None:
        self.draws = Counter(state["draws"])
        self.faults = Counter(state["faults"])
