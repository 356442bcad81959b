"""What the families of VLMs share: the decoder's table, token ids, and values that no converter should swallow."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_unimm.config.base import Section
from megatron_unimm.config.model import BackboneConfig, ModelConfig, TokenIds
from megatron_unimm.convert.table import Row, Source, TiedTo
from megatron_unimm.convert.transforms import Copy, GateUp, QkvInterleave, Transform
from megatron_unimm.errors import CheckpointError

ConfigT = TypeVar("ConfigT", bound=Section)


def rows_of(layer: str, num_layers: int, first: int = 0) -> Callable[..., Row]:
    """Writes rows of repeated layers, the first up to the last: ``row(megatron, transform, (name, shape), …)`` with
    Megatron's name after ``layer``."""

    layers = range(first, num_layers)

    def row(megatron: str, transform: Transform, *sources: tuple[str, tuple[int, ...]]) -> Row:
        return Row(tuple(Source(name, shape) for name, shape in sources), f"{layer}.{megatron}", transform, layers)

    return row


def backbone_rows(b: BackboneConfig, model: str, experts: tuple[Row, ...] = ()) -> list[Row]:
    """The decoder's rows.

    Args:
        model: Hugging Face's prefix: ``model`` or ``model.language_model``.
        experts: the rows of the MLPs where they are mixtures of experts.
    """
    h, m, q, kv = b.hidden_size, b.mlp_size, b.num_heads * b.head_size, b.num_kv_heads * b.head_size
    layer = f"{model}.layers.{{layer}}"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    qkv = QkvInterleave(b.num_heads, b.num_kv_heads, b.head_size)
    row = rows_of("backbone.decoder.layers.{layer}", b.num_layers)
    sizes = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    table = [
        Row(
            (Source(f"{model}.embed_tokens.weight", (b.vocab_size, h)),),
            "backbone.embedding.word_embeddings.weight",
            Copy(),
        ),
        row("self_attention.linear_qkv.layer_norm_weight", Copy(), (f"{layer}.input_layernorm.weight", (h,))),
        row(
            "self_attention.linear_qkv.weight",
            qkv,
            *((f"{attention}.{name}.weight", (size, h)) for name, size in sizes.items()),
        ),
    ]
    if b.qkv_bias:
        biases = ((f"{attention}.{name}.bias", (size,)) for name, size in sizes.items())
        table.append(row("self_attention.linear_qkv.bias", qkv, *biases))
    if b.qk_norm:
        table += [
            row("self_attention.q_layernorm.weight", Copy(), (f"{attention}.q_norm.weight", (b.head_size,))),
            row("self_attention.k_layernorm.weight", Copy(), (f"{attention}.k_norm.weight", (b.head_size,))),
        ]
    table.append(row("self_attention.linear_proj.weight", Copy(), (f"{attention}.o_proj.weight", (h, q))))
    if b.moe is None:
        gate_up = ((f"{mlp}.{name}_proj.weight", (m, h)) for name in ("gate", "up"))
        table += [
            row("mlp.linear_fc1.layer_norm_weight", Copy(), (f"{layer}.post_attention_layernorm.weight", (h,))),
            row("mlp.linear_fc1.weight", GateUp(), *gate_up),
            row("mlp.linear_fc2.weight", Copy(), (f"{mlp}.down_proj.weight", (h, m))),
        ]
    table += experts
    table.append(Row((Source(f"{model}.norm.weight", (h,)),), "backbone.decoder.final_layernorm.weight", Copy()))
    if not b.tie_embeddings:
        table.append(Row((Source("lm_head.weight", (b.vocab_size, h)),), "backbone.output_layer.weight", Copy()))
    return table


def tied_to(model: ModelConfig, embedding: str) -> list[TiedTo]:
    """The output layer of a model that shares it with the embedding."""
    return [TiedTo("lm_head.weight", embedding)] if model.backbone.tie_embeddings else []


# ---------------------------------------------------------------------------------------------- config.json


def reading_config(build: Callable[[], ConfigT], where: str = "config.json") -> ConfigT:
    """What ``build`` makes of ``config.json``.

    Raises:
        CheckpointError: a value is missing or impossible; says which.
    """
    try:
        return build()
    except KeyError as error:
        raise CheckpointError(where, f"has no {error.args[0]!r}; take the folder as published") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))  # "" where two fields do not fit each other
        raise CheckpointError(where, f"{field}: {first['msg']}" if field else first["msg"]) from error


def token_ids(config: dict[str, Any], added_tokens: dict[str, int]) -> TokenIds:
    """Special tokens, from the tokenizer where ``config.json`` does not say."""
    defaults = TokenIds()
    return TokenIds(
        pad=added_tokens.get("<|endoftext|>", defaults.pad),
        im_start=added_tokens.get("<|im_start|>", defaults.im_start),
        im_end=added_tokens.get("<|im_end|>", defaults.im_end),
        vision_start=config.get("vision_start_token_id", defaults.vision_start),
        vision_end=config.get("vision_end_token_id", defaults.vision_end),
        image_pad=config.get("image_token_id", defaults.image_pad),
    )


def rope_of(text: dict[str, Any]) -> dict[str, Any]:
    """The rotary section: ``rope_parameters`` of transformers 5, ``rope_scaling`` of the hub."""
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def refuse_unknown(
    config: dict[str, Any],
    text: dict[str, Any],
    activations: dict[str, tuple[Any, str]],
    rope_types: Sequence[str] = ("default", "mrope"),
) -> None:
    """Refuse what would convert to a model that computes something else.

    Args:
        activations: by the field's name, what it says and the one that is built.
        rope_types: kinds of rotary positions that are built.

    Raises:
        CheckpointError: names the field.
    """
    if "quantization_config" in config:
        raise CheckpointError("config.json", "is of a quantized model; take the bf16 one")
    if text.get("use_sliding_window"):
        raise CheckpointError("config.json", "use_sliding_window is true; only full attention is built")
    for where, (said, built) in activations.items():
        if said != built:
            raise CheckpointError("config.json", f"{where} is {said!r}; only {built!r} is built")
    kind = rope_of(text).get("rope_type", rope_of(text).get("type", "default"))
    if kind not in rope_types:
        raise CheckpointError("config.json", f"rope type {kind!r} is not built; {' and '.join(rope_types)} are")


def refuse_parts(model: ModelConfig, architecture: str, reasons: dict[str, bool]) -> None:
    """Refuse to write a model of ours as a family that lacks one of its parts.

    Args:
        reasons: the part, and whether the model has it.

    Raises:
        CheckpointError: names the parts.
    """
    present = [part for part, applies in reasons.items() if applies]
    if present:
        raise CheckpointError(
            "model", f"has {', '.join(present)}, which {architecture} has not; it cannot be converted"
        )


def parts_of_others(b: BackboneConfig) -> dict[str, bool]:
    """Parts that no Qwen VLM has, for :func:`refuse_parts`."""
    return {
        "gates of modalities": b.moe is not None and bool(b.moe.gates),
        "dense layers before those with experts": b.moe is not None and b.moe.first_layer > 0,
        "a normalised output layer": b.normalize_output,
        "sequential positions": b.positions == "sequential",
    }
