"""Storage that fails: full disks, checkpoints that are damaged after they were written, saves that must not stall."""

import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from injected import before, full_disk, in_step, no_hurry
from job import Job, step_name

from megatron_unimm.checkpoint.manifest import MANIFEST, MARKER
from megatron_unimm.checkpoint.store import is_committed, latest

# ---------------------------------------------------------------------------------------------- full disk


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["asynchronous", "synchronous"])
def test_a_full_disk_costs_a_checkpoint_not_the_run(job: Job, mode: str) -> None:
    """The second save meets it on rank 1: it says so, leaves nothing behind, and the next one is there."""
    setting = f"train.checkpoint.asynchronous={str(mode == 'asynchronous').lower()}"
    outcome = job.finish(
        2, setting, "train.checkpoint.keep_last=5", faults=[no_hurry, partial(full_disk, on=1, saves=(2,))]
    )
    assert job.names() == [step_name(2), step_name(6)]
    assert [event.fields["step"] for event in job.events("saved")] == [2, 6]
    (failed,) = job.events("save_failed")
    assert failed.fields["step"] == 4
    assert "no space left on device" in failed.fields["what"].lower()
    assert "training goes on, 2 more may fail" in failed.fields["what"]
    assert failed.fields["what"] in outcome.said[0]
    assert len(job.records()) == 6


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run(job: Job) -> None:
    """After one more than may fail in a row, with exit code 2 on all ranks; the last good checkpoint is untouched."""
    fault = partial(full_disk, on=0, saves=(2, 3, 4, 5, 6))
    outcome = job.run(2, "train.steps=40", "train.checkpoint.max_failures=1", faults=[no_hurry, fault])
    assert outcome.codes == [2, 2]
    assert job.names() == [step_name(2)]
    assert is_committed(job.checkpoints / step_name(2))
    (last,) = {line for line in outcome.said[0].splitlines() if "error: " in line}
    for words in ("2 checkpoints in a row could not be written", "max_failures is 1", "good one is step_00000002"):
        assert words in last
    assert "no space left on device" in last.lower()
    assert job.events("end")[0].fields["code"] == 2
    assert len(job.events("save_failed")) == 2


@pytest.mark.slow
def test_the_last_checkpoint_must_be_written(job: Job) -> None:
    outcome = job.run(1, "train.steps=2", faults=[partial(full_disk, on=0, saves=(1,))])
    assert outcome.codes == [2]
    assert "the last good one is none" in outcome.said[0]
    assert job.names() == []


# ---------------------------------------------------------------------------------------------- stalls


def hold_back(rank: int, run_dir: Path, *, until: int) -> None:
    """The first save cannot write before ``until`` steps are done."""
    done = threading.Event()
    before("writes a tensor", lambda *_: done.wait())
    for number in (0, 1):
        in_step(rank, run_dir, step=until, on=number, act=done.set)


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written(job: Job) -> None:
    """Would a save hold training up, this one would wait for ever."""
    settings = ("train.steps=7", "train.checkpoint.every_steps=4")
    job.finish(2, *settings, faults=[partial(hold_back, until=6)])
    assert job.names() == [step_name(4), step_name(7)]
    saved = {event.fields["step"]: event.fields for event in job.events("saved")}
    assert saved[4]["seconds"] > 0
    assert saved[4]["stall_seconds"] > 0
    manifest = job.checkpoints / step_name(4)
    on_disk = sum(path.stat().st_size for path in manifest.rglob("*") if path.is_file())
    described = sum((manifest / name).stat().st_size for name in (MANIFEST, MARKER))
    assert saved[4]["bytes"] == on_disk - described


# ---------------------------------------------------------------------------------------------- damage


def flip_a_bit(directory: Path) -> None:
    path = next(directory.glob("__0_*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(directory: Path) -> None:
    path = next(directory.glob("__0_*.distcp"))
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_file(directory: Path) -> None:
    (directory / "index.json").unlink()


def change_the_manifest(directory: Path) -> None:
    path = directory / MANIFEST
    path.write_text(path.read_text().replace('"step": 6', '"step": 5'))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit": (flip_a_bit, "its content changed since it was written (sha256 differs)"),
    "cut": (cut_off, "bytes instead of"),
    "lost": (lose_a_file, "the file is missing"),
    "manifest": (change_the_manifest, "its hash differs from the one in COMMITTED"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(name: str, job: Job) -> None:
    """The one before is taken, loudly, and nothing is deleted."""
    damage, why = DAMAGES[name]
    job.finish(1, faults=[no_hurry])
    damage(job.checkpoints / step_name(6))
    content = sorted(path.name for path in (job.checkpoints / step_name(6)).iterdir())
    said = job.finish(1, "train.steps=8", faults=[no_hurry]).said[0]
    assert "resuming at step 4" in said
    aside = f"{step_name(6)}.damaged"
    (trouble,) = job.events("trouble")
    for words in ("checkpoint step_00000006 is damaged", why, f"kept as {aside}"):
        assert words in trouble.fields["what"]
    assert f"{trouble.fields['what']}; going back to the one before" in said
    assert trouble.fields["step"] == 6
    assert sorted(path.name for path in (job.checkpoints / aside).iterdir()) == content
    assert job.names() == [step_name(6), aside, step_name(8)]
    assert is_committed(job.checkpoints / step_name(6))


@pytest.mark.slow
def test_two_ranks_find_what_one_of_them_hashes(job: Job) -> None:
    """The damaged file is in one rank's share; both fall back, twice, and then refuse to begin anew unasked."""
    job.finish(2, faults=[no_hurry])
    for step in (4, 6):
        flip_a_bit(job.checkpoints / step_name(step))
    shutil.copytree(job.checkpoints / step_name(6), job.checkpoints / f"{step_name(6)}.damaged")
    for _ in range(2):  # also when it is tried again
        outcome = job.run(2)
        assert outcome.codes == [2, 2]
        assert "all its checkpoints are damaged" in outcome.said[0]
        assert "--resume never" in outcome.said[0]
    assert job.names() == [f"{step_name(4)}.damaged", f"{step_name(6)}.damaged", f"{step_name(6)}.damaged-2"]
    job.finish(2, resume="never")
    assert latest(job.checkpoints) == job.checkpoints / step_name(6)


@pytest.mark.slow
def test_a_damaged_checkpoint_that_was_asked_for_is_refused(job: Job) -> None:
    """--resume DIR means that one: nothing is set aside, nothing else is taken."""
    job.finish(1, faults=[no_hurry])
    directory = job.checkpoints / step_name(6)
    flip_a_bit(directory)
    outcome = job.run(1, resume=str(directory))
    assert outcome.codes == [2]
    assert "sha256 differs" in outcome.said[0]
    assert job.names() == [step_name(4), step_name(6)]
