"""ORION's ablation (Table 4) in the Shapes world: vision heads, warm-up data, KL loss. Prints the table, writes
``ablation.json``.

    python tools/ablate_orion.py --run-dir runs/ablation

Each row is trained by ``unimm train`` through warm-up and pretrain and scored as in the quickstart, with the same
data, seed and number of pretrain steps. The paper's 5M and 20M warm-up pairs become ``--warm-up-steps`` / 4 and
``--warm-up-steps``. Rows already trained are not trained again.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from ablation import Training, last_loss, show, train_all
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


def training_of(variant: Variant, arguments: argparse.Namespace) -> Training:
    """Both stages of a row."""
    warm_up_steps = warm_up_steps_of(variant, arguments)
    overrides = [
        f"method.vision_head.kind={variant.head}",
        f"base_checkpoint={arguments.base}",
        "system.cpu_threads=1",
        f"stages.pretrain.method.loss_weights.kl={0.01 if variant.kl else 0.0}",
        f"stages.pretrain.train.steps={arguments.steps}",
        f"stages.pretrain.train.evaluation.suites=[{','.join(SUITES)}]",
    ]
    if warm_up_steps:
        overrides += [f"stages.warm_up.train.steps={warm_up_steps}", "stages.warm_up.train.evaluation.suites=[]"]
        return Training(variant.name, RECIPE, ("warm_up", "pretrain"), tuple(overrides))
    # Without a warm-up, pretrain starts from the base model with a fresh head.
    return Training(variant.name, RECIPE, ("pretrain",), (*overrides, "stages.pretrain.after=null"))


def warm_up_steps_of(variant: Variant, arguments: argparse.Namespace) -> int:
    return round(variant.warm_up_share * arguments.warm_up_steps)


def scores(training: Training, run_dir: Path) -> dict[str, float]:
    """Last accuracy of each suite, and the last MSE."""
    lines = read_lines(run_dir / training.name / "pretrain" / "evaluation.jsonl")
    found = {line["suite"]: line["scores"]["accuracy"] for line in lines}
    return found | {"mse": last_loss(training, "mse", run_dir)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--base", default="runs/quickstart/base", help="imported base model")
    parser.add_argument("--warm-up-steps", type=int, default=120, help="steps that stand for the paper's 20M pairs")
    parser.add_argument("--steps", type=int, default=120, help="pretrain steps")
    parser.add_argument("--jobs", type=int, default=2, help="rows trained at a time, one core each")
    arguments = parser.parse_args()
    trainings = [training_of(variant, arguments) for variant in VARIANTS]
    train_all(trainings, arguments.run_dir, arguments.jobs)
    results = {training.name: scores(training, arguments.run_dir) for training in trainings}
    (arguments.run_dir / "ablation.json").write_text(json.dumps(results, indent=2) + "\n")
    rows = []
    for variant in VARIANTS:
        found = results[variant.name]
        cells = (f"{found['shapes_qa']:.3f}", f"{found['shapes_retrieval']:.3f}", f"{found['mse']:.3f}")
        paper = (f"{variant.paper[0]:.1f}", f"{variant.paper[1]:.2f}")
        warm_up = f"{warm_up_steps_of(variant, arguments)} steps"
        kl = "yes" if variant.kl else "no"
        rows.append((variant.config.rstrip("0"), variant.head, kl, warm_up, *cells, *paper))
    columns = ("", "vision head", "KL", "warm-up", "QA", "retrieval", "last MSE", "paper: MMB", "GenEval")
    show("Table 4 in the Shapes world", columns, rows)


if __name__ == "__main__":
    main()
