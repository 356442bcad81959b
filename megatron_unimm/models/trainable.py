"""What trains in a stage: one ordered table, first match wins, every parameter covered, every pattern used."""

from fnmatch import fnmatchcase

import torch

from megatron_unimm.config.train import TrainableRule
from megatron_unimm.errors import ConfigError

NOT_IN_TABLE = "base."
"""Parameters of frozen companions (a teacher) stand outside the table."""


def matching_rule(name: str, rules: list[TrainableRule]) -> TrainableRule | None:
    """The first rule whose glob matches a parameter's name."""
    return next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)


def is_frozen(part: str, rules: list[TrainableRule]) -> bool:
    """Whether no rule can train a parameter under ``part.``: nothing of it needs a graph."""
    for rule in rules:
        if rule.pattern == "*" or fnmatchcase(f"{part}.x", rule.pattern):
            return not rule.train
        starts_open = rule.pattern.startswith("*")  # may match anything anywhere
        if rule.train and (
            starts_open or rule.pattern.startswith(f"{part}.") or fnmatchcase(part, rule.pattern.split(".")[0])
        ):
            return False
    return True


def apply_rules(
    chunks: list[torch.nn.Module], rules: list[TrainableRule], used_elsewhere: set[str] | None = None
) -> set[str]:
    """Freeze what the table freezes. Runs before the distributed wrapper, which lays out buffers for what trains.

    Args:
        chunks: this rank's model chunks.
        used_elsewhere: patterns that matched something on other ranks.

    Returns:
        Patterns that matched something on this rank.

    Raises:
        ConfigError: a parameter that no pattern covers.
    """
    used = set(used_elsewhere or ())
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith(NOT_IN_TABLE):
                continue
            rule = matching_rule(name, rules)
            if rule is None:
                raise ConfigError("train.trainable", f"no pattern covers {name}; end the table with pattern '*'")
            used.add(rule.pattern)
            parameter.requires_grad_(rule.train)
    return used


def check_used(used: set[str], rules: list[TrainableRule]) -> None:
    """Every pattern must match something on some rank.

    Raises:
        ConfigError: the first that does not.
    """
    for number, rule in enumerate(rules):
        if rule.pattern not in used:
            raise ConfigError(
                f"train.trainable.{number}",
                f"pattern {rule.pattern!r} matches no parameter that an earlier one leaves; correct or remove it",
            )
