"""Three rules of the architecture: imports point one way, only a few files name the device, and only some import what
may be absent."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = "megatron_unimm"

LAYERS = (
    ("errors",),
    ("config",),
    ("parallel",),
    ("models", "flow", "data"),
    ("methods",),
    ("checkpoint", "convert"),
    ("train", "plan", "generate", "hub", "evaluate", "health", "rewards"),
    ("cli",),
)
"""From the bottom up. A part may import from its own layer and from those below."""

MAY_SAY_CUDA = {
    "parallel/platform*.py": "the door to the device",
    "parallel/stand_ins.py": "what Megatron-Core misses without a GPU",
    "parallel/groups.py": "mcore's name of a group option",
    "models/transformer_config.py": "mcore's names of the CUDA graph settings",
    "config/parallel.py": "the values of the settings platform and cuda_graph",
    "config/layout.py": "checks of these settings",
    "cli/doctor.py": "tells how to get CUDA",
}
"""Files that may say "cuda" outside comments and docstrings, and why."""

MAY_IMPORT = {"nvidia": ("data/decode/dali.py",)}
"""Optional packages, and the files that may import them; these files are imported where the package is asked for."""


@pytest.fixture(scope="module")
def package(repo: Path) -> Path:
    return repo / PACKAGE


def modules(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """Path inside the package, and syntax tree, of every file."""
    for file in sorted(package.rglob("*.py")):
        yield file.relative_to(package).as_posix(), ast.parse(file.read_text(), str(file))


def part_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imported_parts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and part (``data``, ``models``, ...) of every import from this package, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # "from megatron_unimm import data" names the part second.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            words = name.split(".")
            if words[0] == PACKAGE and len(words) > 1:
                yield node.lineno, words[1]


def says_cuda(tree: ast.Module) -> Iterator[int]:
    """Lines with a name or string (no docstring) that contains "cuda"."""
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        words = ""
        if isinstance(node, ast.Name):
            words = node.id
        elif isinstance(node, ast.Attribute):
            words = node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words = node.value
        if "cuda" in words.lower():
            yield getattr(node, "lineno", 0)


def test_every_part_has_a_layer(package: Path) -> None:
    parts = {part_of(path) for path, _ in modules(package)} - {"__init__"}
    assert parts <= {part for layer in LAYERS for part in layer}


def test_imports_point_one_way(package: Path) -> None:
    height = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    wrong = [
        f"{PACKAGE}/{path}:{line} imports {part}"
        for path, tree in modules(package)
        for line, part in imported_parts(tree)
        if part in height and part_of(path) in height and height[part] > height[part_of(path)]
    ]
    assert not wrong, "\n".join(wrong)


def test_only_a_few_files_name_the_device(package: Path) -> None:
    wrong = [
        f"{PACKAGE}/{path}:{line}"
        for path, tree in modules(package)
        if not any(fnmatch(path, allowed) for allowed in MAY_SAY_CUDA)
        for line in says_cuda(tree)
    ]
    assert not wrong, "say it through parallel/platform.py:\n" + "\n".join(wrong)


def test_the_table_of_files_is_tight(package: Path) -> None:
    saying = {path for path, tree in modules(package) if any(says_cuda(tree))}
    unused = [allowed for allowed in MAY_SAY_CUDA if not any(fnmatch(path, allowed) for path in saying)]
    assert not unused


def imported_packages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every import, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module.split(".")[0]


def test_optional_packages_are_imported_in_one_place(package: Path) -> None:
    found = {
        (name, path) for path, tree in modules(package) for _, name in imported_packages(tree) if name in MAY_IMPORT
    }
    assert found == {(name, path) for name, paths in MAY_IMPORT.items() for path in paths}


def test_importers_of_optional_packages_are_imported_late(package: Path) -> None:
    """Inside functions only, so that the package loads without them."""
    late = {
        f"{PACKAGE}.{path.removesuffix('.py').replace('/', '.')}" for paths in MAY_IMPORT.values() for path in paths
    }
    early = [
        f"{PACKAGE}/{path}:{node.lineno}"
        for path, tree in modules(package)
        for node in tree.body
        if (isinstance(node, ast.ImportFrom) and node.module in late)
        or (isinstance(node, ast.Import) and any(alias.name in late for alias in node.names))
    ]
    assert not early
