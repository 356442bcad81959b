"""Values of a recipe that know where they were written.

YAML text becomes a tree of ``Written`` nodes, each with the key as the reader wrote it and the file and line (or the
command line), so that a wrong value found much later, after merging, is still reported at its place.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megatron_unimm.config.wording import join, one_line, show
from megatron_unimm.config.yaml_dialect import RecipeLoader
from megatron_unimm.errors import ConfigError

Place = Callable[[int], str]
"""Says where a line is, e.g. ``in configs/x.yaml:14``."""


@dataclass
class Written:
    """A value of a recipe file or an override, with where it stands: a mapping, a list of items, or else a scalar."""

    scalar: Any
    """None where there is a mapping or a list."""
    key: str
    """Dotted path as the reader wrote it, e.g. ``stages.sft.train.steps``."""
    place: str
    """``in configs/x.yaml:14`` or ``on the command line``."""
    mapping: dict[str, "Written"] | None = None
    items: list["Written"] | None = None

    def __getitem__(self, key: str) -> "Written":
        assert self.mapping is not None
        return self.mapping[key]

    def copy(self) -> "Written":
        """A copy whose mappings and lists can be changed without changing this one's."""
        return Written(
            self.scalar,
            self.key,
            self.place,
            None if self.mapping is None else {key: value.copy() for key, value in self.mapping.items()},
            None if self.items is None else [item.copy() for item in self.items],
        )


def plain(tree: Written) -> Any:
    if tree.mapping is not None:
        return {key: plain(value) for key, value in tree.mapping.items()}
    if tree.items is not None:
        return [plain(item) for item in tree.items]
    return tree.scalar


def merged(under: Written, over: Written) -> Written:
    """``over`` laid on ``under``; where both are mappings, key by key.

    A section of another ``family`` or ``rule``, or a method of another ``name``, replaces the one below it: the keys of
    one mean nothing to another.
    """
    if under.mapping is None or over.mapping is None or _is_another(under, over):
        return over.copy()
    mapping = {key: value.copy() for key, value in under.mapping.items()}
    for key, value in over.mapping.items():
        mapping[key] = merged(mapping[key], value) if key in mapping else value.copy()
    return Written(None, over.key, over.place, mapping)


def _is_another(under: Written, over: Written) -> bool:
    """Whether a field that tells the members of a union apart says something else."""
    assert under.mapping is not None
    assert over.mapping is not None
    # What a recipe and a stage are called says nothing of the kind.
    names = ("name",) if over.key.split(".")[-1] == "method" else ("family", "rule")
    for name in names:
        if name in over.mapping:
            return name not in under.mapping or over.mapping[name].scalar != under.mapping[name].scalar
    return False


def parse_yaml(text: str, where: str, place: Place, key: str) -> Written:
    """One YAML document; ``place(line)`` says where a line is."""
    loader = RecipeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Written(None, key, place(1))
        return _from_node(loader, node, place, key, ())
    except yaml.YAMLError as error:
        raise ConfigError(where, f"not valid YAML: {one_line(str(error))}") from error
    finally:
        loader.dispose()


def _from_node(loader: RecipeLoader, node: Node, place: Place, key: str, above: tuple[Node, ...]) -> Written:
    here = place(node.start_mark.line + 1)
    if any(node is ancestor for ancestor in above):
        raise ConfigError(key, f"contains itself {here}")
    above = (*above, node)
    if isinstance(node, MappingNode):
        _refuse_duplicates(node, place, key)
        loader.flatten_mapping(node)
        mapping = {}
        for key_node, value_node in node.value:
            name = loader.construct_object(key_node)
            path = join(key, name)
            if not isinstance(name, str):
                raise ConfigError(path, f"wanted a string as key {here}, got {show(name)}; put it in quotes")
            mapping[name] = _from_node(loader, value_node, place, path, above)
            # An anchor's lines are elsewhere: what counts for the reader is the line of the key.
            mapping[name].place = place(key_node.start_mark.line + 1)
        return Written(None, key, here, mapping)
    if isinstance(node, SequenceNode):
        items = [_from_node(loader, item, place, join(key, i), above) for i, item in enumerate(node.value)]
        return Written(None, key, here, None, items)
    assert isinstance(node, ScalarNode)
    value = loader.construct_object(node)
    return Written(_expand_variables(value, key, here) if isinstance(value, str) else value, key, here)


def _refuse_duplicates(node: MappingNode, place: Place, key: str) -> None:
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if key_node.value in lines:
            first = place(lines[key_node.value])
            raise ConfigError(join(key, key_node.value), f"written twice, {first} and {place(line)}; keep one")
        lines[key_node.value] = line


_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\}|\$\{[^}]*\}?")


def _expand_variables(text: str, key: str, place: str) -> str:
    """``${NAME}`` and ``${NAME:-default}`` from the environment; ``$${`` stands for ``${``."""

    def value_of(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        if match[1] is None:
            raise ConfigError(
                key, f"cannot read {match[0]!r} {place}; write ${{NAME}}, ${{NAME:-default}}, or $${{ for ${{"
            )
        # As in a shell, ":-" also stands in for an empty variable.
        value = os.environ.get(match[1], "")
        if value:
            return value
        if match[2] is None:
            raise ConfigError(
                key, f"{match[1]} is not set {place}; export {match[1]}=… or write ${{{match[1]}:-default}}"
            )
        return match[3]

    return _VARIABLE.sub(value_of, text)


def escape_variables(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, Mapping):
        return {key: escape_variables(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape_variables(item) for item in value]
    return value
