"""What the tools have in common that train the rows of a paper's ablation, score them and print a table: runs of stages
by ``unimm train``, each done once, some of which start from others; suites by ``unimm evaluate``.

A run is a folder. Beside what training writes into it stand ``training.json`` (its stages with their overrides, and
which are done) and ``train.log``.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from summarize_run import read_lines

UNIMM = (sys.executable, "-m", "megatron_unimm.cli")
PLAN, LOG = "training.json", "train.log"
Item, Result = TypeVar("Item"), TypeVar("Result")
LAST_RECORDS = 5
"""Records of ``metrics.jsonl`` that a last loss is the mean of: one alone is of few samples."""


@dataclass(frozen=True)
class Training:
    """A run of stages of a recipe, one after the other."""

    name: str
    """Its folder in the folder of all runs."""
    recipe: str
    stages: tuple[str, ...]
    overrides: tuple[str, ...]
    """Of all its stages; ``stages.NAME.…`` for those of one."""
    after: "Training | None" = None
    """The run whose last stage its first one starts from, and which is trained before."""

    def chain(self) -> list["Training"]:
        """Itself and all that it starts from, first ones first."""
        return [*(self.after.chain() if self.after is not None else []), self]

    def command(self, stage: str, run_dir: Path) -> list[str]:
        """What trains a stage."""
        where = ["--stage", stage, "--run-dir", str(run_dir / self.name)]
        return [*UNIMM, "train", self.recipe, *where, *self.overrides]


@dataclass(frozen=True)
class Row:
    """A row of a table, and the run that is scored for it."""

    label: str
    training: Training
    paper: tuple[str, ...] = ()
    """What the paper has for it, column by column."""


@dataclass(frozen=True)
class Ablation:
    """A table."""

    title: str
    rows: tuple[Row, ...]
    figures: dict[str, str]
    """Columns: a title, and what of a row's results stands there: a loss term, or ``SUITE/SCORE``."""
    paper: tuple[str, ...] = ()
    """Titles of the paper's columns."""
    suites: tuple[str, ...] = ("shapes",)


def distinct(trainings: Sequence[Training]) -> list[Training]:
    """All runs that are needed, each once and after those that it starts from."""
    return list(dict.fromkeys(each for training in trainings for each in training.chain()))


def train_all(trainings: Sequence[Training], run_dir: Path, jobs: int) -> None:
    """Train what is not trained yet, ``jobs`` runs at a time, one core each.

    Raises:
        SystemExit: a run failed, or its folder is of another one; says where to look.
    """
    done: dict[Training, Future[None]] = {}

    def wait_and_train(training: Training) -> None:
        if training.after is not None:
            done[training.after].result()  # under way at least: it was handed in before
        train(training, run_dir)

    with ThreadPoolExecutor(jobs) as pool:
        for training in sorted(distinct(trainings), key=lambda each: len(each.chain())):
            done[training] = pool.submit(wait_and_train, training)
        try:
            for future in done.values():
                future.result()
        except SystemExit:
            pool.shutdown(cancel_futures=True)  # what is under way is finished, and kept
            raise


def train(training: Training, run_dir: Path) -> None:
    """All stages of a run that are not done."""
    folder = run_dir / training.name
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"recipe": training.recipe, "stages": list(training.stages), "overrides": list(training.overrides)}
    known = json.loads((folder / PLAN).read_text()) if (folder / PLAN).exists() else {**plan, "done": []}
    if {key: known[key] for key in plan} != plan:
        raise SystemExit(
            f"error: {folder / PLAN}: was trained with other settings; delete the folder or give another --run-dir"
        )
    (folder / PLAN).write_text(json.dumps(known, indent=2) + "\n")
    _link_stages(training, run_dir)
    for stage in training.stages:
        if stage not in known["done"]:
            run_logged(training.command(stage, run_dir), folder / LOG)
            known["done"].append(stage)
            (folder / PLAN).write_text(json.dumps(known, indent=2) + "\n")


def evaluate(training: Training, suite: str, run_dir: Path, num_samples: int) -> dict[str, float]:
    """Scores of the run's last stage; what was scored before is read."""
    folder = run_dir / training.name
    result = folder / f"{suite}_{num_samples}.json"
    if not result.exists():
        run_logged(evaluation_command(training, suite, run_dir, num_samples), folder / LOG)
    return json.loads(result.read_text())["scores"]


def evaluation_command(training: Training, suite: str, run_dir: Path, num_samples: int) -> list[str]:
    folder = run_dir / training.name
    model = ["--model", str(folder / training.stages[-1]), "--suite", suite, "--num-samples", str(num_samples)]
    return [*UNIMM, "evaluate", *model, "--to", str(folder / f"{suite}_{num_samples}.json")]


def last_loss(training: Training, term: str, run_dir: Path) -> float | None:
    """Mean of a loss term over the last records of the last stage that has it, of a run and those that it starts from;
    None where none has."""
    for each in reversed(training.chain()):
        records = read_lines(run_dir / each.name / each.stages[-1] / "metrics.jsonl")[-LAST_RECORDS:]
        if term in records[-1]["losses"]:
            return sum(record["losses"][term] for record in records) / len(records)
    return None


def results_of(row: Row, ablation: Ablation, run_dir: Path, num_samples: int) -> dict[str, float]:
    """The last values of loss terms that are shown, where there are any, and all scores as ``SUITE/SCORE``."""
    terms = [key for key in ablation.figures.values() if "/" not in key]
    losses = {term: last_loss(row.training, term, run_dir) for term in terms}
    found = {term: loss for term, loss in losses.items() if loss is not None}
    for suite in ablation.suites:
        scores = evaluate(row.training, suite, run_dir, num_samples)
        found |= {f"{suite}/{name}": score for name, score in scores.items()}
    return found


def commands(ablation: Ablation, run_dir: Path, num_samples: int) -> list[str]:
    """All that is run, one after the other."""
    trainings = distinct([row.training for row in ablation.rows])
    trained = [each.command(stage, run_dir) for each in trainings for stage in each.stages]
    scored = [
        evaluation_command(row.training, suite, run_dir, num_samples)
        for row in ablation.rows
        for suite in ablation.suites
    ]
    return [shown(command) for command in [*trained, *scored]]


def add_options(parser: argparse.ArgumentParser, run_dir: Path) -> None:
    """What every tool asks for."""
    parser.add_argument("--run-dir", type=Path, default=run_dir, help="folder of all runs  [%(default)s]")
    parser.add_argument("--num-samples", type=int, default=20, help="as of unimm evaluate  [%(default)s]")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time, one core each  [%(default)s]")
    parser.add_argument("--print", action="store_true", help="print the commands and run none")


def carry_out(name: str, ablation: Ablation, budget: dict[str, int], options: argparse.Namespace) -> None:
    """Train and score the rows of a table, print it, and write ``RUN_DIR/NAME.json``; or print the commands.

    Args:
        budget: of every row, for the report.
        options: of :func:`add_options`.
    """
    if options.print:
        print("\n".join(commands(ablation, options.run_dir, options.num_samples)))
        return
    train_all([row.training for row in ablation.rows], options.run_dir, options.jobs)
    score = partial(results_of, ablation=ablation, run_dir=options.run_dir, num_samples=options.num_samples)
    results = in_parallel(score, ablation.rows, options.jobs)
    rows = {row.label: {"run": row.training.name, **found} for row, found in zip(ablation.rows, results, strict=True)}
    report = {"budget": budget, "rows": rows}
    (options.run_dir / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    print_table(ablation, results)


def print_table(ablation: Ablation, results: Sequence[dict[str, float]]) -> None:
    rows = []
    for row, found in zip(ablation.rows, results, strict=True):
        cells = [f"{found[key]:.3f}" if key in found else "-" for key in ablation.figures.values()]
        rows.append((row.label, *cells, *row.paper))
    show(f"{ablation.title}, in the Shapes world", ("", *ablation.figures, *ablation.paper), rows)


def shown(command: Sequence[str]) -> str:
    """A command as a shell takes it."""
    return shlex.join(["unimm", *command[len(UNIMM) :]])


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item], jobs: int) -> list[Result]:
    """What a function makes of each, ``jobs`` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(function, items))


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def _link_stages(training: Training, run_dir: Path) -> None:
    """Stages of runs before, where this run's own look for them."""
    folder = run_dir / training.name
    for before in training.chain()[:-1]:
        for stage in before.stages:
            link = folder / stage
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(run_dir / before.name / stage, folder))


def run_logged(command: Sequence[str], log: Path) -> None:
    """On one core, its output behind what the log has.

    Raises:
        SystemExit: it failed; says where to look.
    """
    with log.open("a") as file:
        print(f"$ {shown(command)}", file=file, flush=True)
        one_core = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=file, stderr=file, env=one_core, check=False)
    if done.returncode:
        raise SystemExit(f"error: {log}: a command ended with exit code {done.returncode}; see its last lines")
