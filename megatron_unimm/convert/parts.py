"""Parts of ours that no Hugging Face class has: folders in an exported folder, prefixes of tensors in a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from megatron_unimm.config.hieraquery import MultiScaleConfig
from megatron_unimm.config.mmdit import ImageGeneratorConfig
from megatron_unimm.config.model import ModelConfig
from megatron_unimm.config.queries import QueryVlmConfig
from megatron_unimm.convert.qwen_vl import reading_config
from megatron_unimm.convert.transforms import Shape
from megatron_unimm.errors import CheckpointError


@dataclass(frozen=True)
class Part:
    """A part of ours."""

    what: str
    """What it does."""
    described: tuple[str, ...]
    """Where a checkpoint's meta says how it is built, key by key; empty where the shapes of its tensors say it."""


PARTS = {
    "vision_head": Part(
        "Maps a hidden state of the language model to the next visual token (ORION).", ("vision_head",)
    ),
    "query_tokens": Part(
        "Learned tokens that the language model reads in the place of a picture that it is to draw (MMCORE,"
        " HieraQuery).",
        ("queries",),
    ),
    "query_connector": Part(
        "Maps hidden states of the language model at the query tokens to visual latents (MMCORE).",
        ("queries", "connector"),
    ),
    "connector": Part("Maps visual tokens to what the image generator is conditioned on (ORION).", ("connector",)),
    "pathways": Part(
        "Map words and visual latents to what the image generator is conditioned on (MMCORE).", ("pathways",)
    ),
    "frame_embedding": Part(
        "Tells the pictures of a conversation apart: added to the tokens of their patches (MMCORE, HieraQuery).", ()
    ),
    "scale_connector": Part(
        "A language model's layers, in both directions, over its hidden states at the query tokens (HieraQuery).",
        ("hieraquery", "connector"),
    ),
    "scale_adapters": Part(
        "Stand before and behind the connector, and make the pooled condition of the image generator (HieraQuery).",
        (),
    ),
    "alignment_projector": Part(
        "Maps hidden states of the image generator to features of the vision encoder; of use in training only"
        " (HieraQuery).",
        (),
    ),
}
DRAWERS = ("pathways", "scale_adapters")
"""Parts whose ``config.json`` says how to draw."""
README = """# {title}

{what}

It is no part of the Hugging Face models beside it, which load without it; `unimm convert import` takes it back in.
`config.json` says how it is built, `model.safetensors` holds its weights.
"""


def readme_of(part: str) -> str:
    """What stands in the folder of a part beside its weights."""
    return README.format(title=part.replace("_", " ").capitalize(), what=PARTS[part].what)


def part_config(part: str, meta: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``config.json`` of a part, from a checkpoint's meta.

    Raises:
        CheckpointError: it does not say how the part is built.
    """
    described = _described(part, meta)
    config: Any = meta if described else {}
    for key in described:
        if key not in config:
            raise CheckpointError(where, f"holds a {part}, but its manifest has no meta.{'.'.join(described)}")
        config = config[key]
    if described == ("queries",):
        return {**config, "lora": None}  # an export has merged them
    if part in DRAWERS:
        # An imported checkpoint has it from the folder, one of training from its recipe.
        return {**meta.get(part, {}), **_drawing(meta, where)}
    return dict(config)


def _described(part: str, meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Where a checkpoint's meta says how a part is built; of queries each method says it in its own section."""
    if part == "query_tokens" and HIERAQUERY in meta:
        return (HIERAQUERY,)
    return PARTS[part].described


def _drawing(meta: Mapping[str, Any], where: str) -> dict[str, Any]:
    """How conversations become conditions and pictures, of a checkpoint of training.

    Raises:
        CheckpointError: it is of an ablation.
    """
    stage = yaml.safe_load(meta.get("config", "")) or {}
    if "method" not in stage:
        return {}
    method, data = stage["method"], stage["data"]
    for name, usual in WITHOUT_ABLATION.items():
        if (own := method.get(name, usual)) != usual:
            what = f"was trained with method.{name}: {own}, an ablation that nothing outside can draw with"
            raise CheckpointError(where, f"{what}; export a checkpoint that was trained without it")
    return {
        "sampler": method["sampler"],
        "max_frames": method["max_frames"],
        "embedded_guidance": method["embedded_guidance"],
        **{name: method[name] for name in ("shows_sources",) if name in method},  # HieraQuery's
        "data": {name: data[name] for name in DRAWING_DATA},
    }


WITHOUT_ABLATION = {"pathways": "both", "earlier_latents": False, "vit_features": False}
"""Settings of methods that draw (``config/methods.py``), as exports and their pipeline have them."""
DRAWING_DATA = ("system_prompt", "generation_size", "understanding_size", "drawing_size", "max_image_pixels")
"""Of the section ``data``, what drawing goes by."""


BETWEEN = ("query_tokens", "query_connector", "pathways", "frame_embedding")
"""Parts of MMCORE between a VLM and a diffusion transformer."""
OF_SCALES = ("scale_connector", "scale_adapters", "alignment_projector")
"""Parts that HieraQuery alone has."""
HIERAQUERY = "hieraquery"
"""Where the meta of its checkpoints says how it is built."""
LAYERS = ("layers.", "final_layernorm.")
"""Of a connector."""


def part_metas(configs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint's meta says of parts; the way back from :func:`part_config`."""
    metas = {part: configs[part] for part in DRAWERS if part in configs}
    for part, config in configs.items():
        described = PARTS[part].described
        if len(described) == 1:
            metas[HIERAQUERY if part == "query_tokens" and "scale_adapters" in configs else described[0]] = config
    return metas


# ------------------------------------------------------------------------------------ MMCORE and HieraQuery


def check_parts(
    shapes: Mapping[str, Mapping[str, Shape]],
    queries: Mapping[str, Any] | None,
    language_model: ModelConfig | None,
    generator: ImageGeneratorConfig | None,
    where: str,
) -> None:
    """Compare the tensors of MMCORE's and HieraQuery's parts with the models that they stand between.

    Args:
        shapes: of tensors by part and name.
        queries: how the VLM is asked for pictures (``config/queries.py``).

    Raises:
        CheckpointError: a part or a tensor is missing, left over, or of another shape; names the first.
    """
    expected = _expected(shapes, queries, language_model, generator, where)
    for part, tensors in expected.items():
        if part not in shapes:
            raise CheckpointError(
                where, f"has no {part}, which {', '.join(shapes)} stand beside; is the copy complete?"
            )
        for name, shape in tensors.items():
            found = shapes[part].get(name)
            if found is None:
                raise CheckpointError(where, f"tensor {part}.{name} {list(shape)} is missing; is the copy complete?")
            if found != shape:
                raise CheckpointError(
                    where, f"tensor {part}.{name} is {list(found)}, but the models beside it make it {list(shape)}"
                )
        extra = [name for name in shapes[part] if name not in tensors and not name.startswith(LAYERS)]
        if extra:
            raise CheckpointError(where, f"tensor {part}.{extra[0]} has no place there ({len(extra)} such tensors)")


def _expected(
    shapes: Mapping[str, Mapping[str, Shape]],
    queries: Mapping[str, Any] | None,
    language_model: ModelConfig | None,
    generator: ImageGeneratorConfig | None,
    where: str,
) -> dict[str, dict[str, Shape]]:
    """Parts and their tensors; of a connector's layers (:data:`LAYERS`) none are named."""
    mine = shapes.keys() & {*BETWEEN, *OF_SCALES}
    if not mine:
        return {}
    if queries is None:
        raise CheckpointError(where, f"holds {', '.join(sorted(mine))} without query_tokens; is the copy complete?")
    if language_model is None:
        raise CheckpointError(where, f"holds {', '.join(sorted(mine))}, but no language model; is the copy complete?")
    if mine & {*OF_SCALES}:
        scales = reading_config(lambda: MultiScaleConfig.model_validate(queries), f"{where}: query_tokens")
        return _expected_of_scales(shapes, scales, language_model, generator, where)
    vlm = reading_config(lambda: QueryVlmConfig.model_validate(queries), f"{where}: query_tokens")
    hidden, latent = language_model.backbone.hidden_size, vlm.latent_size(language_model)
    widths = [hidden, latent] if vlm.connector.projection == "linear" else [hidden, hidden, latent]
    linears = {f"projection.{number}": (to, wide) for number, (wide, to) in enumerate(pairwise(widths))}
    expected = {"query_tokens": {"weight": (vlm.num_queries, hidden)}, "query_connector": _linears(linears)}
    if generator is None:
        return expected
    condition, pooled = generator.mmdit.condition_size, generator.mmdit.pooled_size
    expected["pathways"] = {"place": (vlm.num_queries, condition), "pooled": (pooled,)}
    for name, width in {"text": hidden, "visual": latent}.items():
        expected["pathways"] |= {f"{name}.norm.weight": (width,), **_two_layers(name, width, condition, condition)}
    return expected | _frame_embedding(shapes, generator)


def _expected_of_scales(
    shapes: Mapping[str, Mapping[str, Shape]],
    scales: MultiScaleConfig,
    language_model: ModelConfig,
    generator: ImageGeneratorConfig | None,
    where: str,
) -> dict[str, dict[str, Shape]]:
    """Of HieraQuery."""
    if generator is None:
        raise CheckpointError(where, "holds HieraQuery's parts, but no image generator; is the copy complete?")
    mmdit, hidden, inner = generator.mmdit, language_model.backbone.hidden_size, scales.connector.hidden_size
    condition, learned = mmdit.condition_size, scales.mode == "learned"
    queries: dict[str, Shape] = {"weight": (scales.num_queries, hidden)}
    adapters = _two_layers("pooled", condition, condition, mmdit.pooled_size) if mmdit.pooled_size else {}
    if learned:
        queries["marks"] = (len(scales.scales), 2, hidden)
        adapters["place"] = (scales.num_queries, condition)
    if hidden != inner:
        adapters |= _two_layers("inward", hidden, inner, inner)
    if inner != condition:
        adapters |= _two_layers("outward", inner, condition, condition)
    expected = {
        "query_tokens": queries,
        "scale_connector": {"final_layernorm.weight": (inner,)},
        "scale_adapters": adapters,
    }
    if "alignment_projector" in shapes:
        middle = shapes["alignment_projector"].get("0.weight", (1,))[0]
        sizes = {"0": (middle, mmdit.hidden_size), "2": (middle, middle)}
        sizes["4"] = (language_model.vision_encoder.out_size, middle)
        expected["alignment_projector"] = _linears(sizes)
    return expected | _frame_embedding(shapes, generator)


def _frame_embedding(
    shapes: Mapping[str, Mapping[str, Shape]], generator: ImageGeneratorConfig
) -> dict[str, dict[str, Shape]]:
    """Of a transformer without rotary positions; how many pictures it tells apart is the tensor's to say."""
    if generator.mmdit.family != "sd3":
        return {}
    frames = shapes.get("frame_embedding", {}).get("weight", (1,))[0]
    return {"frame_embedding": {"weight": (frames, generator.mmdit.hidden_size)}}


def _two_layers(name: str, in_size: int, inner: int, out_size: int) -> dict[str, Shape]:
    """Of two linear layers."""
    return _linears({f"{name}.linear_1": (inner, in_size), f"{name}.linear_2": (out_size, inner)})


def _linears(sizes: Mapping[str, tuple[int, int]]) -> dict[str, Shape]:
    """Weight and bias of linear layers ``[out, in]``."""
    weights = {f"{name}.weight": size for name, size in sizes.items()}
    return weights | {f"{name}.bias": size[:1] for name, size in sizes.items()}
