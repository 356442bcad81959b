"""Trains the four methods in the Shapes world with equal budgets, scores them, and writes one table: quality per task,
training cost, parameters.

    python tools/compare_methods.py --samples 100000                        # about an hour each on two cores
    python tools/compare_methods.py --samples 100000 --page docs/methods.md # and puts the table into the page

Equal are the samples that training sees: each method trains all stages of configs/METHOD/shapes.yaml in the recipe's
proportions, from the same imported models, on the same data (DATA, data/shapes_sessions), for ``--samples`` samples in
all; then it is scored by the same suites. ``launchers/shapes.sh`` does both, in RUNS; what is trained already is not
trained again.
"""

import argparse
import json
import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ablation import show
from summarize_run import read_lines

from megatron_unimm.checkpoint.folder import AVERAGE_PREFIX
from megatron_unimm.checkpoint.manifest import latest
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import Recipe, StageConfig
from megatron_unimm.train.state import OF_TRAINING

METHODS = {
    "ORION": "configs/orion/shapes.yaml",
    "MMCORE": "configs/mmcore/shapes.yaml",
    "HieraQuery": "configs/hieraquery/shapes.yaml",
    "SPAR": "configs/spar/shapes.yaml",
}
SUITES = ("shapes", "shapes_qa")
RANKS = 2
"""Of launchers/shapes.sh on a machine without GPUs: one for each core."""
SCORES = {
    "text to image": ("shapes", "overall"),
    "editing": ("shapes", "editing"),
    "edit done": ("shapes", "editing/success"),
    "rest untouched": ("shapes", "editing/untouched"),
    "questions": ("shapes_qa", "accuracy"),
}
BEGIN, END = "<!-- table of tools/compare_methods.py -->\n", "<!-- end of table -->"


@dataclass(frozen=True)
class Trained:
    """A method's run."""

    name: str
    run: Path
    steps: dict[str, int]
    """By stage."""
    samples: int
    """Over all stages."""


def batch_of(stage: StageConfig) -> int:
    """Samples of a step."""
    if stage.train.global_batch_size is None:
        raise SystemExit(f"error: stages.{stage.name}.train.global_batch_size: is not set; samples cannot be counted")
    return stage.train.global_batch_size


def planned(name: str, recipe: Recipe, samples: int) -> Trained:
    """Steps of each stage, in the recipe's proportions; at least one."""
    stages = recipe.stages.values()
    whole = sum((stage.train.steps or 0) * batch_of(stage) for stage in stages)
    steps = {stage.name: max(1, round((stage.train.steps or 0) * samples / whole)) for stage in stages}
    seen = sum(steps[stage.name] * batch_of(stage) for stage in stages)
    return Trained(name, Path(next(iter(stages)).base_checkpoint).parent, steps, seen)


def train(method: Trained, recipe: str) -> None:
    """All stages, and its scores."""
    settings = [f"stages.{stage}.train.steps={steps}" for stage, steps in method.steps.items()]
    data = os.environ.get("DATA", "data/shapes_sessions")
    environment = os.environ | {"FULL": "1", "SUITES": " ".join(SUITES), "DATA": data}
    done = subprocess.run(["bash", "launchers/shapes.sh", recipe, *settings], env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"error: {method.run}: launchers/shapes.sh ended with exit code {done.returncode}; see above")


def core_minutes(method: Trained) -> float:
    """Of training, from the mean seconds of steps between records."""
    seconds = 0.0
    for stage in method.steps:
        before = 0
        for record in read_lines(method.run / stage / "metrics.jsonl"):
            seconds += (record["step"] - before) * record["step_seconds"]
            before = record["step"]
    return seconds * RANKS / 60


def parameters(method: Trained) -> int:
    """Numbers of all weights that it answers and draws with: those of the checkpoints that no other stage begins with,
    each tensor once."""
    found: dict[str, int] = {}
    for stage in method.steps:
        checkpoint = latest(method.run / stage / "checkpoints")
        assert checkpoint is not None
        with Reader(checkpoint) as reader:
            for key, entry in reader.tensors.items():
                training = key.startswith((AVERAGE_PREFIX, *(glob.removesuffix("*") for glob in OF_TRAINING)))
                # A tokenizer beside a diffusion transformer has the name of a VAE's.
                name = key.removeprefix("vae.") if key.startswith("vae.tokenizer.") else key
                if not training:
                    found[name] = math.prod(entry.shape)
    return sum(found.values())


def row_of(method: Trained) -> list[str]:
    """Its line of the table."""
    reports = {suite: json.loads((method.run / f"{suite}.json").read_text())["scores"] for suite in SUITES}
    scores = [f"{reports[suite][name]:.3f}" if name in reports[suite] else "-" for suite, name in SCORES.values()]
    cost = f"{core_minutes(method):.0f}"
    return [method.name, *scores, f"{parameters(method) / 1e6:.2f} M", f"{method.samples}", cost]


def markdown(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def put_into(page: Path, table: str) -> None:
    """In the place of the table that is there.

    Raises:
        SystemExit: the page has no such place.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"error: {page}: has no lines {BEGIN.strip()!r} and {END!r}; put them where the table goes")
    before, rest = text.split(BEGIN, 1)
    page.write_text(before + BEGIN + "\n" + table + "\n" + END + rest.split(END, 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000, help="over all stages of a method  [%(default)s]")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this; may be given several times")
    parser.add_argument("--page", type=Path, help="Markdown page to put the table into")
    options = parser.parse_args()
    methods = [
        planned(name, load_recipe(path), options.samples)
        for name, path in METHODS.items()
        if name in (options.method or METHODS)
    ]
    # MMCORE reads all kinds of conversations: the data that are made for it serve all.
    for method in sorted(methods, key=lambda each: each.name != "MMCORE"):
        train(method, METHODS[method.name])
    rows = [row_of(method) for method in methods]
    titles = ["method", *SCORES, "parameters", "samples", "core-minutes"]
    show("Four methods, equal budgets, in the Shapes world", titles, rows)
    if options.page is not None:
        put_into(options.page, markdown(titles, rows))


if __name__ == "__main__":
    main()
