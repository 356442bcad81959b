"""What is being read at this moment, for a watchdog that finds the training waiting for it."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager


class InFlight:
    """Safe to use from several threads; nothing in it waits.

    The order of beginnings is kept: the first is the one that has been under way for longest.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._items: dict[int, tuple[float, object]] = {}

    @contextmanager
    def during(self, item: object) -> Iterator[None]:
        """``item`` is being read while the block runs."""
        number = next(self._numbers)
        self._items[number] = (time.monotonic(), item)
        try:
            yield
        finally:
            del self._items[number]

    def oldest(self) -> tuple[float, object] | None:
        """Seconds since its beginning, and the item; None while nothing is being read."""
        items = list(self._items.values())
        return (time.monotonic() - items[0][0], items[0][1]) if items else None
