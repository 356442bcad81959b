"""Parts of SANA against plain loops: linear attention, pictures by size, and which condition a picture sees."""

import numpy as np
import torch
import torch.nn.functional as F

from megatron_unimm.models.mmdit.attention import JointSegments
from megatron_unimm.models.mmdit.pictures import GridBatch, PictureBatches
from megatron_unimm.models.mmdit.visibility import CROSS, Role, TokenTable
from megatron_unimm.models.sana.feed_forward import convolve
from megatron_unimm.models.sana.linear_attention import relu_kernel

CPU = torch.device("cpu")


def test_linear_attention_is_a_weighted_mean() -> None:
    """Each query's weights are its products with the keys, without what is negative; without weights it reads zeros."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 5, 7, 4).unbind(0)  # [segments, heads, tokens, head size]
    weights = F.relu(query) @ F.relu(key).transpose(-1, -2)
    sums = weights.sum(-1, keepdim=True)
    assert not sums.all()
    expected = torch.where(sums > 0, weights @ value / sums, 0.0)
    torch.testing.assert_close(relu_kernel(query, key, value), expected, rtol=1e-5, atol=1e-6)
    low = relu_kernel(*(heads.bfloat16() for heads in (query, key, value)))
    assert low.dtype == torch.bfloat16
    same = relu_kernel(*(heads.bfloat16().float() for heads in (query, key, value)))
    assert torch.equal(low, same.bfloat16()), "summed in float32"


def test_pictures_are_convolved_by_themselves() -> None:
    torch.manual_seed(0)
    sizes = np.array([[2, 3], [4, 1], [2, 3]])
    pictures = PictureBatches.build(sizes, CPU)
    assert pictures.batches == (GridBatch(2, 2, 3), GridBatch(1, 4, 1))
    tokens, weight, bias = torch.randn(16 + 3, 5), torch.randn(5, 9), torch.randn(5)  # three of padding
    grids = pictures.grids(tokens.index_select(0, pictures.index))
    found = torch.zeros(19, 5)
    parts = [convolve(grid, weight, bias).flatten(0, 2) for grid in grids]
    found = found.index_copy(0, pictures.index, torch.cat(parts))
    for part, out, (rows, columns) in zip(
        tokens[:16].split([6, 4, 6]), found[:16].split([6, 4, 6]), sizes.tolist(), strict=True
    ):
        padded = F.pad(part.reshape(rows, columns, 5), (0, 0, 1, 1, 1, 1))
        for row in range(rows):
            for column in range(columns):
                window = padded[row : row + 3, column : column + 3].reshape(9, 5)
                expected = (window * weight.T).sum(0) + bias
                torch.testing.assert_close(out[row * columns + column], expected, rtol=1e-5, atol=1e-5)
    assert not found[16:].any()


def test_a_row_without_pictures_has_gradients() -> None:
    pictures = PictureBatches.build(np.zeros((0, 2), dtype=np.int64), CPU)
    weight, bias = torch.randn(5, 9, requires_grad=True), torch.randn(5, requires_grad=True)
    (grid,) = pictures.grids(torch.zeros(0, 5))
    convolve(grid, weight, bias).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_picture_sees_its_own_condition() -> None:
    """Of two pictures of two and one condition tokens; padding in both streams."""
    sample = np.array([0, 0, 1, -1, 0, 1, 1, 0, -1])
    role = np.where(sample < 0, Role.PADDING, Role.NOISY)
    segments = JointSegments.build(TokenTable(sample, np.zeros_like(sample), role, num_text=4), CROSS, CPU)
    seen = {}
    queries, keys = segments.query_index.tolist(), segments.key_index.tolist()
    for batch in segments.batches:
        for _ in range(batch.num_segments):
            mine, queries = queries[: batch.num_queries], queries[batch.num_queries :]
            theirs, keys = keys[: batch.num_keys], keys[batch.num_keys :]
            seen |= dict.fromkeys(mine, theirs)
    assert seen == {0: [0, 1], 3: [0, 1], 1: [2], 2: [2]}, "indices into the image's and the text's stream"
