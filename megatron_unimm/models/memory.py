"""What the parts of a model hold on a rank (weights) and keep from their forward pass for the backward pass
(activations), from the architecture alone; methods add them up.

Weights are exact. Activations are the tensors that autograd saves, as in Korthikanti et al. (arXiv 2205.05198, section
4.1), derived anew for these layers: grouped keys, gated MLPs, experts, packed rows with one row per micro-batch, and no
dropout. ``tests/plan/test_memory.py`` counts what the real model saves and compares.

Legend  i bytes of a number in the computing dtype. T tokens of the row; t = T / context of them on this rank; s = t,
        or t / tensor between the layers under sequence parallelism. H hidden size, N heads, G key-value heads, D head
        size, F width of the MLP, all of a whole layer; / tensor where tensor parallelism cuts. k experts per token.

One pre-norm layer whose weights train keeps, in the order of its forward pass (bytes; fused: Transformer Engine's
kernels, as we understand them, not yet measured; torch: the plain layers, of which it is measured):

    norm 1     its input  s H i; torch: the normalised input before the weight, too, both in fp32
    QKV        its input  s H i
    qk-norm    fused: its input t (N + 2 G) D i / tensor; torch: what norms keep
    attention  fused: q, k, v and the output, t (2 N + 2 G) D i / tensor, and 4 t N / tensor of log-sums
               torch: keys and values are repeated for every head, and under context parallelism of the whole row:
               (2 t + 2 T) N D i / tensor, and the log-sums
    output     its input  t N D i / tensor (fused: it is attention's output)
    norm 2     as norm 1
    MLP        its input  s H i, and gated: fused 3 t F i / tensor (both halves, the product), torch 5 (the activation
               and a shifted half besides); plain: 2 t F i / tensor (before and after the activation)
    experts    in place of the MLP's inside. Each token comes k times, and what a rank sends it receives on average:
               n = s k expert_tensor tokens with H i each, and 3 (torch: 6, the product before the router's weight
               besides) F_expert i / expert_tensor, and the router's scores

Where the weights are frozen and a gradient only passes through, products keep no inputs and norms no normalised copy.
Where nothing before trains either, nothing is kept. A product with a low-rank adapter (``models/lora.py``) keeps its
input as if it trained, and r numbers per token, t r i where columns are cut and s r i where rows are.

Recompute (section 5 there) gives up some of it and makes it again, one layer's worth (``again``), in the backward pass:
all but the input (``full``); or attention (``core_attn``: then its inputs are kept), the norms' outputs
(``layernorm``), the MLP, the experts (``moe``), or the experts' product (``moe_act``).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from megatron_unimm.config.methods import ConnectorConfig
from megatron_unimm.config.mmdit import DcAeConfig, FluxConfig, MMDiT, SanaConfig, Sd3Config, VaeConfig
from megatron_unimm.config.model import (
    BackboneConfig,
    MoEConfig,
    Qwen25VisionConfig,
    SiglipConfig,
    VisionEncoder,
    VisionHeadConfig,
)
from megatron_unimm.config.parallel import ParallelConfig, RecomputeConfig, SystemConfig
from megatron_unimm.config.queries import CONNECTOR_HEAD_SIZE, CONNECTOR_MLP_RATIO, QueryConnectorConfig
from megatron_unimm.models.lora_shapes import AdaptedLinear
from megatron_unimm.models.mmdit.embedding import NUM_FREQUENCIES
from megatron_unimm.models.transformer_config import DTYPES
from megatron_unimm.models.vae import build_vae

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Weights:
    """Parameters on one rank."""

    dense: int = 0
    expert: int = 0
    """Of routed experts, whose data-parallel ranks are others."""

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(self.dense + other.dense, self.expert + other.expert)

    def times(self, count: int) -> "Weights":
        return Weights(self.dense * count, self.expert * count)

    @property
    def total(self) -> int:
        return self.dense + self.expert


@dataclass(frozen=True)
class Kept:
    """Activations of one micro-batch on one rank, in bytes."""

    bytes: float = 0.0
    """From the forward pass until the backward pass."""
    again: float = 0.0
    """The most that is there besides while one layer, or one loss, is worked on."""

    def __add__(self, other: "Kept") -> "Kept":
        """Of two parts of a chunk, which are worked on one after the other."""
        return Kept(self.bytes + other.bytes, max(self.again, other.again))

    def times(self, layers: int) -> "Kept":
        return Kept(self.bytes * layers, self.again if layers else 0.0)


@dataclass(frozen=True)
class Spread:
    """What decides how much of a part is on one rank."""

    parallel: ParallelConfig
    recompute: RecomputeConfig
    itemsize: int
    fused: bool
    """Transformer Engine's layers."""

    @classmethod
    def of(cls, system: SystemConfig, fused: bool) -> "Spread":
        return cls(system.parallel, system.recompute, DTYPES[system.precision.dtype].itemsize, fused)

    def tokens(self, row: float) -> float:
        """t of T."""
        return row / self.parallel.context

    def between(self, row: float) -> float:
        """s of T."""
        return self.tokens(row) / (self.parallel.tensor if self.parallel.sequence else 1)


@dataclass(frozen=True)
class LayerShape:
    """A pre-norm transformer layer with a dense MLP."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    gated: bool
    rms_norm: bool
    qk_norm: bool
    qkv_bias: bool
    bias: bool

    @classmethod
    def of_backbone(cls, model: BackboneConfig) -> "LayerShape":
        return cls(
            hidden=model.hidden_size,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            head_size=model.head_size,
            mlp=model.mlp_size,
            gated=True,
            rms_norm=True,
            qk_norm=model.qk_norm,
            qkv_bias=model.qkv_bias,
            bias=False,
        )

    @classmethod
    def of_tower(cls, model: VisionEncoder | SiglipConfig) -> "LayerShape":
        like_llama = isinstance(model, Qwen25VisionConfig)
        return cls(
            hidden=model.hidden_size,
            heads=model.num_heads,
            kv_heads=model.num_heads,
            head_size=model.hidden_size // model.num_heads,
            mlp=model.mlp_size,
            gated=like_llama,
            rms_norm=like_llama,
            qk_norm=False,
            qkv_bias=True,
            bias=True,
        )

    @classmethod
    def of_connector(cls, hidden: int) -> "LayerShape":
        """A layer over queries, see ``connector_transformer_config``."""
        heads = hidden // CONNECTOR_HEAD_SIZE
        return cls(
            hidden=hidden,
            heads=heads,
            kv_heads=heads,
            head_size=CONNECTOR_HEAD_SIZE,
            mlp=CONNECTOR_MLP_RATIO * hidden,
            gated=True,
            rms_norm=True,
            qk_norm=False,
            qkv_bias=False,
            bias=False,
        )

    @property
    def norm(self) -> int:
        """Parameters of a norm."""
        return self.hidden if self.rms_norm else 2 * self.hidden


# -- weights


def _columns(rows: int, columns: int, bias: bool, tensor: int) -> int:
    """A product ``[rows, columns]`` cut by columns, bias too."""
    return (rows + bias) * columns // tensor


def _rows(rows: int, columns: int, bias: bool, tensor: int) -> int:
    """A product cut by rows; the bias is whole."""
    return rows * columns // tensor + bias * columns


def attention_weights(layer: LayerShape, tensor: int) -> int:
    """QKV, output, and the norms of queries and keys."""
    qkv = (layer.heads + 2 * layer.kv_heads) * layer.head_size
    return (
        _columns(layer.hidden, qkv, layer.qkv_bias, tensor)
        + _rows(layer.heads * layer.head_size, layer.hidden, layer.bias, tensor)
        + 2 * layer.qk_norm * layer.head_size
    )


def mlp_weights(hidden: int, width: int, gated: bool, bias: bool, tensor: int) -> int:
    """Two products, the first twice as wide where the MLP is gated."""
    return _columns(hidden, (1 + gated) * width, bias, tensor) + _rows(width, hidden, bias, tensor)


def layer_weights(layer: LayerShape, tensor: int) -> Weights:
    """A layer with a dense MLP."""
    mlp = mlp_weights(layer.hidden, layer.mlp, layer.gated, layer.bias, tensor)
    return Weights(2 * layer.norm + attention_weights(layer, tensor) + mlp)


def decoder_layer_weights(model: BackboneConfig, parallel: ParallelConfig, experts: bool) -> Weights:
    """A layer of the decoder; experts as many as this rank has, routers whole."""
    layer = LayerShape.of_backbone(model)
    if not experts:
        return layer_weights(layer, parallel.tensor)
    moe = model.moe
    assert moe is not None
    expert = mlp_weights(model.hidden_size, moe.expert_mlp_size, True, False, parallel.expert_tensor)
    shared = mlp_weights(model.hidden_size, moe.shared_expert_size, True, False, parallel.tensor)
    router = (1 + len(moe.gates)) * model.hidden_size * moe.num_experts
    dense = 2 * layer.norm + attention_weights(layer, parallel.tensor) + router + shared
    return Weights(dense, moe.num_experts // parallel.expert * expert)


def vocabulary_weights(model: BackboneConfig, tensor: int) -> Weights:
    """An embedding, or an output layer."""
    return Weights(model.vocab_size * model.hidden_size // tensor)


def num_mixtures(model: BackboneConfig, layers: range) -> int:
    """How many of the zero-based layers have experts."""
    return 0 if model.moe is None else sum(model.moe.in_layer(number) for number in layers)


def vision_weights(model: VisionEncoder, tensor: int) -> Weights:
    """The tower: patch embedding, learned positions, layers, a merger for the last and for each deepstack level, a
    projector."""
    layer = LayerShape.of_tower(model)
    learned = not isinstance(model, Qwen25VisionConfig)
    joined = model.hidden_size * model.spatial_merge_size**2
    merged = model.merged_size if isinstance(model, Qwen25VisionConfig) else model.out_size
    products = _columns(joined, joined, True, tensor) + _rows(joined, merged, True, tensor)
    if isinstance(model, Qwen25VisionConfig) and model.projector is not None:
        products += _columns(merged, model.out_size, True, tensor) + _rows(model.out_size, model.out_size, True, tensor)
    embedding = (model.patch_dim + learned) * model.hidden_size
    if not isinstance(model, Qwen25VisionConfig):
        embedding += model.num_position_embeddings * model.hidden_size
    # A level's merger normalises the patches that it has joined.
    levels = len(model.deepstack_layers) * (2 * joined + products)
    return Weights(embedding + layer.norm + products + levels) + layer_weights(layer, tensor).times(model.num_layers)


def siglip_weights(model: SiglipConfig, tensor: int) -> Weights:
    """SigLIP's tower: patch embedding, learned positions, layers, a norm; its pooling head is whole on every rank."""
    hidden, layer = model.hidden_size, LayerShape.of_tower(model)
    ends = (model.patch_dim + 1 + model.num_position_embeddings) * hidden + layer.norm
    head = hidden + _columns(hidden, 3 * hidden, True, 1) + _rows(hidden, hidden, True, 1) + layer.norm
    head += mlp_weights(hidden, model.mlp_size, False, True, 1)
    return Weights(ends + model.pooling_head * head) + layer_weights(layer, tensor).times(model.num_layers)


def query_connector_weights(model: QueryConnectorConfig, hidden: int, latent: int, tensor: int) -> Weights:
    """Layers over queries and the norm behind them; the projection is whole on every rank."""
    layer = LayerShape.of_connector(hidden)
    layers = layer_weights(layer, tensor).times(model.num_layers) + Weights(layer.norm * bool(model.num_layers))
    widths = [hidden, latent] if model.projection == "linear" else [hidden, hidden, latent]
    return layers + Weights(sum(_columns(wide, to, True, 1) for wide, to in pairwise(widths)))


def vision_head_weights(model: VisionHeadConfig, hidden: int, tensor: int) -> Weights:
    """ORION's vision head; the Q-Former is whole on every rank: a query token, per layer two norms, attention and an
    MLP of twice the width, and a projection."""
    if model.kind == "linear":
        return Weights(_columns(hidden, hidden, False, tensor))
    if model.kind == "mlp":
        return Weights(mlp_weights(hidden, model.expansion * hidden, False, True, tensor))
    attention = _columns(hidden, 3 * hidden, True, 1) + _rows(hidden, hidden, True, 1)
    layer = 4 * hidden + attention + mlp_weights(hidden, 2 * hidden, False, True, 1)
    return Weights(hidden + model.num_layers * layer + (hidden + 1) * hidden)


def mmdit_weights(model: MMDiT, parallel: ParallelConfig, layers: range) -> Weights:
    """Blocks ``layers`` (zero-based) of a diffusion transformer.

    A stream of a joint block: attention (3 H² + H²), MLP (8 H²), and a modulation of 6 parts (6 H²), all with biases.
    SANA, of cross width X and hidden width m: attention, cross attention (H X, 2 H X, X H), feed-forward (2 m H,
    9 · 2 m of the convolution, m H), and a table of 6 H.
    """
    kinds = block_kinds(model, layers)
    return sum((_block_weights(model, parallel.tensor, kind).times(count) for kind, count in kinds.items()), Weights())


class BlockKind(NamedTuple):
    """What the blocks of diffusion transformers differ in."""

    joint: bool
    """Two streams with weights of their own; else FLUX's single block, or SANA's."""
    dual: bool
    """A second attention, of the image to itself."""
    last: bool
    """SD3's last, whose text has no output."""


def block_kinds(model: MMDiT, layers: range) -> dict[BlockKind, int]:
    """How many of the blocks ``layers`` are of each kind."""
    if isinstance(model, SanaConfig):
        return {BlockKind(False, False, False): len(layers)} if layers else {}
    if isinstance(model, FluxConfig):
        return dict(Counter(BlockKind(number < model.num_layers, False, False) for number in layers))
    dual, last = model.dual_attention_layers, model.num_layers - 1
    return dict(Counter(BlockKind(True, number in dual, number == last) for number in layers))


def _block_weights(model: MMDiT, tensor: int, kind: BlockKind) -> Weights:
    if isinstance(model, SanaConfig):
        return _sana_block_weights(model, tensor)
    hidden, width = model.hidden_size, model.mlp_size
    qk_norm = 2 * model.head_size if isinstance(model, FluxConfig) or model.qk_norm else 0
    qkv = _columns(hidden, 3 * hidden, True, tensor) + qk_norm
    out = _rows(hidden, hidden, True, tensor)
    mlp = mlp_weights(hidden, width, False, True, tensor)

    def modulation(parts: int) -> int:
        return _columns(hidden, parts * hidden, True, tensor)

    if not kind.joint:
        fc1, out = _columns(hidden, width, True, tensor), _rows(hidden + width, hidden, True, tensor)
        return Weights(qkv + fc1 + out + modulation(3))
    image = qkv + out + mlp + (modulation(9) + qkv + out if kind.dual else modulation(6))
    text = qkv + modulation(2) if kind.last else qkv + out + mlp + modulation(6)
    return Weights(image + text)


def _sana_block_weights(model: SanaConfig, tensor: int) -> Weights:
    hidden, cross, width = model.hidden_size, model.cross_size, model.mlp_size
    own = _columns(hidden, 3 * hidden, model.attention_bias, tensor) + _rows(hidden, hidden, True, tensor)
    other = _columns(hidden, 3 * cross, True, tensor) + _rows(cross, hidden, True, tensor)
    grown = _columns(hidden, 2 * width, True, tensor) + _columns(9, 2 * width, True, tensor)
    return Weights(6 * hidden + own + other + grown + _rows(width, hidden, False, tensor))


def mmdit_entry_weights(model: MMDiT) -> Weights:
    """Patches, condition, and what makes the conditioning vectors; whole on every rank."""
    hidden = model.hidden_size

    def vector(size: int) -> int:
        return (size + 1) * hidden + (hidden + 1) * hidden

    if isinstance(model, SanaConfig):
        condition = (model.condition_size + 1) * hidden + (hidden + 1) * hidden + hidden
        modulation = (hidden + 1) * 6 * hidden
        return Weights((model.patch_dim + 1) * hidden + condition + vector(2 * NUM_FREQUENCIES) + modulation)
    vectors = (1 + model.guidance) * vector(2 * NUM_FREQUENCIES) + vector(model.pooled_size)
    return Weights((model.patch_dim + 1) * hidden + (model.condition_size + 1) * hidden + vectors)


def mmdit_exit_weights(model: MMDiT, tensor: int) -> Weights:
    """The last modulation and the way to patches."""
    hidden = model.hidden_size
    modulation = 2 * hidden if isinstance(model, SanaConfig) else _columns(hidden, 2 * hidden, True, tensor)
    return Weights(modulation + (hidden + 1) * model.patch_dim)


def connector_weights(model: ConnectorConfig, visual: int, mmdit: MMDiT) -> Weights:
    """Two products with norms, the pooled condition, and the mark of sources."""
    inner, condition = model.hidden_size or mmdit.condition_size, mmdit.condition_size
    products = (visual + 1) * inner + (inner + 1) * condition
    return Weights(products + 2 * inner + 2 * condition + mmdit.pooled_size + model.sources * condition)


def pathways_weights(mmdit: MMDiT, word: int, latent: int, num_queries: int) -> Weights:
    """Words and visual latents to the condition, each by a norm and two products; places of the latents, the pooled
    condition."""
    condition = mmdit.condition_size

    def pathway(width: int) -> int:
        return width + (width + 1) * condition + (condition + 1) * condition

    return Weights(pathway(word) + pathway(latent) + num_queries * condition + mmdit.pooled_size)


def vae_weights(model: VaeConfig | DcAeConfig) -> Weights:
    """diffusers' network, counted by building it without memory."""
    return Weights(_vae_parameters(type(model), model.model_dump_json()))


@lru_cache
def _vae_parameters(kind: type[VaeConfig] | type[DcAeConfig], model: str) -> int:
    with torch.device("meta"):
        vae = build_vae(kind.model_validate_json(model))
    return sum(parameter.numel() for parameter in vae.parameters())


# -- activations of transformer layers


def layer_kept(
    layer: LayerShape,
    spread: Spread,
    row: float,
    *,
    trains: bool,
    moe: MoEConfig | None = None,
    adapted: Sequence[AdaptedLinear] = (),
) -> Kept:
    """A layer over a row of ``row`` tokens; see the head of this file.

    Args:
        trains: its weights get a gradient; else one only passes through.
        moe: it has experts in place of the MLP.
        adapted: linears with an adapter that trains.
    """
    parts = _layer_parts(layer, spread, row, trains, moe, adapted)
    return _recomputed(parts, layer, spread, row, moe)


def layer_pass(layer: LayerShape, spread: Spread, row: float, moe: MoEConfig | None = None) -> Kept:
    """A layer that no gradient passes through: nothing but what it needs while it runs."""
    return Kept(0.0, layer_kept(layer, _without_recompute(spread), row, trains=True, moe=moe).bytes)


def tower_layer_kept(layer: LayerShape, spread: Spread, patches: float, trains: bool = True) -> Kept:
    """A layer of a vision tower: on every context rank all patches, without sequence parallelism."""
    return layer_kept(layer, _alone(spread), patches, trains=trains)


def _alone(spread: Spread) -> Spread:
    """Of a part that every context rank has whole."""
    parallel = spread.parallel.model_copy(update={"context": 1, "sequence": False})
    return Spread(parallel, spread.recompute, spread.itemsize, spread.fused)


def _without_recompute(spread: Spread) -> Spread:
    return Spread(spread.parallel, RecomputeConfig(), spread.itemsize, spread.fused)


def _layer_parts(
    layer: LayerShape,
    spread: Spread,
    row: float,
    trains: bool,
    moe: MoEConfig | None,
    adapted: Sequence[AdaptedLinear],
) -> dict[str, float]:
    """Bytes that each part keeps."""
    tensor, item = spread.parallel.tensor, spread.itemsize
    tokens, between = spread.tokens(row), spread.between(row)
    learns = dict.fromkeys(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), trains)
    learns |= {each.name: True for each in adapted}
    heads, hidden = layer.heads * layer.head_size / tensor, between * layer.hidden * item
    parts = {
        "norm_1": _norm(between, layer.hidden, layer.rms_norm, spread, trains),
        "qkv": hidden * learns["linear_qkv"],
        "qk_norm": _qk_norm(layer, spread, tokens, trains) if layer.qk_norm else 0.0,
        "attention": _attention(layer, spread, row),
        "output": tokens * heads * item * (learns["linear_proj"] and not spread.fused),
        "norm_2": _norm(between, layer.hidden, layer.rms_norm, spread, trains),
        "mlp_input": hidden * learns["linear_fc1"],
        "adapters": sum(each.rank * (between if each.by_rows else tokens) for each in adapted) * item,
    }
    if moe is None:
        parts["mlp"] = _mlp(tokens * layer.mlp / tensor, layer.gated, spread, learns["linear_fc2"])
        return parts
    shared = tokens * moe.shared_expert_size / tensor
    shared = _mlp(shared, True, spread, learns["linear_fc2"])
    return parts | {"mlp": shared} | _experts(layer, moe, spread, between, trains)


def _norm(tokens: float, width: float, rms_norm: bool, spread: Spread, trains: bool) -> float:
    """A norm's input and one or two numbers per token; torch's RMS norm computes in fp32 and keeps its output before
    the weight as well."""
    if spread.fused or not rms_norm:
        return tokens * (width * spread.itemsize + FLOAT * (1 if rms_norm else 2))
    return tokens * (width * FLOAT * (1 + trains) + FLOAT)


def _qk_norm(layer: LayerShape, spread: Spread, tokens: float, trains: bool) -> float:
    queries, keys = layer.heads / spread.parallel.tensor, _kv_heads(layer, spread)
    mixed = tokens * (queries + 2 * keys) * layer.head_size * spread.itemsize
    if keys > 1:
        # Queries of several groups do not lie together: they are copied first.
        mixed += tokens * queries * layer.head_size * spread.itemsize
    if spread.fused:
        return mixed + FLOAT * tokens * (queries + keys)
    # In fp32 the input is a part of the mixed QKV; in bf16 it is a copy.
    values = tokens * (queries + keys) * layer.head_size * FLOAT
    entry = mixed if spread.itemsize == FLOAT else values
    return entry + values * trains + FLOAT * tokens * (queries + keys)


def _kv_heads(layer: LayerShape, spread: Spread) -> float:
    """Key-value heads on a rank: at least one."""
    return max(1.0, layer.kv_heads / spread.parallel.tensor)


def _attention(layer: LayerShape, spread: Spread, row: float) -> float:
    tokens, item = spread.tokens(row), spread.itemsize
    queries, keys = layer.heads / spread.parallel.tensor, _kv_heads(layer, spread)
    sums = FLOAT * tokens * queries
    if spread.fused:
        return tokens * (2 * queries + 2 * keys) * layer.head_size * item + sums
    return (2 * tokens + 2 * row) * queries * layer.head_size * item + sums


def _mlp(width: float, gated: bool, spread: Spread, trains: bool) -> float:
    """Args:
    width: tokens times columns of this rank.
    """
    inside = (2 if spread.fused else 4) if gated else 1
    return width * spread.itemsize * (inside + trains)


def _experts(layer: LayerShape, moe: MoEConfig, spread: Spread, between: float, trains: bool) -> dict[str, float]:
    """The router: its choice and weights per token and expert. Then the tokens that a rank works on."""
    parallel, item = spread.parallel, spread.itemsize
    sent = between * moe.top_k
    tokens = sent * parallel.expert_tensor
    width = moe.expert_mlp_size / parallel.expert_tensor
    router = between * moe.num_experts * ROUTER_BYTES + sent * ROUTED_BYTES
    if moe.gates:
        # Their weights, one under the other for one product.
        router += (1 + len(moe.gates)) * moe.num_experts * layer.hidden * item
    inside = tokens * width * item * (2 if spread.fused else 5)
    product = tokens * width * item * trains
    return {
        "router": router,
        "experts": tokens * (layer.hidden * item * trains + FLOAT) + inside,
        "experts_product": product,
    }


ROUTER_BYTES = 1
"""Per token and expert: which go where."""
ROUTED_BYTES = 8 + 4 + 8 + 8 + 4
"""Per token and chosen expert: the choice, its weight, its places before and after the exchange, its weight there."""


def _recomputed(parts: dict[str, float], layer: LayerShape, spread: Spread, row: float, moe: MoEConfig | None) -> Kept:
    """What is left of a layer's parts, and what comes again in the backward pass."""
    recompute, item = spread.recompute, spread.itemsize
    whole = sum(parts.values())
    if recompute.granularity == "none":
        return Kept(whole)
    if recompute.granularity == "full":
        entry = spread.between(row) * layer.hidden * item
        return Kept(entry / recompute.num_layers, whole * recompute.num_layers)
    dropped = [_given_up(module, spread.fused, moe is not None) for module in recompute.modules]
    left = {name: 0.0 if any(name in names for names in dropped) else size for name, size in parts.items()}
    if "core_attn" in recompute.modules:
        left["attention"] = _attention_inputs(layer, spread, row)
    again = max((sum(parts[name] for name in names) for names in dropped), default=0.0)
    return Kept(sum(left.values()), again)


def _attention_inputs(layer: LayerShape, spread: Spread, row: float) -> float:
    """The mixed QKV, of which keys and values are parts, and queries copied where they are of several groups; or both
    normalised, beside the mixed QKV, which the norms keep."""
    queries, keys = layer.heads / spread.parallel.tensor, _kv_heads(layer, spread)
    numbers = queries + keys if layer.qk_norm else (1 + (keys > 1)) * queries + 2 * keys
    return spread.tokens(row) * numbers * layer.head_size * spread.itemsize


def _given_up(module: str, fused: bool, moe: bool) -> tuple[str, ...]:
    """Parts of a layer that recomputing a module makes again. Where a norm is a part of the product behind it, it is
    no module, and the input of the norm is that of both."""
    if module == "core_attn":
        return ("attention",)
    if moe:
        inside = ("router", "experts", "experts_product")
        return {"moe": (*inside, "mlp"), "moe_act": ("experts_product",), "layernorm": ("mlp_input",)}.get(module, ())
    if module == "mlp":
        return ("mlp", "mlp_input") if fused else ("mlp",)
    return ()


# -- activations of vision towers


def tower_kept(model: VisionEncoder, spread: Spread, patches: float) -> Kept:
    """A tower that trains, on P patches (which are not counted, see ``inputs`` of a footprint): its layers and mergers.

    A merger keeps its norm's input (a deepstack level's is that of a layer) and output, P H each, and the hidden layer
    of its MLP before and after the activation, P H / tensor each. A projector keeps its input, its hidden layer
    likewise, and its output before it is normalised.
    """
    layer, item = LayerShape.of_tower(model), spread.itemsize
    layers = tower_layer_kept(layer, spread, patches).times(model.num_layers)
    levels = len(model.deepstack_layers)
    width, tensor = model.hidden_size, spread.parallel.tensor
    normed = patches * width * item
    hidden = 2 * patches * width / tensor * item
    # Mergers are plain torch on every device.
    plain = Spread(spread.parallel, spread.recompute, item, fused=False)
    norm = _norm(patches, width, layer.rms_norm, plain, trains=True)
    tapped = levels if spread.recompute.granularity == "none" else 0  # there already, as a layer's input
    merger = norm + normed + hidden
    projector = 0.0
    if isinstance(model, Qwen25VisionConfig) and model.projector is not None:
        widths = model.projector.in_size + 2 * model.out_size / tensor + model.projector.normalize * model.out_size
        projector = patches / model.spatial_merge_size**2 * widths * item
    return layers + Kept((1 + levels) * merger - tapped * normed + projector)


def tower_pass(model: VisionEncoder | SiglipConfig, spread: Spread, patches: float) -> Kept:
    """A frozen tower: nothing but what a layer needs while it runs."""
    return layer_pass(LayerShape.of_tower(model), _alone(spread), patches)


def vae_pass(model: VaeConfig | DcAeConfig, pixels: float, itemsize: int) -> Kept:
    """A frozen VAE encodes all pictures of one size at once: at full resolution a residual block has its input, and of
    its second half what comes in, that normalised, that activated, and what the convolution makes of it."""
    channels = model.encoder[0].channels if isinstance(model, DcAeConfig) else model.block_channels[0]
    return Kept(0.0, 5 * pixels * channels * itemsize)


# -- activations of losses and heads


def final_norm_kept(model: BackboneConfig, spread: Spread, row: float, trains: bool) -> Kept:
    """The norm behind the last layer."""
    return Kept(_norm(spread.between(row), model.hidden_size, True, spread, trains))


def rms_norm_kept(width: int, spread: Spread, tokens: float) -> Kept:
    """A norm that trains, over tokens that every rank has whole."""
    return Kept(_norm(tokens, width, True, spread, trains=True))


def logits_kept(model: BackboneConfig, spread: Spread, positions: float) -> Kept:
    """Cross entropy at n positions: their hidden states n H i, and the softmax in fp32, 4 n V / tensor. While it is
    made, and again when its gradient is, the logits themselves are there in the computing dtype."""
    cut = positions * model.vocab_size / spread.parallel.tensor
    logits = cut * spread.itemsize if spread.itemsize < FLOAT else 0.0
    return Kept(positions * model.hidden_size * spread.itemsize + FLOAT * cut, logits)


def kl_kept(model: BackboneConfig, spread: Spread, positions: float) -> Kept:
    """The KL term at n positions keeps the student's n H i and the difference of the two distributions, n V / tensor
    (in fp32 it is one half of a tensor of both). While it is made there are the logits of both models, both shifted in
    fp32 and their logarithms (8 n V each), the teacher's probabilities, a difference and a product (4 n V each)."""
    cut = positions * model.vocab_size / spread.parallel.tensor
    item = spread.itemsize
    kept = cut * (item if item < FLOAT else 2 * FLOAT)
    return Kept(kept + positions * model.hidden_size * item, cut * (2 * item + 2 * 8 + 3 * FLOAT) - kept)


def vision_head_kept(model: VisionHeadConfig, hidden: int, spread: Spread, positions: float) -> Kept:
    """ORION's vision head at n positions, and the error of what it predicts in fp32.

    MLP: its input n H and its hidden layer before and after the activation. Q-Former, two tokens each: per layer two
    norms and the inputs of QKV, output, and the MLP (6 H), q, k, v and the output of attention (4 H), and the MLP's
    inside (2 · 2 H).
    """
    item = spread.itemsize
    error = FLOAT * hidden
    if model.kind == "linear":
        return Kept(positions * (hidden * item + error))
    if model.kind == "mlp":
        return Kept(positions * (hidden * item * (1 + 2 * model.expansion / spread.parallel.tensor) + error))
    return Kept(positions * (hidden * item * (1 + 2 * 14 * model.num_layers) + error))


def query_connector_kept(
    model: QueryConnectorConfig,
    hidden: int,
    latent: int,
    spread: Spread,
    queries: float,
    mine: float,
    *,
    trains: bool,
) -> Kept:
    """From hidden states at a row's queries to what they predict, and eq. 1 there. Layers see all Q on every context
    rank, the projection its own q of them.

    The projection keeps its input and its hidden layer before and after the activation, q H i each. The cosine keeps
    both of its sides normalised, in fp32, q D each (in bf16 the prediction in fp32 besides).
    """
    item, kept = spread.itemsize, Kept()
    if model.num_layers:
        layers = tower_layer_kept(LayerShape.of_connector(hidden), spread, queries, trains).times(model.num_layers)
        kept += layers + Kept(_norm(queries, hidden, True, spread, trains))
    inside = mine * hidden * item * (trains + (model.projection == "mlp") * (1 + trains))
    return kept + Kept(inside + mine * latent * 2 * FLOAT)


def pathway_kept(width: int, condition: int, spread: Spread, count: float) -> Kept:
    """From n hidden states, or visual latents, to a part of the condition: the norm, its output where nothing is left
    out, and the hidden layer before and after the activation."""
    plain = Spread(spread.parallel, spread.recompute, spread.itemsize, fused=False)  # plain torch on every device
    return Kept(_norm(count, width, True, plain, trains=True) + count * (width + 2 * condition) * spread.itemsize)


# -- activations of diffusion transformers


@dataclass(frozen=True)
class Streams:
    """A row of a diffusion transformer: T tokens of both streams, and n conditioning vectors."""

    text: float
    image: float
    vectors: float

    @property
    def tokens(self) -> float:
        return self.text + self.image


def mmdit_block_kept(model: MMDiT, spread: Spread, row: Streams, kind: BlockKind) -> Kept:
    """A block of a diffusion transformer whose weights train.

    A joint block keeps of each token, s H i each: its input, and for attention and MLP alike what is normalised, that
    modulated (the next product's input) and what is added under the gate, and between them the middle: 8 in all. Of
    each token of the context rank, H i / tensor each: the mixed QKV (3, with a norm of queries and keys; torch: 2
    normalised), q, k, v and the output of attention (4), the output laid back into the row (1; torch: a copy besides),
    and the MLP's inside before and after its activation (2 · 4). And the modulations, 6 H i per vector and stream.

    A single block keeps 4 s H i (input, normalised, modulated, added), the same QKV and attention, the MLP's hidden
    layer before its activation (4), and the input of its last product (1 + 4), which holds the attention laid back.

    A second attention adds its modulated input and what it adds, and QKV and attention, of the image alone. SD3's last
    text stream has no output: no MLP, nothing added.
    """
    if isinstance(model, SanaConfig):
        return _sana_block_kept(model, spread, row)
    item, tensor = spread.itemsize, spread.parallel.tensor
    between = spread.between(row.tokens) * model.hidden_size * item
    inside = spread.tokens(row.tokens) * model.hidden_size * item / tensor
    qkv, core = _joint_attention(model, spread, row.tokens)
    share = row.image / row.tokens
    if kind.joint:
        parts = {"qkv": qkv, "core": core, "laid": inside, "mlp": 2 * model.mlp_ratio * inside, "rest": 8 * between}
        modulation = 12 * row.vectors * model.hidden_size * item
    else:
        parts = {"qkv": qkv, "core": core, "mlp": (1 + 2 * model.mlp_ratio) * inside, "rest": 4 * between}
        modulation = 3 * row.vectors * model.hidden_size * item
    if kind.dual:
        parts["rest"] += 2 * share * between
        parts["qkv"] += share * qkv
        parts["core"] += share * core
        parts["laid"] += share * inside
        modulation += 3 * row.vectors * model.hidden_size * item
    if kind.last:
        # The text keeps its input, normalised and modulated.
        parts["rest"] -= 5 * (1 - share) * between
        parts["mlp"] -= (1 - share) * parts["mlp"]
        modulation -= 4 * row.vectors * model.hidden_size * item
    parts["rest"] += modulation
    # Only a joint block's MLP can be made again by itself.
    given_up = {"core_attn": "core", "mlp": "mlp" if kind.joint else ""}
    # Attention's inputs are queries, keys and values laid one stream behind the other.
    return _mmdit_recomputed(parts, given_up, spread, between, 3 * inside)


def _sana_block_kept(model: SanaConfig, spread: Spread, row: Streams) -> Kept:
    """A block of SANA whose weights train, of cross width X, hidden width m and head size D.

    Both streams' tokens as they come in, s H i. Of each image token, s H i each: normalised, modulated and added of the
    attention and of the feed-forward layer, what the cross attention reads and what comes out behind it: 8. Of each
    image token of the rank, H / tensor each: queries, keys, values with a one behind each head, and the output so, all
    in fp32 (4 and 3 / D), a matrix of D (D + 1) per head of each picture, and the output laid back (i). The cross
    attention's q, k, v, output (torch: a copy besides) and that laid back, of width X; keys and values are of the text.
    The feed-forward layer's first product, its activation picture by picture, that convolved (2 m each), the gate's
    activation, and the product laid back (m each). And the modulations, 6 H i per vector.
    """
    item, tensor = spread.itemsize, spread.parallel.tensor
    width, cross, size = model.hidden_size / tensor, model.cross_size / tensor, model.head_size
    image, text = spread.tokens(row.image), spread.tokens(row.text)
    states = row.vectors * width * (size + 1) * FLOAT
    sums = FLOAT * image * model.num_cross_heads / tensor
    copies = 0 if spread.fused else 1
    parts = {
        "core": image * width * (4 + 3 / size) * FLOAT + states,
        "cross": ((2 + copies) * image + 2 * text) * cross * item + sums,
        "laid": image * (width + cross) * item,
        "mlp": 8 * image * model.mlp_size / tensor * item,
        "rest": (spread.between(row.tokens) + 8 * spread.between(row.image) + 6 * row.vectors)
        * model.hidden_size
        * item,
    }
    inputs = (image * (3 * width + cross) + 2 * text * cross) * item
    whole = spread.between(row.tokens) * model.hidden_size * item
    return _mmdit_recomputed(parts, {"core_attn": "core cross", "mlp": "mlp"}, spread, whole, inputs)


def _joint_attention(model: Sd3Config | FluxConfig, spread: Spread, row: float) -> tuple[float, float]:
    """Bytes of the mixed QKV with the norms, and of attention; keys and values are gathered from all context ranks."""
    tensor, item = spread.parallel.tensor, spread.itemsize
    tokens, width, heads = spread.tokens(row), model.hidden_size / tensor, model.num_heads / tensor
    normed = isinstance(model, FluxConfig) or model.qk_norm
    qkv = 0.0
    if normed and spread.fused:
        qkv = 3 * tokens * width * item + 2 * FLOAT * tokens * heads
    elif normed:
        entry = 3 * tokens * width * item if item == FLOAT else 2 * tokens * width * FLOAT
        qkv = entry + 2 * tokens * width * FLOAT + 2 * FLOAT * tokens * heads
    copies = 0 if spread.fused else 1
    return qkv, (2 + copies) * tokens * width * item + 2 * row * width * item + FLOAT * tokens * heads


def _mmdit_recomputed(
    parts: dict[str, float], given_up: dict[str, str], spread: Spread, between: float, core_inputs: float
) -> Kept:
    """Args:
    given_up: parts that making a module again leaves out, by its name.
    between: the block's input. core_inputs: what attention reads, which making it again keeps.
    """
    recompute, whole = spread.recompute, sum(parts.values())
    if recompute.granularity == "none":
        return Kept(whole)
    if recompute.granularity == "full":
        return Kept(between / recompute.num_layers, whole * recompute.num_layers)
    dropped = [name for module in recompute.modules for name in given_up[module].split()]
    left = sum(size for name, size in parts.items() if name not in dropped)
    left += core_inputs if "core" in dropped else 0.0
    return Kept(left, max((parts[name] for name in dropped), default=0.0))


def mmdit_entry_kept(model: MMDiT, spread: Spread, row: Streams) -> Kept:
    """Patches and condition, and the two layers that make each conditioning vector."""
    tokens = spread.tokens(row.image) * model.patch_dim + spread.tokens(row.text) * model.condition_size
    if isinstance(model, SanaConfig):
        # The condition before and after the activation, and as its norm keeps it; of vectors two layers' alike.
        plain = Spread(spread.parallel, spread.recompute, spread.itemsize, fused=False)
        norm = _norm(spread.tokens(row.text), model.hidden_size, True, plain, trains=True)
        inside = (2 * spread.tokens(row.text) + 4 * row.vectors) * model.hidden_size
        return Kept(norm + (tokens + inside) * spread.itemsize)
    vectors = row.vectors * model.hidden_size * 2 * (2 + model.guidance)
    return Kept((tokens + vectors) * spread.itemsize)


def mmdit_exit_kept(model: MMDiT, spread: Spread, row: Streams) -> Kept:
    """The last norm, its output and that modulated, of the image; the error in fp32."""
    between = spread.between(row.image) * model.hidden_size * spread.itemsize
    tokens = spread.tokens(row.image)
    return Kept(2 * between + tokens * (model.hidden_size * spread.itemsize + FLOAT * model.patch_dim))
