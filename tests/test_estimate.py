import numpy as np
import pytest
import torch

from equipoise.estimate import Estimate, jackknife


def test_the_mean_and_its_standard_error():
    estimate = Estimate.of_mean(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert estimate == Estimate(2.5, pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2), 4)


def test_float32_draws_are_summed_in_float64():
    assert Estimate.of_mean(torch.full((1_000_000,), 0.1)).value == pytest.approx(
        float(np.float32(0.1)), rel=1e-12
    )


def test_one_draw_has_no_standard_error_and_none_has_no_mean():
    assert Estimate.of_mean(np.array([3.0])) == Estimate(3.0, None, 1)
    assert jackknife(lambda rows: 3.0 * len(rows), 1) == Estimate(3.0, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        Estimate.of_mean(np.zeros(0))


def test_a_ratio_to_equal_numbers_is_a_mean():
    values = np.random.default_rng(0).normal(size=40)
    assert Estimate.of_ratio(3 * values, np.full(40, 3.0)) == pytest.approx(
        Estimate.of_mean(values)
    )
    assert Estimate.of_ratio(np.array([6.0]), np.array([4.0])) == Estimate(1.5, None, 1)
    for nothing in (np.zeros(2), np.zeros(0)):
        with pytest.raises(ValueError, match="positive denominator"):
            Estimate.of_ratio(nothing, nothing)


def test_the_standard_error_of_a_ratio_is_that_of_the_jackknife():
    rng = np.random.default_rng(0)
    a, b = rng.poisson(3.0, 400).astype(float), rng.poisson(5.0, 400).astype(float)
    a = np.minimum(a, b)
    expected = jackknife(lambda rows: float(a[rows].sum() / b[rows].sum()), 400, groups=400)
    found = Estimate.of_ratio(a, b)
    assert found.value == pytest.approx(expected.value)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=0.01)


def test_the_jackknife_of_a_mean_is_the_closed_form():
    values = np.random.default_rng(0).normal(size=40)
    estimate = jackknife(lambda rows: float(values[rows].mean()), 40, groups=40)
    assert estimate.standard_error == pytest.approx(Estimate.of_mean(values).standard_error)


def test_the_jackknife_of_a_ratio_covers_the_truth():
    """About 95 % of 200 repetitions are within two standard errors."""
    rng = np.random.default_rng(0)
    within = 0

    for _ in range(200):
        x, y = rng.normal(2.0, 1.0, 500), rng.normal(4.0, 1.0, 500)
        estimate = jackknife(
            lambda rows, x=x, y=y: float(y[rows].mean() / x[rows].mean()), 500, groups=20
        )
        within += abs(estimate.value - 2.0) < 2 * estimate.standard_error

    assert 180 <= within <= 199
