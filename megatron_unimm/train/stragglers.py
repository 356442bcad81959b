"""Which rank holds up the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low


@dataclass(frozen=True)
class Peer:
    """A rank as the others know it."""

    host: str
    pipeline_rank: int


@dataclass(frozen=True)
class Straggler:
    """The rank that needs the longest for its own work."""

    rank: int
    host: str
    ratio: float
    """Its time over that of the usual rank."""

    def __str__(self) -> str:
        return f"slowest rank {self.rank} on {self.host}: {self.ratio:.2f}x the median"


def slowest(busy: Sequence[float], peers: Sequence[Peer]) -> Straggler | None:
    """The rank whose own time is longest beside the median of its pipeline stage's ranks, which do like work; None
    where no rank has its like.

    Ranks that exchange activations inside forward and backward (tensor, context, expert parallel) wait for each other
    there and look alike: of those the name stands for the group. The lower median makes sense of two ranks, too.

    Args:
        busy: own time of each rank, in seconds.
        peers: the ranks, in the same order.
    """
    stages = {peer.pipeline_rank for peer in peers}
    if len(stages) == len(peers):
        return None
    usual = {
        stage: median_low(own for own, peer in zip(busy, peers, strict=True) if peer.pipeline_rank == stage)
        for stage in stages
    }
    ratios = [
        own / usual[peer.pipeline_rank] if usual[peer.pipeline_rank] > 0 else 1.0
        for own, peer in zip(busy, peers, strict=True)
    ]
    rank = max(range(len(ratios)), key=ratios.__getitem__)
    return Straggler(rank, peers[rank].host, ratios[rank])
