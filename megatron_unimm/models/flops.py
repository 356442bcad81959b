"""Model FLOPs of the parts of a model, from the architecture alone; methods add them up, and MFU comes from them.

What is counted. A multiply-add is 2 FLOPs. Only matrix products count; norms, rotary positions, softmax and activations
are below one per cent of them. A product Y[m, n] = X[m, k] W[k, n] costs F = 2 m k n. Its backward pass has two of the
same size:

    dX = dY Wᵀ   where something before it trains
    dW = Xᵀ dY   where W trains

so a part costs F forward only (frozen), 2F (frozen, but gradient passes through it), or 3F (trains). Attention has no
weights: two products forward (Q Kᵀ and P V), four backward (dV, dP, dQ, dK), 1F or 3F.

What is not counted. Whatever is computed twice: recompute of activations, flash attention's second Q Kᵀ, the second
tower of a pipeline's last stage, blank images, copies on tensor-parallel ranks. So the ratio to the peak is MFU (PaLM,
arXiv 2204.02311, appendix B), not hardware utilisation. Padding is computed like any token and is counted; the record's
padding share says how much of it there is.

Legend  T tokens of the row, P patches, V visual tokens, l length of a segment, H hidden size, N heads, G key-value
heads, D head size.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from megatron_unimm.config.model import BackboneConfig, Qwen25VisionConfig, SiglipConfig, VisionEncoder


@dataclass(frozen=True)
class Work:
    """Forward FLOPs of a part of the model on one row."""

    products: float
    """Of products with weights."""
    attention: float = 0.0
    """Of Q Kᵀ and P V."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.products + other.products, self.attention + other.attention)

    def times(self, count: int) -> "Work":
        return Work(self.products * count, self.attention * count)

    def cost(self, trains: bool, passes_gradient: bool) -> float:
        """Forward and backward.

        Args:
            trains: the weights get a gradient.
            passes_gradient: the input gets one, because something before it trains.
        """
        return self.products * (1 + trains + passes_gradient) + self.attention * (3 if trains or passes_gradient else 1)


def causal_pairs(segment_bounds: Collection[int]) -> float:
    """(query, key) pairs of a packed row's causal mask: Σ l (l + 1) / 2 over its segments."""
    lengths = np.diff(np.fromiter(segment_bounds, dtype=np.float64))
    return float((lengths * (lengths + 1)).sum() / 2)


def decoder_work(model: BackboneConfig, num_tokens: int, pairs: float, layers: range | None = None) -> Work:
    """The decoder's layers, or some of them (zero-based).

    Per layer: QKV projection 2 T H (N + 2 G) D, output projection 2 T N D H, attention 2 · 2 · pairs · N D (grouped
    keys save memory, not FLOPs: every query head has its own scores), and a gated MLP of width F: 2 T H F three times.
    A mixture-of-experts layer has, in place of the MLP, the routers' 2 T H E each (all of them read every token, see
    ``models/gates.py``) and the gated MLPs of the experts that a token visits, top_k · F_expert + F_shared wide
    together.
    """
    tokens, hidden = float(num_tokens), model.hidden_size
    heads = model.num_heads * model.head_size
    projections = 2 * tokens * hidden * (2 * heads + 2 * model.num_kv_heads * model.head_size)
    attention = Work(projections, 4 * pairs * heads)
    dense = Work(6 * tokens * hidden * model.mlp_size)
    layers = range(model.num_layers) if layers is None else layers
    if model.moe is None:
        return (attention + dense).times(len(layers))
    moe = model.moe
    active = moe.top_k * moe.expert_mlp_size + moe.shared_expert_size
    routers = 1 + len(moe.gates)
    sparse = Work(2 * tokens * hidden * routers * moe.num_experts + 6 * tokens * hidden * active)
    num_sparse = sum(moe.in_layer(number) for number in layers)
    return attention.times(len(layers)) + sparse.times(num_sparse) + dense.times(len(layers) - num_sparse)


def logits_work(model: BackboneConfig, num_positions: int) -> Work:
    """The output layer at the positions whose logits are used: 2 n H vocabulary."""
    return Work(2.0 * num_positions * model.hidden_size * model.vocab_size)


def vision_pairs(grids: np.ndarray, model: VisionEncoder) -> float:
    """(query, key) pairs of all layers over images of patch grids ``[n, 3]``: full ones, and windowed ones.

    Full: Σ (height · width)² per frame. Windows are rectangles of the grid of merge units, so the sum over windows of
    (rows · columns)² is the sum of squared row counts times the sum of squared column counts: with windows of m units
    and n units on a side, ⌊n / m⌋ m² + (n mod m)².
    """
    if not len(grids):
        return 0.0
    frames, height, width = grids.astype(np.float64).T
    full = float((frames * (height * width) ** 2).sum())
    if not isinstance(model, Qwen25VisionConfig):
        return full * model.num_layers
    merge, window = model.spatial_merge_size, model.window_size // model.token_pixels
    rows, columns = height // merge, width // merge
    windowed = frames * _sum_of_squares(rows, window) * _sum_of_squares(columns, window) * merge**4
    num_full = len(model.full_attention_layers)
    return num_full * full + (model.num_layers - num_full) * float(windowed.sum())


def _sum_of_squares(count: np.ndarray, size: int) -> np.ndarray:
    """Σ length² of the pieces when ``count`` units are cut into pieces of ``size``."""
    return (count // size) * size**2 + (count % size) ** 2


def vision_work(model: VisionEncoder, grids: np.ndarray) -> tuple[Work, Work]:
    """(patch embedding, all that follows it) of the tower on images of patch grids ``[n, 3]``.

    Patch embedding 2 P patch_dim H. Per layer 2 P H 3H (QKV), 2 P H H (output), 4 · pairs · H (attention) and an MLP of
    width F: 2 P H F three times where it is gated (Qwen2.5-VL), else twice. The merger on joined patches of width
    J = merge² H: 2 V J J + 2 V J out, once more for each deepstack level. A projector behind it: 2 V in out +
    2 V out out. The embedding stands apart because nothing before it can train.
    """
    patches = float(grids.prod(axis=1).sum()) if len(grids) else 0.0
    hidden, merge = model.hidden_size, model.spatial_merge_size**2
    mlp_products = 3 if isinstance(model, Qwen25VisionConfig) else 2
    layer = Work(2 * patches * hidden * (4 * hidden + mlp_products * model.mlp_size))
    attention = Work(0.0, 4 * hidden * vision_pairs(grids, model))
    joined = merge * hidden
    tokens, merged = patches / merge, model.merged_size if isinstance(model, Qwen25VisionConfig) else model.out_size
    merger = Work(2 * tokens * joined * (joined + merged)).times(1 + len(model.deepstack_layers))
    if isinstance(model, Qwen25VisionConfig) and model.projector is not None:
        merger += Work(2 * tokens * model.out_size * (merged + model.out_size))
    return Work(2 * patches * model.patch_dim * hidden), layer.times(model.num_layers) + attention + merger


def siglip_work(model: SiglipConfig, grids: np.ndarray) -> Work:
    """SigLIP's tower on images of patch grids ``[n, 3]``: 2 P patch_dim H, and per layer 2 P H 4H (QKV, output),
    4 · pairs · H and 2 P H F twice."""
    sizes = grids.prod(axis=1).astype(np.float64)
    patches, hidden = float(sizes.sum()), model.hidden_size
    layer = Work(2 * patches * hidden * (4 * hidden + 2 * model.mlp_size), 4 * hidden * float((sizes**2).sum()))
    return Work(2 * patches * model.patch_dim * hidden) + layer.times(model.num_layers)
