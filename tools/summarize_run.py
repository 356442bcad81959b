"""Tables of a run's stages and ``summary.json``: losses first and last, speed, skipped steps, scores before and after,
and what ``unimm evaluate --suite shapes --to RUN/shapes.json`` measured of its pictures.

python tools/summarize_run.py runs/quickstart
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON lines file; none if it is absent."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarize_stage(folder: Path) -> dict[str, Any]:
    """First and last value of each loss term, mean tokens/s, skipped steps, and the evaluations of one stage."""
    records = read_lines(folder / "metrics.jsonl")
    if not records:
        raise SystemExit(f"error: {folder}: has no metrics.jsonl; train the stage first")
    first, last = records[0], records[-1]
    seconds = [record["step_seconds"] for record in records]
    tokens = [record["tokens_per_second"] * second for record, second in zip(records, seconds, strict=True)]
    return {
        "steps": last["step"],
        "losses": {term: {"first": first["losses"][term], "last": last["losses"][term]} for term in first["losses"]},
        "tokens_per_second": sum(tokens) / sum(seconds),
        "skipped_steps": last["skipped_steps"],
        "faults": last["faults"],
        "evaluations": read_lines(folder / "evaluation.jsonl"),
    }


def score(stages: dict[str, dict[str, Any]], suite: str, *, first: bool) -> float | None:
    """Accuracy of a suite in the run's first or last evaluation of it."""
    found = [line for stage in stages.values() for line in stage["evaluations"] if line["suite"] == suite]
    return found[0 if first else -1]["scores"]["accuracy"] if found else None


def summarize(run: Path) -> dict[str, Any]:
    """The whole run, in the order of its stages."""
    folders = sorted(
        (path.parent for path in run.glob("*/metrics.jsonl")), key=lambda f: (f / "config.yaml").stat().st_mtime
    )
    stages = {folder.name: summarize_stage(folder) for folder in folders}
    scores = {
        name: {"before": score(stages, suite, first=True), "after": score(stages, suite, first=False)}
        for name, suite in (("question_answering", "shapes_qa"), ("generation_retrieval", "shapes_retrieval"))
    }
    drawn = run / "shapes.json"
    return {"stages": stages, "scores": scores, "shapes": json.loads(drawn.read_text()) if drawn.exists() else None}


def show(summary: dict[str, Any], console: Console) -> None:
    """Two tables."""
    table = Table("stage", "steps", "loss", "first", "last", "tokens/s", "skipped", title="Training")
    for name, stage in summary["stages"].items():
        parts = {term: values for term, values in stage["losses"].items() if "/" not in term}
        for number, (term, values) in enumerate(parts.items()):
            own = (name, str(stage["steps"]), f"{stage['tokens_per_second']:.0f}", str(stage["skipped_steps"]))
            stage_name, steps, speed, skipped = own if number == 0 else ("", "", "", "")
            table.add_row(stage_name, steps, term, f"{values['first']:.4g}", f"{values['last']:.4g}", speed, skipped)
        table.add_section()
    console.print(table)
    scores = Table("accuracy", "before", "after", title="Held-out scenes and captions")
    for name, pair in summary["scores"].items():
        scores.add_row(name.replace("_", " "), *("-" if value is None else f"{value:.3f}" for value in pair.values()))
    console.print(scores)
    if summary["shapes"] is not None:
        pictures = Table("score", "", title="Pictures of held-out prompts, questions, edits")
        for name, value in summary["shapes"]["scores"].items():
            if "/" not in name:
                pictures.add_row(name.replace("_", " "), f"{value:.3f}")
        console.print(pictures)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    run = Path(sys.argv[1])
    summary = summarize(run)
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    show(summary, Console())
    print(f"Written to {run / 'summary.json'}")


if __name__ == "__main__":
    main()
