"""``unimm``, but one rank sleeps in every forward step: slow_rank.py RANK SECONDS ARGUMENTS of unimm."""

import os
import sys
import time
from typing import Any

import megatron_unimm.parallel  # noqa: F401 - before Megatron-Core
from megatron_unimm.cli.main import run
from megatron_unimm.train import step

RANK, SECONDS = int(sys.argv[1]), float(sys.argv[2])
forward_step = step._forward_step


def slow_forward_step(*args: Any, **kwargs: Any) -> Any:
    time.sleep(SECONDS)
    return forward_step(*args, **kwargs)


if int(os.environ["RANK"]) == RANK:
    step._forward_step = slow_forward_step
sys.exit(run(sys.argv[3:]))
