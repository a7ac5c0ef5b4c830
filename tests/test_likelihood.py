import math

import pytest
import torch

from equipoise.aggregate import GaussianMixture
from equipoise.data import Subset
from equipoise.metrics.likelihood import iwae, likelihood, likelihood_section
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
    assert whole.elbo.value == pytest.approx(float(oracle.mean()), abs=4 * whole.elbo.standard_error)
    assert whole.elbo.value == pytest.approx(whole.log_likelihood.value - whole.kl.value)
    assert whole.elbo.n == 700
    assert whole.noise_var.value == pytest.approx(float(ppca.var), rel=1e-5)
    bound = iwae(model, x.split(100), 5, torch.Generator().manual_seed(0))
    assert bound.value == pytest.approx(float(oracle.mean()), abs=1e-4)


def test_the_batches_do_not_matter(model_and_data):
    model, x, _ = model_and_data
    values = [iwae(model, x.split(size), 200).value for size in (700, 130)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_the_section_has_the_protocols_figures(model_and_data):
    model, x, ppca = model_and_data
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 3), torch.eye(3)[None])
    section = likelihood_section(model, Subset.whole(x.numpy()), prior, seed=0)
    assert section["iwae_20_first_500"]["n"] == 500
    assert section["elbo"]["n"] == 700
    # N(0, I) as a mixture is the prior.
    assert section["iwae_20_first_500_mixture"]["value"] == pytest.approx(
        section["iwae_20_first_500"]["value"], abs=1e-3
    )
    assert section["iwae_20_first_500"]["value"] == pytest.approx(float(ppca.log_prob(x[:500]).mean()), abs=1e-3)
    assert section["noise_floor_var"] == 0.0  # a fixed variance has no floor
    assert all(math.isfinite(figure["standard_error"]) for figure in section.values() if isinstance(figure, dict))
