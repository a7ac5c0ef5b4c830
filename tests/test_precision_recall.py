"""Precision and recall are compared with their definition, and with sets of known coverage."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from equipoise.estimate import Estimate
from equipoise.metrics import precision_recall as module
from equipoise.metrics.precision_recall import precision_recall


def normal(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def values(found):
    return found.precision.value, found.recall.value


def directly(x, y, k):
    """Apply the definition to all pairs."""
    x, y = x.double().numpy(), y.double().numpy()

    def covered(rows, centres):
        radii = np.sort(cdist(centres, centres), 1)[:, k]  # the nearest is the centre itself
        return (cdist(rows, centres) <= radii).any(1).mean()

    return covered(x, y), covered(y, x)


@pytest.mark.parametrize(
    ("n", "m", "d", "k"), [(4, 4, 2, 3), (60, 41, 1, 3), (50, 200, 30, 3), (130, 97, 5, 7)]
)
@pytest.mark.parametrize("rows_at_once", [16, 1000])
def test_it_is_the_definition(monkeypatch, n, m, d, k, rows_at_once):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows_at_once)
    k = min(k, n - 1, m - 1)
    x, y = 0.8 * normal(n, d, 0), normal(m, d, 1)
    assert values(precision_recall(x, y, k)) == pytest.approx(directly(x, y, k))
    # Neither a shift nor a scale, nor an exchange of the sets, changes it.
    assert values(precision_recall(3 * x + 100, 3 * y + 100, k)) == values(
        precision_recall(x, y, k)
    )
    assert values(precision_recall(y, x, k)) == values(precision_recall(x, y, k))[::-1]


def test_the_error_is_that_of_the_jackknife_over_both_sets():
    x, y = normal(53, 4, 0), normal(75, 4, 1)
    without = [
        directly(x[torch.arange(53) % 10 != j], y[torch.arange(75) % 10 != j], 3) for j in range(10)
    ]
    found = precision_recall(x, y)
    for figure, value, groups in zip(found, directly(x, y, 3), np.array(without).T, strict=True):
        assert figure == pytest.approx(Estimate.of_groups(value, groups, figure.n))


def test_the_error_is_at_least_the_spread_over_repetitions():
    found = [precision_recall(normal(200, 6, i), normal(200, 6, i + 1000)) for i in range(50)]
    for figures in zip(*found, strict=True):
        spread = np.std([figure.value for figure in figures], ddof=1)
        error = np.mean([figure.standard_error for figure in figures])
        assert 1 < error / spread < 2.2


def test_ties_are_within_the_balls():
    # On a grid of distance .1 every point is as far from its neighbours as the radii of the balls.
    grid = torch.cartesian_prod(torch.arange(12.0), torch.arange(12.0)) / 10
    x = torch.cat([grid[::2], grid[::2] + 7])
    expected = directly((10 * x).round(), (10 * grid).round(), 3)
    assert values(precision_recall(x, grid)) == pytest.approx(expected)


@pytest.mark.parametrize("d", [1, 40])
def test_identical_and_disjoint_sets(d):
    x = normal(200, d, 0)
    assert values(precision_recall(x, x)) == (1, 1)
    assert values(precision_recall(x, x + 1000)) == (0, 0)
    # All vectors twice: the balls of the nearest neighbour have no extent.
    twice = torch.cat([x, x])
    assert values(precision_recall(twice, twice.flip(0), k=1)) == (1, 1)
    assert values(precision_recall(twice, twice + 0.5, k=1)) == (0, 0)


def test_half_of_the_modes_are_precise_and_recall_half():
    centres = 100 * normal(10, 8, 0)
    y = centres.repeat(40, 1) + normal(400, 8, 1)
    half = y[torch.arange(400) % 10 < 5]
    assert values(precision_recall(half, y)) == (1, 0.5)
    unseen = values(precision_recall(half + 0.1 * normal(200, 8, 2), y))
    assert unseen == pytest.approx((1, 0.5), abs=0.02)


def test_narrow_samples_lose_recall_and_wide_samples_lose_precision():
    y = normal(400, 8, 3)
    narrow, wide = (values(precision_recall(scale * normal(400, 8, 4), y)) for scale in (0.6, 1.6))
    assert narrow[0] > 0.9 > 0.5 > narrow[1]
    assert wide[0] < 0.5 < 0.9 < wide[1]


def test_few_vectors_have_no_error():
    found = precision_recall(normal(4, 2, 0), normal(9, 2, 1))
    assert found.precision.standard_error is None
    assert found.recall.n == 9


@pytest.mark.parametrize(
    ("n", "m", "d", "k"), [(3, 9, 2, 3), (9, 3, 2, 3), (9, 9, 3, 3), (9, 9, 2, 0)]
)
def test_bad_sets_are_refused(n, m, d, k):
    with pytest.raises(ValueError, match="more than k vectors"):
        precision_recall(torch.zeros(n, 2), torch.zeros(m, d), k)
