"""Which layers each pipeline rank has, and how many micro-batches it holds at once: Megatron-Core's schedules."""

from megatron_unimm.config.layout import trunk_of
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.footprint import ChunkPlace


def places(stage: StageConfig) -> list[list[ChunkPlace]]:
    """The chunks of each pipeline rank. Chunk v of rank p is number v P + p of the model, front to back."""
    parallel, num_layers = stage.system.parallel, trunk_of(stage).num_layers
    chunks = parallel.pipeline * parallel.virtual_pipeline
    counts = parallel.layers_per_stage or [num_layers // chunks] * chunks
    bounds = [sum(counts[:number]) for number in range(chunks + 1)]
    whole = [
        ChunkPlace(number == 0, number == chunks - 1, range(bounds[number], bounds[number + 1]))
        for number in range(chunks)
    ]
    return [whole[rank :: parallel.pipeline] for rank in range(parallel.pipeline)]


def in_flight(rank: int, stages: int, chunks: int, micro_batches: int) -> list[int]:
    """Micro-batches whose activations a pipeline rank holds at its fullest, for each of its chunks.

    1F1B (arXiv 2104.04473, section 2.2): rank p of P runs P - p - 1 micro-batches ahead, and holds one more while it
    works on it. Interleaved with v chunks per rank (section 2.3): it runs 2 (P - p - 1) + (v - 1) P chunks ahead, P
    micro-batches through a chunk before the next one.
    """
    if chunks == 1:
        return [min(micro_batches, stages - rank)]
    ahead = min(2 * (stages - rank - 1) + (chunks - 1) * stages, chunks * micro_batches)
    held = [0] * chunks
    for number in range(min(ahead + 1, chunks * micro_batches)):
        held[number // stages % chunks] += 1
    return held


def pipeline_time(stage_times: list[float], chunks: int, micro_batches: int) -> float:
    """Seconds from the first forward pass to the last backward pass, when a micro-batch takes ``stage_times``, forward
    and backward, on each rank: the slowest is busy all the time, and waits for the first micro-batch to come and the
    last to go, which interleaving makes ``chunks`` times shorter (the bubble (P - 1) / (v m) of arXiv 2104.04473)."""
    slowest = max(stage_times)
    return micro_batches * slowest + (sum(stage_times) - slowest) / chunks
