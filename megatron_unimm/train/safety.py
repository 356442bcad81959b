"""What keeps a run going through faults, or ends it in order."""

from dataclasses import dataclass

from megatron_unimm.train.poison import SkippedSteps
from megatron_unimm.train.saving import Saver
from megatron_unimm.train.watchdog import Watchdog


@dataclass(frozen=True)
class Safety:
    """Hands of the loop."""

    saver: Saver
    """Checkpoints, also where some cannot be written."""
    watchdog: Watchdog
    """Ends a job that hangs."""
    skipped: SkippedSteps
    """Whose samples made steps that were skipped."""
