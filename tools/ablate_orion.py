"""ORION's ablation (Table 4) in the Shapes world: vision heads, warm-up data, KL loss. Prints the table, writes
``ablation.json``.

    python tools/ablate_orion.py --run-dir runs/ablation

Each row is trained by ``unimm train`` through warm-up and pretrain and scored as in the quickstart, with the same
data, seed and number of pretrain steps. The paper's 5M and 20M warm-up pairs become ``--warm-up-steps`` / 4 and
``--warm-up-steps``. Rows already trained are not trained again.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from summarize_run import read_lines

RECIPE = "configs/orion/shapes.yaml"
SUITES = ("shapes_qa", "shapes_retrieval")


@dataclass(frozen=True)
class Variant:
    """A row of Table 4."""

    config: str
    """The paper's letter."""
    head: str
    kl: bool
    warm_up_share: float
    """Of ``--warm-up-steps``."""
    paper: tuple[float, float]
    """MMBench and GenEval in the paper."""

    @property
    def name(self) -> str:
        return f"{self.config}_{self.head}_warm{self.warm_up_share:g}{'_kl' if self.kl else ''}"


VARIANTS = (
    Variant("A", "linear", kl=False, warm_up_share=0.25, paper=(71.6, 0.62)),
    Variant("B", "linear", kl=False, warm_up_share=1.0, paper=(71.5, 0.65)),
    Variant("C", "q_former", kl=False, warm_up_share=0.25, paper=(77.3, 0.75)),
    Variant("D", "q_former", kl=False, warm_up_share=1.0, paper=(78.6, 0.77)),
    Variant("E0", "mlp", kl=False, warm_up_share=0.0, paper=(74.1, 0.73)),
    Variant("E", "mlp", kl=False, warm_up_share=0.25, paper=(76.4, 0.76)),
    Variant("F", "mlp", kl=False, warm_up_share=1.0, paper=(79.8, 0.79)),
    Variant("G", "mlp", kl=True, warm_up_share=1.0, paper=(83.7, 0.82)),
)


def train(variant: Variant, arguments: argparse.Namespace) -> None:
    """Both stages of a row; output goes to ``train.log`` of its folder."""
    folder = arguments.run_dir / variant.name
    folder.mkdir(parents=True, exist_ok=True)
    common = [f"method.vision_head.kind={variant.head}", f"base_checkpoint={arguments.base}", "system.cpu_threads=1"]
    warm_up_steps = round(variant.warm_up_share * arguments.warm_up_steps)
    if warm_up_steps:
        run_stage(folder, "warm_up", [*common, f"train.steps={warm_up_steps}", "train.evaluation.suites=[]"])
    weights = f"method.loss_weights.kl={0.01 if variant.kl else 0.0}"
    pretrain = [*common, weights, f"train.steps={arguments.steps}", f"train.evaluation.suites=[{','.join(SUITES)}]"]
    # Without a warm-up, pretrain starts from the base model with a fresh head.
    run_stage(folder, "pretrain", pretrain if warm_up_steps else [*pretrain, "stages.pretrain.after=null"])


def run_stage(folder: Path, stage: str, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "megatron_unimm.cli", "train", RECIPE, "--stage", stage, "--run-dir", str(folder)]
    with (folder / "train.log").open("a") as log:
        done = subprocess.run([*command, *overrides], stdout=log, stderr=log, env=os.environ, check=False)
    if done.returncode:
        raise SystemExit(
            f"error: {folder / 'train.log'}: stage {stage} ended with exit code {done.returncode}; see its last lines"
        )


def scores(folder: Path) -> dict[str, float]:
    """Last accuracy of each suite, and the last MSE."""
    found = {line["suite"]: line["scores"]["accuracy"] for line in read_lines(folder / "pretrain" / "evaluation.jsonl")}
    return found | {"mse": read_lines(folder / "pretrain" / "metrics.jsonl")[-1]["losses"]["mse"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--base", default="runs/quickstart/base", help="imported base model")
    parser.add_argument("--warm-up-steps", type=int, default=120, help="steps that stand for the paper's 20M pairs")
    parser.add_argument("--steps", type=int, default=120, help="pretrain steps")
    parser.add_argument("--jobs", type=int, default=2, help="rows trained at a time, one core each")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda variant: train(variant, arguments), VARIANTS))
    results = {variant.name: scores(arguments.run_dir / variant.name) for variant in VARIANTS}
    (arguments.run_dir / "ablation.json").write_text(json.dumps(results, indent=2) + "\n")
    table = Table(
        "",
        "vision head",
        "KL",
        "warm-up",
        "QA",
        "retrieval",
        "last MSE",
        "paper: MMB",
        "GenEval",
        title="Table 4 in the Shapes world",
    )
    for variant in VARIANTS:
        found = results[variant.name]
        cells = (f"{found['shapes_qa']:.3f}", f"{found['shapes_retrieval']:.3f}", f"{found['mse']:.3f}")
        paper = (f"{variant.paper[0]:.1f}", f"{variant.paper[1]:.2f}")
        warm_up = f"{round(variant.warm_up_share * arguments.warm_up_steps)} steps"
        table.add_row(variant.config.rstrip("0"), variant.head, "yes" if variant.kl else "no", warm_up, *cells, *paper)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
