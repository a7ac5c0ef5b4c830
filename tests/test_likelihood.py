import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from equipoise.aggregate import GaussianMixture
from equipoise.estimate import Estimate
from equipoise.gaussian import Gaussian, standard_normal_log_prob
from equipoise.metrics.likelihood import (
    bits_per_dimension,
    dequantise,
    has_cells,
    iwae,
    likelihood,
)
from equipoise.model import VAE
from equipoise.noise import FixedNoise
from tests.oracles import Ppca, linear_gaussian_data, ppca_vae


@pytest.fixture
def model_and_data():
    x = linear_gaussian_data(n=700)
    ppca = Ppca.fit(x, 3)
    model = ppca_vae(ppca, FixedNoise(float(ppca.var))).eval()
    model.scaling.double()
    model.noise.double()
    return model, x, ppca


def test_elbo_and_iwae_of_probabilistic_pca(model_and_data):
    model, x, ppca = model_and_data
    oracle = ppca.log_prob(x)
    whole = likelihood(model, x.split(100), torch.Generator().manual_seed(0))
    assert whole.elbo.value == pytest.approx(
        float(oracle.mean()), abs=4 * whole.elbo.standard_error
    )
    assert whole.elbo.value == pytest.approx(whole.log_likelihood.value - whole.kl.value)
    assert whole.elbo.n == 700
    assert whole.noise_var.value == pytest.approx(float(ppca.var), rel=1e-5)
    assert whole.floor_var == 0.0  # a fixed variance has no floor
    # Each example's bound is exact, whatever K: the posterior is.
    torch.testing.assert_close(iwae(model, x.split(100), 5)[0, 0], oracle, atol=1e-4, rtol=0)


class _Wider(torch.nn.Module):
    """The exact encoder of PPCA with a posterior ten times as wide: K must close the gap."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        mean, log_var = self.encoder(x)
        return torch.cat([mean, (log_var + math.log(10.0)).expand_as(mean)], 1)


def test_the_bound_closes_on_log_p_and_is_stable_for_5000_samples(model_and_data):
    exact, x, ppca = model_and_data
    model = VAE(
        _Wider(exact.encoder), exact.decoder, exact.noise, shape=exact.shape, latent_dim=3
    ).eval()
    x = x[:100]
    oracle = ppca.log_prob(x).mean()
    gaps = [
        float(oracle - iwae(model, [x], k, generator=torch.Generator().manual_seed(0)).mean())
        for k in (1, 20, 5000)
    ]
    assert gaps[0] > gaps[1] > 0.01
    assert abs(gaps[2]) < 0.01


def test_far_from_the_data_the_bound_stays_finite(model_and_data):
    model, x, _ = model_and_data
    assert bool(iwae(model, [x[:5] + 1e4], 5000).isfinite().all())


def test_the_prior_as_a_mixture_gives_the_same_bound_from_the_same_draws(model_and_data):
    model, x, _ = model_and_data
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 3), torch.eye(3)[None])
    by_prior = iwae(model, x.split(100), 7, [standard_normal_log_prob, prior.log_prob])[0]
    torch.testing.assert_close(by_prior[0], by_prior[1], atol=1e-4, rtol=0)


def test_the_batches_do_not_matter(model_and_data):
    model, x, _ = model_and_data
    values = [float(iwae(model, x.split(size), 200).mean()) for size in (700, 130)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


@given(st.integers(0, 255), st.integers(1, 8))
def test_dequantised_values_stay_with_their_level(level, bits):
    quantum = 1 / (2**bits - 1)
    x = torch.full((1000,), level * quantum, dtype=torch.float64)
    spread = dequantise(x, quantum, torch.Generator().manual_seed(level))
    assert bool((torch.round(spread / quantum) == level).all())
    assert float(spread.std()) == pytest.approx(quantum / math.sqrt(12), rel=0.1)
    assert float(spread.mean()) == pytest.approx(level * quantum, abs=0.05 * quantum)


def test_bits_of_a_gaussian_are_the_entropy_of_its_levels():
    """For levels of a wide Gaussian the bound on the code length is close to their entropy.

    It is never below it.
    """
    std, quantum, n = 10.0, 1.0, 40_000
    density = torch.distributions.Normal(0.0, std)
    x = torch.round(density.sample((n, 1)).double())
    spread = dequantise(x, quantum, torch.Generator().manual_seed(0))
    found = bits_per_dimension(Estimate.of_mean(density.log_prob(spread)[:, 0]), 1, quantum)
    levels = torch.arange(-80, 81).double()
    p = density.cdf(levels + 0.5) - density.cdf(levels - 0.5)
    entropy = float(-(p * p.log2()).sum())
    assert found.value == pytest.approx(entropy, abs=4 * found.standard_error + 1e-3)


def test_raw_likelihood_has_no_ceiling_but_bits_have():
    """As a density shrinks onto constant data, log p grows without limit.

    The code length does not: it is smallest at a small but finite std.
    """
    x, quantum = torch.zeros(2000, 1), 1 / 255
    spread = dequantise(x, quantum, torch.Generator().manual_seed(0))
    raw, bits = [], []
    for std in (0.1, 0.001, 0.00001):
        density = torch.distributions.Normal(0.0, std)
        raw.append(float(density.log_prob(x).mean()))
        bits.append(
            bits_per_dimension(Estimate.of_mean(density.log_prob(spread)[:, 0]), 1, quantum).value
        )
    assert raw[0] < raw[1] < raw[2]
    assert bits[1] < bits[0]
    assert bits[1] < bits[2]
    assert min(bits) > 0  # one certain level costs no bits, and no density beats that


def test_codes_of_the_data_as_they_are_bound_dequantised_data_too(model_and_data, generator):
    """Importance weights are right for any proposal.

    From the same codes, the bounds approach log p(x + u) as well.
    """
    model, x, ppca = model_and_data
    x, model.scaling.quantum = torch.round(x[:50], decimals=1), 0.1
    found = iwae(model, [x], 20_000, generator=generator, dequantised=True)
    spread = dequantise(x, 0.1, torch.Generator().manual_seed(0))  # as the generator has drawn it
    torch.testing.assert_close(found[0, 0], ppca.log_prob(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1, 0], ppca.log_prob(spread), atol=0.1, rtol=0)
    assert float((found[1, 0] - found[0, 0]).abs().max()) > 0.3
    model.scaling.quantum = None
    with pytest.raises(ValueError, match="without levels"):
        iwae(model, [x], 2, dequantised=True)


def rounded_ppca(quantum, bounds):
    """A linear model of two dimensions and one latent unit, and data that are rounded for it."""
    x = linear_gaussian_data(n=25, dimensions=2, latent_dim=1) - 2
    ppca = Ppca.fit(x, 1)
    model = ppca_vae(ppca, FixedNoise(float(ppca.var))).eval()
    model.scaling.double()
    model.noise.double()
    model.scaling.quantum, model.mean_bounds = quantum, bounds

    low, high = bounds or (-math.inf, math.inf)
    return model, (x / quantum).round().mul(quantum).clamp(low, high), ppca


def log_probability(x, model, ppca):
    """Log of the mass of the cells, by quadrature over the code."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    mean = nodes[:, None] * ppca.weight[:, 0].numpy() + ppca.bias.numpy()
    if model.mean_bounds:
        mean = mean.clip(*model.mean_bounds)

    levels, x = model.levels, x.numpy()[:, None]
    upper = np.where(x >= levels.high, np.inf, x + levels.quantum / 2)
    lower = np.where(x <= levels.low, -np.inf, x - levels.quantum / 2)
    std = math.sqrt(float(ppca.var))
    cells = norm.cdf((upper - mean) / std) - norm.cdf((lower - mean) / std)
    return torch.from_numpy(np.log(cells.prod(2) @ weights / math.sqrt(2 * math.pi)))


@pytest.mark.parametrize("quantum", [0.25, 1.0])
@pytest.mark.parametrize("bounds", [None, (-1.0, 1.0)])
def test_the_bound_on_levels_closes_on_their_probability(quantum, bounds, generator):
    """With and without open ends; the prior as p(z) and as a mixture."""
    model, x, ppca = rounded_ppca(quantum, bounds)
    assert has_cells(model)
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.eye(1)[None])
    log_priors = [standard_normal_log_prob, prior.log_prob]
    # Codes of clamped data may be further away than the encoder of the unclamped ones thinks.
    exact_encoder, model.encoder = model.encoder, _Wider(model.encoder)
    found = iwae(model, x.split(10), 4000, log_priors, generator, digital=True)
    model.encoder = exact_encoder
    assert found.shape == (2, 2, 25)
    torch.testing.assert_close(found[1, 0], log_probability(x, model, ppca), atol=0.1, rtol=0)
    torch.testing.assert_close(found[1, 0], found[1, 1], atol=1e-4, rtol=0)
    # From the same codes, dequantised data cost more.
    few = iwae(model, [x.repeat(200, 1)], 1, generator=generator, dequantised=True, digital=True)
    dequantised = bits_per_dimension(Estimate.of_mean(few[1, 0]), 2, quantum)
    assert dequantised.value > bits_per_dimension(Estimate.of_mean(few[2, 0]), 2).value > 0


def test_a_likelihood_without_cells_is_said_and_refused(model_and_data, monkeypatch):
    model, x, _ = model_and_data
    assert not has_cells(model)
    with pytest.raises(ValueError, match="without levels"):
        iwae(model, [x], 2, digital=True)

    class Other(Gaussian):
        """A likelihood of another kind, of which the cells are not known."""

    model.scaling.quantum = 0.1
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda z: Other(*decode(z)))
    assert not has_cells(model)
    with pytest.raises(ValueError, match="is a Other"):
        iwae(model, [x], 2, digital=True)
