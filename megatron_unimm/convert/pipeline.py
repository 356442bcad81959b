"""Model folders of diffusers: a pipeline of several models, or one of them alone.

model_index.json            class of each part: "vae": ["diffusers", "AutoencoderKL"]
transformer/  vae/          config.json, diffusion_pytorch_model.safetensors: what we convert
scheduler/  tokenizer/  …   small files only; weights of text encoders are not built
language_model/             a model of transformers that conditions it (MMCORE), with parts of ours beside it
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_unimm.config.mmdit import ImageGeneratorConfig
from megatron_unimm.convert.reader import read_config, read_json
from megatron_unimm.errors import CheckpointError

PIPELINE = "model_index.json"
TRANSFORMER, VAE = "transformer", "vae"
SCHEDULER = "scheduler"
CONFIG = "config.json"


def is_model_folder(path: Path) -> bool:
    """Whether a folder looks like a model of transformers or diffusers, or a pipeline."""
    return any((path / name).is_file() for name in (CONFIG, PIPELINE))


def read_model(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model; of a pipeline ``model_index.json``, in which the config of each part that we convert
    stands in place of the name of its class.

    Raises:
        CheckpointError: one is absent or not JSON, or the pipeline has no such part.
    """
    if not (folder / PIPELINE).is_file():
        return read_config(folder)
    config = read_json(folder / PIPELINE)
    for part in (TRANSFORMER, VAE):
        if part not in config:
            raise CheckpointError(
                str(folder / PIPELINE), f"has no {part}; pipelines of a {TRANSFORMER} and a {VAE} can be converted"
            )
        config[part] = read_config(folder / part)
    return config


def part_names(folder: Path) -> list[str]:
    """The parts of a pipeline that have a folder in it. A name from a file is a folder's only if it is a plain word, so
    that it cannot lead elsewhere."""
    if not (folder / PIPELINE).is_file():
        return []
    return sorted(name for name in read_json(folder / PIPELINE) if name.isidentifier() and (folder / name).is_dir())


def config_files(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files, by their path in the folder, that :func:`read_model` reads as ``config``; with the scheduler's."""
    parts = {name: content for name, content in config.items() if isinstance(content, dict)}
    if TRANSFORMER not in parts:
        return {CONFIG: config}
    index = config | {name: ["diffusers", content["_class_name"]] for name, content in parts.items()}
    files = {f"{name}/{'scheduler_config.json' if name == SCHEDULER else CONFIG}": parts[name] for name in parts}
    return {PIPELINE: index} | files


def without_text_encoders(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files of a pipeline, by their path in it, without those of tokenizers and text encoders: its transformer has
    learned to be conditioned on something else."""
    index: dict[str, Any] = json.loads(files[PIPELINE])
    others = {name for name in index if not name.startswith("_") and name not in (TRANSFORMER, VAE, SCHEDULER)}
    kept = {name: content for name, content in files.items() if name.split("/")[0] not in others}
    index |= {name: [None, None] for name in sorted(others)}
    return kept | {PIPELINE: (json.dumps(index, indent=2) + "\n").encode()}


def architectures_of(config: dict[str, Any]) -> list[str]:
    """Names of the classes that a model may be loaded as; of a pipeline, its transformer's."""
    model = config[TRANSFORMER] if isinstance(config.get(TRANSFORMER), dict) else config
    if "_class_name" in model:
        return [model["_class_name"]]
    return model.get("architectures") or []


# ---------------------------------------------------------------------------------------------- image generators


def folders(model: ImageGeneratorConfig) -> tuple[str, ...]:
    """Where the weights lie: a transformer that was imported alone goes back alone."""
    return ("",) if model.vae is None else (TRANSFORMER, VAE)


def prefix_of(model: ImageGeneratorConfig) -> str:
    """Of the transformer's tensors."""
    return "" if model.vae is None else f"{TRANSFORMER}/"


def transformer_config(config: dict[str, Any]) -> dict[str, Any]:
    """The transformer's part of what :func:`read_model` read."""
    return config.get(TRANSFORMER, config)


def pipeline_config(
    name: str,
    transformer: dict[str, Any],
    vae: dict[str, Any] | None,
    scheduler: dict[str, Any],
    text_parts: Sequence[str],
) -> dict[str, Any]:
    """What :func:`config_files` writes of a model that never was a folder.

    Args:
        name: the pipeline's class.
        vae: None for a transformer alone.
        text_parts: tokenizers and text encoders, which the pipeline is loaded without.
    """
    if vae is None:
        return transformer
    absent = {part: [None, None] for part in text_parts}
    return {"_class_name": name, TRANSFORMER: transformer, VAE: vae, SCHEDULER: scheduler, **absent}


def refuse_fields(config: dict[str, Any], where: str, built: dict[str, Any], ignored: Sequence[str]) -> None:
    """Refuse what would convert to a model that computes something else.

    Args:
        built: fields, and the only value of each that is built; one that is absent or null passes.
        ignored: the other fields that we know.

    Raises:
        CheckpointError: names the field.
    """
    if "quantization_config" in config:
        raise CheckpointError(where, "is of a quantized model; take the bf16 one")
    for field, value in built.items():
        if config.get(field) not in (None, value):
            raise CheckpointError(where, f"{field} is {config[field]!r}; only {value!r} is built")
    for field, value in config.items():
        if field not in built and field not in ignored and not field.startswith("_") and value is not None:
            raise CheckpointError(where, f"{field} is {value!r}; this field is unknown, and nothing is built for it")
