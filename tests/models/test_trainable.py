"""The table of what trains: first match wins, all covered, all used."""

import pytest
import torch

from megatron_unimm.config.train import TrainableRule
from megatron_unimm.errors import ConfigError
from megatron_unimm.models.trainable import apply_rules, check_used, is_frozen, matching_rule


def rules(*table: tuple[str, bool] | str) -> list[TrainableRule]:
    """``"head.*"`` trains; ``("*", False)`` is frozen."""
    return [
        TrainableRule(pattern=line) if isinstance(line, str) else TrainableRule(pattern=line[0], train=line[1])
        for line in table
    ]


def make_model() -> torch.nn.Module:
    parts = {"tower": torch.nn.Linear(2, 2), "backbone": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)}
    return torch.nn.ModuleDict(parts)


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_first_match_wins() -> None:
    table = rules("head.*", ("*.bias", False), ("tower.*", False), "*")
    assert matching_rule("head.bias", table) is table[0]
    assert matching_rule("backbone.bias", table) is table[1]
    assert matching_rule("backbone.weight", table) is table[3]
    assert matching_rule("nothing", rules("head.*")) is None
    model = make_model()
    apply_rules([model], table)
    assert trained(model) == {"head.weight", "head.bias", "backbone.weight"}


def test_rules_thaw_as_well_as_freeze() -> None:
    model = make_model().requires_grad_(False)
    apply_rules([model], rules("head.*", ("*", False)))
    assert trained(model) == {"head.weight", "head.bias"}


def test_a_parameter_that_no_pattern_covers() -> None:
    with pytest.raises(ConfigError, match=r"no pattern covers backbone\.weight.*'\*'"):
        apply_rules([make_model()], rules("head.*", "tower.*"))


def test_patterns_are_used_over_all_ranks() -> None:
    """A rank of a pipeline has only some of the modules."""
    table = rules("head.*", ("tower.*", False), "*")
    first = apply_rules([torch.nn.ModuleDict({"tower": torch.nn.Linear(1, 1)})], table)
    last = apply_rules([torch.nn.ModuleDict({"head": torch.nn.Linear(1, 1), "x": torch.nn.Linear(1, 1)})], table)
    assert (first, last) == ({"tower.*"}, {"head.*", "*"})
    check_used(first | last, table)
    with pytest.raises(ConfigError, match=r"trainable\.1: pattern 'tower\.\*' matches no parameter"):
        check_used(last, table)


def test_a_pattern_hidden_behind_an_earlier_one_is_unused() -> None:
    table = rules("*", "head.*")
    with pytest.raises(ConfigError, match=r"trainable\.1"):
        check_used(apply_rules([make_model()], table), table)


def test_frozen_companions_stand_outside_the_table() -> None:
    model = torch.nn.ModuleDict({"base": torch.nn.Linear(1, 1).requires_grad_(False), "head": torch.nn.Linear(1, 1)})
    apply_rules([model], rules("*"))
    assert trained(model) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("table", "frozen"),
    [
        (("*",), False),
        ((("*", False),), True),
        (("head.*", ("*", False)), True),
        ((("backbone.*", False), "*"), True),
        (("backbone.*", ("*", False)), False),
        (("backbone.layers.3.*", ("*", False)), False),
        ((("backbone.layers.3.*", False), "*"), False),
        ((("back*", False), "*"), True),
    ],
)
def test_is_frozen(table: tuple, frozen: bool) -> None:
    """Whether nothing under ``backbone.`` can train: the graph through it is then left out."""
    assert is_frozen("backbone", rules(*table)) is frozen
