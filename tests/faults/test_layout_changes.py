"""A run that goes on at another layout, from tensor over pipeline to data parallel, and with experts spread or not: the
same samples, and losses as if it had never stopped."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from injected import in_step, record_samples, stop_by_signal
from job import Job
from small_base import write_base

STEPS = 6
TOLERANCE = 1e-4
"""Relative, of losses and gradient norms. Measured worst case: see what ``pytest -s`` prints."""
LEAST = {"kl": 1e-2}
"""What a smaller loss is compared with instead: the student begins as its teacher, and their KL, then 1e-4, is a
difference of numbers around 6."""
TENSOR, PIPELINE, EXPERT = (f"system.parallel.{name}=2" for name in ("tensor", "pipeline", "expert"))
MOE = "model.backbone.moe={num_experts: 4, top_k: 2, expert_mlp_size: 48}"


@dataclass(frozen=True)
class Leg:
    """Two steps at one layout."""

    ranks: int
    layout: tuple[str, ...] = ()


DENSE = [Leg(2, (TENSOR,)), Leg(2, (PIPELINE,)), Leg(2)]
EXPERTS = [Leg(1), Leg(2, (EXPERT,)), Leg(2)]
EXPERTS_BACK = [Leg(2, (EXPERT,)), Leg(1), Leg(2, (EXPERT,))]


def samples(job: Job, ranks: int) -> dict[int, set[str]]:
    """What all ranks together have drawn in each step."""
    found: dict[int, set[str]] = {}
    for rank in range(ranks):
        for text in (job.run_dir / f"drawn_{rank}.jsonl").read_text().splitlines():
            line = json.loads(text)
            found.setdefault(line["step"], set()).update(line["samples"])
    return found


def compare(job: Job, legs: list[Leg], tmp_path: Path, *settings: str) -> None:
    whole = job.of(tmp_path / "whole", *settings)
    whole.finish(1, faults=[record_samples])
    moving = job.of(tmp_path / "moving", *settings)
    for number, leg in enumerate(legs):
        is_last = number == len(legs) - 1
        # A signal stops the run after the step that follows.
        stop = partial(in_step, step=2 * number + 1, on=0, act=stop_by_signal)
        outcome = moving.run(leg.ranks, *leg.layout, faults=[record_samples] if is_last else [record_samples, stop])
        assert outcome.codes == [0 if is_last else 75] * leg.ranks, "\n".join(text[-3000:] for text in outcome.said)
    assert [event.fields["step"] for event in moving.events("resume")] == [2, 4]
    expected, found = whole.records(), moving.records()
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["learning_rates"] == theirs["learning_rates"]
        pairs = [(ours["losses"][name], theirs["losses"][name], LEAST.get(name, 1e-9)) for name in theirs["losses"]]
        pairs.append((ours["gradient_norm"], theirs["gradient_norm"], 1e-9))
        worst = max(worst, *(abs(a - b) / max(abs(b), least) for a, b, least in pairs))
    print(f"worst relative difference {worst:.1e}")
    assert worst < TOLERANCE
    assert samples(moving, 2) == samples(whole, 1)


@pytest.mark.slow
def test_tensor_to_pipeline_to_data(job: Job, tmp_path: Path) -> None:
    compare(job, DENSE, tmp_path, "train.ema_decay=0.9")


@pytest.mark.slow
@pytest.mark.parametrize("legs", [EXPERTS, EXPERTS_BACK], ids=["1_2_1", "2_1_2"])
def test_experts_spread_and_gathered(job: Job, tmp_path: Path, repo: Path, legs: list[Leg]) -> None:
    """With experts over ranks there are two optimizers, without there is one: checkpoints of one fill the other."""
    write_base(repo, tmp_path / "base", MOE)
    compare(job, legs, tmp_path, MOE, f"base_checkpoint={tmp_path}/base")


@pytest.mark.slow
def test_a_pipeline_whose_first_rank_trains_nothing(job: Job, tmp_path: Path) -> None:
    """Warm-up trains the vision head alone, on the last stage; what the optimizer counts must not come from rank 0."""
    legs = [Leg(2, (PIPELINE,)), Leg(2, (PIPELINE,)), Leg(1)]
    compare(replace(job, stage="warm_up"), legs, tmp_path)
