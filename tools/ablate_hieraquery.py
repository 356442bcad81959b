"""HieraQuery's ablations (section 6) in the Shapes world: one command each trains its rows, scores them, prints a table
beside the paper's numbers and writes ``RUN_DIR/NAME.json``.

    python tools/ablate_hieraquery.py table3         # one scale, more tokens, several scales, with alignment
    python tools/ablate_hieraquery.py table4         # which scales, and how many tokens in all
    python tools/ablate_hieraquery.py figure5b       # how many tokens, at one scale and at several
    python tools/ablate_hieraquery.py consistency    # of the pictures of one prompt over scales, and alignment
    python tools/ablate_hieraquery.py figure5a       # pictures of one prompt at all scales, without and with alignment

Data and imported base models are where configs/hieraquery/shapes.yaml has them (DATA, RUNS). All rows are text to image
in ``--steps`` steps of the batches of configs/hieraquery/shapes_ablations.yaml; runs are shared between commands of one
``--run-dir``, and what is trained or scored already is not done again.

A picture of this world has 16 image tokens in place of the paper's 256, so that all numbers of queries are a sixteenth
of the paper's: 16 for 256, 21 for 336, 32 for 512, 64 for 1024. All its pictures are square; what the paper has for
other aspect ratios stands beside the same rows. The paper does not say whether its Table 4 is with alignment; its first
row is Table 3's without, and so are all rows here.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from ablation import UNIMM, Ablation, Row, Training, add_options, carry_out, run_logged, shown, train_all
from PIL import Image

from megatron_unimm.data.shapes import PROMPT_KINDS
from megatron_unimm.generate.png import picture_grid, write_png

RECIPE = "configs/hieraquery/shapes_ablations.yaml"
STAGE = "text_to_image"
QUARTER, HALF, WHOLE = "1", "2", "4"
"""Grids of queries as many as the image tokens of pictures of 16, 32 and 64 pixels."""
SCALES = (QUARTER, HALF, WHOLE)
MORE = {
    32: ("[1, 2]", "[2, 3]", "[4, 6]"),
    64: ("[2, 2]", "[3, 4]", "[6, 8]"),
}
"""Finer grids of the same pictures, by queries in all."""
PROMPT = "a red circle left of a blue square"
OVERALL = {"flow loss": "flow", "overall": "shapes/overall"}


# -- runs


def run(steps: int, name: str, grids: tuple[str, ...], shares: str = "null", aligned: bool = False) -> Training:
    """One model.

    Args:
        grids: of queries, coarse to fine.
        shares: sides of their pictures in that of the finest; null goes by the grids.
    """
    overrides = [
        f"stages.{STAGE}.train.steps={steps}",
        f"hieraquery.scales=[{', '.join(grids)}]",
        f"hieraquery.shares={shares}",
    ]
    if not aligned:
        overrides.append(f"stages.{STAGE}.method.alignment=null")
    return Training(name, RECIPE, (STAGE,), tuple(overrides))


def single(steps: int, rows: int, columns: int) -> Training:
    """The finest scale alone, from a grid of queries (MetaQuery's setting)."""
    return run(steps, f"single_{rows * columns}", (f"[{rows}, {columns}]",))


def several(steps: int, *grids: str) -> Training:
    """Scales whose pictures have as many image tokens as queries."""
    return run(steps, "scales_" + "_".join(grids), grids)


def all_scales(steps: int, aligned: bool = False) -> Training:
    """The recipe's three."""
    return run(steps, "aligned", SCALES, aligned=True) if aligned else several(steps, *SCALES)


def more_tokens(steps: int, total: int) -> Training:
    """All scales, from finer grids."""
    return run(steps, f"tokens_{total}", MORE[total], "[0.25, 0.5, 1.0]")


# -- tables


def table3(steps: int) -> Ablation:
    rows = (
        Row("one scale, 16 queries", single(steps, 4, 4), ("54.4", "96.8", "55.8", "40.6", "82.7", "18.5", "32.0")),
        Row("one scale, 21", single(steps, 3, 7), ("54.7", "96.4", "56.4", "42.2", "82.6", "18.5", "32.3")),
        Row("three scales, 21", all_scales(steps), ("61.8", "99.0", "75.7", "53.4", "86.9", "26.2", "29.7")),
        Row("and alignment", all_scales(steps, True), ("63.2", "99.0", "76.7", "58.7", "84.3", "27.0", "33.2")),
    )
    short = {"single_object": "1 obj.", "two_object": "2 obj.", "counting": "count", "colors": "colour"}
    short |= {"position": "place", "color_attr": "attr."}
    figures = OVERALL | {short[kind]: f"shapes/{kind}" for kind in PROMPT_KINDS}
    titles = ("paper: overall", *(short[kind] for kind in PROMPT_KINDS))
    return Ablation("Table 3", rows, figures, titles)


def table4(steps: int) -> Ablation:
    rows = (
        Row("1.0x: 16 queries", single(steps, 4, 4), ("256", "0.54; any aspect: 0.57", "6.87; 6.85")),
        Row("0.25x, 1.0x: 17", several(steps, QUARTER, WHOLE), ("272", "0.61", "6.95")),
        Row("0.5x, 1.0x: 20", several(steps, HALF, WHOLE), ("320", "0.60", "5.84")),
        Row("0.25x, 0.5x, 1.0x: 21", all_scales(steps), ("336", "0.64", "5.53")),
        Row("the same: 32", more_tokens(steps, 32), ("512", "0.64", "5.58")),
        Row("the same: 64", more_tokens(steps, 64), ("1024", "0.63", "5.69")),
    )
    return Ablation("Table 4", rows, OVERALL, ("paper: queries", "GenEval", "FID"))


def figure5b(steps: int) -> Ablation:
    """The paper says of its figure that one scale does not gain beyond 256 queries; numbers are its tables'."""
    grids = {4: (2, 2), 8: (2, 4), 16: (4, 4), 21: (3, 7), 32: (4, 8), 64: (8, 8)}
    known = {16: ("256", "54.4"), 21: ("336", "54.7"), 32: ("512", "no gain"), 64: ("1024", "no gain")}
    one = [
        Row(f"one scale, {total} queries", single(steps, *grid), known.get(total, (str(16 * total), "")))
        for total, grid in grids.items()
    ]
    three = (
        Row("three scales, 21", all_scales(steps), ("336", "61.8")),
        Row("three scales, 32", more_tokens(steps, 32), ("512", "as 336")),
        Row("three scales, 64", more_tokens(steps, 64), ("1024", "a little less")),
    )
    return Ablation("Figure 5(b)", (*one, *three), OVERALL, ("paper: queries", "GenEval"))


def consistency(steps: int) -> Ablation:
    rows = (
        Row("three scales", all_scales(steps), ("",)),
        Row("and alignment", all_scales(steps, aligned=True), ("notably improved",)),
    )
    scores = {
        "agreement": "agreement",
        **{f"at {scale}": f"agreement/{scale}" for scale in ("0.25x", "0.5x")},
        "objects": "objects",
        "other noise": "agreement/other_noise",
        "other prompt": "agreement/other_prompt",
        **{f"right {scale}": f"overall/{scale}" for scale in ("0.25x", "0.5x", "1x")},
    }
    figures = {title: f"shapes_scales/{score}" for title, score in scores.items()}
    return Ablation("Consistency over scales (3.2)", rows, figures, ("paper",), ("shapes_scales",))


ABLATIONS = {build.__name__: build for build in (table3, table4, figure5b, consistency)}


# -- pictures


def figure5a(options: argparse.Namespace) -> None:
    """A sheet of the prompts' pictures at all scales, a row of each model and prompt; written to ``--to``."""
    runs = {"without alignment": all_scales(options.steps), "with alignment": all_scales(options.steps, aligned=True)}
    prompts = options.prompt or [PROMPT]
    asked = {
        (label, number): generating(training, prompt, options.run_dir, number)
        for number, prompt in enumerate(prompts)
        for label, training in runs.items()
    }
    if options.print:
        trained = [training.command(STAGE, options.run_dir) for training in runs.values()]
        print("\n".join(shown(command) for command in [*trained, *asked.values()]))
        return
    train_all(list(runs.values()), options.run_dir, options.jobs)
    pictures, captions = [], []
    for (label, number), command in asked.items():
        folder = options.run_dir / runs[label].name
        run_logged(command, folder / "generate.log")
        files = [folder / f"prompt_{number}.png", *folder.glob(f"prompt_{number}_*.png")]
        scales = sorted((np.asarray(Image.open(file)) for file in files), key=lambda picture: picture.size)
        pictures += scales
        captions += [f"{label}\n{prompts[number]}", *[""] * (len(scales) - 1)]
    to = options.to or options.run_dir / "figure5a.png"
    write_png(to, picture_grid(pictures, captions, len(SCALES)), {"steps": options.steps})
    print(to)


def generating(training: Training, prompt: str, run_dir: Path, number: int) -> list[str]:
    """What draws a prompt at all scales."""
    folder = run_dir / training.name
    where = ["--model", str(folder / STAGE), "--to", str(folder / f"prompt_{number}.png")]
    return [*UNIMM, "generate", *where, "--all-scales", "--prompt", prompt]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", choices=[*ABLATIONS, "figure5a"])
    parser.add_argument("--steps", type=int, default=400, help="of every row  [%(default)s]")
    parser.add_argument("--prompt", action="append", help=f"of figure5a; may be given several times  [{PROMPT}]")
    parser.add_argument("--to", type=Path, help="picture of figure5a  [RUN_DIR/figure5a.png]")
    add_options(parser, Path(os.environ.get("RUNS", "runs")) / "hieraquery" / "ablations")
    options = parser.parse_args()
    if options.ablation == "figure5a":
        figure5a(options)
        return
    carry_out(options.ablation, ABLATIONS[options.ablation](options.steps), {"steps": options.steps}, options)


if __name__ == "__main__":
    main()
