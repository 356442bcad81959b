"""Tables of a run's stages and ``summary.json``: losses and rewards first and last, speed, skipped steps, accuracies
before and after, and what ``unimm evaluate --suite SUITE --to RUN/SUITE.json`` measured at its end.

python tools/summarize_run.py runs/quickstart
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REWARD = "reward/total"
ACCURACIES = {"shapes_qa": "question_answering", "shapes_retrieval": "generation_retrieval"}
"""Suites that training evaluates, and what they are called here."""
TITLES = {
    "shapes": "Pictures of held-out prompts, questions, edits",
    "shapes_qa": "Questions about held-out scenes",
    "shapes_sessions": "Two edits in a conversation, choices among many pictures",
}
"""Suites that are evaluated at the end."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON lines file; none if it is absent."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarize_stage(folder: Path) -> dict[str, Any]:
    """First and last value of each loss term and of the reward, mean tokens/s, skipped steps, evaluations."""
    records = read_lines(folder / "metrics.jsonl")
    if not records:
        raise SystemExit(f"error: {folder}: has no metrics.jsonl; train the stage first")
    first, last = ({**record["losses"], **_reward(record)} for record in (records[0], records[-1]))
    seconds = [record["step_seconds"] for record in records]
    tokens = [record["tokens_per_second"] * second for record, second in zip(records, seconds, strict=True)]
    return {
        "steps": records[-1]["step"],
        "losses": {term: {"first": first[term], "last": last[term]} for term in first},
        "tokens_per_second": sum(tokens) / sum(seconds),
        "skipped_steps": records[-1]["skipped_steps"],
        "faults": records[-1]["faults"],
        "evaluations": read_lines(folder / "evaluation.jsonl"),
    }


def _reward(record: dict[str, Any]) -> dict[str, float]:
    """Of pictures that a policy drew."""
    return {"reward": record["extra"][REWARD]} if REWARD in record["extra"] else {}


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
        for suite, name in ACCURACIES.items()
    }
    scores = {name: pair for name, pair in scores.items() if pair["after"] is not None}
    reports = {suite: json.loads(file.read_text()) for suite in TITLES if (file := run / f"{suite}.json").exists()}
    return {"stages": stages, "scores": scores, **reports}


def show(summary: dict[str, Any], console: Console) -> None:
    """Training, accuracies, and a table of each suite."""
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
    for suite, title in TITLES.items():
        if suite in summary:
            table = Table("score", "", title=title)
            for name, value in summary[suite]["scores"].items():
                if "/" not in name:
                    table.add_row(name.replace("_", " "), f"{value:.3f}")
            console.print(table)


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
