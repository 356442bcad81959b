"""Model FLOPs of a packed row, from the architecture alone, and the peak of known GPUs: TFLOP/s and MFU come from here.

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

import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from megatron_unimm.config.model import BackboneConfig, Qwen25VisionConfig, VisionEncoder, VisionHeadConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow, TokenizedSample
from megatron_unimm.models.trainable import is_frozen

PARTS = ("vision_encoder", "backbone", "vision_head")
"""Parts that a stage trains or freezes as a whole, as far as this file is concerned."""

PEAK_TFLOPS = (
    # Words of torch's device name, and bf16 TFLOP/s without sparsity. From NVIDIA's data sheets, which print twice that
    # "with sparsity".
    (("GB300",), 2500.0),  # GB300 NVL72: 360 PFLOP/s sparse / 72 / 2
    (("GB200",), 2500.0),  # GB200 NVL72: 360 PFLOP/s sparse / 72 / 2
    (("B300",), 2250.0),  # HGX B300: 36 PFLOP/s sparse / 8 / 2
    (("B200",), 2250.0),  # HGX B200: 36 PFLOP/s sparse / 8 / 2
    (("GH200",), 989.4),  # an H100 die
    (("H200", "NVL"), 835.5),  # H200 data sheet: 1,671 sparse
    (("H200",), 989.4),  # H200 data sheet: 1,979 sparse; the same die as the H100 SXM
    (("H100", "PCIe"), 756.5),  # H100 data sheet: 1,513 sparse
    (("H100", "NVL"), 835.5),  # H100 data sheet: 1,671 sparse
    (("H100",), 989.4),  # H100 SXM5: architecture white paper, table 3, 989.4 dense
    (("H800",), 989.4),  # an H100 with fewer links
    (("H20",), 148.0),
    (("A100",), 312.0),  # A100 data sheet
    (("A800",), 312.0),  # an A100 with fewer links
    (("L40S",), 362.05),  # L40S data sheet: 733 sparse, 362.05 dense
    (("L40",), 181.05),  # L40 data sheet
    (("L4",), 121.0),  # L4 data sheet: 242 sparse
    (("A10",), 125.0),  # A10 data sheet
)
"""First match wins."""


def peak_tflops(device_name: str, fp8: bool) -> float | None:
    """Peak of one GPU in TFLOP/s: bf16, or twice that with FP8 (on every GPU that has it). None: not in the table."""
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    for needed, peak in PEAK_TFLOPS:
        if words.issuperset(needed):
            return 2 * peak if fp8 else peak
    return None


def stage_peak_tflops(stage: StageConfig, device_name: str) -> float | None:
    """What a stage's MFU is a share of, in TFLOP/s: ``train.logging.peak_tflops``, else the table's bf16 or FP8 peak.

    None for fp32 and for devices that are not in the table.
    """
    if stage.train.logging.peak_tflops is not None:
        return stage.train.logging.peak_tflops
    if stage.system.precision.dtype != "bfloat16":
        return None
    return peak_tflops(device_name, fp8=stage.system.precision.fp8 is not None)


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


def decoder_work(model: BackboneConfig, num_tokens: int, pairs: float) -> Work:
    """The decoder's layers.

    Per layer: QKV projection 2 T H (N + 2 G) D, output projection 2 T N D H, attention 2 · 2 · pairs · N D (grouped
    keys save memory, not FLOPs: every query head has its own scores), and a gated MLP of width F: 2 T H F three times.
    A mixture-of-experts layer has, in place of the MLP, the router's 2 T H E and the gated MLPs of the experts that a
    token visits, top_k · F_expert + F_shared wide together.
    """
    tokens, hidden = float(num_tokens), model.hidden_size
    heads = model.num_heads * model.head_size
    projections = 2 * tokens * hidden * (2 * heads + 2 * model.num_kv_heads * model.head_size)
    attention = Work(projections, 4 * pairs * heads)
    dense = Work(6 * tokens * hidden * model.mlp_size)
    if model.moe is None:
        return (attention + dense).times(model.num_layers)
    moe = model.moe
    active = moe.top_k * moe.expert_mlp_size + moe.shared_expert_size
    sparse = Work(2 * tokens * hidden * moe.num_experts + 6 * tokens * hidden * active)
    # Layers 0, n, 2n … have experts (Megatron-Core's moe_layer_freq).
    num_sparse = -(-model.num_layers // moe.layer_frequency)
    return attention.times(model.num_layers) + sparse.times(num_sparse) + dense.times(model.num_layers - num_sparse)


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
    J = merge² H: 2 V J J + 2 V J out, once more for each deepstack level. The embedding stands apart because nothing
    before it can train.
    """
    patches = float(grids.prod(axis=1).sum()) if len(grids) else 0.0
    hidden, merge = model.hidden_size, model.spatial_merge_size**2
    mlp_products = 3 if isinstance(model, Qwen25VisionConfig) else 2
    layer = Work(2 * patches * hidden * (4 * hidden + mlp_products * model.mlp_size))
    attention = Work(0.0, 4 * hidden * vision_pairs(grids, model))
    joined = merge * hidden
    merger = Work(2 * patches / merge * joined * (joined + model.out_size)).times(1 + len(model.deepstack_layers))
    return Work(2 * patches * model.patch_dim * hidden), layer.times(model.num_layers) + attention + merger


def vision_head_cost(
    model: VisionHeadConfig, hidden: int, num_positions: int, trains: bool, passes_gradient: bool
) -> float:
    """Forward and backward of ORION's vision head on n positions.

    Linear: 2 n H H. MLP: 2 n H eH twice; the second product's input always gets a gradient where the first one trains.
    Q-Former: per layer and pair of tokens 2 · 2n H (3H + H) and 2 · 2n H 2H twice, attention over 2 × 2 pairs
    4 · 4n H, and one projection 2 n H H; its query token is a weight, so gradient passes through all of it.
    """
    square = 2.0 * num_positions * hidden * hidden
    if model.kind == "linear":
        return Work(square).cost(trains, passes_gradient)
    if model.kind == "mlp":
        layer = Work(square * model.expansion)
        return layer.cost(trains, passes_gradient) + layer.cost(trains, trains or passes_gradient)
    layer = Work(2 * square * 4 + 2 * square * 2 * 2, 16.0 * num_positions * hidden)
    return (layer.times(model.num_layers) + Work(square)).cost(trains, trains or passes_gradient)


def frozen_parts(stage: StageConfig) -> frozenset[str]:
    """The parts of :data:`PARTS` in which nothing trains."""
    return frozenset(part for part in PARTS if is_frozen(part, stage.train.trainable))


def row_flops(row: PackedRow, stage: StageConfig, frozen: Collection[str]) -> float:
    """Model FLOPs of one packed row, forward and backward, over all ranks that share it.

    The student's tower and decoder; text logits where a text token is predicted; the vision head where a visual token
    is; with a KL weight the teacher's decoder (forward) and both models' logits at those positions, in rows that
    generate an image; the frozen tower (forward) on all images where the student's own is frozen or regression targets
    are wanted.

    Args:
        frozen: names of frozen parts, see :func:`frozen_parts`.
    """
    backbone, weights = stage.model.backbone, stage.method.loss_weights
    tower_trains, backbone_trains = "vision_encoder" not in frozen, "backbone" not in frozen
    num_vision = len(row.predict_index)
    num_text = int(np.count_nonzero(row.labels != IGNORED_LABEL)) if weights.cross_entropy else 0
    decoder = decoder_work(backbone, len(row.input_ids), causal_pairs(row.segment_bounds))
    total = _tower_flops(row, stage.model.vision_encoder, tower_trains)
    total += decoder.cost(backbone_trains, backbone_trains or tower_trains)
    total += logits_work(backbone, num_text).cost(backbone_trains, backbone_trains or tower_trains)
    head = stage.method.vision_head
    total += vision_head_cost(
        head, backbone.hidden_size, num_vision, "vision_head" not in frozen, backbone_trains or tower_trains
    )
    if weights.kl and num_vision:
        student = logits_work(backbone, num_vision).cost(backbone_trains, backbone_trains or tower_trains)
        teacher = (decoder + logits_work(backbone, num_vision)).cost(trains=False, passes_gradient=False)
        total += student + teacher
    return total


def sample_flops(sample: TokenizedSample, stage: StageConfig, frozen: Collection[str]) -> float:
    """What a sample costs beyond its tokens' share of a row, forward and backward: attention among its tokens, and the
    tower on its images. Rows of the same length differ in nothing else that is large."""
    backbone, trains = stage.model.backbone, "backbone" not in frozen
    passes = trains or "vision_encoder" not in frozen
    pairs = decoder_work(backbone, 0, causal_pairs((0, len(sample)))).cost(trains, passes)
    return pairs + _tower_flops(sample, stage.model.vision_encoder, "vision_encoder" not in frozen)


def _tower_flops(row: PackedRow | TokenizedSample, model: VisionEncoder, trains: bool) -> float:
    total = 0.0
    if row.features is not None:  # Computed beforehand.
        return total
    if trains:
        embedding, rest = vision_work(model, row.grids[~row.is_target])
        total += embedding.cost(trains=True, passes_gradient=False) + rest.cost(trains=True, passes_gradient=True)
    if not trains or row.is_target.any():
        embedding, rest = vision_work(model, row.grids)
        total += (embedding + rest).cost(trains=False, passes_gradient=False)
    return total
