"""MMCORE's ablations (arXiv 2604.19902, sections 3 and 4.3) in the Shapes world: one command each trains its rows,
scores them, prints a table beside the paper's numbers and writes ``RUN_DIR/NAME.json``.

    python tools/ablate_mmcore.py table1         # connector of 2, 3, 6 layers, LoRA, full, large batch, SFT
    python tools/ablate_mmcore.py queries        # N visual latents
    python tools/ablate_mmcore.py pathways       # queries only, words only, both
    python tools/ablate_mmcore.py alignment      # eq. 1 off: queries learn from the diffusion loss alone
    python tools/ablate_mmcore.py dropout        # of words: constant, or high first and annealed
    python tools/ablate_mmcore.py earlier_latents
    python tools/ablate_mmcore.py vit_features

Data and imported base models are where configs/mmcore/shapes.yaml has them (DATA, RUNS). All rows have the same budget:
``--vlm-steps`` of the VLM and ``--diffusion-steps`` of the diffusion transformer, in the batches of
configs/mmcore/shapes_ablations.yaml; rows with the same VLM share it, also between commands of one ``--run-dir``. What
is trained or scored already is not done again.

``table1``, ``queries`` and ``alignment`` compare what the visual latents say: the diffusion transformer behind them
draws text to image from them alone, as in MetaQuery's setting, which the paper starts from. The others have the whole
mix.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from ablation import Ablation, Row, Training, add_options, carry_out

RECIPE = "configs/mmcore/shapes_ablations.yaml"
NEW = "{pattern: 'query_tokens.*'}, {pattern: 'query_connector.*'}, {pattern: '*', train: false}"
DRAWN_NEW = "{pattern: 'vlm.query_tokens.*'}, {pattern: 'vlm.query_connector.*'}, {pattern: 'vlm.*', train: false}"
LATENTS_ALONE = (
    "stages.diffusion.method.pathways=visual",
    # What guides words otherwise.
    "stages.diffusion.method.sampler={guidance_scale: 1.0, image_guidance_scale: 2.0}",
)
TEXT_TO_IMAGE = ("stages.diffusion.data.sources={editing: null, interleaved: null}",)
LARGE_BATCH = 140
"""5 times the recipe's: "scaling the batch size by 5x" (section 4.3)."""


@dataclass(frozen=True)
class Budget:
    """Steps of every row."""

    vlm: int
    diffusion: int
    sft: int


# -- runs


def vlm(budget: Budget, name: str, *overrides: str) -> Training:
    """A VLM (stage A). Overrides of ``queries`` are of the stages behind it, too."""
    return Training(f"vlm_{name}", RECIPE, ("vlm",), (f"stages.vlm.train.steps={budget.vlm}", *overrides))


def full(budget: Budget) -> Training:
    """All of the VLM trains, as in the recipe."""
    return vlm(budget, "full")


def frozen(budget: Budget, layers: int) -> Training:
    """Queries and a connector behind a frozen VLM."""
    table = f"stages.vlm.train.trainable=[{NEW}]"
    return vlm(budget, f"connector{layers}", f"queries.connector.num_layers={layers}", table)


def drawing(budget: Budget, name: str, after: Training | None, *overrides: str) -> Training:
    """A diffusion transformer (stage B) behind a VLM."""
    steps = f"stages.diffusion.train.steps={budget.diffusion}"
    annealed = f"stages.diffusion.method.text_dropout.steps={budget.diffusion // 2}"
    queries = [] if after is None else [each for each in after.overrides if each.startswith("queries.")]
    start = f"stages.diffusion.after={'null' if after is None else after.stages[-1]}"
    return Training(name, RECIPE, ("diffusion",), (steps, annealed, start, *queries, *overrides), after)


def latents_alone(budget: Budget, name: str, after: Training | None, *overrides: str) -> Training:
    """One that draws text to image from visual latents alone."""
    return drawing(budget, f"latents_{name}", after, *LATENTS_ALONE, *TEXT_TO_IMAGE, *overrides)


# -- tables

VIS, FLOW = {"L_vis": "vis"}, {"flow loss": "flow"}
OVERALL = {"overall": "shapes/overall"}
BOTH = {
    "overall": "shapes/overall",
    "from perfect latents": "shapes/overall_decoder",
    "editing": "shapes/editing",
    "edit done": "shapes/editing/success",
    "rest untouched": "shapes/editing/untouched",
}


def table1(budget: Budget) -> Ablation:
    large = vlm(budget, "large", f"stages.vlm.train.global_batch_size={LARGE_BATCH}")
    sft_settings = (f"stages.vlm_sft.train.steps={budget.sft}", f"stages.vlm_sft.train.global_batch_size={LARGE_BATCH}")
    sft = Training("vlm_large_sft", RECIPE, ("vlm_sft",), sft_settings, large)
    adapters = vlm(
        budget,
        "lora",
        "queries.lora={rank: 16}",
        f"stages.vlm.train.trainable=[{{pattern: 'backbone.*lora_*'}}, {NEW}]",
    )
    vlms = {
        "frozen, connector of 2 layers": (frozen(budget, 2), "0.6791", "0.7276"),
        "frozen, 3 layers": (frozen(budget, 3), "0.7490", "0.7910"),
        "frozen, 6 layers": (frozen(budget, 6), "0.7843", "0.8396"),
        "LoRA": (adapters, "above 2 layers, below full", ""),
        "full": (full(budget), "0.8114", "0.8417"),
        "full, batch x 5": (large, "0.8199", "0.8528"),
        "full, batch x 5, then SFT": (sft, "0.8585", "0.8915"),
    }
    rows = [
        Row(label, latents_alone(budget, before.name.removeprefix("vlm_"), before), tuple(paper))
        for label, (before, *paper) in vlms.items()
    ]
    return Ablation("Table 1", tuple(rows), VIS | FLOW | OVERALL, ("paper: GPT-4o", "Doubao"))


def queries(budget: Budget) -> Ablation:
    rows = []
    for number in (1, 4, 16, 64):
        # 16 is the recipe's.
        before = full(budget) if number == 16 else vlm(budget, f"n{number}", f"queries.num_queries={number}")
        name = before.name.removeprefix("vlm_")
        rows.append(Row(f"N = {number}", latents_alone(budget, name, before), ("optimal" if number == 64 else "",)))
    return Ablation("Queries (3.1.2: N from 1 to 128)", tuple(rows), VIS | FLOW | OVERALL, ("paper",))


def pathways(budget: Budget) -> Ablation:
    words = drawing(budget, "words", full(budget), "stages.diffusion.method.pathways=text")
    rows = (
        Row("queries only", drawing(budget, "queries_only", full(budget), *LATENTS_ALONE), ("significantly weaker",)),
        Row("words only", words, ("",)),
        Row("both", drawing(budget, "both", full(budget)), ("best",)),
    )
    return Ablation("Pathways (3.1)", rows, FLOW | BOTH, ("paper",))


def alignment(budget: Budget) -> Ablation:
    table = f"stages.diffusion.train.trainable=[{DRAWN_NEW}, {{pattern: 'vae.*', train: false}}, {{pattern: '*'}}]"
    off = latents_alone(budget, "unaligned", None, "queries.connector.num_layers=2", table)
    rows = (
        Row("frozen VLM, diffusion loss only", off, ("poor convergence",)),
        Row("frozen VLM, aligned (eq. 1)", latents_alone(budget, "connector2", frozen(budget, 2)), ("0.6791",)),
        Row("full, aligned", latents_alone(budget, "full", full(budget)), ("0.8114",)),
    )
    return Ablation("Alignment loss (4.3)", rows, VIS | FLOW | OVERALL, ("paper: GPT-4o",))


def dropout(budget: Budget) -> Ablation:
    constant = drawing(budget, "constant", full(budget), "stages.diffusion.method.text_dropout={start: 0.1, end: 0.1}")
    rows = (
        Row("constant, 0.1", constant, ("",)),
        Row("annealed, 0.4 to 0.1", drawing(budget, "both", full(budget)), ("its choice",)),
    )
    return Ablation("Dropout of words (3.2)", rows, FLOW | BOTH, ("paper",))


def earlier_latents(budget: Budget) -> Ablation:
    visible = drawing(budget, "earlier_latents", full(budget), "stages.diffusion.method.earlier_latents=true")
    rows = (
        Row("excluded", drawing(budget, "both", full(budget)), ("",)),
        Row("visible", visible, ("performance degradation",)),
    )
    figures = {
        "first edit": "shapes_sessions/first",
        "second, with history": "shapes_sessions/with_history",
        "its change alone": "shapes_sessions/with_history/change",
        "editing": "shapes/editing",
    }
    suites = ("shapes", "shapes_sessions")
    return Ablation("Visual latents of earlier frames (3.2)", rows, FLOW | OVERALL | figures, ("paper",), suites)


def vit_features(budget: Budget) -> Ablation:
    added = drawing(budget, "vit_features", full(budget), "stages.diffusion.method.vit_features=true")
    rows = (
        Row("VAE latents alone", drawing(budget, "both", full(budget)), ("55.2",)),
        Row("with ViT features", added, ("30.62",)),
    )
    return Ablation("ViT features on the VAE condition (4.3)", rows, FLOW | BOTH, ("paper: edit alignment",))


ABLATIONS = {
    build.__name__: build for build in (table1, queries, pathways, alignment, dropout, earlier_latents, vit_features)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", choices=ABLATIONS)
    parser.add_argument("--vlm-steps", type=int, default=200, help="[%(default)s]")
    parser.add_argument("--diffusion-steps", type=int, default=200, help="[%(default)s]")
    parser.add_argument(
        "--sft-steps", type=int, default=40, help="of the VLM, for the last row of table1  [%(default)s]"
    )
    add_options(parser, Path(os.environ.get("RUNS", "runs")) / "mmcore" / "ablations")
    options = parser.parse_args()
    budget = Budget(options.vlm_steps, options.diffusion_steps, options.sft_steps)
    carry_out(options.ablation, ABLATIONS[options.ablation](budget), vars(budget), options)


if __name__ == "__main__":
    main()
