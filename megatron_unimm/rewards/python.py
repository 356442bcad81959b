"""Reward of a user's function: ``package.module:function``."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from megatron_unimm.errors import ConfigError
from megatron_unimm.rewards.reward import Float64, RewardPrompt, checked_values

SIGNATURE = "(pictures, prompts)"


class PythonReward:
    """Calls ``function(pictures, prompts)`` with two lists; what it gives is checked. What it raises goes on, with a
    note that says whose it is.

    Args:
        where: the reward's place in the recipe, for messages.
        entry_point: ``package.module:function``.

    Raises:
        ConfigError: there is no such function, or it cannot be called so.
    """

    def __init__(self, where: str, entry_point: str) -> None:
        self.where = where
        self.entry_point = entry_point
        self.function = load_function(f"{where}.entry_point", entry_point)

    def __call__(self, pictures: Sequence[np.ndarray], prompts: Sequence[RewardPrompt]) -> Float64:
        """
        Raises:
            UserError: it gave something else than a finite number for each picture.
        """
        try:
            values = self.function(list(pictures), list(prompts))
        except Exception as error:
            error.add_note(f"raised by the reward {self.where}, {self.entry_point}")
            raise
        return checked_values(self.where, values, prompts)


def load_function(where: str, entry_point: str) -> Callable[..., Any]:
    """The function that an entry point names.

    Args:
        where: the setting, for messages.

    Raises:
        ConfigError: no such module or function, or one that cannot be called with pictures and prompts.
    """
    module_name, _, name = entry_point.partition(":")
    module = _module(where, module_name)
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, [other for other in vars(module) if not other.startswith("_")], n=1)
        said = f", did you mean {near[0]}?" if near else ""
        raise ConfigError(where, f"{module_name} ({_place(module)}) has no {name}{said}")
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(where, f"{entry_point} is a {type(function).__name__}, wanted a function {name}{SIGNATURE}")
    _check_signature(where, entry_point, function)
    return function


def _module(where: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent = error.name or ""
        if name == absent or name.startswith(absent + "."):
            raise ConfigError(
                where, f"no module {absent}; install its package in this environment, or add its folder to PYTHONPATH"
            ) from error
        raise ConfigError(where, f"module {name} imports {absent}, which is not installed") from error


def _place(module: ModuleType) -> str:
    """Where it was found: another module of the same name often explains what is missing."""
    return module.__file__ or "built in"


def _check_signature(where: str, entry_point: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:  # what is written in C may have none
        raise ConfigError(where, f"{entry_point} has no signature; wrap it in a function {SIGNATURE}") from error
    try:
        signature.bind([], [])
    except TypeError as error:
        raise ConfigError(
            where, f"{entry_point} takes {signature}, but is called as {SIGNATURE}: {error}; change its parameters"
        ) from error
