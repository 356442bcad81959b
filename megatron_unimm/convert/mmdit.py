"""What the tables of diffusion transformers share; of SD3 and FLUX.1 joint blocks, the conditioning vector and the end.

Legend  H hidden size, N heads, D head size, m width of the MLPs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_unimm.config.mmdit import DiffusionTransformerConfig, MMDiTConfig
from megatron_unimm.convert.table import LAYER, Row, Source
from megatron_unimm.convert.transforms import Copy, QkvInterleave, Shape, Transform

MMDIT = "mmdit"
BLOCKS = f"{MMDIT}.blocks.layers.{LAYER}"
MLP_RATIO = 4
"""Hidden width of the MLPs over that of the model."""
FREQUENCIES = 256
"""Sines and cosines that a timestep is embedded as."""


@dataclass(frozen=True)
class Part:
    """A stretch of the table: some module on both sides, perhaps of repeated layers."""

    theirs: str
    ours: str
    layers: Sequence[int] | None = None
    first_layer: int = 0

    def linear(
        self,
        theirs: str | Sequence[str],
        ours: str,
        shape: Shape,
        transform: Transform | None = None,
        *,
        bias: bool = True,
    ) -> list[Row]:
        """Weight and bias of a linear layer ``[out, in]``, or of several that become one.

        Args:
            transform: of both; None for the same tensors.
            bias: whether there is one.
        """
        names = (theirs,) if isinstance(theirs, str) else theirs
        shapes = {"weight": shape} | ({"bias": shape[:1]} if bias else {})
        return [
            self.row([f"{name}.{kind}" for name in names], f"{ours}.{kind}", size, transform or Copy())
            for kind, size in shapes.items()
        ]

    def row(self, theirs: Sequence[str], ours: str, shape: Shape, transform: Transform) -> Row:
        sources = tuple(Source(f"{self.theirs}{name}", shape) for name in theirs)
        return Row(sources, f"{self.ours}.{ours}", transform, self.layers, self.first_layer)


def attention_rows(
    part: Part,
    model: DiffusionTransformerConfig,
    qkv: Sequence[str],
    ours: str,
    norms: Sequence[str] = (),
    output: str | None = None,
    *,
    qkv_bias: bool = True,
) -> list[Row]:
    """One stream's projections.

    Args:
        norms: RMSNorm of queries and keys, where there are.
        output: the linear layer behind, where there is one.
    """
    h = model.hidden_size
    interleave = QkvInterleave(model.num_heads, model.num_heads, model.head_size)
    table = part.linear(qkv, f"{ours}.linear_qkv", (h, h), interleave, bias=qkv_bias)
    for name, norm in zip(("q_layernorm", "k_layernorm"), norms, strict=bool(norms)):
        table.append(part.row([f"{norm}.weight"], f"{ours}.{name}.weight", (model.head_size,), Copy()))
    if output is not None:
        table += part.linear(output, f"{ours}.linear_proj", (h, h))
    return table


def joint_block_rows(
    theirs: str, model: MMDiTConfig, num_layers: int, *, qk_norm: bool, text_ends: bool, dual: Sequence[int] = ()
) -> list[Row]:
    """Blocks of a text and an image stream.

    Args:
        text_ends: the last block makes nothing of the text.
        dual: layers in which the image has a second attention to itself.
    """
    h = model.hidden_size
    blocks = f"{theirs}transformer_blocks.{LAYER}."
    every = Part(blocks, BLOCKS, range(num_layers))
    going_on = Part(blocks, BLOCKS, range(num_layers - text_ends))
    last = Part(blocks, BLOCKS, range(num_layers - text_ends, num_layers))
    with_dual = Part(blocks, BLOCKS, tuple(sorted(dual)))
    without = Part(blocks, BLOCKS, tuple(layer for layer in range(num_layers) if layer not in dual))
    image_qkv, text_qkv = [f"attn.to_{x}" for x in "qkv"], [f"attn.add_{x}_proj" for x in "qkv"]
    norms = [f"attn.norm_{x}" for x in "qk"] if qk_norm else ()
    text_norms = [f"attn.norm_added_{x}" for x in "qk"] if qk_norm else ()
    dual_norms = [f"attn2.norm_{x}" for x in "qk"] if qk_norm else ()
    return [
        *without.linear("norm1.linear", "image.modulation.linear", (6 * h, h)),
        *with_dual.linear("norm1.linear", "image.modulation.linear", (9 * h, h)),
        *going_on.linear("norm1_context.linear", "text.modulation.linear", (6 * h, h)),
        *last.linear("norm1_context.linear", "text.modulation.linear", (2 * h, h)),
        *attention_rows(every, model, image_qkv, "image.attention", norms, "attn.to_out.0"),
        *attention_rows(every, model, text_qkv, "text.attention", text_norms),
        *going_on.linear("attn.to_add_out", "text.attention.linear_proj", (h, h)),
        *attention_rows(
            with_dual, model, [f"attn2.to_{x}" for x in "qkv"], "image.attention_2", dual_norms, "attn2.to_out.0"
        ),
        *_mlp_rows(every, "ff", "image.mlp", h),
        *_mlp_rows(going_on, "ff_context", "text.mlp", h),
    ]


def _mlp_rows(part: Part, theirs: str, ours: str, h: int) -> list[Row]:
    m = MLP_RATIO * h
    return [
        *part.linear(f"{theirs}.net.0.proj", f"{ours}.linear_fc1", (m, h)),
        *part.linear(f"{theirs}.net.2", f"{ours}.linear_fc2", (h, m)),
    ]


def ends_rows(theirs: str, model: MMDiTConfig, guidance: bool, output: Transform | None = None) -> list[Row]:
    """What stands before the blocks and behind them, but for the patches.

    Args:
        output: of the last linear layer, whose outputs are a patch.
    """
    h = model.hidden_size
    part = Part(theirs, MMDIT)
    vectors = {"timestep": FREQUENCIES, "text": model.pooled_size}
    if guidance:
        vectors["guidance"] = FREQUENCIES
    table = part.linear("context_embedder", "condition_embedder", (h, model.condition_size))
    for name, size in vectors.items():
        ours = f"conditioning_vector.{'pooled' if name == 'text' else name}_embedder"
        table += part.linear(f"time_text_embed.{name}_embedder.linear_1", f"{ours}.linear_1", (h, size))
        table += part.linear(f"time_text_embed.{name}_embedder.linear_2", f"{ours}.linear_2", (h, h))
    table += part.linear("norm_out.linear", "final_modulation.linear", (2 * h, h))
    return table + part.linear("proj_out", "final_linear", (model.patch_dim, h), output)
