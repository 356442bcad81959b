"""Gradients that are not finite or explode, on one rank; and batches that keep doing so."""

import json
from functools import partial

import pytest
from injected import bad_gradient, no_hurry, record_samples
from job import Job, step_name

from megatron_unimm.checkpoint.store import latest
from megatron_unimm.train.poison import FILE

TENSOR = "backbone.decoder.layers.1.mlp.linear_fc2.weight"


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "norm"), [(float("nan"), "inf"), (1e6, "e+0")], ids=["nan", "exploding"])
def test_one_rank_spoils_a_step(job: Job, factor: float, norm: str) -> None:
    """All ranks skip it together, the tensor is named, and training goes on."""
    fault = partial(bad_gradient, on=1, steps=(4,), name=TENSOR, factor=factor)
    outcome = job.finish(2, "train.spike.warmup_steps=2", faults=[record_samples, fault])
    records = job.records()
    assert [record["skipped_now"] for record in records] == [0, 0, 0, 1, 0, 0]
    assert all(loss < 100 for record in records for loss in record["losses"].values())
    (line,) = [line for line in outcome.said[0].splitlines() if "skipped for their gradients" in line]
    assert f"largest in the last of them: {TENSOR} " in line
    assert norm in line.split(TENSOR)[1].split(",")[0]
    (skipped,) = (json.loads(text) for text in (job.folder / FILE).read_text().splitlines())
    names = [json.loads((job.run_dir / f"drawn_{rank}.jsonl").read_text().splitlines()[3]) for rank in (0, 1)]
    assert skipped == {"step": 4, "samples": [*names[0]["samples"], *names[1]["samples"]]}


@pytest.mark.slow
def test_a_poisoned_batch_that_repeats(job: Job) -> None:
    """More skipped steps in a row than are allowed: exit code 2, with the ids of the samples of both ranks."""
    fault = partial(bad_gradient, on=0, steps=(3, 4, 5), name=TENSOR, factor=float("inf"))
    outcome = job.run(2, "train.spike.max_consecutive=2", faults=[no_hurry, record_samples, fault])
    assert outcome.codes == [2, 2]
    (error,) = [line for line in outcome.said[0].splitlines() if "error: " in line]
    assert "step 5: 3 steps in a row had anomalous gradients, and train.spike.max_consecutive is 2" in error
    lines = [json.loads(text) for text in (job.folder / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 5]
    names = [name for line in lines for name in line["samples"]]
    assert len(names) >= 12
    assert "samples (steps 3 to 5): " + ", ".join(dict.fromkeys(names[:8])) in error
    assert str(job.folder / FILE) in error
    # Losses were fine before: what was saved then is there to go back to.
    assert latest(job.checkpoints) == job.checkpoints / step_name(4)
    assert job.events("end")[0].fields["code"] == 2
