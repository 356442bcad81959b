"""Learning rates against answers worked out by hand."""

import pytest

from megatron_unimm.config.train import ScheduleConfig
from megatron_unimm.train.schedule import learning_rate


def rates(total: int, **settings: object) -> list[float]:
    schedule = ScheduleConfig.model_validate({"max_learning_rate": 1.0, "min_learning_rate": 0.0} | settings)
    return [learning_rate(step, total, schedule) for step in range(total)]


def test_warm_up_is_linear_and_its_first_step_moves() -> None:
    found = rates(20, kind="constant", warmup_ratio=0.25, min_learning_rate=1.0)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5:] == [1.0] * 15


def test_constant_without_warm_up() -> None:
    assert rates(7, kind="constant", warmup_ratio=0.0) == [1.0] * 7


def test_cosine_known_answers() -> None:
    """Nine steps after no warm-up: progress 0, 1/8 … 1, so 45° is at step 2 and the middle at step 4."""
    found = rates(9, kind="cosine", warmup_ratio=0.0, min_learning_rate=0.2)
    assert found[0] == 1.0
    assert found[2] == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)
    assert found[4] == pytest.approx(0.6)
    assert found[8] == pytest.approx(0.2)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("total", [10, 101, 1000])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 0.5])
def test_cosine_peaks_after_warm_up_and_ends_at_the_minimum(total: int, warmup_ratio: float) -> None:
    found = rates(total, kind="cosine", warmup_ratio=warmup_ratio, min_learning_rate=0.01)
    assert max(found) == pytest.approx(1.0)
    assert found[-1] == pytest.approx(0.01)


def test_warm_up_over_everything() -> None:
    assert rates(4, kind="cosine", warmup_ratio=1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_a_single_step_runs_at_the_maximum() -> None:
    """There is no step left to go down in."""
    assert rates(1, kind="cosine", warmup_ratio=0.05) == [1.0]


def test_beyond_the_last_step_it_stays_at_the_minimum() -> None:
    schedule = ScheduleConfig(max_learning_rate=1.0, min_learning_rate=0.1)
    assert learning_rate(150, 100, schedule) == pytest.approx(0.1)
