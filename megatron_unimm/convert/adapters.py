"""Low-rank adapters (``models/lora.py``) of a checkpoint, which an export puts into the weights beside them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_unimm.errors import CheckpointError


@dataclass(frozen=True)
class Adapter:
    """Beside a weight."""

    lora_a: str
    """Names of the two tensors."""
    lora_b: str
    alpha: float


def find_adapters(keys: Collection[str], meta: Mapping[str, Any], where: str) -> dict[str, Adapter]:
    """The adapters among a checkpoint's tensors, by the name of their weight.

    Raises:
        CheckpointError: one lacks its other half or its weight; names it.
    """
    alphas = _alphas(meta)
    if not alphas:
        return {}
    from megatron_unimm.models.lora import LORA_A, LORA_B, WEIGHT  # loads Megatron-Core, which conversions seldom need

    linears = {
        key.removesuffix(end)
        for key in keys
        for end in (LORA_A, LORA_B)
        if key.endswith(end) and key.split(".", 1)[0] in alphas
    }
    for linear in sorted(linears):
        for end in (LORA_A, LORA_B, WEIGHT):
            if linear + end not in keys:
                raise CheckpointError(where, f"{linear} has an adapter, but there is no tensor {linear}{end}")
    return {
        linear + WEIGHT: Adapter(linear + LORA_A, linear + LORA_B, alphas[linear.split(".", 1)[0]])
        for linear in linears
    }


def _alphas(meta: Mapping[str, Any]) -> dict[str, float]:
    """alpha of each trunk that has adapters."""
    stage = yaml.safe_load(meta.get("config", "")) or {}
    sections = {
        "backbone": meta.get("queries", {}).get("lora"),
        "mmdit": stage.get("method", {}).get("lora"),
    }
    return {trunk: section["alpha"] for trunk, section in sections.items() if section is not None}
