"""Which layers a pipeline rank has, how many micro-batches it holds, and how long the schedule takes, against
Megatron-Core's own numbers and a schedule played move by move."""

from pathlib import Path

import pytest
from measure import orion
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_unimm.methods.registry import build_method
from megatron_unimm.parallel.platform_meta import META, pretend_rank
from megatron_unimm.plan.pipeline import in_flight, pipeline_time, places
from megatron_unimm.train.dry_run import build_chunk


@pytest.mark.parametrize(
    "overrides",
    [
        ("system.parallel.pipeline=2",),
        ("system.parallel.pipeline=2", "system.parallel.virtual_pipeline=3"),
        ("system.parallel.pipeline=4", "system.parallel.layers_per_stage=[1,2,2,1]"),
        ("system.parallel={pipeline: 2, virtual_pipeline: 2, layers_per_stage: [2, 1, 1, 2]}",),
    ],
)
def test_layers_are_megatron_cores(overrides: tuple[str, ...], repo: Path) -> None:
    stage = orion(repo, "model.backbone.num_layers=6", *overrides)
    parallel = stage.system.parallel
    for rank, rank_places in enumerate(places(stage)):
        with pretend_rank(parallel, rank, parallel.pipeline) as groups:
            method = build_method(stage, META, groups)
            for number, place in enumerate(rank_places):
                chunk, _ = build_chunk(stage, method, number)
                layers = [layer.layer_number - 1 for layer in chunk.backbone.decoder.layers]
                assert layers == list(place.layers)
                assert (chunk.pre_process, chunk.post_process) == (place.first, place.last)


def held_at_most(rank: int, stages: int, chunks: int, micro_batches: int) -> int:
    """Most micro-batches that a rank holds over all its chunks, when it plays Megatron-Core's order: forward passes of
    the warm-up, then one forward and one backward pass in turn, then what is left of the backward passes."""
    total = chunks * micro_batches
    ahead = stages - rank - 1 if chunks == 1 else 2 * (stages - rank - 1) + (chunks - 1) * stages
    moves = ["forward"] * min(ahead, total)
    for _ in range(total - len(moves)):
        moves += ["forward", "backward"]
    held = most = 0
    for move in moves:
        held += 1 if move == "forward" else -1
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("stages", "chunks", "micro_batches"), [(4, 1, 8), (4, 1, 2), (4, 2, 8), (2, 3, 4), (4, 4, 16)]
)
def test_in_flight(stages: int, chunks: int, micro_batches: int) -> None:
    order = [chunk for _, chunk in get_schedule_table(micro_batches, chunks, stages)]
    for rank in range(stages):
        held = in_flight(rank, stages, chunks, micro_batches)
        assert sum(held) == held_at_most(rank, stages, chunks, micro_batches)
        # The warm-up's forward passes and the first one after it, by chunk.
        assert held == [order[: sum(held)].count(chunk) for chunk in range(chunks)]


def play(forward: list[float], backward: list[float], micro_batches: int) -> float:
    """Seconds of 1F1B, played move by move: each waits for the rank and for the neighbour's result."""
    stages = len(forward)
    moves = []
    for rank in range(stages):
        ahead = min(stages - rank - 1, micro_batches)
        order = [("forward", number) for number in range(ahead)]
        for number in range(micro_batches - ahead):
            order += [("forward", ahead + number), ("backward", number)]
        moves.append(order + [("backward", number) for number in range(micro_batches - ahead, micro_batches)])
    done: dict[tuple[str, int, int], float] = {}
    clock, position = [0.0] * stages, [0] * stages
    while any(position[rank] < len(moves[rank]) for rank in range(stages)):
        for rank in range(stages):
            while position[rank] < len(moves[rank]):
                kind, number = moves[rank][position[rank]]
                neighbour = rank - 1 if kind == "forward" else rank + 1
                needed = (kind, neighbour, number)
                if 0 <= neighbour < stages and needed not in done:
                    break
                seconds = forward[rank] if kind == "forward" else backward[rank]
                clock[rank] = max(clock[rank], done.get(needed, 0.0)) + seconds
                done[(kind, rank, number)] = clock[rank]
                position[rank] += 1
    return max(clock)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 2), (4, 4), (4, 16)])
def test_time_of_equal_stages_is_exact(stages: int, micro_batches: int) -> None:
    played = play([1.0] * stages, [2.0] * stages, micro_batches)
    assert pipeline_time([3.0] * stages, 1, micro_batches) == pytest.approx(played)
    # arXiv 2104.04473, section 2.3: interleaving divides the bubble (P - 1)(t_f + t_b) by v.
    assert pipeline_time([3.0] * stages, 2, micro_batches) == 3.0 * micro_batches + 3.0 * (stages - 1) / 2


@pytest.mark.parametrize("slow", range(4))
def test_time_of_unequal_stages(slow: int) -> None:
    """The slowest stage is busy but for the way to it and from it, which others may shorten: by up to 11 % here."""
    forward = [1.5 if rank == slow else 1.0 for rank in range(4)]
    backward = [2 * seconds for seconds in forward]
    played = play(forward, backward, 8)
    planned = pipeline_time([f + b for f, b in zip(forward, backward, strict=True)], 1, 8)
    assert played <= planned <= 1.12 * played
