"""How long work on bytes is shown: a bar with MB/s on a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_SECONDS = 5.0
"""Time between lines of a log."""


@contextmanager
def progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show work on ``total_bytes``; call the function that it yields with the bytes just done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, what, total_bytes).advance
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda count: bar.advance(task, count)


class _Lines:
    def __init__(self, console: Console, what: str, total_bytes: int) -> None:
        self.console, self.what, self.total = console, what, max(total_bytes, 1)
        self.done, self.start = 0, time.monotonic()
        self.shown = self.start

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.shown >= LINE_SECONDS or self.done >= self.total:
            self.shown = now
            speed = self.done / 1e6 / max(now - self.start, 1e-9)
            line = f"{self.what}: {self.done / 1e6:.0f} of {self.total / 1e6:.0f} MB, {speed:.0f} MB/s"
            self.console.print(line, highlight=False, soft_wrap=True)
