"""What every source of samples offers."""

from typing import Protocol

from megatron_unimm.config.data import SampleKind
from megatron_unimm.data.sample import Sample


class Source(Protocol):
    """Random access to samples.

    Reading is safe from several threads. Pickling keeps only how the source was opened; unpickling opens it again, so
    that worker processes can be handed one.
    """

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        ...

    @property
    def kind(self) -> SampleKind:
        """What its samples teach."""
        ...

    def __len__(self) -> int:
        """Number of samples, those that cannot be used included."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at a place; images stay encoded where they lie.

        Raises:
            SampleError: the sample cannot be used.
            IndexError: there is no such place.
        """
        ...

    def where(self, index: int) -> str:
        """The place of a sample for messages: the file with its line, member or row."""
        ...


def checked(index: int, length: int, name: str) -> int:
    """The index, if there is such a sample.

    Raises:
        IndexError: there is not.
    """
    if not 0 <= index < length:
        raise IndexError(f"{name}: sample {index} of {length}")
    return index
