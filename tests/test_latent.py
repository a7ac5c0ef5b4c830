"""Compares measures of the latent space with closed forms.

These are probabilistic PCA, and Gaussians with known divergence and known marginals.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from equipoise.aggregate import AggregatePosterior, GaussianMixture, single_gaussian
from equipoise.gaussian import Gaussian
from equipoise.metrics import latent as latent_module
from equipoise.metrics.latent import code_log_likelihood, latent_plane, latent_units
from equipoise.mixture_fit import fit_mixture
from equipoise.model import encode_all
from equipoise.noise import FixedNoise
from tests.oracles import Ppca, linear_gaussian_data, ppca_vae


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_mixture(K=4, d=3, seed=1):
    factors = (
        torch.eye(d, dtype=torch.float64)
        + 0.3 * torch.randn(K, d, d, generator=seeded(seed)).double()
    )
    means = 2 * torch.randn(K, d, generator=seeded(seed + 1)).double()
    weights = torch.randn(K, generator=seeded(seed + 2)).double().softmax(0)
    return GaussianMixture(weights, means, factors @ factors.mT)


def random_posterior(n=300, d=4, seed=0):
    scale = torch.arange(1, d + 1, dtype=torch.float64)
    mean = torch.randn(n, d, generator=seeded(seed), dtype=torch.float64) * scale
    return Gaussian(mean, torch.rand(n, d, generator=seeded(seed + 1), dtype=torch.float64) - 2)


@pytest.fixture
def ppca_with_a_dead_unit():
    """Two units that the data need, and one of weight zero, whose posterior is the prior."""
    x = linear_gaussian_data(n=3000)
    fitted = Ppca.fit(x, 2)
    ppca = fitted._replace(
        weight=torch.cat([fitted.weight, torch.zeros(8, 1, dtype=torch.float64)], 1)
    )
    model = ppca_vae(ppca, FixedNoise(float(ppca.var))).eval()
    model.scaling.double()
    return model, x, ppca


def test_units_of_probabilistic_pca(ppca_with_a_dead_unit):
    """Over the data of the fit E[mu_u^2] = 1 - s_u^2.

    The rate is therefore that of a Gaussian channel, -log(s_u^2) / 2.
    """
    model, x, ppca = ppca_with_a_dead_unit
    units = latent_units(encode_all(model, x.split(700)))
    posterior_var = (ppca.var / ((ppca.weight.T @ ppca.weight).diagonal() + ppca.var)).tolist()
    for unit, var in zip(units, posterior_var, strict=True):
        assert unit.mean_var.value == pytest.approx(1 - var, abs=1e-9)
        assert unit.rate.value == pytest.approx(-0.5 * math.log(var), abs=1e-9)
        assert unit.rate.n == unit.mean_var.n == 3000
    assert [unit.is_active for unit in units] == [True, True, False]


@given(n=st.integers(2, 30), d=st.integers(1, 6), seed=st.integers(0, 1000))
def test_rates_are_the_kl_of_the_elbo_unit_by_unit(n, d, seed):
    posterior = random_posterior(n, d, seed)
    units = latent_units(posterior)
    assert sum(unit.rate.value for unit in units) == pytest.approx(posterior.kl().mean().item())
    oracle = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0))
    assert [unit.rate.value for unit in units] == pytest.approx(oracle.mean(0).tolist())
    assert units[0].rate.standard_error == pytest.approx(oracle[:, 0].std().item() / n**0.5)


def test_all_units_dead_and_one_example():
    collapsed = Gaussian(torch.zeros(5, 3), torch.zeros(5, 3))
    assert [
        (unit.is_active, unit.rate.value, unit.mean_var.standard_error)
        for unit in latent_units(collapsed)
    ] == [(False, 0.0, 0.0)] * 3
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        latent_units(Gaussian(torch.zeros(1, 3), torch.zeros(1, 3)))


def test_the_threshold_of_activity():
    """Posterior means of +-a have variance a^2; the limit is 0.01."""
    means = torch.tensor([[-1.0], [1.0]]) * torch.tensor([0.099, 0.101])
    assert [unit.is_active for unit in latent_units(Gaussian(means, torch.zeros(2, 2)))] == [
        False,
        True,
    ]


def test_one_gaussian_has_the_moments_of_the_mixture():
    mixture = random_mixture()
    one = single_gaussian(mixture)
    draws = mixture.sample(400_000, seeded())
    assert one.n_components == 1
    torch.testing.assert_close(one.means[0], draws.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(one.covariances[0], draws.T.cov(), atol=0.06, rtol=0.01)
    again = single_gaussian(one)
    torch.testing.assert_close(again.covariances, one.covariances)


def test_em_makes_it_the_gaussian_of_the_codes():
    """One Gaussian fitted to the same codes has these moments, whatever mixture EM returns."""
    codes = random_mixture().sample(2000, seeded())
    one = single_gaussian(fit_mixture(codes, 3, generator=seeded()).mixture)
    torch.testing.assert_close(one.means[0], codes.mean(0))
    torch.testing.assert_close(one.covariances[0], codes.T.cov(correction=0), atol=1e-5, rtol=1e-5)


def test_log_likelihood_of_codes_of_known_entropy():
    """For codes of a full Gaussian, the score of that Gaussian is minus its entropy.

    The score of the prior is lower by the divergence of the two.
    """
    gaussian = single_gaussian(random_mixture())
    codes = gaussian.sample(20_000, seeded())
    found = code_log_likelihood(codes, gaussian)
    oracle = MultivariateNormal(gaussian.means[0], gaussian.covariances[0])
    assert found.mixture.value == pytest.approx(
        -oracle.entropy().item(), abs=4 * found.mixture.standard_error
    )
    prior = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    divergence = kl_divergence(oracle, prior).item()
    assert found.mixture.value - found.prior.value == pytest.approx(divergence, rel=0.05)
    assert found.gain == pytest.approx(
        (0.0, 0.0, 20_000)
    )  # one component is its own single Gaussian


def test_the_gain_is_paired():
    mixture = random_mixture()
    found = code_log_likelihood(mixture.sample(5000, seeded()), mixture)
    assert found.gain.value == pytest.approx(found.mixture.value - found.gaussian.value)
    assert found.gain.value > 4 * found.gain.standard_error
    unpaired = math.hypot(found.mixture.standard_error, found.gaussian.standard_error)
    assert found.gain.standard_error < 0.9 * unpaired


def integral(plane, log_prob):
    return np.exp(log_prob).sum() * (plane.x[1] - plane.x[0]) * (plane.y[1] - plane.y[0])


@pytest.mark.parametrize("d", [2, 4])
def test_densities_on_the_plane_integrate_to_one(d):
    plane = latent_plane(random_posterior(d=d), random_mixture(d=d), seeded(), n_points=150)
    for log_prob in (plane.aggregate_log_prob, plane.mixture_log_prob, plane.prior_log_prob):
        assert integral(plane, log_prob) == pytest.approx(1, abs=1e-3)


def test_two_units_are_the_plane():
    posterior, mixture = random_posterior(d=2), random_mixture(d=2)
    plane = latent_plane(posterior, mixture, seeded(), n_points=20)
    assert np.array_equal(plane.axes, np.eye(2))
    z = torch.tensor([[plane.x[7], plane.y[12]]])
    assert plane.mixture_log_prob[12, 7] == pytest.approx(mixture.log_prob(z).item())
    assert plane.aggregate_log_prob[12, 7] == pytest.approx(
        AggregatePosterior(*posterior).log_prob(z).item()
    )
    assert plane.prior_log_prob[12, 7] == pytest.approx(
        -math.log(2 * math.pi) - 0.5 * z.square().sum().item()
    )


def test_marginals_on_the_plane_agree_with_a_histogram():
    posterior, mixture = random_posterior(), random_mixture(d=4)
    plane = latent_plane(posterior, mixture, seeded(), n_points=41)
    assert plane.axes @ plane.axes.T == pytest.approx(np.eye(2))
    # The planted scales grow with the number of the unit. The axes are therefore the last two
    # units, with positive signs.
    assert np.abs(plane.axes[:, [3, 2]]) == pytest.approx(np.eye(2), abs=0.2)
    assert (plane.axes[[0, 1], [3, 2]] > 0).all()
    width = plane.x[1] - plane.x[0], plane.y[1] - plane.y[0]
    bins = [
        np.append(grid - w / 2, grid[-1] + w / 2)
        for grid, w in zip((plane.y, plane.x), width[::-1], strict=True)
    ]
    for density, log_prob in (
        (AggregatePosterior(*posterior), plane.aggregate_log_prob),
        (mixture, plane.mixture_log_prob),
    ):
        x, y = plane.axes @ density.sample(400_000, seeded()).numpy().T
        counts = np.histogram2d(y, x, bins)[0]
        expected = 400_000 * np.exp(log_prob) * width[0] * width[1]
        shown = expected > 50
        assert shown.sum() > 50
        # Poisson noise, and a few per cent because a cell's mean is not the density at its middle.
        error = (counts - expected)[shown] / np.sqrt(
            expected[shown] + (0.05 * expected[shown]) ** 2
        )
        assert np.sqrt(np.mean(error**2)) < 1.5


def test_many_posteriors_are_thinned_at_random(monkeypatch):
    monkeypatch.setattr(latent_module, "PLANE_POSTERIORS", 50)
    posterior = random_posterior(n=300)
    planes = [
        latent_plane(posterior, random_mixture(d=4), seeded(seed), n_points=4) for seed in (0, 0, 1)
    ]
    assert planes[0].codes.shape == (50, 2)
    assert np.array_equal(planes[0].codes, planes[1].codes)
    assert np.array_equal(planes[0].aggregate_log_prob, planes[1].aggregate_log_prob)
    assert not np.allclose(planes[0].aggregate_log_prob, planes[2].aggregate_log_prob)


def test_a_single_example_has_a_plane():
    posterior = random_posterior(n=1, d=2)
    plane = latent_plane(posterior, random_mixture(d=2), seeded(), n_points=300)
    assert integral(plane, plane.aggregate_log_prob) == pytest.approx(1, abs=1e-3)


def test_one_unit_has_no_plane():
    with pytest.raises(ValueError, match="histogram"):
        latent_plane(random_posterior(d=1), random_mixture(d=1))
    with pytest.raises(ValueError, match="2 grid points"):
        latent_plane(random_posterior(d=2), random_mixture(d=2), n_points=1)
