"""Training jobs of a few ranks with faults put in, without a launcher.

Ranks are forked from a process that has imported everything, so that a start takes no longer than building the model:
what is tested here needs many starts. Each runs the command line, as under torchrun.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.train.events import Event, read_events

PRELOADED = ["megatron_unimm.train.run", "megatron_unimm.cli.main", "job"]
Fault = Callable[[int, Path], None]
"""Called in every rank before the command, with its number and the run's folder: puts a fault in. A top-level function,
or a partial of one."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    codes: list[int]
    """Of the ranks; minus a signal's number where it ended one."""
    said: list[str]
    """stdout and stderr of the ranks."""
    seconds: float


@dataclass(frozen=True)
class Job:
    """A stage of a recipe in a run's folder."""

    recipe: Path
    stage: str
    run_dir: Path
    settings: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.run_dir / self.stage

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def of(self, run_dir: Path, *settings: str) -> "Job":
        """The same in another folder, with more settings."""
        return replace(self, run_dir=run_dir, settings=[*self.settings, *settings])

    def run(
        self, ranks: int, *settings: str, faults: Sequence[Fault] = (), resume: str = "auto", limit: float = 500.0
    ) -> Outcome:
        """Start it and wait for its end; fails where some rank has not ended by itself within ``limit`` seconds (many,
        for busy machines)."""
        context = multiprocessing.get_context("forkserver")
        forkserver.set_forkserver_preload(PRELOADED)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.run_dir.mkdir(parents=True, exist_ok=True)
        arguments = ["train", str(self.recipe), "--stage", self.stage, "--run-dir", str(self.run_dir)]
        arguments += ["--resume", resume, *self.settings, *settings]
        name = uuid.uuid4().hex[:8]
        logs = [self.run_dir / f"said_{name}_{rank}.txt" for rank in range(ranks)]
        environ = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environ |= {"TORCHELASTIC_RUN_ID": name, "OMP_NUM_THREADS": 1}
        began = time.monotonic()
        processes = [
            context.Process(target=_rank, args=(rank, environ, arguments, list(faults), self.run_dir, logs[rank]))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, limit - (time.monotonic() - began)))
        late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
        for process in processes:
            process.kill()
            process.join()
        said = [log.read_text(errors="replace") for log in logs]
        assert not late, f"ranks {late} did not end within {limit} s:\n" + "\n".join(text[-3000:] for text in said)
        return Outcome([process.exitcode or 0 for process in processes], said, time.monotonic() - began)

    def finish(self, ranks: int, *settings: str, faults: Sequence[Fault] = (), resume: str = "auto") -> Outcome:
        """Run it to a good end."""
        outcome = self.run(ranks, *settings, faults=faults, resume=resume)
        assert outcome.codes == [0] * ranks, "\n".join(text[-3000:] for text in outcome.said)
        return outcome

    def events(self, kind: str) -> list[Event]:
        return [event for event in read_events(self.folder) if event.kind == kind]

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def names(self) -> list[str]:
        """What lies in the folder of checkpoints."""
        return sorted(path.name for path in self.checkpoints.iterdir())


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def differences(one: Path, other: Path) -> list[str]:
    """Tensors of two checkpoints that are not the same bit for bit: weights, their masters, moments and averages."""
    with Reader(one) as first, Reader(other) as second:
        assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in first.tensors)
        assert first.tensors.keys() == second.tensors.keys()
        return [key for key in first.tensors if not torch.equal(first.read(key), second.read(key))]


def pid_file(run_dir: Path, rank: int) -> Path:
    return run_dir / f"pid_{rank}"


def kill(run_dir: Path, victims: Sequence[int]) -> None:
    """SIGKILL ranks, this process last if it is among them."""
    pids = [int(pid_file(run_dir, rank).read_text()) for rank in victims]
    for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
        os.kill(pid, signal.SIGKILL)


def _rank(
    rank: int, environ: dict[str, Any], arguments: list[str], faults: list[Fault], run_dir: Path, log: Path
) -> None:
    os.environ.update({name: str(value) for name, value in environ.items()}, RANK=str(rank), LOCAL_RANK=str(rank))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    pid_file(run_dir, rank).write_text(str(os.getpid()))
    from megatron_unimm.cli.main import run

    for fault in faults:
        fault(rank, run_dir)
    code = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
