"""Measurements in processes of their own, which are killed when they take too long.

A broken GPU, network or file system more often hangs than fails, and a thread that hangs in it cannot be ended.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOAD = ("torch", "torch.distributed", "megatron_unimm.parallel")
"""Imported once, for all measurements."""


@dataclass(frozen=True)
class Result:
    """What came of one call: ``value`` or ``fault``."""

    value: Any = None
    fault: str = ""


def server() -> Any:
    """The context that starts processes: forked from one that has imported torch and has not touched a GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


def call_all(function: Callable[..., Any], calls: Sequence[tuple], seconds: float) -> list[Result]:
    """``function(*arguments)`` of each call, at the same time, each in its process; none outlives ``seconds``."""
    context = server()
    started = [_start(context, function, arguments) for arguments in calls]
    waiting = {receiver: index for index, (_, receiver) in enumerate(started)}
    results = [Result(fault=f"no answer within {seconds:.0f} s") for _ in calls]
    deadline = time.monotonic() + seconds
    while waiting and (left := deadline - time.monotonic()) > 0:
        for receiver in wait(list(waiting), left):
            assert isinstance(receiver, Connection)
            index = waiting.pop(receiver)
            try:
                results[index] = receiver.recv()
            except EOFError:
                process = started[index][0]
                process.join(1)
                results[index] = Result(fault=f"the process ended with exit code {process.exitcode}")
    for process, _ in started:
        process.kill()
    # A process in an uninterruptible call (dead network storage) stays; we do not wait for it.
    for process, _ in started:
        process.join(1)
    return results


def _start(context: Any, function: Callable[..., Any], arguments: tuple) -> tuple[Any, Connection]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()  # so that the receiver sees the end when the process dies
    return process, receiver


def _run(sender: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        result = Result(value=function(*arguments))
    except Exception as error:  # whatever breaks is what we are here to tell
        result = Result(fault=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    sender.send(result)
