"""Attends over small MMDiT rows under context parallelism and writes down outputs and gradients of the whole row. Also
home of the rows, inputs and kernels that test_mmdit_attention.py shares.

usage, under torchrun: mmdit_attention_worker.py FOLDER CASES; CASES is a JSON list of {"name": …, "kind": …,
"kernel": …, "row": …, "size": …}

Each case is run by all groups of ``size`` neighbouring ranks; rank 0 writes FOLDER/NAME.pt.
"""

import json
import sys
from pathlib import Path
from typing import Any

import megatron_unimm.parallel  # noqa: F401 isort: skip - before Megatron-Core, on a machine without a GPU

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.attention.flex_attention as flex
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_unimm.models.mmdit.attention import JointAttention, JointBlocks, JointSegments
from megatron_unimm.models.mmdit.visibility import CROSS, IMAGE_KINDS, Role, TokenTable, local_index

NUM_HEADS, HEAD_SIZE = 2, 4
CPU = torch.device("cpu")
KERNELS = ("scaled_dot_product", "variable_length", "flex")


class Alone:
    """A context group of one rank."""

    def size(self) -> int:
        return 1


class SequenceLoop(torch.nn.Module):
    """In the place of Transformer Engine: one sequence after the other, by the same arguments."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: None, mask_type: Any, packed_seq_params: PackedSeqParams
    ) -> Tensor:
        packed = packed_seq_params
        assert packed.qkv_format == "thd"
        assert packed.cu_seqlens_q.dtype == packed.cu_seqlens_kv.dtype == torch.int32
        lengths = [packed.cu_seqlens_q.diff().tolist(), packed.cu_seqlens_kv.diff().tolist()]
        assert [packed.max_seqlen_q, packed.max_seqlen_kv] == [max(lengths[0]), max(lengths[1])]
        parts = zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True)
        return torch.cat([softmax_attention(*part) for part in parts])


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All of ``[q, N, D]`` to all of ``[k, N, D]``: ``[q, N * D]``."""
    scores = torch.einsum("qnd,knd->nqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1), value).flatten(1)


def make_row(tokens: list[list[tuple[int, int, int]]]) -> TokenTable:
    """From (sample, frame, role) of each token of the text stream and of the image stream."""
    columns = np.array([token for stream in tokens for token in stream], dtype=np.int64).T
    return TokenTable(*columns, num_text=len(tokens[0]))


def row_of(name: str | int) -> TokenTable:
    """A random row by its seed, or ``sparse``: one small sample, and padding that fills whole ranks.

    Random rows have one to four samples of up to four frames, some of whose conditions are shared, with padding behind
    (odd seeds: all tokens shuffled in their stream; every third seed: samples of one size).
    """
    if name == "sparse":
        padding = (0, 0, Role.PADDING)
        return make_row([[(0, 0, 0)] + [padding] * 7, [(0, 0, 1), (0, 0, 2), (0, 1, 1)] + [padding] * 9])
    seed = int(name)
    rng = np.random.default_rng(seed)
    streams: list[list[tuple[int, int, int]]] = [[], []]
    num_samples = int(rng.integers(1, 5))
    for sample in range(num_samples):
        draw = np.random.default_rng(seed if seed % 3 == 0 else 1000 * seed + sample)
        for frame in range(int(draw.integers(1, 5))):
            size = int(draw.integers(1, 6))
            streams[0] += [(sample, frame, Role.CONDITION)] * int(draw.integers(0, 4))
            streams[0] += [(sample, frame, Role.SHARED)] * int(draw.integers(0, 3))
            streams[1] += [(sample, frame, Role.CONDITION)] * int(draw.integers(0, 3))
            streams[1] += [(sample, frame, Role.SHARED)] * int(draw.integers(0, 2))
            streams[1] += [(sample, frame, Role.NOISY)] * (size if draw.random() < 0.8 else 0)
            streams[1] += [(sample, frame, Role.CLEAN)] * (size if draw.random() < 0.8 else 0)
    for stream in streams:
        stream += [(num_samples - 1, 0, Role.PADDING)] * (4 + -len(stream) % 4)
        if seed % 2:
            rng.shuffle(stream)
    return make_row([[tuple(map(int, token)) for token in stream] for stream in streams])


def sides(table: TokenTable, kind: str, rank: int = 0, size: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Whose queries and whose keys one context rank has in attention of a kind, as tokens of the row."""
    mine = local_index(table, rank, size)
    text, image = np.split(mine, [table.num_text // size])
    if kind == CROSS:
        return image, text
    return (image, image) if kind in IMAGE_KINDS else (mine, mine)


def inputs(num_tokens: int) -> tuple[Tensor, ...]:
    """Queries, keys, values ``[T, N, D]``, and weights ``[T, N * D]`` that make of an output a scalar."""
    generator = torch.Generator().manual_seed(num_tokens)
    heads = torch.randn(3, num_tokens, NUM_HEADS, HEAD_SIZE, generator=generator, dtype=torch.float64)
    return *heads, torch.randn(num_tokens, NUM_HEADS * HEAD_SIZE, generator=generator, dtype=torch.float64)


def inputs_of(table: TokenTable, kind: str, rank: int = 0, size: int = 1) -> tuple[Tensor, ...]:
    """The same of the tokens that one rank has."""
    queries, keys = map(torch.from_numpy, sides(table, kind, rank, size))
    query, key, value, weight = inputs(len(table))
    return query[queries], key[keys], value[keys], weight[queries]


def attention(kind: str, kernel: str, group: Any) -> JointAttention:
    config = TransformerConfig(num_layers=1, hidden_size=NUM_HEADS * HEAD_SIZE, num_attention_heads=NUM_HEADS)
    module = JointAttention(config, "torch", group, kind)
    if kernel == "variable_length":
        module.variable_length = SequenceLoop()
    return module


def lowered(table: TokenTable, kind: str, kernel: str, rank: int = 0, size: int = 1) -> JointSegments | JointBlocks:
    return (JointBlocks if kernel == "flex" else JointSegments).build(table, kind, CPU, rank, size)


def results(table: TokenTable, kind: str, kernel: str, group: Any, rank: int = 0) -> dict[str, Tensor]:
    """Output and gradients of one rank's tokens."""
    torch._dynamo.reset()  # FlexAttention without compilation traces each call anew, up to a limit
    *heads, weight = inputs_of(table, kind, rank, group.size())
    heads = [part.requires_grad_() for part in heads]
    module = attention(kind, kernel, group)
    output = module.attend(*heads, lowered(table, kind, kernel, rank, group.size()))
    gradients = torch.autograd.grad((output * weight).sum(), heads)
    return {"output": output.detach(), **dict(zip(("query", "key", "value"), gradients, strict=True))}


def gathered(values: Tensor, order: np.ndarray, group: dist.ProcessGroup) -> Tensor:
    """In row order, from all ranks of a group."""
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts)[torch.from_numpy(np.argsort(order))]


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    dist.init_process_group("gloo")
    flex._validate_device = lambda *heads: None  # it forbids the backward pass on CPU, which works uncompiled
    groups = {}
    for size in sorted({case["size"] for case in cases}):
        for start in range(0, dist.get_world_size(), size):
            ranks = list(range(start, start + size))
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                groups[size] = group
    for case in cases:
        table, kind, group = row_of(case["row"]), case["kind"], groups[case["size"]]
        found = results(table, kind, case["kernel"], group, group.rank())
        parts = zip(*(sides(table, kind, rank, case["size"]) for rank in range(case["size"])), strict=True)
        of_queries, of_keys = map(np.concatenate, parts)
        orders = {"output": of_queries, "query": of_queries, "key": of_keys, "value": of_keys}
        whole = {name: gathered(found[name], order, group) for name, order in orders.items()}
        if dist.get_rank() == 0:
            torch.save(whole, folder / f"{case['name']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
