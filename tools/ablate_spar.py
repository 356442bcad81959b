"""SPAR's ablations (arXiv 2606.23041) in the Shapes world: one command each trains its rows, scores them, prints a
table and writes ``RUN_DIR/NAME.json``. Of the paper the abstract is known: its claims stand beside the rows, and no
numbers.

    python tools/ablate_spar.py tokenizer    # both streams; no pixel stream; no self-distillation
    python tools/ablate_spar.py teacher      # internal teacher, external teacher, none: steps to a score, and a plot
    python tools/ablate_spar.py routing      # dynamic, its two largest layers, one mixture for all tokens, last layer

Data and the imported base model are where configs/spar/shapes.yaml has them (DATA, RUNS). All rows have the same
budget, in the batches of configs/spar/shapes_ablations.yaml; runs are shared between commands of one ``--run-dir``, and
what is trained or scored already is not done again.

Rows of ``tokenizer`` train the vision encoder too (a tenth of the rate, as the recipe's second stage does): one that
does not move needs no distillation. ``teacher`` draws a few held-out prompts every ``--every`` steps. ``routing``
trains alignment and what draws with it.
"""

import argparse
import os
from pathlib import Path

from ablation import Ablation, Row, Training, add_options, carry_out, show
from summarize_run import read_lines

RECIPE = "configs/spar/shapes_ablations.yaml"
ENCODER_LEARNS = (
    "stages.tokenizer.train.trainable=[{pattern: 'vision_encoder.*', learning_rate_multiplier: 0.1}, {pattern: '*'}]"
)
LEVELS = (0.25, 0.5, 0.75)
"""Shares of right pictures that steps are counted to."""
SUITE, SCORE = "shapes", "overall"


# -- runs


def tokenizer(options: argparse.Namespace, name: str = "tokenizer", *overrides: str) -> Training:
    steps = f"stages.tokenizer.train.steps={options.tokenizer_steps}"
    return Training(name, RECIPE, ("tokenizer",), (steps, *overrides))


DYNAMIC, TWO, STATIC, LAST = "{mode: dynamic}", "{mode: dynamic, top_k: 2}", "{mode: static}", "null"
NO_ROUTERS = {
    "alignment": "[{pattern: 'query_*'}, {pattern: '*', train: false}]",
    "joint": "[{pattern: 'vlm.query_*'}, {pattern: 'vlm.*', train: false}, {pattern: 'vae.*', train: false}, "
    "{pattern: '*'}]",
}
"""What trains without routing, by stage: rules of the recipe are about routers."""


def routed(stage: str, routing: str) -> tuple[str, ...]:
    """Settings of a stage."""
    table = (f"stages.{stage}.train.trainable={NO_ROUTERS[stage]}",) if routing == LAST else ()
    return (f"stages.{stage}.routing={routing}", *table)


def vlm(options: argparse.Namespace, name: str, routing: str) -> Training:
    """The language model's alignment with one kind of routing; the tokenizer, which it does not read, comes before."""
    settings = (f"stages.alignment.train.steps={options.alignment_steps}", *routed("alignment", routing))
    return Training(f"vlm_{name}", RECIPE, ("alignment",), settings, tokenizer(options))


def joint(options: argparse.Namespace, name: str, before: Training, routing: str, *overrides: str) -> Training:
    """What draws, in the shared tokenizer's space."""
    settings = (
        f"stages.joint.train.steps={options.steps}",
        *routed("joint", routing),
        f"tokenizer_checkpoint={options.run_dir / 'tokenizer' / 'tokenizer'}",
        *overrides,
    )
    return Training(name, RECIPE, ("joint",), settings, before)


# -- tables


def ablate_tokenizer(options: argparse.Namespace) -> Ablation:
    whole = tokenizer(options, "tokenizer_whole", ENCODER_LEARNS)
    no_pixels = tokenizer(options, "tokenizer_no_pixels", ENCODER_LEARNS, "tokenizer.pixel=null")
    off = "stages.tokenizer.method.loss_weights={l1: 1.0, l2: 1.0, perceptual: 0.1, semantic: 0.0, latent: 0.0}"
    free = tokenizer(options, "tokenizer_free", ENCODER_LEARNS, off)
    rows = (
        Row("both streams, self-distillation", whole, ("both",)),
        Row("without the pixel stream", no_pixels, ("loses fine detail",)),
        Row("without self-distillation", free, ("loses understanding",)),
    )
    figures = {
        "PSNR": "reconstruction/psnr",
        "SSIM": "reconstruction/ssim",
        "Fréchet": "reconstruction/frechet",
        "probe: encoder": "reconstruction/probe/original",
        "semantic stream": "reconstruction/probe/semantic",
        "latents": "reconstruction/probe/latents",
    }
    return Ablation("The tokenizer", rows, figures, ("paper",), ("reconstruction",))


def ablate_teacher(options: argparse.Namespace) -> Ablation:
    evaluated = (
        f"stages.joint.train.evaluation={{suites: [{SUITE}], every_steps: {options.every}, "
        f"num_samples: {options.curve_samples}}}"
    )
    before = vlm(options, "dynamic", DYNAMIC)

    def row(label: str, name: str, alignment: str, paper: str) -> Row:
        overrides = (*alignment_overrides(alignment), evaluated)
        return Row(label, joint(options, f"teacher_{name}", before, DYNAMIC, *overrides), (paper,))

    rows = (
        row("internal: the tokenizer's semantic stream", "internal", "internal", "fastest"),
        row("external: the vision encoder", "external", "external", ""),
        row("none", "none", "none", ""),
    )
    return Ablation("Self-alignment", rows, {"flow loss": "flow", "overall": f"{SUITE}/{SCORE}"}, ("paper",))


def alignment_overrides(teacher: str) -> tuple[str, ...]:
    if teacher == "none":
        return ("stages.joint.method.alignment=null",)
    return (f"stages.joint.method.alignment.teacher={teacher}",)


def ablate_routing(options: argparse.Namespace) -> Ablation:
    kinds = {
        "dynamic, all layers": ("dynamic", DYNAMIC, "adaptive, per token"),
        "dynamic, two largest": ("two", TWO, ""),
        "one mixture for all tokens": ("static", STATIC, ""),
        "last layer": ("last", LAST, ""),
    }
    rows = [
        Row(label, joint(options, f"routing_{name}", vlm(options, name, routing), routing), (paper,))
        for label, (name, routing, paper) in kinds.items()
    ]
    figures = {
        "L_vis": "vis",
        "flow loss": "flow",
        "overall": "shapes/overall",
        "editing": "shapes/editing",
        "edit done": "shapes/editing/success",
    }
    return Ablation("Dynamic Token Routing", tuple(rows), figures, ("paper",))


ABLATIONS = {"tokenizer": ablate_tokenizer, "teacher": ablate_teacher, "routing": ablate_routing}


# -- curves


def curve(training: Training, run_dir: Path) -> list[tuple[int, float]]:
    """Steps, and the score that was measured there while training."""
    lines = read_lines(run_dir / training.name / training.stages[-1] / "evaluation.jsonl")
    return [(line["step"], line["scores"][SCORE]) for line in lines if line["suite"] == SUITE]


def steps_to(points: list[tuple[int, float]], level: float) -> int | None:
    """The first measured step from which on the score stays at or above a level; None where it never does."""
    below = [step for step, score in points if score < level]
    return next((step for step, _ in points if not below or step > max(below)), None)


def show_speed(ablation: Ablation, options: argparse.Namespace) -> None:
    """A table of steps to scores, and the curves as ``RUN_DIR/teacher.png``."""
    import matplotlib.pyplot as plt  # of the extra `plots`

    curves = {row.label: curve(row.training, options.run_dir) for row in ablation.rows}
    cells = [(label, *(str(steps_to(points, level) or "-") for level in LEVELS)) for label, points in curves.items()]
    show("Steps until so many held-out prompts are drawn right", ("teacher", *map(str, LEVELS)), cells)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="steps", ylabel="held-out prompts drawn right", ylim=(0, 1))
    axes.legend()
    figure.savefig(options.run_dir / "teacher.png", dpi=150)
    print(options.run_dir / "teacher.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", choices=ABLATIONS)
    parser.add_argument("--tokenizer-steps", type=int, default=800, help="[%(default)s]")
    parser.add_argument("--alignment-steps", type=int, default=200, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=400, help="of what draws  [%(default)s]")
    parser.add_argument("--every", type=int, default=50, help="steps between scores of teacher  [%(default)s]")
    parser.add_argument("--curve-samples", type=int, default=8, help="prompts of a kind for these  [%(default)s]")
    add_options(parser, Path(os.environ.get("RUNS", "runs")) / "spar" / "ablations")
    options = parser.parse_args()
    ablation = ABLATIONS[options.ablation](options)
    budget = {name: vars(options)[name] for name in ("tokenizer_steps", "alignment_steps", "steps")}
    carry_out(options.ablation, ablation, budget, options)
    if options.ablation == "teacher" and not options.print:
        show_speed(ablation, options)


if __name__ == "__main__":
    main()
