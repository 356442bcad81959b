"""Pieces of error messages about recipes."""

import difflib
from collections.abc import Iterable

import yaml

from megatron_unimm.config.yaml_dialect import RecipeDumper


def join(key: str, part: object) -> str:
    return f"{key}.{part}" if key else str(part)


def one_line(text: str) -> str:
    return " ".join(text.split())


def show(value: object) -> str:
    """A value as the reader may have written it, cut to a readable length."""
    text = yaml.dump(value, Dumper=RecipeDumper, default_flow_style=True, width=2**31, allow_unicode=True)
    text = text.removesuffix("\n...\n").strip()
    return text if len(text) <= 80 else text[:77] + "..."


def suggest(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def suggest_or_list(name: str, valid: Iterable[str]) -> str:
    return suggest(name, valid) or f"; valid here: {', '.join(valid)}"
