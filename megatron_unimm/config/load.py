"""From recipe files and command line to a typed recipe, and back to text.

A recipe file holds shared defaults at its top (``model``, ``method``, ``data``, ``train``, ``system``,
``base_checkpoint``) and named ``stages`` whose values override them. ``base: other.yaml`` starts from another file,
``base: [one.yaml, other.yaml]`` from several, later ones on top (how to train, and which model).
Mappings merge key by key; lists and scalars replace. Precedence, lowest first: shared defaults of the base file, those
of the file, the stage in the base file, the stage in the file, the command line.

Every value remembers where it was written (``Written``), so that an error names the key as the reader wrote it, with
file and line.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_unimm.config.explain import validate
from megatron_unimm.config.methods import METHODS
from megatron_unimm.config.recipe import Recipe, StageConfig
from megatron_unimm.config.wording import join, show, suggest, suggest_or_list
from megatron_unimm.config.written import Written, escape_variables, merged, parse_yaml, plain
from megatron_unimm.config.yaml_dialect import RecipeDumper
from megatron_unimm.errors import ConfigError

STAGE_ONLY = ("name", "after")
"""Fields of a stage that cannot be shared defaults."""
SHARED_SECTIONS = tuple(field for field in StageConfig.model_fields if field not in STAGE_ONLY)
FILE_KEYS = ("base", "name", *SHARED_SECTIONS, "stages")
COMMAND_LINE = "on the command line"


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
    typed = {stage: validate(StageConfig, tree, f"stage {stage}") for stage, tree in stages.items()}
    whole = Written({}, "", root.place, {"name": name, "stages": root["stages"]})
    return validate(Recipe, whole, "recipe", {"name": plain(name), "stages": typed})


def load_stage(path: str | Path) -> StageConfig:
    """Read one complete stage, as written by ``dump(stage)``.

    Raises:
        ConfigError: where the file is absent, incomplete, or wrong.
    """
    return validate(StageConfig, _read_file(Path(path)), "stage")


def dump(config: Recipe | StageConfig) -> str:
    """YAML text with every field in schema order. ``load_recipe`` (``load_stage``) of it gives back an equal object."""
    return yaml.dump(
        escape_variables(config.model_dump()),
        Dumper=RecipeDumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=2**31,
    )


def select_stage(recipe: Recipe, name: str | None) -> StageConfig:
    """The stage of that name; without a name, the only stage.

    Raises:
        ConfigError: where there is no such stage, or no name and several stages.
    """
    names = ", ".join(recipe.stages)
    if name is None:
        if len(recipe.stages) > 1:
            raise ConfigError(
                "stage", f"recipe {recipe.name} has {len(recipe.stages)} stages, choose one with --stage: {names}"
            )
        return next(iter(recipe.stages.values()))
    if name not in recipe.stages:
        raise ConfigError(
            "stage", f"recipe {recipe.name} has no stage {name}{suggest(name, recipe.stages)}; its stages: {names}"
        )
    return recipe.stages[name]


def _read_with_bases(path: Path, chain: tuple[Path, ...]) -> Written:
    """A file merged onto its ``base`` files; ``chain`` holds the files that led here."""
    if path.resolve() in [seen.resolve() for seen in chain]:
        raise ConfigError("base", "files that name each other as base: " + " -> ".join(str(p) for p in (*chain, path)))
    root = _read_file(path)
    assert root.mapping is not None
    base = root.mapping.pop("base", None)
    if base is None:
        return root
    names = [plain(item) for item in base.items] if base.items else [base.scalar]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError("base", f"wanted a recipe file or a list of them {base.place}, got {show(plain(base))}")
    for name in reversed(names):
        root = merged(_read_with_bases(path.parent / name, (*chain, path)), root)
    return root


def _read_file(path: Path) -> Written:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), f"no such recipe{_near_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read as a UTF-8 text file: {error}") from error
    root = parse_yaml(text, str(path), lambda line: f"in {path}:{line}", "")
    if root.mapping is None:
        raise ConfigError(str(path), f"wanted a recipe with the keys {', '.join(FILE_KEYS)}, got {show(plain(root))}")
    return root


def _near_files(path: Path) -> str:
    """What to say about recipes that do exist."""
    folders = [folder for folder in (path.parent, Path("configs")) if folder.is_dir()]
    found = dict.fromkeys(str(file) for folder in folders for file in sorted(folder.rglob("*.yaml")) if file.is_file())
    near = difflib.get_close_matches(str(path), found, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; there are {', '.join(list(found)[:8])}" if found else f"; no *.yaml files in {path.parent}"


def _check_keys(root: Written, valid: Sequence[str]) -> None:
    for key, value in (root.mapping or {}).items():
        if key not in valid:
            raise ConfigError(value.key, f"unknown key {value.place}{suggest_or_list(key, valid)}")


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
        raise ConfigError(
            "stages",
            f"missing {(stages or root).place}; a recipe needs at least one stage, e.g. stages: {{pretrain: {{}}}}",
        )
    shared = Written(None, "", root.place, {key: root[key] for key in SHARED_SECTIONS if key in root.mapping})
    resolved: dict[str, Written] = {}
    previous: str | None = None
    for name, own in stages.mapping.items():
        if plain(own) is None:  # a stage that overrides nothing: "sft:"
            own = Written(None, own.key, own.place, {})
        if own.mapping is None:
            raise ConfigError(own.key, f"wanted a section (keys and values) {own.place}, got {show(plain(own))}")
        tree = merged(shared, own)
        assert tree.mapping is not None
        stated = tree.mapping.setdefault("name", Written(name, own.key, own.place))
        if stated.scalar != name:
            raise ConfigError(
                stated.key, f"{show(stated.scalar)} {stated.place} differs from the key {name}; leave it out"
            )
        tree.mapping.setdefault("after", Written(previous, own.key, own.place))
        resolved[name], previous = tree, name
    return resolved


def _parse_override(override: str) -> tuple[list[str], Written]:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(override, "not of the form key.name=value, e.g. train.steps=5")
    if parts[0] not in FILE_KEYS[1:]:
        raise ConfigError(key, f"unknown key {COMMAND_LINE}{suggest_or_list(parts[0], FILE_KEYS[1:])}")
    try:
        return parts, parse_yaml(text, key, lambda _line: COMMAND_LINE, key)
    except ConfigError as error:
        if isinstance(error.__cause__, yaml.YAMLError):
            raise ConfigError(
                key, f"{text!r} is not a YAML value; if it is text, quote it: '{key}=\"{text}\"'"
            ) from error.__cause__
        raise


def _apply_override(stages: dict[str, Written], key: list[str], value: Written) -> None:
    if key[0] != "stages":
        for tree in _stages_meant(stages, key):
            _set(tree, key, value)
        return
    if len(key) < 3:
        raise ConfigError(".".join(key), "name the stage and a key in it, e.g. stages.sft.train.steps=5")
    if key[1] not in stages:
        raise ConfigError(".".join(key), f"no stage {key[1]}{suggest(key[1], stages)}; the stages: {', '.join(stages)}")
    _set(stages[key[1]], key[2:], value)


def _stages_meant(stages: dict[str, Written], key: list[str]) -> list[Written]:
    """The stages that an override for all means: ``data.sources.NAME.path=...`` skips stages without that source,
    ``method.KEY=...`` those of a method without that key."""
    if key[0] == "method" and len(key) > 1 and key[1] != "name":
        return [tree for tree in stages.values() if _method_has(tree, key[1])] or list(stages.values())
    if key[:2] != ["data", "sources"] or len(key) < 4:
        return list(stages.values())
    having = [tree for tree in stages.values() if key[2] in (plain(tree).get("data") or {}).get("sources", {})]
    return [tree for tree in having if tree["data"]["sources"][key[2]].mapping is not None] or list(stages.values())


def _method_has(tree: Written, field: str) -> bool:
    name = (plain(tree).get("method") or {}).get("name", "orion")
    return name in METHODS and field in METHODS[name].model_fields


def _set(tree: Written, key: list[str], value: Written) -> None:
    """Put a value at a path, making the sections on the way; a mapping merges into a mapping that is there."""
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if tree.items is not None:
            _check_index(tree, part, value.key)
            index = int(part)
            if last:
                tree.items[index] = merged(tree.items[index], value)
            tree = tree.items[index]
            continue
        if tree.mapping is None:
            if tree.scalar is not None:
                raise ConfigError(value.key, f"{tree.key} is {show(tree.scalar)} {tree.place}, it has no {part} inside")
            tree.mapping = {}
        if last:
            tree.mapping[part] = merged(tree.mapping[part], value) if part in tree.mapping else value.copy()
        else:
            # Not value.copy(): the section in between has no value of its own yet.
            tree = tree.mapping.setdefault(part, Written(None, join(tree.key, part), COMMAND_LINE, {}))


def _check_index(tree: Written, part: str, key: str) -> None:
    assert tree.items is not None
    if not part.isdecimal() or int(part) >= len(tree.items):
        raise ConfigError(
            key, f"{tree.key} {tree.place} is a list of {len(tree.items)}; wanted a number below that, got {part}"
        )
