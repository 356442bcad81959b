"""Validation of a ``Written`` tree, with pydantic's errors in our words."""

import re
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_unimm.config.base import Section
from megatron_unimm.config.wording import join, show, suggest, suggest_or_list
from megatron_unimm.config.written import Written, plain
from megatron_unimm.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)


def validate(section: type[SectionT], tree: Written, what: str, values: Any = None) -> SectionT:
    """The typed section of a tree.

    Args:
        tree: where things were written.
        what: whose section it is, for messages: ``stage sft``.
        values: what to validate in place of the tree's plain values.

    Raises:
        ConfigError: for the first thing that is wrong; how many more there are is said at the end.
    """
    try:
        return section.model_validate(plain(tree) if values is None else values)
    except ValidationError as error:
        details = error.errors(include_url=False)
    # A misspelt key often shows up twice, as unknown and as missing: the unknown one says more.
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    where, message = _translate(section, tree, what, details[0])
    raise ConfigError(where, message + (f" (and {len(details) - 1} more)" if len(details) > 1 else ""))


def _translate(section: type[Section], tree: Written, what: str, detail: ErrorDetails) -> tuple[str, str]:
    """``where`` and ``what`` of a ConfigError for one of pydantic's errors."""
    node, path, found = _follow(tree, detail["loc"])
    kind, context = detail["type"], detail.get("ctx", {})
    where = (node.key if found else "") or ".".join(path) or what
    if kind == "extra_forbidden":
        valid = _fields_at(section, detail["loc"][:-1])
        return where, f"unknown key {node.place}{suggest_or_list(path[-1], valid)}"
    if kind == "missing":
        return where, f"missing for {what} {node.place}; add it"
    if kind == "value_error":  # raised by a validator of ours, which says it all
        return where, f"{context['error']}, {node.place}"
    got = f"got {show(detail['input'])} {node.place}"
    if kind == "union_tag_not_found":
        return join(where, _tag(context)), f"missing for {what} {node.place}; add it"
    if kind == "union_tag_invalid":
        names = re.split(r", ", context["expected_tags"].replace("'", ""))
        said = (node.mapping or {}).get(_tag(context), node)
        got = f"got {show(context['tag'])} {said.place}"
        return join(where, _tag(context)), f"wanted one of {', '.join(names)}, {got}{suggest(context['tag'], names)}"
    if kind == "literal_error":
        names = re.split(r", | or ", context["expected"].replace("'", ""))
        return where, f"wanted one of {', '.join(names)}, {got}{suggest(str(detail['input']), names)}"
    if kind in _BOUNDS:
        sign, bound = _BOUNDS[kind]
        return where, f"wanted a number {sign} {context[bound]:g}, {got}"
    wanted = next((words for prefix, words in _WANTED.items() if kind.startswith(prefix)), None)
    return where, f"wanted {wanted}, {got}" if wanted else f"{detail['msg']}, {got}"


def _tag(context: dict[str, Any]) -> str:
    """The field that tells the members of a union apart."""
    return context["discriminator"].strip("'")


_BOUNDS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}
"""Pydantic's error type: the sign, and the key of the bound in the error's context."""
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
        elif tree.items is not None and isinstance(part, int) and part < len(tree.items):
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
        # A part that is no field is a key of a dict, an index of a list, or a union's tag: the sections stay the same.
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
