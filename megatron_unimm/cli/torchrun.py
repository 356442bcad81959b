"""``python -m megatron_unimm.cli.torchrun``: torchrun, for trainings that are stopped and started again.

Takes torchrun's arguments. Two things differ:

* Exit code. torchrun turns whatever code a rank ends with into 1; here a rank's own code comes out, so that a launcher
  can tell "stopped after saving" (75) and "needs a person" (2) from a crash. For a rank that a signal has killed it
  is 128 plus the signal's number, as in a shell.
* Signals. SIGTERM and SIGUSR1 are handed to the ranks, and their end is awaited: they save first. torchrun kills ranks
  30 seconds after a SIGTERM, and dies of a SIGUSR1.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

FOR_THE_RANKS = (signal.SIGTERM, signal.SIGUSR1)
NEEDS_A_PERSON, STOPPED = 2, 75


def main(arguments: Sequence[str]) -> int:
    """Start the ranks of this node and wait for them; returns their exit code."""
    # Which signals torchrun ends the ranks for; it looks here before it parses its arguments.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    for number in FOR_THE_RANKS:
        signal.signal(number, _hand_on)

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(arguments)))
    except ChildFailedError as error:
        codes = [failure.exitcode for _, failure in sorted(error.failures.items())]
        code = joint_code(codes)
        if code != STOPPED:
            ended = ", ".join(f"rank {rank} with {f.exitcode}" for rank, f in sorted(error.failures.items()))
            print(f"Ranks that ended first: {ended}", file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + error.sigval
    finally:
        # Nobody is left to hand them to, and Python dies of a signal that comes while it shuts down.
        for number in FOR_THE_RANKS:
            signal.signal(number, signal.SIG_IGN)
    return 0


def joint_code(codes: Sequence[int]) -> int:
    """One exit code for the ranks that ended first.

    Args:
        codes: as of ``subprocess``: negative for signals.
    """
    for code in (NEEDS_A_PERSON, STOPPED):
        if code in codes:
            return code
    return codes[0] if codes[0] > 0 else 128 - codes[0]


def _hand_on(number: int, frame: FrameType | None) -> None:
    import psutil

    for child in psutil.Process().children():
        try:
            child.send_signal(number)
        except psutil.NoSuchProcess:  # ended meanwhile
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
