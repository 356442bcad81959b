"""From recipe files and command line to a typed recipe, and back to text.

A recipe file holds shared defaults at its top (``model``, ``method``, ``data``, ``train``, ``system``, ``base_checkpoint``) and named
``stages`` whose values override them. ``base: other.yaml`` starts from another file. The order of precedence, lowest first: base
file, file, stage, command line. Mappings merge key by key; lists and scalars replace.

Every value remembers where it was written (``Written``), so that an error names the key as the reader wrote it, with file and line.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megatron_unimm.config.base import Section
from megatron_unimm.config.recipe import Recipe, StageConfig
from megatron_unimm.errors import ConfigError

STAGE_ONLY = ("name", "after")
"""Fields of a stage that cannot be shared defaults."""
SHARED_SECTIONS = tuple(field for field in StageConfig.model_fields if field not in STAGE_ONLY)
FILE_KEYS = ("base", "name", *SHARED_SECTIONS, "stages")
COMMAND_LINE = "on the command line"

SectionT = TypeVar("SectionT", bound=Section)


# ----------------------------------------------------------------------------------------------------------------------------------
# Public functions


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply ``a.b=value`` overrides in order, and validate every stage.

    ``train.steps=5`` changes all stages, ``stages.sft.train.steps=5`` one.

    Raises:
        ConfigError: for anything wrong in the file, its bases, or the overrides.
    """
    root = _read_with_bases(Path(path), ())
    _check_keys(root, FILE_KEYS)
    name, stages = _name_of(root), _resolve_stages(root)
    for override in overrides:
        key, value = _parse_override(override)
        if key == ["name"]:
            name = value
        else:
            _apply_override(stages, key, value)
    typed = {stage: _validate(StageConfig, tree, f"stage {stage}") for stage, tree in stages.items()}
    whole = Written({}, "", root.place, {"name": name, "stages": root["stages"]})
    return _validate(Recipe, whole, "recipe", {"name": _plain(name), "stages": typed})


def load_stage(path: str | Path) -> StageConfig:
    """Read one complete stage, as written by ``dump(stage)``.

    Raises:
        ConfigError: where the file is absent, incomplete, or wrong.
    """
    return _validate(StageConfig, _read_file(Path(path)), "stage")


def dump(config: Recipe | StageConfig) -> str:
    """YAML text with every field in schema order. ``load_recipe`` (``load_stage``) of it gives back an equal object."""
    return yaml.dump(
        _escape_variables(config.model_dump()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=2**31
    )


def select_stage(recipe: Recipe, name: str | None) -> StageConfig:
    """The stage of that name; without a name, the only stage.

    Raises:
        ConfigError: where there is no such stage, or no name and several stages.
    """
    names = ", ".join(recipe.stages)
    if name is None:
        if len(recipe.stages) > 1:
            raise ConfigError("stage", f"recipe {recipe.name} has {len(recipe.stages)} stages, choose one with --stage: {names}")
        return next(iter(recipe.stages.values()))
    if name not in recipe.stages:
        raise ConfigError("stage", f"recipe {recipe.name} has no stage {name}{_suggest(name, recipe.stages)}; its stages: {names}")
    return recipe.stages[name]


# ----------------------------------------------------------------------------------------------------------------------------------
# Values that know where they were written


@dataclass
class Written:
    """A value of a recipe file or an override, with where it stands. Exactly one of scalar, mapping, items is meant by ``kind``."""

    scalar: Any
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


def _plain(tree: Written) -> Any:
    if tree.mapping is not None:
        return {key: _plain(value) for key, value in tree.mapping.items()}
    if tree.items is not None:
        return [_plain(item) for item in tree.items]
    return tree.scalar


def _merged(under: Written, over: Written) -> Written:
    """``over`` laid on ``under``; where both are mappings, key by key."""
    if under.mapping is None or over.mapping is None:
        return over.copy()
    mapping = {key: value.copy() for key, value in under.mapping.items()}
    for key, value in over.mapping.items():
        mapping[key] = _merged(mapping[key], value) if key in mapping else value.copy()
    return Written(None, over.key, over.place, mapping)


# ----------------------------------------------------------------------------------------------------------------------------------
# YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but ``1e-3`` is a number (PyYAML wants ``1.0e-3``)."""


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_Loader`` would otherwise take for a number."""


_PLAIN_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _PLAIN_EXPONENT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _PLAIN_EXPONENT, list("-+0123456789"))


def _read_with_bases(path: Path, chain: tuple[Path, ...]) -> Written:
    """A file merged onto its chain of ``base`` files; ``chain`` holds the files that led here."""
    if path.resolve() in [seen.resolve() for seen in chain]:
        raise ConfigError("base", "files that name each other as base: " + " -> ".join(str(p) for p in (*chain, path)))
    root = _read_file(path)
    assert root.mapping is not None
    base = root.mapping.pop("base", None)
    if base is None:
        return root
    if not isinstance(base.scalar, str):
        raise ConfigError("base", f"wanted the name of a recipe file {base.place}, got {_show(_plain(base))}")
    return _merged(_read_with_bases(path.parent / base.scalar, (*chain, path)), root)


def _read_file(path: Path) -> Written:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), f"no such recipe{_near_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read as a UTF-8 text file: {error}") from error
    root = _parse_yaml(text, str(path), lambda line: f"in {path}:{line}", "")
    if root.mapping is None:
        raise ConfigError(str(path), f"wanted a recipe with the keys {', '.join(FILE_KEYS)}, got {_show(_plain(root))}")
    return root


def _near_files(path: Path) -> str:
    """What to say about recipes that do exist."""
    folders = [folder for folder in (path.parent, Path("configs")) if folder.is_dir()]
    found = dict.fromkeys(str(file) for folder in folders for file in sorted(folder.rglob("*.yaml")) if file.is_file())
    near = difflib.get_close_matches(str(path), found, n=3, cutoff=0.5)
    near += [file for file in found if file not in near and difflib.SequenceMatcher(None, Path(file).stem, path.stem).ratio() > 0.6]
    if near:
        return f"; did you mean {' or '.join(near[:3])}?"
    return f"; there are {', '.join(list(found)[:8])}" if found else f"; no *.yaml files in {path.parent}"


def _parse_yaml(text: str, where: str, place: Any, key: str) -> Written:
    """One YAML document; ``place(line)`` says where a line is."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Written(None, key, place(1))
        return _from_node(loader, node, place, key, ())
    except yaml.YAMLError as error:
        raise ConfigError(where, f"not valid YAML: {_one_line(str(error))}") from error
    finally:
        loader.dispose()


def _from_node(loader: _Loader, node: Node, place: Any, key: str, above: tuple[Node, ...]) -> Written:
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
            path = _join(key, name)
            if not isinstance(name, str):
                raise ConfigError(path, f"wanted a string as key {here}, got {_show(name)}; put it in quotes")
            mapping[name] = _from_node(loader, value_node, place, path, above)
            # An anchor's lines are elsewhere: what counts for the reader is the line of the key.
            mapping[name].place = place(key_node.start_mark.line + 1)
        return Written(None, key, here, mapping)
    if isinstance(node, SequenceNode):
        return Written(None, key, here, None, [_from_node(loader, n, place, _join(key, i), above) for i, n in enumerate(node.value)])
    assert isinstance(node, ScalarNode)
    value = loader.construct_object(node)
    return Written(_expand_variables(value, key, here) if isinstance(value, str) else value, key, here)


def _refuse_duplicates(node: MappingNode, place: Any, key: str) -> None:
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if key_node.value in lines:
            raise ConfigError(_join(key, key_node.value), f"written twice, {place(lines[key_node.value])} and {place(line)}; keep one")
        lines[key_node.value] = line


# ----------------------------------------------------------------------------------------------------------------------------------
# Environment variables in strings

_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\}|\$\{[^}]*\}?")


def _expand_variables(text: str, key: str, place: str) -> str:
    """``${NAME}`` and ``${NAME:-default}`` from the environment; ``$${`` stands for ``${``."""

    def value_of(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        if match[1] is None:
            raise ConfigError(key, f"cannot read {match[0]!r} {place}; write ${{NAME}} or ${{NAME:-default}}, or $${{ for the characters")
        # As in a shell, ":-" also stands in for an empty variable.
        value = os.environ.get(match[1], "")
        if value:
            return value
        if match[2] is None:
            raise ConfigError(key, f"environment variable {match[1]} is not set {place}; set it, or give a default: ${{{match[1]}:-…}}")
        return match[3]

    return _VARIABLE.sub(value_of, text)


def _escape_variables(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, Mapping):
        return {key: _escape_variables(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape_variables(item) for item in value]
    return value


# ----------------------------------------------------------------------------------------------------------------------------------
# Stages and overrides


def _check_keys(root: Written, valid: Sequence[str]) -> None:
    for key, value in (root.mapping or {}).items():
        if key not in valid:
            raise ConfigError(value.key, f"unknown key {value.place}{_suggest_or_list(key, valid)}")


def _name_of(root: Written) -> Written:
    assert root.mapping is not None
    if "name" not in root.mapping:
        raise ConfigError("name", f"missing {root.place}; give the recipe a name")
    return root["name"]


def _resolve_stages(root: Written) -> dict[str, Written]:
    """The trees of all stages: shared defaults under the stage's own values, name and predecessor filled in."""
    assert root.mapping is not None
    stages = root.mapping.get("stages")
    if stages is None or not stages.mapping:
        raise ConfigError("stages", f"missing {(stages or root).place}; a recipe needs at least one stage, e.g. stages: {{pretrain: {{}}}}")
    shared = Written(None, "", root.place, {key: root[key] for key in SHARED_SECTIONS if key in root.mapping})
    resolved: dict[str, Written] = {}
    previous: str | None = None
    for name, own in stages.mapping.items():
        if own.mapping is None and own.scalar is None and own.items is None:
            own = Written(None, own.key, own.place, {})
        if own.mapping is None:
            raise ConfigError(own.key, f"wanted a section with the keys {', '.join(StageConfig.model_fields)} {own.place}, got {_show(_plain(own))}")
        tree = _merged(shared, own)
        assert tree.mapping is not None
        stated = tree.mapping.setdefault("name", Written(name, own.key, own.place))
        if stated.scalar != name:
            raise ConfigError(stated.key, f"{_show(stated.scalar)} {stated.place} differs from the stage's key {name}; leave the name out")
        tree.mapping.setdefault("after", Written(previous, own.key, own.place))
        resolved[name], previous = tree, name
    return resolved


def _parse_override(override: str) -> tuple[list[str], Written]:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(override, "not of the form key.name=value, e.g. train.steps=5")
    if parts[0] not in FILE_KEYS[1:]:
        raise ConfigError(key, f"unknown key {COMMAND_LINE}{_suggest_or_list(parts[0], FILE_KEYS[1:])}")
    try:
        return parts, _parse_yaml(text, key, lambda _line: COMMAND_LINE, key)
    except ConfigError as error:
        if isinstance(error.__cause__, yaml.YAMLError):
            raise ConfigError(key, f"{text!r} is not a YAML value; if it is text, quote it: '{key}=\"{text}\"'") from error.__cause__
        raise


def _apply_override(stages: dict[str, Written], key: list[str], value: Written) -> None:
    if key[0] != "stages":
        for tree in _stages_with_source(stages, key):
            _set(tree, key, value)
        return
    if len(key) < 3:
        raise ConfigError(".".join(key), "name the stage and a key in it, e.g. stages.sft.train.steps=5")
    if key[1] not in stages:
        raise ConfigError(".".join(key), f"no stage {key[1]}{_suggest(key[1], stages)}; the stages: {', '.join(stages)}")
    _set(stages[key[1]], key[2:], value)


def _stages_with_source(stages: dict[str, Written], key: list[str]) -> list[Written]:
    """The stages that an override for all stages means: ``data.sources.NAME.path=...`` leaves out stages without that source."""
    if key[:2] != ["data", "sources"] or len(key) < 4:
        return list(stages.values())
    having = [tree for tree in stages.values() if key[2] in (_plain(tree).get("data") or {}).get("sources", {})]
    return [tree for tree in having if tree["data"]["sources"][key[2]].mapping is not None] or list(stages.values())


def _set(tree: Written, key: list[str], value: Written) -> None:
    """Put a value at a path, making the sections on the way; a mapping merges into a mapping that is there."""
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if tree.items is not None:
            _check_index(tree, part, value.key)
            index = int(part)
            if last:
                tree.items[index] = _merged(tree.items[index], value)
            tree = tree.items[index]
            continue
        if tree.mapping is None:
            if tree.scalar is not None:
                raise ConfigError(value.key, f"{tree.key} is {_show(tree.scalar)} {tree.place}, it has no {part} inside")
            tree.mapping = {}
        if last:
            tree.mapping[part] = _merged(tree.mapping[part], value) if part in tree.mapping else value.copy()
        else:
            # Not value.copy(): the section in between has no value of its own yet.
            tree = tree.mapping.setdefault(part, Written(None, _join(tree.key, part), COMMAND_LINE, {}))


def _check_index(tree: Written, part: str, key: str) -> None:
    assert tree.items is not None
    if not part.isdecimal() or int(part) >= len(tree.items):
        raise ConfigError(key, f"{tree.key} {tree.place} is a list of {len(tree.items)}; wanted a number below that, got {part}")


# ----------------------------------------------------------------------------------------------------------------------------------
# Pydantic's errors in our words


def _validate(section: type[SectionT], tree: Written, what: str, plain: Any = None) -> SectionT:
    try:
        return section.model_validate(_plain(tree) if plain is None else plain)
    except ValidationError as error:
        details = error.errors(include_url=False)
    # A misspelt key often shows up twice, as unknown and as missing: the unknown one says more.
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    where, message = _translate(section, tree, what, details[0])
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    raise ConfigError(where, message + more)


def _translate(section: type[Section], tree: Written, what: str, detail: ErrorDetails) -> tuple[str, str]:
    node, path, found = _follow(tree, detail["loc"])
    kind, context = detail["type"], detail.get("ctx", {})
    where = (node.key if found else "") or ".".join(path) or what
    got = _show(detail["input"])
    if kind == "extra_forbidden":
        return where, f"unknown key {node.place}{_suggest_or_list(path[-1], _fields_at(section, detail['loc'][:-1]))}"
    if kind == "missing":
        return where, f"missing for {what} {node.place}; add it"
    if kind in ("value_error", "assertion_error"):
        return where, f"{context['error']}, {node.place}"
    if kind == "literal_error":
        options = context["expected"].replace("'", "")
        names = re.split(r", | or ", options)
        return where, f"wanted one of {', '.join(names)}, got {got} {node.place}{_suggest(str(detail['input']), names)}"
    if kind in _BOUNDS:
        sign = _BOUNDS[kind]
        return where, f"wanted a number {sign} {context[_BOUND_KEY[kind]]}, got {got} {node.place}"
    wanted = next((words for prefix, words in _WANTED.items() if kind.startswith(prefix)), None)
    if wanted is None:
        return where, f"{detail['msg']}, got {got} {node.place}"
    return where, f"wanted {wanted}, got {got} {node.place}"


_BOUNDS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
_BOUND_KEY = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
_WANTED = {
    "int_": "an integer",
    "float_": "a number",
    "finite_": "a finite number",
    "bool_": "true or false",
    "string_": "a string",
    "list_": "a list",
    "dict_": "a section (keys and values)",
    "model_": "a section (keys and values)",
}
"""By the beginning of pydantic's error type."""


def _follow(tree: Written, loc: tuple[int | str, ...]) -> tuple[Written, list[str], bool]:
    """The node at a pydantic location, the path to it, and whether it exists (if not: the nearest node above it).

    Pydantic puts tags of unions into locations; these are no keys of ours and are left out.
    """
    path: list[str] = []
    for index, part in enumerate(loc):
        if tree.mapping is not None and part in tree.mapping:
            tree = tree.mapping[str(part)]
        elif tree.items is not None and isinstance(part, int):
            tree = tree.items[part]
        elif index == len(loc) - 1:
            return tree, [*path, str(part)], False
        else:
            continue
        path.append(str(part))
    return tree, path, True


def _fields_at(section: type[Section], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that are valid at a pydantic location."""
    sections = [section]
    for part in loc:
        fields = [s.model_fields[str(part)] for s in sections if part in s.model_fields]
        # A part that is no field is the key of a dict, the index of a list, or a union's tag: the sections stay the same.
        sections = [inner for field in fields for inner in _sections_in(field)] if fields else sections
    return sorted({name for s in sections for name in s.model_fields})


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, FieldInfo):
        return _sections_in(annotation.annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        arguments = arguments[:1]
    return [section for argument in arguments for section in _sections_in(argument)]


# ----------------------------------------------------------------------------------------------------------------------------------
# Wording


def _join(key: str, part: object) -> str:
    return f"{key}.{part}" if key else str(part)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show(value: object) -> str:
    """A value as the reader may have written it, cut to a readable length."""
    if isinstance(value, Section):
        value = value.model_dump()
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=2**31, allow_unicode=True).removesuffix("\n...\n").strip()
    return text if len(text) <= 80 else text[:77] + "..."


def _suggest(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def _suggest_or_list(name: str, valid: Iterable[str]) -> str:
    return _suggest(name, valid) or f"; valid here: {', '.join(valid)}"
