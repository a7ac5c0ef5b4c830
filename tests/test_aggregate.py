"""Eqs. (12) and (13) are compared with torch.distributions, scikit-learn and closed forms."""

import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as ScikitLearnMixture
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from equipoise import aggregate
from equipoise.aggregate import AggregatePosterior, GaussianMixture, StandardNormal
from equipoise.estimate import Estimate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def random_mixture(K=5, d=3, offset=0.0, scale=1.0, dtype=torch.float64):
    factors = torch.eye(d, dtype=torch.float64) + 0.3 * normal(K, d, d, seed=1)
    weights = normal(K, seed=2).softmax(0)
    means = offset + scale * normal(K, d, seed=3)

    return GaussianMixture(
        weights.to(dtype), means.to(dtype), (scale**2 * factors @ factors.mT).to(dtype)
    )


def random_posteriors(N=7, d=3, dtype=torch.float64):
    return normal(N, d, seed=4).to(dtype), (normal(N, d, seed=5) - 2).to(dtype)


def densities():
    return [StandardNormal(3).double(), AggregatePosterior(*random_posteriors()), random_mixture()]


@pytest.mark.parametrize("density", densities(), ids=lambda density: type(density).__name__)
class TestContract:
    def test_log_prob_is_a_density(self, density):
        """The integral of q, estimated by the mean of q / p over samples of a wide p, is one."""
        z = 3 * normal(200_000, 3)
        log_wide = Independent(Normal(torch.zeros_like(z), 3.0), 1).log_prob(z)
        ratios = (density.log_prob(z) - log_wide).exp()
        assert ratios.mean().item() == pytest.approx(1, abs=5 * ratios.std().item() / len(z) ** 0.5)

    def test_samples_follow_log_prob(self, density):
        """The mean of p / q over samples of q is one, for a narrow p."""
        z = density.sample(200_000, seeded())
        centre = z[0]
        log_narrow = Independent(Normal(centre, 0.1 * torch.ones_like(centre)), 1).log_prob(z)
        ratios = (log_narrow - density.log_prob(z)).exp()

        assert ratios.mean().item() == pytest.approx(1, abs=5 * ratios.std().item() / len(z) ** 0.5)

    def test_generator_decides(self, density):
        assert torch.equal(density.sample(9, seeded(1)), density.sample(9, seeded(1)))
        assert not torch.equal(density.sample(9, seeded(1)), density.sample(9, seeded(2)))

    def test_shapes_and_dtype(self, density):
        z = density.sample(4, seeded())

        assert z.shape == (4, density.latent_dim)
        assert density.log_prob(z).shape == (4,)
        assert density.log_prob(z[:0]).shape == (0,)
        assert density.log_prob(z).dtype == z.dtype == torch.float64

    def test_gradient_reaches_the_codes(self, density):
        z = density.sample(4, seeded()).requires_grad_()
        assert torch.autograd.gradcheck(density.log_prob, z)

    def test_codes_of_another_dimension(self, density):
        with pytest.raises(ValueError, match=r"expected codes of shape \(B, 3\), got \(4, 2\)"):
            density.log_prob(torch.zeros(4, 2, dtype=torch.float64))

    def test_kl_to_prior(self, density):
        estimate = density.kl_to_prior(1000, seeded())

        assert isinstance(estimate, Estimate)
        assert estimate == density.kl_to_prior(1000, seeded())
        with pytest.raises(ValueError, match="n_samples >= 2, got 1"):
            density.kl_to_prior(1)


def test_standard_normal():
    z = normal(10, 3)
    expected = Independent(Normal(torch.zeros_like(z), 1.0), 1).log_prob(z)

    torch.testing.assert_close(StandardNormal(3).log_prob(z), expected)
    assert StandardNormal(3).kl_to_prior(10) == (0, 0, 10)
    assert not StandardNormal(3).state_dict()
    with pytest.raises(ValueError, match="latent_dim >= 1, got 0"):
        StandardNormal(0)


def test_aggregate_posterior_equals_torch_distributions():
    means, log_vars = random_posteriors()
    oracle = MixtureSameFamily(
        Categorical(torch.ones(len(means))), Independent(Normal(means, (0.5 * log_vars).exp()), 1)
    )
    z = normal(20, 3)

    torch.testing.assert_close(AggregatePosterior(means, log_vars).log_prob(z), oracle.log_prob(z))


def test_aggregate_posterior_does_not_depend_on_the_blocks(monkeypatch):
    posterior, z = AggregatePosterior(*random_posteriors(50)), normal(30, 3)
    expected = posterior.log_prob(z)
    monkeypatch.setattr(aggregate, "BLOCK", 7)
    torch.testing.assert_close(posterior.log_prob(z), expected, rtol=1e-13, atol=1e-13)


def test_aggregate_posterior_of_one_mixture_component_per_example():
    """Eq. (13) with K = N and the posteriors' covariances is eq. (12)."""
    means, log_vars = random_posteriors()
    weights = torch.full((len(means),), 1 / len(means), dtype=torch.float64)
    mixture = GaussianMixture(weights, means, log_vars.exp().diag_embed())
    z = normal(20, 3)

    torch.testing.assert_close(mixture.log_prob(z), AggregatePosterior(means, log_vars).log_prob(z))


def test_aggregate_posterior_far_away_and_narrow():
    """The density loses no digits for codes around 1e4 with std 1e-2."""
    means, log_vars = random_posteriors()
    near = AggregatePosterior(means, log_vars)
    far = AggregatePosterior(1e4 + 1e-2 * means, log_vars + 2 * math.log(1e-2))
    z = normal(20, 3)
    expected = near.log_prob(z) - 3 * math.log(1e-2)

    torch.testing.assert_close(far.log_prob(1e4 + 1e-2 * z), expected, rtol=1e-7, atol=0)


def test_aggregate_posterior_of_float32_codes_is_computed_in_float64():
    means, log_vars = random_posteriors()
    posterior = AggregatePosterior(means.float(), log_vars.float())
    exact = AggregatePosterior(means.float().double(), log_vars.float().double())
    z = normal(20, 3).float()

    assert torch.equal(posterior.log_prob(z), exact.log_prob(z.double()).float())


def test_aggregate_posterior_moments():
    posterior = AggregatePosterior(*random_posteriors())
    moments = posterior.moments()
    z = posterior.sample(400_000, seeded())
    torch.testing.assert_close(moments.mean, z.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(moments.covariance, z.mT.cov(), atol=0.02, rtol=0)

    one = AggregatePosterior(torch.zeros(1, 1), torch.zeros(1, 1)).moments()
    assert one.mean.tolist() == [0]
    assert one.covariance.tolist() == [[1]]


@pytest.mark.parametrize(
    ("means", "log_vars", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 1), r"got \(3, 2\) and \(3, 1\)"),
        (torch.zeros(3), torch.zeros(3), r"got \(3,\) and \(3,\)"),
        (torch.zeros(0, 2), torch.zeros(0, 2), "neither zero"),
        (
            torch.full((3, 2), math.nan),
            torch.zeros(3, 2),
            "6 of 6 values of means are not finite.*diverged",
        ),
        (torch.zeros(3, 2), torch.full((3, 2), math.inf), "values of log_vars are not finite"),
    ],
)
def test_aggregate_posterior_refuses(means, log_vars, message):
    with pytest.raises(ValueError, match=message):
        AggregatePosterior(means, log_vars)


def test_mixture_equals_torch_distributions():
    mixture, z = random_mixture(), normal(20, 3)
    oracle = MixtureSameFamily(
        Categorical(mixture.weights),
        MultivariateNormal(mixture.means, covariance_matrix=mixture.covariances),
    )

    torch.testing.assert_close(mixture.log_prob(z), oracle.log_prob(z))


def test_mixture_equals_scikit_learn():
    mixture, z = random_mixture(), normal(20, 3)
    model = ScikitLearnMixture(5)
    model.weights_, model.means_ = mixture.weights.numpy(), mixture.means.numpy()
    model.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(mixture.covariances.numpy()))

    torch.testing.assert_close(
        mixture.log_prob(z), torch.from_numpy(model.score_samples(z.numpy()))
    )
    torch.testing.assert_close(
        mixture.responsibilities(z), torch.from_numpy(model.predict_proba(z.numpy()))
    )


def test_mixture_does_not_depend_on_the_blocks(monkeypatch):
    mixture, z = random_mixture(), normal(30, 3)
    expected = mixture.log_prob(z), mixture.responsibilities(z)
    monkeypatch.setattr(aggregate, "BLOCK", 8)
    actual = mixture.log_prob(z), mixture.responsibilities(z)

    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_mixture_far_away_and_narrow():
    near, far, z = random_mixture(), random_mixture(offset=1e4, scale=1e-2), normal(20, 3)
    expected = near.log_prob(z) - 3 * math.log(1e-2)
    torch.testing.assert_close(far.log_prob(1e4 + 1e-2 * z), expected, rtol=1e-7, atol=0)


def test_mixture_sample_moments():
    mixture = random_mixture()
    z = mixture.sample(400_000, seeded())
    mean = mixture.weights @ mixture.means
    centred = mixture.means - mean
    covariance = torch.einsum("k,kij->ij", mixture.weights, mixture.covariances)
    covariance += torch.einsum("k,ki,kj->ij", mixture.weights, centred, centred)

    torch.testing.assert_close(z.mean(0), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(z.mT.cov(), covariance, atol=0.03, rtol=0)


def test_mixture_samples_of_one_component():
    mixture = random_mixture()
    z = mixture.sample(200_000, seeded(), component=2)

    torch.testing.assert_close(z.mean(0), mixture.means[2], atol=0.01, rtol=0)
    torch.testing.assert_close(z.mT.cov(), mixture.covariances[2], atol=0.03, rtol=0)
    for component in (-1, 5):
        with pytest.raises(ValueError, match=f"from 0 to 4, got {component}"):
            mixture.sample(1, component=component)
    with pytest.raises(ValueError, match="n >= 1 codes to draw, got 0"):
        mixture.sample(0)


def test_kl_to_prior_of_one_gaussian():
    """K = 1 has the closed form (tr S + |m|^2 - d - log det S) / 2."""
    mixture = random_mixture(K=1)
    mean, covariance = mixture.means[0], mixture.covariances[0]
    exact = 0.5 * (covariance.trace() + mean.square().sum() - 3 - covariance.logdet()).item()
    estimate = mixture.kl_to_prior(100_000, seeded())

    assert estimate.value == pytest.approx(exact, abs=4 * estimate.standard_error)
    assert 0 < estimate.standard_error < 0.02


def test_standard_error_is_that_of_repetitions():
    mixture = random_mixture()
    estimates = [mixture.kl_to_prior(500, seeded(seed)) for seed in range(200)]
    spread = torch.tensor([estimate.value for estimate in estimates]).std().item()
    claimed = sum(estimate.standard_error for estimate in estimates) / len(estimates)

    assert claimed == pytest.approx(spread, rel=0.2)


def test_mixture_state_round_trip():
    mixture, z = random_mixture(), normal(20, 3)
    state = mixture.state_dict()
    assert set(state) == {"weights", "means", "covariances"}

    loaded = GaussianMixture(
        torch.ones(5) / 5, torch.zeros(5, 3), torch.eye(3).repeat(5, 1, 1)
    ).double()
    loaded.load_state_dict(state)

    for copy in (GaussianMixture(**state), loaded, pickle.loads(pickle.dumps(mixture))):
        assert torch.equal(copy.log_prob(z), mixture.log_prob(z))
        assert torch.equal(copy.sample(5, seeded()), mixture.sample(5, seeded()))
    with pytest.raises(ValueError, match="sum of 10"):
        loaded.load_state_dict(state | {"weights": torch.full((5,), 2.0)})


def test_mixture_does_not_share_memory_with_its_arguments():
    means = torch.zeros(1, 2)
    mixture = GaussianMixture(torch.ones(1), means, torch.eye(2)[None])
    means += 1
    assert mixture.means.tolist() == [[0, 0]]


def test_mixture_in_float32():
    z = normal(20, 3)
    low = random_mixture().float()

    assert low.log_prob(z).dtype == low.sample(2).dtype == torch.float32
    torch.testing.assert_close(
        low.log_prob(z).double(), random_mixture().log_prob(z), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(3) / 3}, r"got \(3,\), \(2, 2\) and \(2, 2, 2\)"),
        ({"means": torch.zeros(2)}, r"got \(2,\), \(2,\)"),
        ({"covariances": torch.ones(2, 2)}, r"covariances \(K, d, d\)"),
        ({"weights": torch.ones(2)}, "sum of 2 and a minimum of 1; divide"),
        ({"weights": torch.tensor([1.5, -0.5])}, "minimum of -0.5"),
        ({"means": torch.full((2, 2), math.nan)}, "4 of 4 values of means are not finite"),
        (
            {"covariances": torch.stack([torch.eye(2), torch.ones(2, 2)])},
            r"\[1\] is not positive definite",
        ),
        ({"covariances": torch.tensor([[1.0, 0.5], [0.0, 1.0]]).repeat(2, 1, 1)}, "symmetric"),
    ],
)
def test_mixture_refuses(change, message):
    valid = {
        "weights": torch.ones(2) / 2,
        "means": torch.zeros(2, 2),
        "covariances": torch.eye(2).repeat(2, 1, 1),
    }
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**(valid | change))


@pytest.mark.parametrize(("K", "d"), [(1, 1), (5, 3)])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_temperature_multiplies_the_covariances_alone(K, d, temperature):
    mixture, z = random_mixture(K, d), normal(100, d, seed=6)
    tempered = aggregate.tempered(mixture, temperature)

    components = MultivariateNormal(mixture.means, temperature * mixture.covariances)
    expected = MixtureSameFamily(Categorical(mixture.weights), components)
    torch.testing.assert_close(tempered.log_prob(z), expected.log_prob(z))

    between = aggregate.tempered(mixture, 1e-12).moments().covariance
    within = mixture.moments().covariance - between
    torch.testing.assert_close(tempered.moments().covariance, temperature * within + between)

    # The draws are those of the mixture, moved towards the means.
    z, moved = mixture.sample(50, seeded(), 0), tempered.sample(50, seeded(), 0)
    mean = mixture.means[0]
    torch.testing.assert_close(moved - mean, temperature**0.5 * (z - mean))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_other_temperatures_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature above 0"):
        aggregate.tempered(random_mixture(), temperature)
