"""Joint attention of MMDiT rows: every lowering against a rule written again as a loop, leaks, padding, context
parallelism, and FLUX's rotary positions against diffusers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mmdit_attention_worker as worker
import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as flex
from mmdit_attention_worker import (
    CPU,
    HEAD_SIZE,
    KERNELS,
    NUM_HEADS,
    Alone,
    inputs,
    inputs_of,
    lowered,
    make_row,
    row_of,
)
from torch import Tensor

from megatron_unimm.models.mmdit.attention import JointBlocks, JointContext, JointSegments, SegmentBatch, lower
from megatron_unimm.models.mmdit.rotary import axes_angles, rotate_pairs
from megatron_unimm.models.mmdit.visibility import CROSS, KINDS, Role, TokenTable, Traits, local_index, sees, visible

TOLERANCE = 1e-12
"""Absolute, in double. Measured 1.3e-15 on outputs, 2.2e-15 on gradients, for every kernel."""
SEEDS = range(6)
CONDITION, NOISY, CLEAN, PADDING, SHARED = Role
TWO_FRAMES = make_row([[(0, 0, 0), (0, 1, 0)], [(0, 0, 1), (0, 0, 2), (0, 1, 1), (0, 1, 2)]])
FIGURE_6 = [
    [1, 0, 1, 0, 0, 0],
    [0, 1, 0, 1, 1, 0],
    [1, 0, 1, 0, 0, 0],
    [0, 0, 0, 1, 0, 0],
    [0, 1, 0, 1, 1, 0],
    [0, 0, 0, 1, 0, 1],
]
TWO_FRAMES_SHARED = make_row(
    [[(0, 0, 0), (0, 0, 4), (0, 1, 0), (0, 1, 4)], [(0, 0, 1), (0, 0, 2), (0, 1, 1), (0, 1, 2)]]
)
SHARED_FIGURE = [
    [1, 1, 0, 0, 1, 0, 0, 0],
    [1, 1, 0, 0, 1, 0, 0, 0],
    [0, 1, 1, 1, 0, 1, 1, 0],
    [0, 1, 1, 1, 0, 1, 1, 0],
    [1, 1, 0, 0, 1, 0, 0, 0],
    [0, 0, 0, 0, 0, 1, 0, 0],
    [0, 1, 1, 1, 0, 1, 1, 0],
    [0, 0, 0, 0, 0, 1, 0, 1],
]
"""Each frame with a condition of its own and a shared one; n1 and its conditions see the shared one of frame 0."""


@pytest.fixture(autouse=True)
def flex_backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention forbids the backward pass on CPU, where it does work uncompiled."""
    monkeypatch.setattr(flex, "_validate_device", lambda *heads: None)


def may_see(kind: str, table: TokenTable, query: int, key: int) -> bool:
    """The rules once more, of one pair."""
    roles = (table.role[query], table.role[key])
    if PADDING in roles or table.sample[query] != table.sample[key]:
        return False
    if kind.startswith("image") and min(query, key) < table.num_text:
        return False
    if kind == "cross":
        return key < table.num_text <= query and table.frame[query] == table.frame[key]
    if not kind.endswith("block_causal"):
        return True
    ahead = table.frame[query] - table.frame[key]
    if roles == (CLEAN, CLEAN):
        return ahead >= 0
    if roles[1] == CLEAN:
        return ahead > 0
    return roles[0] != CLEAN and (ahead == 0 or (roles[1] == SHARED and ahead > 0))


def reference(table: TokenTable, kind: str) -> dict[str, Tensor]:
    """Output and gradients, one query after the other."""
    queries, keys = worker.sides(table, kind)
    *heads, weight = inputs_of(table, kind)
    query, key, value = (part.requires_grad_() for part in heads)
    rows = []
    for number, token in enumerate(queries):
        seen = [place for place, other in enumerate(keys) if may_see(kind, table, token, other)]
        attended = worker.softmax_attention(query[[number]], key[seen], value[seen])
        rows.append(attended if seen else torch.zeros_like(weight[[number]]))
    output = torch.cat(rows)
    gradients = torch.autograd.grad((output * weight).sum(), (query, key, value), allow_unused=True)
    return {"output": output.detach(), **dict(zip(("query", "key", "value"), gradients, strict=True))}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, values in expected.items():
        torch.testing.assert_close(
            found[name], values, rtol=0, atol=TOLERANCE, msg=lambda text, of=name: f"{of}: {text}"
        )


def test_two_frames_are_figure_6() -> None:
    everything = np.arange(6)
    assert visible(TWO_FRAMES, "block_causal", everything, everything).astype(int).tolist() == FIGURE_6


def test_two_frames_with_shared_conditions() -> None:
    everything = np.arange(8)
    assert visible(TWO_FRAMES_SHARED, "block_causal", everything, everything).astype(int).tolist() == SHARED_FIGURE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_rule(kind: str, seed: int) -> None:
    """Of chosen queries and keys, in numpy and, as kernels ask it, with tensors."""
    table = row_of(seed)
    rng = np.random.default_rng(seed)
    queries, keys = (rng.permutation(len(table))[: len(table) // 2] for _ in range(2))
    expected = np.array([[may_see(kind, table, query, key) for key in keys] for query in queries])
    assert np.array_equal(visible(table, kind, queries, keys), expected)
    traits = Traits(*map(torch.from_numpy, table.traits()))
    found = sees(kind, traits.at(torch.from_numpy(queries)[:, None]), traits.at(torch.from_numpy(keys)))
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_and_gradients(kind: str, kernel: str) -> None:
    for seed in SEEDS if kernel != "flex" else (1, 3):
        table = row_of(seed)
        assert_equal(worker.results(table, kind, kernel, Alone()), reference(table, kind))


def long_row(num_conditions: int = 20) -> TokenTable:
    """Two samples of three frames of 100 tokens: some blocks of 128 are empty, some full, most mixed. For full ones in
    the text stream it takes 260 conditions of each frame."""
    text, image = [], []
    for sample in range(2):
        for frame in range(3):
            text += [(sample, frame, CONDITION)] * num_conditions
            image += [(sample, frame, NOISY)] * (300 if frame == 1 else 100) + [(sample, frame, CLEAN)] * 150
    return make_row([text, image + [(1, 0, PADDING)] * 60])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 4)])
def test_blocks_equal_those_of_torch(kind: str, rank: int, size: int) -> None:
    """Which blocks are full and which are mixed, counted by us and drawn out by torch."""
    table = long_row(260 if kind == CROSS else 20)
    found = JointBlocks.build(table, kind, CPU, rank, size).block_mask
    queries = worker.sides(table, kind, rank, size)[0]
    keys = np.concatenate([worker.sides(table, kind, number, size)[1] for number in range(size)])
    mask = torch.from_numpy(visible(table, kind, queries, keys))

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[query, key]

    expected = flex.create_block_mask(mask_mod, 1, 1, len(queries), len(keys), device="cpu")
    assert found.shape == expected.shape
    parts = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices")
    for name in (*parts, "full_q_num_blocks", "full_q_indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    if size == 1:
        assert found.full_kv_num_blocks.sum() > 0
        assert found.kv_num_blocks.sum() > 0
        assert (found.full_kv_num_blocks + found.kv_num_blocks).min() < len(keys) // 128
    found_mask, expected_mask = (
        flex.create_mask(mask.mask_mod, 1, 1, len(queries), len(keys), device="cpu") for mask in (found, expected)
    )
    assert torch.equal(found_mask, expected_mask)


def test_flex_over_many_blocks() -> None:
    table = long_row()
    both = [worker.results(table, "block_causal", kernel, Alone()) for kernel in ("flex", "scaled_dot_product")]
    assert_equal(*both)


def test_a_new_row_does_not_recompile_flex() -> None:
    """Rows of one length share one graph, whatever is in them."""
    torch._dynamo.reset()
    compilations = []

    def count(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(flex.flex_attention, backend=count)
    heads = [part.transpose(0, 1)[None] for part in inputs(48)[:3]]
    for seed in range(5):
        draw = np.random.default_rng(seed)
        table = TokenTable(draw.integers(0, 3, 48), draw.integers(0, 3, 48), draw.integers(0, 5, 48), num_text=8)
        lowering = JointBlocks.build(table, "block_causal", CPU)
        output = compiled(*heads, block_mask=lowering.block_mask)
        expected = worker.attention("block_causal", "scaled_dot_product", Alone()).attend(
            *inputs(48)[:3], lowered(table, "block_causal", "scaled_dot_product")
        )
        torch.testing.assert_close(output[0].transpose(0, 1).flatten(1), expected, rtol=0, atol=TOLERANCE)
    assert len(compilations) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_segments_hold_visible_pairs_and_no_other(kind: str, seed: int) -> None:
    """What attention costs is what the rule asks for."""
    table = row_of(seed)
    segments = JointSegments.build(table, kind, CPU)
    pairs = sum(count * queries * keys for count, queries, keys in segments.batches)
    everything = np.arange(len(table))
    assert pairs == visible(table, kind, everything, everything).sum()


def test_equal_samples_are_one_batch() -> None:
    streams = [[(sample, 0, role) for sample in range(3) for role in roles] for roles in ((0, 0), (1, 1, 1, 1))]
    table = make_row([streams[0] + [(2, 0, PADDING)], streams[1] + [(2, 0, PADDING)]])
    assert JointSegments.build(table, "joint", CPU).batches == (SegmentBatch(3, 6, 6),)
    assert JointSegments.build(table, "image", CPU).batches == (SegmentBatch(3, 4, 4),)


def test_lowering_of_each_backend() -> None:
    for kind in KINDS:
        assert isinstance(lower(TWO_FRAMES, kind, "torch", CPU), JointSegments)
        chosen = JointBlocks if kind.endswith("block_causal") else JointSegments
        assert isinstance(lower(TWO_FRAMES, kind, "transformer_engine", CPU), chosen)


# Leaks: what must not reach a token does not change a bit of it.


def story(shared: bool = False) -> TokenTable:
    """Two samples; the first has three frames, with conditions in both streams."""
    text, image = [], []
    for sample, frames in ((0, 3), (1, 2)):
        for frame in range(frames):
            text += [(sample, frame, CONDITION)] * 2 + [(sample, frame, SHARED if shared else CONDITION)]
            image += [(sample, frame, role) for role in (CONDITION, NOISY, NOISY, CLEAN, CLEAN)]
    return make_row([text, image])


def two_layers(table: TokenTable, hidden: Tensor, kernel: str) -> Tensor:
    """``[T, N * D]``, each layer with random projections and a residual."""
    generator = torch.Generator().manual_seed(0)
    module = worker.attention("block_causal", kernel, Alone())
    lowering = lowered(table, "block_causal", kernel)
    for _ in range(2):
        weights = torch.randn(3, hidden.shape[1], hidden.shape[1], generator=generator, dtype=torch.float64)
        heads = [(hidden @ weight).unflatten(1, (NUM_HEADS, HEAD_SIZE)) for weight in weights]
        hidden = hidden + module.attend(*heads, lowering)
    return hidden


def changed(table: TokenTable, of: np.ndarray, kernel: str) -> np.ndarray:
    """bool ``[T]``: outputs of two layers that are not bit for bit what they were before some inputs were changed."""
    torch._dynamo.reset()
    hidden = torch.randn(len(table), NUM_HEADS * HEAD_SIZE, generator=torch.Generator().manual_seed(1)).double()
    other = hidden.clone()
    other[torch.from_numpy(of)] += 1.0
    before, after = two_layers(table, hidden, kernel), two_layers(table, other, kernel)
    return (before != after).any(dim=1).numpy()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("frame", range(3))
@pytest.mark.parametrize("shared", [False, True])
def test_clean_tokens_reach_later_frames_only(kernel: str, frame: int, shared: bool) -> None:
    """The noisy tokens of a frame, and those of frames before, never know its clean image; later frames do."""
    table = story(shared)
    own = table.sample == 0
    reached = changed(table, own & (table.frame == frame) & (table.role == CLEAN), kernel)
    expected = own & ((table.frame > frame) | ((table.frame == frame) & (table.role == CLEAN)))
    assert np.array_equal(reached, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("role", [CONDITION, NOISY])
@pytest.mark.parametrize("frame", range(3))
def test_conditions_and_noise_stay_in_their_frame(kernel: str, role: Role, frame: int) -> None:
    table = story()
    own = (table.sample == 0) & (table.frame == frame)
    reached = changed(table, own & (table.role == role), kernel)
    assert np.array_equal(reached, own & (table.role != CLEAN))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("role", [CONDITION, NOISY, SHARED])
@pytest.mark.parametrize("frame", range(3))
def test_shared_conditions_carry_their_frame_to_later_ones(kernel: str, role: Role, frame: int) -> None:
    """And to no clean token, nor to frames before."""
    table = story(shared=True)
    own = table.sample == 0
    reached = changed(table, own & (table.frame == frame) & (table.role == role), kernel)
    expected = own & (table.frame >= frame) & (table.role != CLEAN)
    assert not (reached & ~expected).any()
    # What has come through the shared tokens of the first layer may be too little to round differently everywhere.
    assert (
        (reached[expected]).all() if role == SHARED else reached[own & (table.frame == frame + 1)].any() or frame == 2
    )


def padding_of(table: TokenTable, kind: str) -> list[Tensor]:
    """bool, of queries and of keys."""
    return [torch.from_numpy(table.role[tokens] == PADDING) for tokens in worker.sides(table, kind)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", KERNELS[:2])
def test_padding_is_zero_and_costs_nothing(kind: str, kernel: str) -> None:
    """Even if it held no numbers."""
    table = row_of("sparse")
    of_queries, of_keys = padding_of(table, kind)
    *heads, weight = inputs_of(table, kind)
    paddings = [of_queries, of_keys, of_keys]
    for part, padding in zip(heads, paddings, strict=True):
        part[padding] = torch.nan
        part.requires_grad_()
    lowering = lowered(table, kind, kernel)
    assert isinstance(lowering, JointSegments)
    assert len(lowering.query_index) == visible(table, kind, *worker.sides(table, kind)).any(axis=1).sum()
    output = worker.attention(kind, kernel, Alone()).attend(*heads, lowering)
    gradients = torch.autograd.grad((output * weight).sum(), heads)
    for values, padding in zip((output, *gradients), [of_queries, *paddings], strict=True):
        assert values.isfinite().all()
        assert values[padding].abs().max() == 0
    for values, padding in ((output, of_queries), (gradients[2], of_keys)):
        assert values[~padding].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_zero_in_flex(kind: str) -> None:
    table = row_of("sparse")
    of_queries, of_keys = padding_of(table, kind)
    for name, values in worker.results(table, kind, "flex", Alone()).items():
        padding = of_keys if name in ("key", "value") else of_queries
        assert values.isfinite().all()
        assert values[padding].abs().max() == 0


def test_rows_of_padding_alone() -> None:
    table = make_row([[(0, 0, PADDING)] * 2, [(0, 0, PADDING)] * 4])
    for kernel in KERNELS:
        for values in worker.results(table, "joint", kernel, Alone()).values():
            assert values.abs().max() == 0


def test_context_is_rotated_and_has_a_lowering_by_name() -> None:
    """A model of the kind joint runs block-causally by what the context holds."""
    table = row_of(1)
    *heads, _ = inputs(len(table))
    angles = torch.randn(len(table), HEAD_SIZE // 2, dtype=torch.float64)
    module = worker.attention("joint", "scaled_dot_product", Alone())
    segments = JointSegments.build(table, "block_causal", CPU)
    found = module(*heads, JointContext(lowerings={"joint": segments}, cos=angles.cos(), sin=angles.sin()))
    rotated = [rotate_pairs(part, angles.cos(), angles.sin()) for part in heads[:2]]
    assert torch.equal(found, module.attend(*rotated, heads[2], segments))
    assert not torch.equal(found, module(*heads, JointContext(lowerings={"joint": segments})))


# Context parallelism.

RANKS = 4
CASES: list[dict[str, Any]] = [
    {"name": f"{kind}-{kernel}-{row}-cp{size}", "kind": kind, "kernel": kernel, "row": row, "size": size}
    for kind in KINDS
    for kernel, rows in (
        ("scaled_dot_product", (0, 1, 2, 3, "sparse")),
        ("variable_length", (1, "sparse")),
        ("flex", ("sparse",) if kind == "joint" else (1,)),
    )
    for row in rows
    for size in (2, 4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every case wrote down what it found; one start serves all."""
    made = tmp_path_factory.mktemp("mmdit_attention")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [sys.executable, *launcher, worker.__file__, str(made), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_context_parallel_equals_one_rank(folder: Path, case: dict[str, Any]) -> None:
    """Outputs and gradients of the whole row; also where a rank has only padding."""
    found = torch.load(folder / f"{case['name']}.pt", weights_only=True)
    assert_equal(found, worker.results(row_of(case["row"]), case["kind"], "scaled_dot_product", Alone()))


def test_sparse_row_leaves_a_rank_without_tokens() -> None:
    table = row_of("sparse")
    assert (table.role[local_index(table, 3, 4)] == PADDING).all()
    assert JointSegments.build(table, "joint", CPU, 3, 4).batches == ()


def test_local_index_is_a_slice_of_either_stream() -> None:
    table = make_row([[(0, 0, CONDITION)] * 4, [(0, 0, NOISY)] * 6])
    assert local_index(table, 1, 2).tolist() == [2, 3, 7, 8, 9]
    with pytest.raises(AssertionError, match="6 tokens cannot be split over 4"):
        local_index(table, 0, 4)


# FLUX's rotary positions.


def test_rotary_equals_diffusers() -> None:
    """Measured 2.4e-7 on cosines and sines of positions up to 4000, 9.5e-7 on heads."""
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    axes, theta = [16, 56, 56], 10000
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4000, (37, 3), generator=generator)
    cos, sin = FluxPosEmbed(theta, axes)(ids)
    angles = axes_angles(ids.T, axes, theta)
    assert angles.dtype == torch.float32
    assert angles.shape == (37, 64)
    torch.testing.assert_close(angles.cos(), cos[:, ::2], rtol=0, atol=1e-6)
    torch.testing.assert_close(angles.sin(), sin[:, ::2], rtol=0, atol=1e-6)
    heads = torch.randn(37, 3, 128, generator=generator)
    expected = apply_rotary_emb(heads.transpose(0, 1)[None], (cos, sin), use_real=True, use_real_unbind_dim=-1)
    found = rotate_pairs(heads, angles.cos(), angles.sin())
    torch.testing.assert_close(found, expected[0].transpose(0, 1), rtol=0, atol=3e-6)
    assert rotate_pairs(heads.bfloat16(), angles.cos(), angles.sin()).dtype == torch.bfloat16
