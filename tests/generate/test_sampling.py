"""The choice of tokens from logits."""

import pytest
import torch

from megatron_unimm.errors import ConfigError
from megatron_unimm.generate.sampling import DecodeSettings, Sampler


def test_greedy() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert Sampler(DecodeSettings(), [0, 1]).choose(logits, [0, 1]).tolist() == [1, 0]


def test_draws_have_the_model_s_frequencies() -> None:
    """20,000 draws; four standard errors are 0.014."""
    probability = torch.tensor([0.5, 0.25, 0.15, 0.1])
    sampler = Sampler(DecodeSettings(temperature=1.0), range(20_000))
    drawn = sampler.choose(probability.log().expand(20_000, -1), range(20_000))
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20_000, probability, rtol=0, atol=0.014)


def test_top_p_keeps_the_likeliest() -> None:
    """0.5 and 0.25 make up 0.7; their frequencies are 2 : 1."""
    logits = torch.tensor([0.15, 0.5, 0.1, 0.25]).log().expand(20_000, -1)
    drawn = Sampler(DecodeSettings(temperature=1.0, top_p=0.7), range(20_000)).choose(logits, range(20_000))
    torch.testing.assert_close(
        drawn.bincount(minlength=4) / 20_000, torch.tensor([0, 2 / 3, 0, 1 / 3]), rtol=0, atol=0.014
    )


def test_a_tiny_top_p_is_greedy() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    drawn = Sampler(DecodeSettings(temperature=1.0, top_p=1e-6), range(50)).choose(logits, range(50))
    assert torch.equal(drawn, logits.argmax(dim=1))


def test_forbidden_tokens_never_come() -> None:
    logits = torch.zeros(1000, 4)
    logits[:, 2] = float("-inf")
    assert 2 not in Sampler(DecodeSettings(temperature=5.0), range(1000)).choose(logits, range(1000))


def test_numbers_and_seeds_fix_the_draws() -> None:
    logits = torch.zeros(1, 1_000_000)

    def draw(seed: int, number: int) -> int:
        return int(Sampler(DecodeSettings(temperature=1.0, seed=seed), [9, number]).choose(logits, [1]))

    assert draw(0, 1) == draw(0, 1)
    assert len({draw(seed, number) for seed in range(4) for number in range(4)}) == 16


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}])
def test_refuses_impossible_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DecodeSettings(**wrong)  # type: ignore[arg-type]
