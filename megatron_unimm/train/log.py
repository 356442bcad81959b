"""Logging of a training job: one voice on a terminal or in a log file, with a prefix where another rank speaks."""

import logging
import os
import sys
import warnings

from rich.console import Console
from rich.logging import RichHandler

PACKAGE = "megatron_unimm"

EXPECTED_WARNINGS = (
    # Megatron-Core, at import: true on every machine without a GPU, and `unimm doctor` tells. Our own Adam takes the
    # place of both.
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    # Megatron-Core's TransformerConfig warns of the default value of its own field for the scope of graphs.
    r"full scope is deprecated\. Use empty",
    # Frozen parts are how stages work; a rank whose part is frozen has a stub in the optimizer's place.
    r"WARNING: there is no optimizer on RANK",
    # A hint for the order of streams on a GPU (CUDA_DEVICE_MAX_CONNECTIONS); sbatch scripts set it, and it does nothing
    # on CPU.
    r"When using (sequence parallelism|async grad allreduce) it is recommended to set the environment variable",
    # torch 2.13 renames collectives that Megatron-Core 0.16 calls by their old names.
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
)
"""Regular expressions of warnings that tell nothing to act on. They match the start of a message."""


def setup_logging() -> None:
    """Send messages and Python's warnings to stderr: INFO from the first rank, WARNING from others, with their number.

    On a terminal through rich, so that lines and a progress bar do not disturb one another; else as plain lines for a
    log file. Other libraries speak up from WARNING. Call it once, before Megatron-Core is imported (its import warns
    already).
    """
    rank = int(os.environ.get("RANK", "0"))
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) in (logging.StreamHandler, RichHandler)]:
        root.removeHandler(handler)  # the command line's plain one, or that of an earlier call; a test runner's stays
    root.addHandler(_handler(rank))
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.captureWarnings(True)
    # Every rank would repeat what the first one says.
    logging.getLogger("py.warnings").setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def terminal_console() -> Console | None:
    """The console of the log on a terminal, for a progress bar that shares the screen with it; None in a log file."""
    handlers = logging.getLogger().handlers
    return next((handler.console for handler in handlers if isinstance(handler, RichHandler)), None)


def _handler(rank: int) -> logging.Handler:
    console = Console(stderr=True)
    # Several ranks on one terminal come through a launcher's pipe or overwrite each other's bar: only the first draws.
    if console.is_terminal and rank == 0:
        return RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
    prefix = f"[rank {rank}] " if rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    return handler
