"""What hangs: a rank, storage that data comes from or checkpoints go to, an interpreter. The watchdog ends the job in
time, says which rank it waits for and in what, and leaves the stacks of all ranks."""

import ctypes
import re
import threading
from functools import partial
from pathlib import Path

import pytest
from injected import before, in_step, sleep_for_ever
from job import Job, Outcome

from megatron_unimm.config.load import load_recipe
from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.errors import ConfigError
from megatron_unimm.train import loop, watchdog

LIMIT = ("system.watchdog_minutes=0.15", "train.steps=100000")
"""Nine seconds; a step takes a tenth of one where the machine is not busy."""
HUNG = 70


def check(job: Job, outcome: Outcome, why: str) -> tuple[str, str]:
    """Both ranks ended with 70 and left their stacks; one of them told why, and rank 0 says so, in its log and in the
    events. Returns what was told and rank 1's stacks.

    A busy machine may give cause for other events before (a slow rank, say)."""
    assert outcome.codes == [HUNG, HUNG], "\n".join(text[-3000:] for text in outcome.said)
    (trouble,) = {event.fields["what"] for event in job.events("trouble") if "watchdog_minutes" in event.fields["what"]}
    assert why in trouble
    assert why in outcome.said[0]
    ends = job.events("end")
    assert {event.fields["code"] for event in ends} == {HUNG}
    assert any(event.rank == 0 and why in event.fields["reason"] for event in ends)
    stacks = [(job.folder / f"stacks/rank{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert all("most recent call first" in text for text in stacks)
    return trouble, stacks[1]


@pytest.mark.slow
def test_a_hung_rank(job: Job) -> None:
    """Rank 1 sleeps in a callback; rank 0 waits for it in a collective, and its main thread can do nothing."""
    outcome = job.run(2, *LIMIT, faults=[partial(in_step, step=3, on=1, act=sleep_for_ever)])
    trouble, stacks = check(job, outcome, "behind is rank 1 on ")
    assert "sleep_for_ever" in stacks
    assert "after step 3, in callbacks" in trouble
    assert "rank 0 came no further" in trouble
    assert "distributed_c10d.py" in (job.folder / "stacks/rank00000.txt").read_text(), "it waits in a collective"
    # Started again, it goes on from what was saved before.
    assert "resuming at step 2" in job.finish(2, "train.steps=4").said[0]


def stall_reading(rank: int, run_dir: Path, *, on: int, after: int) -> None:
    """From the ``after``-th image on, storage does not answer rank ``on``."""
    opened, count = DiskImage.open, 0

    def open_slowly(image: DiskImage) -> object:
        nonlocal count
        count += 1
        if count > after:
            threading.Event().wait()
        return opened(image)

    if rank == on:
        DiskImage.open = open_slowly


@pytest.mark.slow
def test_data_that_does_not_come(job: Job) -> None:
    """The file that rank 1 waits for is named."""
    outcome = job.run(2, *LIMIT, faults=[partial(stall_reading, on=1, after=60)])
    trouble, _ = check(job, outcome, "waiting for data: ")
    # The image, or while headers are read the line of the sample that it belongs to.
    name = trouble.split("waiting for data: ")[1].split(",")[0]
    assert Path(re.sub(r":\d+$", "", name)).is_file(), name
    assert "behind is rank 1 on " in trouble


def less_patience() -> None:
    loop.LONG = watchdog.LONG = 1


def stall_writing(rank: int, run_dir: Path, *, on: int) -> None:
    """Storage takes nothing from rank ``on``. After the first step, what may take six times the limit may take one."""
    in_step(rank, run_dir, step=1, on=rank, act=less_patience)
    if rank == on:
        before("writes a tensor", lambda *_: sleep_for_ever())


@pytest.mark.slow
def test_a_save_that_does_not_end(job: Job) -> None:
    outcome = job.run(2, *LIMIT, "train.checkpoint.asynchronous=false", faults=[partial(stall_writing, on=1)])
    _, stacks = check(job, outcome, "step 2, saving")
    assert "_write_piece" in stacks or "write_piece" in stacks


@pytest.mark.slow
def test_a_save_that_does_not_end_while_training_goes_on(job: Job) -> None:
    """Saves that are due meanwhile are left out, and in the end the job is."""
    outcome = job.run(2, *LIMIT, faults=[partial(stall_writing, on=1)])
    check(job, outcome, "has been writing checkpoint 2 for ")
    left_out = [event.fields for event in job.events("trouble") if "is left out" in event.fields["what"]]
    assert "checkpoint 4 is left out: 2 is still being written" in left_out[0]["what"]
    assert job.records()[-1]["step"] >= 4


def hold_interpreter(rank: int, run_dir: Path, *, on: int, step: int) -> None:
    """A C library takes the GIL and keeps it."""
    watchdog.REPORT_SECONDS = 3.0
    in_step(rank, run_dir, step=1, on=rank, act=less_patience)
    if rank == on:
        calls = 0

        def hold(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls == step:
                ctypes.PyDLL(None).sleep(1000)

        before("reads data", hold)


@pytest.mark.slow
def test_an_interpreter_that_is_stuck(job: Job) -> None:
    """No thread of rank 1 can run: a timer in C writes its stacks to stderr and ends it. Rank 0 names it."""
    outcome = job.run(2, *LIMIT, faults=[partial(hold_interpreter, on=1, step=3)])
    assert outcome.codes == [HUNG, 1], "\n".join(text[-3000:] for text in outcome.said)
    assert "Timeout (" in outcome.said[1]
    assert "in hold" in outcome.said[1]
    assert "behind is rank 1 on " in outcome.said[0]


def test_the_watchdog_comes_before_the_collectives(repo: Path) -> None:
    with pytest.raises(ConfigError, match=r"watchdog_minutes 12 is not below timeout_minutes 10.*raise timeout"):
        load_recipe(repo / "configs/orion/shapes.yaml", ["system.watchdog_minutes=12"])
