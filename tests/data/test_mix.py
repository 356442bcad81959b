"""The order of draws: shares, permutations, and that it needs no walking."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megatron_unimm.data.mix import MAX_CYCLE, Draw, Mix, permute
from megatron_unimm.errors import ConfigError

WEIGHTS = [
    [1.0],
    [1.0, 1.0, 1.0],
    [0.5, 0.3, 0.2],
    [0.9, 0.05, 0.05],
    [0.6, 0.1, 0.1, 0.1, 0.1],
    [7, 3, 3, 3, 2, 2, 1, 1],
    [0.001, 0.999],
    [0.333, 0.333, 0.334],
    [100, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
]


def mix_of(weights, sizes=None, seed=0) -> Mix:
    names = [f"s{i}" for i in range(len(weights))]
    sizes = sizes or [10 + i for i in range(len(weights))]
    return Mix({n: range(s) for n, s in zip(names, sizes, strict=True)}, dict(zip(names, weights, strict=True)), seed)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_counts_stay_within_one_of_the_share(weights):
    """After every single draw, not only in the long run."""
    mix, counts = mix_of(weights), Counter()
    total = sum(Fraction(str(w)) for w in weights)
    shares = {f"s{i}": Fraction(str(w)) / total for i, w in enumerate(weights)}
    assert mix.shares == shares
    for n in range(1, 2500):
        counts[mix[n - 1].source] += 1
        assert all(abs(counts[name] - n * share) < 1 for name, share in shares.items())


def test_counts_stay_within_one_for_random_weights():
    rng = np.random.default_rng(0)
    for _ in range(100):
        quotas = rng.integers(1, 60, rng.integers(2, 9)).tolist()
        mix, counts, total = mix_of(quotas), Counter(), sum(quotas)
        for n in range(1, total + 1):
            counts[mix[n - 1].source] += 1
            assert all(abs(counts[f"s{i}"] * total - n * quota) < total for i, quota in enumerate(quotas))
        assert counts == {f"s{i}": quota for i, quota in enumerate(quotas)}


def test_long_cycles_are_rounded():
    """Weights that are the sizes of data sets: shares are off by at most one draw in 65536."""
    weights = [25_012_345, 3_541_237, 11]
    mix = mix_of(weights)
    for name, weight in zip(mix.names, weights, strict=True):
        assert abs(mix.shares[name] - Fraction(weight, sum(weights))) < Fraction(1, MAX_CYCLE)
    assert sum(mix.shares.values()) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_permute_is_a_permutation(size):
    assert sorted(permute(i, size, "key") for i in range(size)) == list(range(size))


def test_permutations_look_random():
    """Correlation of place and image is of the order of 1/sqrt(n), also between epochs."""
    size = 4000
    first, second = ([permute(i, size, f"0/s/{epoch}") for i in range(size)] for epoch in range(2))
    for a, b in [(range(size), first), (first, second), (first[:-1], first[1:])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / size**0.5
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def test_each_source_is_passed_whole_before_it_repeats():
    mix = mix_of([3, 1], sizes=[50, 7])
    seen = {"s0": [], "s1": []}
    for g in range(1000):
        draw = mix[g]
        seen[draw.source].append((draw.epoch, draw.index))
    for name, size in (("s0", 50), ("s1", 7)):
        order = seen[name]
        assert [epoch for epoch, _ in order] == [j // size for j in range(len(order))]
        for epoch in range(len(order) // size):
            assert sorted(index for e, index in order if e == epoch) == list(range(size))


def test_known_answer():
    """The schedule, worked out by hand, and a golden order: changing it would break the resume of running trainings."""
    mix = mix_of([0.5, 0.3, 0.2], sizes=[1000, 1000, 10], seed=17)
    assert [mix[g].source[1] for g in range(10)] == list("0102010102")
    assert [mix[g].index for g in range(4)] == [25, 322, 358, 3]
    # 12,345,678,901 cycles of 10 and 2 draws: source 0 was drawn 61,728,394,506 times before.
    assert mix[123_456_789_012] == Draw("s0", index=379, epoch=61_728_394)
    assert mix.fingerprint() == "dea3fadffb0e9310"


def test_seed_and_other_sources():
    """The seed changes the order; adding a source leaves the order inside the others alone."""
    one, other = mix_of([1], [100], seed=0), mix_of([1], [100], seed=1)
    assert [one[g].index for g in range(100)] != [other[g].index for g in range(100)]
    both = mix_of([1, 1], [100, 30])
    assert [d.index for d in map(both.__getitem__, range(200)) if d.source == "s0"] == [
        one[g].index for g in range(100)
    ]
    assert len({one.fingerprint(), other.fingerprint(), both.fingerprint()}) == 3


def test_epochs_and_steps():
    mix = mix_of([1, 2, 0], [10, 15, 1000])
    assert mix.names == ("s0", "s1")
    assert mix.epoch_size == 25
    assert [mix.num_steps(epochs, 8) for epochs in (1, 0.1, 2, 0.32)] == [4, 1, 7, 1]
    assert mix_of([1], [640]).num_steps(0.1, 64) == 1  # 0.1 is a tenth: not one step more by rounding


def test_caps():
    """A source stops after its passes; the others go on by their weights, and each pass is whole as before."""
    sources = {"a": range(10), "b": range(7), "c": range(5)}
    mix = Mix(sources, {"a": 2, "b": 1, "c": 1}, 0, {"b": 1, "c": 2.5})
    draws = [mix[g] for g in range(400)]
    counts = Counter(draw.source for draw in draws)
    assert (counts["b"], counts["c"]) == (7, 13)
    assert mix.num_draws is None
    assert {draw.source for draw in draws[60:]} == {"a"}
    # b's 7th draw is near draw 28 of a schedule in fourths; from there a and c share 2 : 1.
    last = max(g for g, draw in enumerate(draws) if draw.source == "b")
    assert 24 <= last <= 28
    after = Counter(draw.source for draw in draws[last + 1 : last + 10])
    assert (after["a"], after["c"]) == (6, 3)
    for name, size in (("a", 10), ("b", 7), ("c", 5)):
        order = [draw.index for draw in draws if draw.source == name]
        for start in range(0, len(order) - size + 1, size):
            assert sorted(order[start : start + size]) == list(range(size))
    capless = Mix(sources, {"a": 2, "b": 1, "c": 1}, 0)
    assert [capless[g] for g in range(last + 1)] == draws[: last + 1]
    assert capless.fingerprint() != mix.fingerprint()


def test_all_capped_ends():
    mix = Mix({"a": range(10), "b": range(4)}, {"a": 1, "b": 1}, 0, {"a": 1, "b": 2})
    assert mix.num_draws == 18
    assert Counter(mix[g].source for g in range(18)) == {"a": 10, "b": 8}
    with pytest.raises(IndexError):
        mix[18]


def test_errors():
    with pytest.raises(ConfigError, match="none of 1 sources has a weight above 0"):
        mix_of([0])
    with pytest.raises(ConfigError, match="holds no samples"):
        Mix({"a": []}, {"a": 1}, 0)
    with pytest.raises(IndexError):
        mix_of([1])[-1]
