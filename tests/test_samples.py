import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.kid import poly_mmd

from equipoise.estimate import jackknife
from equipoise.metrics.samples import frechet_distance, kernel_distance, sample_quality


def with_moments(mean, covariance, n=500):
    """Vectors whose sample mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.atleast_2d(x.mT.cov())), x.mT, upper=False
    ).mT
    return white @ torch.linalg.cholesky(covariance).mT + mean


def test_frechet_distance_of_known_gaussians():
    root = torch.randn(2, 6, 6, dtype=torch.float64)
    covariances = root @ root.mT + torch.eye(6)
    means = torch.randn(2, 6, dtype=torch.float64)
    x, y = (
        with_moments(mean, covariance) for mean, covariance in zip(means, covariances, strict=True)
    )
    cross = np.trace(sqrtm(covariances[0].numpy() @ covariances[1].numpy()).real)
    expected = (
        float((means[0] - means[1]).square().sum() + covariances.diagonal(dim1=1, dim2=2).sum())
        - 2 * cross
    )
    figure = frechet_distance(x, y)
    assert figure.value == pytest.approx(expected, rel=1e-9)
    assert figure.n == 500
    assert frechet_distance(x.float(), y.float()).value == pytest.approx(
        expected, rel=1e-4
    )  # statistics in float64
    assert frechet_distance(x, x).value == pytest.approx(0, abs=1e-5)


def test_frechet_distance_of_features_far_from_the_origin(generator):
    x = torch.randn(500, 3, generator=generator)
    y = 2 * torch.randn(500, 3, generator=generator)
    assert frechet_distance(x + 1e3, y + 1e3).value == pytest.approx(
        frechet_distance(x, y).value, rel=1e-3
    )


def test_standard_error_of_the_frechet_distance_in_one_dimension():
    """In one dimension the distance is (m - m_r)^2 + (s - s_r)^2.

    Its variance follows from the variances of the mean and of the standard deviation.
    """
    x, y = (
        with_moments(torch.tensor([m]), torch.tensor([[var]]).double(), 4000)
        for m, var in ((0.0, 1.0), (3.0, 4.0))
    )
    centred = x[:, 0] - x.mean()
    # d m = c, d s = c^2 / 2 s, at m - m_r = -3 and s - s_r = -1
    expected = (-6 * centred - centred.square()).std() / 4000**0.5
    assert frechet_distance(x, y).standard_error == pytest.approx(float(expected), rel=1e-9)


def test_standard_error_of_the_frechet_distance_is_the_spread_over_repetitions(generator):
    mixing = torch.randn(8, 8, generator=generator)
    reference = torch.randn(2000, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    draws = [torch.randn(800, 8, generator=generator) @ mixing + 0.3 for _ in range(100)]
    figures = [frechet_distance(draw, reference) for draw in draws]
    errors = [figure.standard_error for figure in figures]
    assert np.mean(errors) == pytest.approx(np.std([figure.value for figure in figures]), rel=0.2)
    deleted = jackknife(
        lambda rows: frechet_distance(draws[0][torch.from_numpy(rows)], reference).value, 800, 100
    )
    assert errors[0] == pytest.approx(deleted.standard_error, rel=0.15)


def test_frechet_distance_of_degenerate_features():
    constant = torch.ones(5, 3)
    same = frechet_distance(constant, constant)
    assert same.value == pytest.approx(0, abs=1e-9)
    assert same.standard_error == pytest.approx(0, abs=1e-9)
    few = frechet_distance(torch.randn(4, 20), torch.randn(4, 20))  # singular covariances
    assert math.isfinite(few.value)
    assert math.isfinite(few.standard_error)


def test_kernel_distance_is_the_unbiased_discrepancy(generator):
    x, y = torch.randn(400, 5, generator=generator) + 0.5, torch.randn(400, 5, generator=generator)
    figure = kernel_distance(x, y)
    whole = float(
        poly_mmd(y.double(), x.double())
    )  # of all examples, where ours is the mean over subsets
    assert figure.value == pytest.approx(whole, abs=2 * figure.standard_error)
    null = [kernel_distance(torch.randn(200, 5, generator=generator), y).value for _ in range(20)]
    assert (
        abs(np.mean(null)) < 3 * np.std(null) / math.sqrt(20) + 0.01
    )  # no bias, where the Fréchet distance has one
    assert figure.value > 10 * np.std(null)


def test_standard_error_of_the_kernel_distance_covers_the_spread_over_repetitions(generator):
    def draw(shift):
        return torch.randn(300, 4, generator=generator) + shift

    figures = [kernel_distance(draw(0.5), draw(0.0)) for _ in range(40)]
    spread = np.std([figure.value for figure in figures])
    assert 0.8 * spread < np.mean([figure.standard_error for figure in figures]) < 1.6 * spread


def test_kernel_distance_is_reproducible_and_leaves_the_global_generator_alone(generator):
    x, y = torch.randn(50, 3, generator=generator), torch.randn(60, 3, generator=generator)
    before = torch.get_rng_state()
    first = kernel_distance(x, y, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert kernel_distance(x, y, seed=1) == first
    assert kernel_distance(x, y, seed=2).value != first.value


def test_quality_is_both_and_grows_with_the_damage(generator):
    real, other = torch.randn(2, 500, 4, generator=generator)
    good, bad = sample_quality(other, real), sample_quality(2 * other + 1, real)
    assert good.frechet == frechet_distance(other, real)
    assert good.kernel == kernel_distance(other, real)
    assert bad.frechet.value > 10 * good.frechet.value
    assert bad.kernel.value > 10 * abs(good.kernel.value)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_wrong_input_is_refused(distance):
    with pytest.raises(
        ValueError, match=r"expected at least \d examples on either side, got 1 and 9"
    ):
        distance(torch.randn(1, 3), torch.randn(9, 3))
    with pytest.raises(
        ValueError, match="got 3 and 4 dimensions; take both with the same extractor"
    ):
        distance(torch.randn(9, 3), torch.randn(9, 4))
