"""What the suite reconstruction measures, against formulas written otherwise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_unimm.errors import DataError
from megatron_unimm.evaluate.picture_metrics import frechet_distance, probe_accuracy, psnr, ssim
from megatron_unimm.evaluate.reconstruction import load_items


def pictures() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 256, (20, 17, 3), dtype=np.uint8)
    return true, np.clip(true.astype(int) + rng.integers(-30, 31, true.shape), 0, 255).astype(np.uint8)


def test_psnr() -> None:
    black = np.zeros((4, 4, 3), dtype=np.uint8)
    assert psnr(black, black) == 100
    assert psnr(black, black + 255) == pytest.approx(0)
    assert psnr(black, black + 51) == pytest.approx(20 * np.log10(5))


def test_ssim() -> None:
    """Window by window, with weighted moments."""
    true, drawn = pictures()
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for channel in range(3):
        for row in range(20 - 10):
            for column in range(17 - 10):
                a, b = (
                    each[row : row + 11, column : column + 11, channel].astype(np.float64) for each in (true, drawn)
                )
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                value = (2 * mean_a * mean_b + one) * (2 * both + two)
                found.append(value / (mean_a**2 + mean_b**2 + one) / (var_a + var_b + two))
    assert ssim(true, drawn) == pytest.approx(np.mean(found), rel=1e-9)
    assert ssim(true, true) == pytest.approx(1)


def test_frechet_distance() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((50, 6)) @ rng.standard_normal((6, 6)), 2 + rng.standard_normal((40, 6))
    one, other = np.cov(first.T), np.cov(second.T)
    roots = np.sqrt(np.linalg.eigvals(one @ other).real)
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(one + other) - 2 * roots.sum()
    assert frechet_distance(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(torch.tensor(first), torch.tensor(first)) == pytest.approx(0, abs=1e-8)


def test_probe_finds_what_is_linear_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 8, generator=generator)
    labels = (features @ torch.randn(8, 3, generator=generator)).argmax(1)
    assert probe_accuracy(features[:300], labels[:300], features[300:], labels[300:]) > 0.85
    parity = ((features[:, 0] > 0) ^ (features[:, 1] > 0)).long()
    assert probe_accuracy(features[:300], parity[:300], features[300:], parity[300:]) < 0.65


def test_items_of_the_shapes_world_and_of_a_folder(tmp_path: Path) -> None:
    items = load_items(None, 2)
    assert [picture.shape for picture in items.pictures] == [(64, 64, 3)] * 2
    assert len(items.classified) == len(items.labels) == 8
    with pytest.raises(DataError, match="has no image"):
        load_items(tmp_path, 2)
    for name, count in (("cat", 3), ("dog", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    items = load_items(tmp_path, 3)
    assert list(items.labels) == [0, 1, 0]
    assert [int(picture[0, 0, 0]) for picture in items.pictures] == [0, 0, 1]
