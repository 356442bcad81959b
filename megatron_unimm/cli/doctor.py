"""``unimm doctor``: what is installed, what works, what is missing and how to get it."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

State = Literal["ok", "missing", "broken", "too old or new", "optional"]

IMPORT_NAMES = {
    "megatron-core": "megatron.core",
    "nvidia-dali-cuda130": "nvidia.dali",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "transformer-engine": "transformer_engine.pytorch",
}
"""Where the module is not named like its package."""
GIB = 2**30
SMALLEST_MEMORY_GIB, SMALLEST_DISK_GIB = 4, 2
"""What the quick start in the Shapes world needs."""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    state: State
    detail: str
    remedy: str = ""
    required: bool = True

    @property
    def is_fatal(self) -> bool:
        return self.required and self.state != "ok"


@click.command(epilog="Example: unimm doctor")
def doctor() -> int:
    """Tell what is installed, what works, and how to get what is missing.

    Exit code 0 if training on CPU works, 1 if something that it needs is missing.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    findings = list(diagnose())
    table = Table()
    for heading in ("", "state", "found", "how to get it"):
        table.add_column(heading, overflow="fold")
    colours = {"ok": "green", "optional": "yellow"}
    for finding in findings:
        colour = colours.get(finding.state, "red")
        table.add_row(finding.name, f"[{colour}]{finding.state}[/]", escape(finding.detail), escape(finding.remedy))
    Console().print(table)
    fatal = [finding.name for finding in findings if finding.is_fatal]
    click.echo(f"Not ready: {', '.join(fatal)}." if fatal else "Ready: training works on this machine.")
    return 1 if fatal else 0


def diagnose() -> Iterator[Finding]:
    """All findings, in the order of the table."""
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield from _check_requirements()
    yield _check_module("apex", "", "not needed: Transformer Engine has fused layers and optimizer", required=False)
    yield _check_device()
    yield _check_memory()
    yield _check_disk()


def _check_requirements() -> Iterator[Finding]:
    """One finding per dependency that our own package metadata names."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("megatron_unimm") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("megatron_unimm", "missing", "running from a folder", "in its folder: pip install -e .")
        return
    for requirement in map(Requirement, lines):
        extra = next(
            (e for e in ("gpu", "dali", "test") if requirement.marker and f'"{e}"' in str(requirement.marker)), None
        )
        if extra == "test":
            continue
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        if extra is not None:
            remedy = f"on a GPU machine: pip install -e '.[{extra}]'"
        yield _check_module(requirement.name, str(requirement.specifier), remedy, required=extra is None)


def _check_module(name: str, wanted: str, remedy: str, *, required: bool) -> Finding:
    """Whether a package is there, in a wanted version, and can be imported."""
    from packaging.specifiers import SpecifierSet

    module_name = IMPORT_NAMES.get(name, name.replace("-", "_"))
    try:
        with warnings.catch_warnings():
            # Megatron-Core and transformers warn about optional packages that have lines of their own here.
            warnings.simplefilter("ignore")
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            return Finding(name, "missing" if required else "optional", "not installed", remedy, required)
        return Finding(name, "broken", f"imports {error.name}, which is missing", f"pip install {error.name}", required)
    except Exception as error:  # a compiled package that does not fit torch or the driver fails in ways of its own
        return Finding(name, "broken", " ".join(f"{type(error).__name__}: {error}".split())[:200], remedy, required)
    version = _version(name) or str(module.__dict__.get("__version__", "unknown version"))
    if wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(name, "too old or new", f"{version}, wanted {wanted}", remedy, required)
    return Finding(name, "ok", version, required=required)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_device() -> Finding:
    from megatron_unimm.errors import UserError

    try:
        from megatron_unimm.parallel.platform import select_platform

        chosen = select_platform()
    except ImportError as error:
        return Finding("device", "broken", str(error), "see the lines above")
    except UserError as error:
        return Finding("device", "broken", str(error))
    remedy = "" if chosen.is_gpu else "for large models: an NVIDIA GPU, its driver, and a CUDA build of torch"
    return Finding("device", "ok", f"{chosen.device_name()}, ranks talk through {chosen.backend}", remedy)


def _check_memory() -> Finding:
    try:
        import psutil
    except ImportError:
        return Finding("memory", "missing", "cannot tell without psutil", "pip install psutil")
    memory = psutil.virtual_memory()
    free = memory.available / GIB
    detail = f"{free:.1f} of {memory.total / GIB:.1f} GiB free, {os.cpu_count()} cores"
    if free < SMALLEST_MEMORY_GIB:
        return Finding("memory", "optional", detail, f"the quick start needs {SMALLEST_MEMORY_GIB} GiB", required=False)
    return Finding("memory", "ok", detail)


def _check_disk() -> Finding:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / GIB
    if free < SMALLEST_DISK_GIB:
        remedy = f"the quick start needs {SMALLEST_DISK_GIB} GiB; set RUNS and DATA to another disk"
        return Finding("disk", "optional", f"{free:.1f} GiB free at {here}", remedy, required=False)
    return Finding("disk", "ok", f"{free:.1f} GiB free at {here}")
