"""A platform without devices and without peers: one process plays any rank of a job of any size.

Tensors are on torch's meta device, which knows shapes and holds no memory; collectives go to torch's fake backend,
which returns at once and moves nothing. What comes of it is shapes, parameter counts and errors, and no numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_unimm.config.parallel import ParallelConfig
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from megatron_unimm.parallel.platform import Platform

META = Platform("cpu", torch.device("meta"), "fake")


@contextmanager
def pretend_rank(config: ParallelConfig, rank: int, world_size: int, seed: int = 0) -> Iterator[ParallelGroups]:
    """The process groups of one rank of a job, on the meta device.

    Megatron-Core takes its communication buffers from torch's current GPU, which therefore is the meta device, too.

    Raises:
        AssertionError: the process has already joined a real job.
    """
    assert not dist.is_initialized(), "the process groups of a real job are there"
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        groups = initialize_groups(config, META, seed, host_backend="fake")
        with _on_meta():
            yield groups
    finally:
        destroy_groups()


@contextmanager
def _on_meta() -> Iterator[None]:
    """What the meta device needs of others, while it is used."""
    device, attention = torch.cuda.current_device, torch.nn.functional.scaled_dot_product_attention
    generator = torch.Generator
    torch.cuda.current_device = lambda: META.device  # type: ignore[assignment,return-value]
    torch.Generator = lambda device="cpu": generator("cpu")  # type: ignore[assignment,misc]
    torch.nn.functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.cuda.current_device = device  # type: ignore[assignment]
        torch.Generator = generator  # type: ignore[misc]
        torch.nn.functional.scaled_dot_product_attention = attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """torch's fused kernel for CPUs. Left to itself, torch takes attention apart on this device, all pairs written
    down, at ten times the cost."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
