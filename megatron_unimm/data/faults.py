"""What can be wrong with one sample. Training passes over such samples and counts them by reason."""

from typing import Any, Literal

from megatron_unimm.errors import DataError

Fault = Literal[
    "malformed conversation",
    "image count",
    "missing image",
    "path outside the image folder",
    "unreadable image",
    "image too large",
    "text too large",
    "unsafe member",
    "damaged file",
    "too long",
    "too many pictures",
    "nothing to draw",
]
"""Reasons to count by. "unsafe member": an entry of a tar shard that is no plain file, or whose name leads out of it.
"damaged file": a shard or table that is cut off or broken; what can be read of it is used."""


class SampleError(DataError):
    """One sample of the data cannot be used.

    Args:
        where: the file with its line, or the id of the sample.
        what: what is wrong, with both numbers.
        fault: the kind of fault, to count by.
    """

    def __init__(self, where: str, what: str, fault: Fault) -> None:
        super().__init__(where, what)
        self.fault: Fault = fault

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with all arguments, so that it survives worker processes."""
        return type(self), (self.where, self.what, self.fault)
