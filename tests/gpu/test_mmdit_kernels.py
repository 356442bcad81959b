"""On a GPU: the fused kernels of joint attention (Transformer Engine's variable lengths, compiled FlexAttention) in
bf16 against torch's in fp32.

NOT YET RUN ON A GPU; the tolerance is a guess, to be replaced by measured errors with a margin.
"""

import numpy as np
import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_unimm.models.mmdit.attention import JointAttention, JointBlocks, JointSegments, lower
from megatron_unimm.models.mmdit.visibility import CROSS, IMAGE_KINDS, KINDS, Role, TokenTable, local_index

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not HAVE_TE, reason="needs Transformer Engine"),
]

TOLERANCE = 1e-2
"""Relative, of a tensor's norm. bf16 has 8 bits, 0.4 % per rounding."""
NUM_HEADS, HEAD_SIZE = 4, 64
GPU = torch.device("cuda")


class Group:
    """A context group as far as these checks go: they gather nothing."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def make_row(samples: list[list[int]]) -> TokenTable:
    """From the picture sizes of each sample's frames: 77 text tokens, noisy and clean tokens for each; then padding."""
    text, image = [], []
    for sample, frames in enumerate(samples):
        for frame, size in enumerate(frames):
            text += [(sample, frame, Role.CONDITION)] * 77
            image += [(sample, frame, Role.NOISY)] * size + [(sample, frame, Role.CLEAN)] * size
    for stream in (text, image):
        stream += [(0, 0, Role.PADDING)] * (-len(stream) % 64 + 64)
    return TokenTable(*np.array(text + image, dtype=np.int64).T, num_text=len(text))


ROW = make_row([[256, 240], [100], [256, 240], [300, 64, 64]])


def attention(backend: str, kind: str, context_size: int = 1) -> JointAttention:
    config = TransformerConfig(num_layers=1, hidden_size=NUM_HEADS * HEAD_SIZE, num_attention_heads=NUM_HEADS)
    return JointAttention(config, backend, Group(context_size), kind)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(GPU).manual_seed(len(shape)), device=GPU)


def run(
    module: JointAttention,
    lowering: JointSegments | JointBlocks,
    dtype: torch.dtype,
    num_queries: int,
    num_keys: int | None = None,
):
    """Output and gradients of queries, keys, values, of which there are as many unless ``num_keys`` says another."""
    counts = (num_queries, num_keys or num_queries, num_keys or num_queries)
    drawn = draw(3, max(counts), NUM_HEADS, HEAD_SIZE).to(dtype)
    heads = [part[:count].clone().requires_grad_() for part, count in zip(drawn, counts, strict=True)]
    output = module.attend(*heads, lowering)
    weight = draw(num_queries, NUM_HEADS * HEAD_SIZE)
    return output, *torch.autograd.grad((output.float() * weight).sum(), heads)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.isfinite().all()
    assert (found.float() - expected.float()).norm() < TOLERANCE * expected.float().norm()


@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_torch(kind: str) -> None:
    """The kernel that each kind gets: output, gradients, zeros at padding."""
    padding = torch.from_numpy(ROW.role == Role.PADDING).to(GPU)
    of_image, of_text = padding[ROW.num_text :], padding[: ROW.num_text]
    of_queries = of_image if kind in (*IMAGE_KINDS, CROSS) else padding
    of_keys = of_text if kind == CROSS else of_queries
    counts = len(of_queries), len(of_keys)
    expected = run(attention("torch", kind), lower(ROW, kind, "torch", GPU), torch.float32, *counts)
    fused = lower(ROW, kind, "transformer_engine", GPU)
    found = run(attention("transformer_engine", kind), fused, torch.bfloat16, *counts)
    for ours, theirs, padded in zip(found, expected, (of_queries, of_queries, of_keys, of_keys), strict=True):
        assert_close(ours, theirs)
        assert ours[padded].abs().max() == 0


def test_variable_lengths_with_repeated_keys() -> None:
    """Block-causal segments, in which queries and keys differ in number, also fit Transformer Engine."""
    segments = JointSegments.build(ROW, "block_causal", GPU)
    expected = run(attention("torch", "block_causal"), segments, torch.float32, len(ROW))
    found = run(attention("transformer_engine", "block_causal"), segments, torch.bfloat16, len(ROW))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["joint", "block_causal"])
def test_a_context_rank(kind: str) -> None:
    """Queries of rank 1 of 2, keys of both as the gather leaves them, against the same tokens of the whole row."""
    orders = [local_index(ROW, rank, 2) for rank in range(2)]
    gathered = torch.from_numpy(np.concatenate(orders)).to(GPU)
    mine = torch.from_numpy(orders[1]).to(GPU)
    query, key, value = draw(3, len(ROW), NUM_HEADS, HEAD_SIZE)
    expected = attention("torch", kind).attend(query, key, value, lower(ROW, kind, "torch", GPU))[mine]
    module, lowering = attention("transformer_engine", kind, 2), lower(ROW, kind, "transformer_engine", GPU, 1, 2)
    heads = [part.bfloat16() for part in (query[mine], key[gathered], value[gathered])]
    if isinstance(lowering, JointBlocks):
        found = module._by_blocks(*heads, lowering.block_mask)
    else:
        found = module._by_segments(*heads, lowering)
    assert_close(found.flatten(1), expected)


def test_rows_of_one_length_share_compiled_blocks() -> None:
    """A new row costs no compilation: with recompiling forbidden, other rows of the length still run."""
    module = attention("transformer_engine", "block_causal")
    run(module, lower(ROW, "block_causal", "transformer_engine", GPU), torch.bfloat16, len(ROW))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(len(ROW))
            other = TokenTable(ROW.sample[order], ROW.frame[order], ROW.role[order], ROW.num_text)
            lowering = lower(other, "block_causal", "transformer_engine", GPU)
            run(module, lowering, torch.bfloat16, len(ROW))
