import pytest
import torch

from equipoise.digital import DigitalGaussian
from equipoise.gaussian import Gaussian, standard_normal_log_prob
from equipoise.model import VAE
from equipoise.noise import FixedNoise, GlobalNoise, PredictedNoise
from equipoise.objectives import (
    IMQ_SCALES,
    BatchVarianceElbo,
    DetachedVarianceElbo,
    DipVaeI,
    DipVaeII,
    Elbo,
    FrozenMeanElbo,
    RaeL2,
    WaeMmd,
    importance_weighted_bound,
    importance_weighted_bounds,
    maximum_mean_discrepancy,
)
from equipoise.residuals import ResidualVariance
from tests.oracles import Ppca, linear_gaussian_data, ppca_vae


def exact_model(noise=None):
    x = linear_gaussian_data()
    ppca = Ppca.fit(x, 3)
    return x, ppca, ppca_vae(ppca, noise or FixedNoise(float(ppca.var)))


def stage_2_model(network="decoder"):
    vae = VAE.build((1, 8, 8), latent_dim=3, width=4)
    vae.noise.update(torch.full((2, 1, 8, 8), 0.2))
    var = vae.noise(torch.zeros(1, 3)).exp()
    vae.predict_variance(var, 0.1 * var, network=network)

    return vae


def test_elbo_with_the_exact_posterior_is_the_log_likelihood(generator):
    """With the exact posterior, log p(x|z) + log p(z) - log q(z|x) is log p(x) for every z."""
    x, ppca, vae = exact_model()
    elbo = torch.stack([Elbo(vae)(x, generator).elbo for _ in range(200)]).mean(0)
    torch.testing.assert_close(elbo.mean(), ppca.log_prob(x).mean(), rtol=2e-3, atol=0)


def test_closed_form_noise_is_that_of_probabilistic_pca(generator):
    """Eq. (10) with samples of z gives the variance of PPCA. The posterior mean does not."""
    x, ppca, vae = exact_model()
    sampled, plugged_in = ResidualVariance(), ResidualVariance()
    for _ in range(100):
        sampled.update(Elbo(vae)(x, generator).residual)

    plugged_in.update(x - vae.reconstruct(x).mean)

    torch.testing.assert_close(sampled.var, ppca.var, rtol=5e-3, atol=0)
    assert plugged_in.var < 0.8 * ppca.var


def test_importance_weighted_bound_is_exact_with_the_exact_posterior(generator):
    """All importance weights are p(x). The bound is therefore log p(x) for any K."""
    x, ppca, vae = exact_model()
    vae.noise.log_var = ppca.var.log()
    for k in (1, 7):
        bound = importance_weighted_bound(vae, x[:50], k, generator)
        torch.testing.assert_close(bound, ppca.log_prob(x[:50]), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_importance_weighted_bound_with_one_sample_is_the_elbo():
    vae = VAE.build((6,), latent_dim=2, width=2, noise=FixedNoise(0.1)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    bound = torch.stack(
        [importance_weighted_bound(vae, x, 1, generator) for _ in range(4000)]
    ).mean(0)
    with torch.no_grad():
        elbo = torch.stack([Elbo(vae)(x, generator).elbo for _ in range(4000)]).mean(0)

    torch.testing.assert_close(bound, elbo, rtol=5e-3, atol=5e-2)


def test_importance_weighted_bound_grows_with_the_number_of_samples(generator):
    vae = VAE.build((6,), latent_dim=2, width=2, noise=FixedNoise(0.05)).double()
    x = torch.randn(200, 6, dtype=torch.float64)
    bounds = [float(importance_weighted_bound(vae, x, k, generator).mean()) for k in (1, 10, 100)]
    assert bounds[0] < bounds[1] < bounds[2]


def test_importance_weighted_bound_draws_exactly_as_many_samples_as_asked():
    """Seven samples need chunks of 3, 3 and 1. The test counts the rows of the decoder."""
    vae = VAE.build((6,), latent_dim=2, width=2)
    rows = []
    vae.decoder.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    importance_weighted_bound(vae, torch.zeros(2, 6), 7, max_rows=6)

    assert rows == [6, 6, 2]


def test_importance_weighted_bound_of_more_examples_than_rows(generator):
    x, ppca, vae = exact_model()
    vae.noise.log_var = ppca.var.log()
    bounds = importance_weighted_bounds(
        vae,
        x[:50],
        3,
        [standard_normal_log_prob],
        generator,
        observed=[x[:50], x[50:100]],
        max_rows=8,
    )

    torch.testing.assert_close(bounds[0, 0], ppca.log_prob(x[:50]), rtol=1e-9, atol=1e-9)
    assert bounds.shape == (2, 1, 50)
    # The second bound is of other examples, with codes of the first ones.
    assert (bounds[1] < bounds[0]).double().mean() > 0.9


def test_importance_weighted_bound_is_stable_for_thousands_of_samples(generator):
    """A small noise variance gives log-weights of -1e5, whose exponentials are zero."""
    vae = VAE.build((6,), latent_dim=2, width=2, noise=FixedNoise(1e-5))
    bound = importance_weighted_bound(vae, torch.randn(2, 6), 5000, generator)
    assert torch.isfinite(bound).all()
    assert (bound < -1000).all()


def test_importance_weighted_bound_takes_another_prior(generator):
    x, ppca, vae = exact_model()
    shifted = importance_weighted_bound(
        vae,
        x[:20],
        3,
        generator,
        log_prior=lambda z: -10 + Gaussian(torch.zeros_like(z), z.new_zeros(())).log_prob(z),
    )
    vae.noise.log_var = ppca.var.log()

    torch.testing.assert_close(shifted, ppca.log_prob(x[:20]) - 10, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="at least 1"):
        importance_weighted_bound(vae, x, 0)


def test_terms_are_per_example_and_add_up(generator):
    vae = VAE.build((1, 8, 8), latent_dim=3, width=4)
    x = torch.rand(5, 1, 8, 8)
    terms = Elbo(vae)(x, generator)

    assert terms.loss.shape == terms.log_likelihood.shape == terms.kl.shape == (5,)
    torch.testing.assert_close(terms.loss, -terms.elbo)
    torch.testing.assert_close(terms.squared_error, terms.residual.square().flatten(1).sum(1))
    assert not terms.residual.requires_grad


def test_gradients_of_the_elbo():
    vae = VAE.build((4,), latent_dim=2, width=1, noise=GlobalNoise("gradient")).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    parameters = tuple(vae.parameters())

    def loss(*_parameters):
        return Elbo(vae)(x, torch.Generator().manual_seed(0)).loss

    assert torch.autograd.gradcheck(loss, parameters)


def test_stage_2_starts_where_stage_1_ended():
    vae = VAE.build((1, 8, 8), latent_dim=3, width=4)
    x = torch.rand(5, 1, 8, 8)
    vae.noise.update(torch.full((2, 1, 8, 8), 0.2))
    before = Elbo(vae)(x, torch.Generator().manual_seed(0)).elbo
    var = vae.noise(torch.zeros(1, 3)).exp()
    vae.predict_variance(var, var)
    after = Elbo(vae)(x, torch.Generator().manual_seed(0)).elbo

    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("network", ["decoder", "head"])
def test_detached_variance_leaves_the_networks_gradients_as_in_stage_1(network):
    vae = stage_2_model(network)
    torch.nn.init.normal_(vae.noise.network.output.weight, std=0.5)
    x = torch.rand(5, 1, 8, 8)
    shared = [*vae.encoder.parameters(), *vae.decoder.parameters()]

    def gradients(objective):
        loss = objective(x, torch.Generator().manual_seed(0)).loss.sum()
        return torch.autograd.grad(loss, shared)

    detached = gradients(DetachedVarianceElbo(vae))
    joint = gradients(Elbo(vae))

    vae.noise = FixedNoise(float(vae.noise.reference_log_var.exp()))
    stage_1 = gradients(Elbo(vae))

    for mine, theirs in zip(detached, stage_1, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(joint, stage_1, strict=True))


@pytest.mark.parametrize("network", ["decoder", "head"])
def test_detached_variance_trains_the_variance_as_the_joint_objective_does(network):
    vae = stage_2_model(network)
    x = torch.rand(5, 1, 8, 8)
    gradients = []
    for objective in (DetachedVarianceElbo(vae), Elbo(vae)):
        terms = objective(x, torch.Generator().manual_seed(0))
        gradients.append(torch.autograd.grad(terms.loss.sum(), list(vae.noise.parameters())))

    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_detached_variance_reports_the_elbo_of_the_whole_model():
    vae = stage_2_model()
    x = torch.rand(5, 1, 8, 8)
    elbos = [
        o(x, torch.Generator().manual_seed(0)).elbo for o in (DetachedVarianceElbo(vae), Elbo(vae))
    ]

    torch.testing.assert_close(*elbos)


def test_the_probability_of_levels_trains_the_variance_alone():
    """The mean keeps its gradients to the bit; the terms are those of the density."""
    vae = stage_2_model()
    torch.nn.init.normal_(vae.noise.network.output.weight, std=0.5)
    vae.scaling.quantum, vae.mean_bounds = 1 / 16, (0.0, 1.0)
    x = torch.randint(0, 17, (5, 1, 8, 8), generator=torch.Generator().manual_seed(1)) / 16
    shared = [*vae.encoder.parameters(), *vae.decoder.parameters()]
    own = list(vae.noise.parameters())

    density, digital = (
        objective(x, torch.Generator().manual_seed(0))
        for objective in (DetachedVarianceElbo(vae), DetachedVarianceElbo(vae, levels=vae.levels))
    )
    torch.testing.assert_close(digital.elbo, density.elbo, rtol=0, atol=0)
    gradients = [
        torch.autograd.grad(terms.loss.sum(), [*shared, *own]) for terms in (density, digital)
    ]
    for by_density, by_levels in zip(*(part[: len(shared)] for part in gradients), strict=True):
        torch.testing.assert_close(by_levels, by_density, rtol=0, atol=0)

    z = vae.encode(x).sample(torch.Generator().manual_seed(0)).detach()
    likelihood = Gaussian(vae.decode_mean(z).detach(), vae.noise(z))
    loss = -DigitalGaussian.of(likelihood, vae.levels).log_prob(x).sum()
    expected = torch.autograd.grad(loss, own)
    for found, wanted in zip(gradients[1][len(shared) :], expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert any(not torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_detached_variance_needs_a_predicted_variance():
    with pytest.raises(ValueError, match="PredictedNoise"):
        DetachedVarianceElbo(VAE.build((4,), latent_dim=2))
    with pytest.raises(ValueError, match="PredictedNoise"):
        FrozenMeanElbo(VAE.build((4,), latent_dim=2))


@pytest.mark.parametrize("network", ["decoder", "head"])
def test_a_frozen_mean_gives_the_variance_network_the_gradients_of_stopped_ones(network):
    vae, x = stage_2_model(network), torch.rand(4, 1, 8, 8)
    gradients = []
    for objective in (DetachedVarianceElbo(vae), FrozenMeanElbo(vae)):
        vae.zero_grad()
        terms = objective(x, torch.Generator().manual_seed(0))
        terms.loss.sum().backward()
        gradients.append([parameter.grad for parameter in vae.noise.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(parameter.grad is None for parameter in vae.encoder.parameters())
    assert all(parameter.grad is None for parameter in vae.decoder.parameters())
    assert torch.equal(terms.loss, -terms.log_likelihood)


def test_a_planted_noise_map_is_recovered():
    """x is noise with a std per pixel that depends on the code. The variance head finds it."""
    generator = torch.Generator().manual_seed(0)
    n = 4000
    side = torch.randint(0, 2, (n, 1), generator=generator).float()
    true_std = torch.where(side > 0, torch.tensor([0.05, 0.4]), torch.tensor([0.4, 0.05]))
    x = true_std * torch.randn(n, 2, generator=generator)

    network = torch.nn.Linear(1, 2)
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.zeros_(network.bias)

    var = x.square().mean()
    noise = PredictedNoise(network, var, var * 1e-3)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.05)

    for _ in range(500):
        loss = -Gaussian(torch.zeros_like(x), noise(side)).log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    std = (0.5 * noise(torch.tensor([[0.0], [1.0]]))).exp()

    torch.testing.assert_close(std, torch.tensor([[0.4, 0.05], [0.05, 0.4]]), rtol=0.05, atol=0)
    assert torch.isfinite(loss)


def parameter_gradients(objective, x):
    """Return the gradients of both networks for the mean loss of a batch, with a fixed draw."""
    loss = objective(x, torch.Generator().manual_seed(0)).loss.mean()
    return torch.autograd.grad(
        loss, [*objective.model.encoder.parameters(), *objective.model.decoder.parameters()]
    )


def small_vae(noise=None, **traits):
    torch.manual_seed(0)
    return VAE.build((1, 8, 8), latent_dim=3, width=2, noise=noise, **traits)


def test_a_beta_is_a_variance():
    """The loss of beta = 2 at variance 0.5 is twice that of beta = 1 at variance 1.

    The latter is the paper's beta-VAE. The equality holds up to a constant.
    """
    x = torch.rand(6, 1, 8, 8)
    weighted = parameter_gradients(Elbo(small_vae(FixedNoise(0.5)), beta=2.0), x)
    plain = parameter_gradients(Elbo(small_vae(FixedNoise(1.0))), x)

    for mine, theirs in zip(weighted, plain, strict=True):
        torch.testing.assert_close(mine, 2 * theirs)


def test_beta_changes_the_loss_and_not_the_bound():
    x, vae = torch.rand(6, 1, 8, 8), small_vae(FixedNoise(0.5))
    plain, weighted = (Elbo(vae, beta)(x, torch.Generator().manual_seed(0)) for beta in (1.0, 4.0))
    torch.testing.assert_close(weighted.elbo, plain.elbo)
    torch.testing.assert_close(weighted.loss, plain.loss + 3 * plain.kl)


def test_batch_variance_is_optimal_for_the_batch():
    """The bound is -D/2 (log(2 pi MSE) + 1). Another variance gives a smaller bound."""
    x, vae = torch.rand(6, 1, 8, 8), small_vae()
    terms = BatchVarianceElbo(vae)(x, torch.Generator().manual_seed(0))
    mse = terms.residual.square().mean()
    expected = -0.5 * 64 * (torch.log(2 * torch.pi * mse) + 1)

    torch.testing.assert_close(terms.log_likelihood.mean(), expected)

    for factor in (0.8, 1.25):
        vae.noise = FixedNoise(float(factor * mse))
        other = Elbo(vae)(x, torch.Generator().manual_seed(0))
        assert other.log_likelihood.mean() < terms.log_likelihood.mean()


def test_gradients_of_the_batch_variance_are_those_at_its_value():
    """At the optimum, the derivative of the bound by the variance is zero."""
    x, vae = torch.rand(6, 1, 8, 8), small_vae()
    mine = parameter_gradients(BatchVarianceElbo(vae), x)
    mse = BatchVarianceElbo(vae)(x, torch.Generator().manual_seed(0)).residual.square().mean()
    theirs = parameter_gradients(Elbo(small_vae(FixedNoise(float(mse)))), x)

    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def dip_penalty(objective, x):
    plain = Elbo(objective.model)(x, torch.Generator().manual_seed(0))
    terms = objective(x, torch.Generator().manual_seed(0))
    penalties = terms.loss - plain.loss

    torch.testing.assert_close(penalties, penalties[:1].expand_as(penalties), rtol=1e-3, atol=1e-3)

    return penalties.mean(), terms.posterior


def test_dip_penalties_are_those_of_the_covariance():
    x, vae = torch.rand(40, 1, 8, 8), small_vae(FixedNoise(0.5))
    for objective, diagonal in ((DipVaeI(vae, 3.0), 30.0), (DipVaeII(vae, 3.0), 3.0)):
        penalty, posterior = dip_penalty(objective, x)
        covariance = posterior.mean.mT.cov(correction=0)
        if isinstance(objective, DipVaeII):
            covariance = covariance + posterior.var.mean(0).diag()
        off = covariance - covariance.diagonal().diag()
        expected = 3.0 * off.square().sum() + diagonal * (covariance.diagonal() - 1).square().sum()
        torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=1e-3)


def test_dip_vae_ii_is_content_with_the_prior():
    """If the posterior is the prior for every input, the covariance of the codes is I.

    DIP-VAE-I considers only the means, which do not vary.
    """
    vae = small_vae(FixedNoise(0.5))
    torch.nn.init.zeros_(vae.encoder.output.weight)
    x = torch.rand(8, 1, 8, 8)

    assert dip_penalty(DipVaeII(vae), x)[0].abs() < 1e-3
    torch.testing.assert_close(
        dip_penalty(DipVaeI(vae), x)[0], torch.tensor(300.0), rtol=1e-5, atol=1e-2
    )


def test_maximum_mean_discrepancy_is_the_double_sum():
    z, prior = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)

    def kernel(a, b):
        return sum(6 * s / (6 * s + float((a - b).square().sum())) for s in IMQ_SCALES)

    within = sum(
        kernel(z[i], z[j]) + kernel(prior[i], prior[j])
        for i in range(7)
        for j in range(7)
        if i != j
    )
    between = sum(kernel(a, b) for a in z for b in prior)

    assert float(maximum_mean_discrepancy(z, prior)) == pytest.approx(
        within / 42 - 2 * between / 49, rel=1e-9
    )


def test_maximum_mean_discrepancy_is_zero_on_average_for_one_distribution():
    values = torch.stack(
        [maximum_mean_discrepancy(torch.randn(50, 4), torch.randn(50, 4)) for _ in range(300)]
    )

    assert abs(float(values.mean())) < 4 * float(values.std()) / 300**0.5
    assert maximum_mean_discrepancy(torch.randn(50, 4) + 1, torch.randn(50, 4)) > 5 * values.std()


def test_maximum_mean_discrepancy_has_gradients_where_codes_coincide():
    z = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    maximum_mean_discrepancy(z, torch.ones(5, 2, dtype=torch.float64)).backward()
    assert torch.isfinite(z.grad).all()

    free = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    prior = torch.randn(5, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda codes: maximum_mean_discrepancy(codes, prior), free)


def test_wae_is_squared_error_and_discrepancy():
    vae = small_vae(FixedNoise(0.5), deterministic=True)
    x = torch.rand(9, 1, 8, 8)
    terms = WaeMmd(vae, penalty=7.0)(x, torch.Generator().manual_seed(0))
    prior = torch.empty(9, 3).normal_(generator=torch.Generator().manual_seed(0))
    expected = terms.squared_error + 7.0 * maximum_mean_discrepancy(terms.posterior.mean, prior)

    torch.testing.assert_close(terms.loss, expected)


def test_rae_draws_nothing_and_weighs_codes_and_weights():
    vae = small_vae(FixedNoise(0.5), deterministic=True)
    x = torch.rand(9, 1, 8, 8)
    first, second = (
        RaeL2(vae, 0.5, 0.1)(x, torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )

    torch.testing.assert_close(first.loss, second.loss)

    weights = sum(p.detach().square().sum() for p in vae.decoder.parameters())
    codes = first.posterior.mean.square().sum(1)
    torch.testing.assert_close(first.loss, first.squared_error + 0.25 * codes + 0.1 * weights)


@pytest.mark.parametrize("objective", [BatchVarianceElbo, DipVaeI, DipVaeII, WaeMmd, RaeL2])
def test_objectives_train_both_networks(objective):
    gradients = parameter_gradients(objective(small_vae(FixedNoise(0.5))), torch.rand(9, 1, 8, 8))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert sum(float(gradient.abs().sum()) > 0 for gradient in gradients) > 0.8 * len(gradients)
