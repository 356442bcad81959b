"""The YAML of recipes: YAML 1.1 as PyYAML reads it, but ``1e-3`` is a number (PyYAML wants ``1.0e-3``)."""

import re

import yaml


class RecipeLoader(yaml.SafeLoader):
    """Reads recipes."""


class RecipeDumper(yaml.SafeDumper):
    """Writes recipes; quotes what the loader would otherwise take for a number."""


_PLAIN_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", _PLAIN_EXPONENT, list("-+0123456789"))
RecipeDumper.add_implicit_resolver("tag:yaml.org,2002:float", _PLAIN_EXPONENT, list("-+0123456789"))
