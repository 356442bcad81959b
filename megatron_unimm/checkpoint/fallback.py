"""Which checkpoint a run goes on from: the newest one whose every byte is what was written."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_unimm.checkpoint.manifest import (
    DAMAGED,
    check_files,
    newest_with_marker,
    put_back,
    read_manifest,
    set_aside,
    share_of_files,
)
from megatron_unimm.checkpoint.ranks import Ranks
from megatron_unimm.errors import CheckpointError

Tell = Callable[[Path, Path, CheckpointError], None]
"""Hears of a damaged checkpoint: its folder, where it was set aside, what is wrong with it."""


def newest_intact(run_dir: Path, ranks: Ranks, tell: Tell) -> Path | None:
    """The newest finished checkpoint of a run of which every file has its hash, or None where there never was one.

    Called on every rank, with no save under way; each hashes its share of the files. One that is damaged (a flipped
    bit, a file cut off or gone) is set aside, and the one before is looked at.

    Raises:
        CheckpointError: there were checkpoints, but all are damaged.
    """
    ranks.from_first(lambda: put_back(run_dir))
    while True:
        newest = ranks.from_first(lambda: newest_with_marker(run_dir))
        if newest is None:
            ranks.from_first(lambda: _refuse_to_start_anew(run_dir))
            return None
        damage = _damage(newest, ranks)
        if damage is None:
            return newest
        tell(newest, ranks.from_first(partial(set_aside, newest)), damage)


def _damage(directory: Path, ranks: Ranks) -> CheckpointError | None:
    """What is wrong with a checkpoint, the same on every rank."""
    found = None
    try:
        manifest = read_manifest(directory)
        check_files(directory, manifest, share_of_files(manifest, ranks.rank, ranks.size))
    except CheckpointError as error:
        found = error
    return next((error for error in ranks.all_gather(found) if error is not None), None)


def _refuse_to_start_anew(run_dir: Path) -> None:
    """A run that had come far must not begin again unasked."""
    damaged = sorted(run_dir.glob(f"step_*{DAMAGED}*"))
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise CheckpointError(
            str(run_dir),
            f"all its checkpoints are damaged ({names}); bring one back from a copy, or start the stage anew with "
            "--resume never",
        )
