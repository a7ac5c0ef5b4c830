"""Correlation of the noise: its mathematics, and how it is estimated, chosen, kept and used."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import fft, stats
from torch import nn

import equipoise
from equipoise.anonymity import without_paths
from equipoise.cli import main
from equipoise.config import ConfigError
from equipoise.correlated_noise import CorrelatedNoise, marginal_of
from equipoise.correlation import (
    BandCorrelation,
    BandCovariance,
    CorrelatedGaussian,
    CosineTransform,
    FullCorrelation,
    LowRankCorrelation,
    build_correlation,
    describe_correlation,
)
from equipoise.estimate import Estimate
from equipoise.export import export
from equipoise.files import StoreError
from equipoise.gaussian import Gaussian
from equipoise.metrics.outliers import model_scores
from equipoise.model import VAE, Scaling
from equipoise.noise import GlobalNoise, PredictedNoise
from equipoise.noise_fit import fit_correlation, fit_noise, problem_of_form
from equipoise.objectives import Elbo, importance_weighted_bound
from equipoise.outputs import write_samples
from equipoise.records import ModelDescription
from equipoise.residuals import ResidualCovariance
from equipoise.sharing import model_card
from equipoise.store import (
    load_model,
    read_codes_digest,
    read_digest,
    read_tensors,
    restore_model,
    save_model,
)
from equipoise.training.setup import check_fit, check_own_noise
from equipoise.training.trainer import Trainer
from tests.test_mixture_fit import in_processes

SHAPES = [(4,), (1, 8, 8), (3, 16, 12)]
FLOOR = torch.tensor(1e-3)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moments(u):
    statistic = ResidualCovariance(math.prod(u.shape[1:]))
    for batch in u.split(97):
        statistic.update(batch)
    return statistic


def bands_of(u):
    statistic = BandCovariance(tuple(u.shape[1:]))
    for batch in u.split(97):
        statistic.update(batch)
    return statistic


def forms(shape, n=400):
    """One correlation of each form that suits the shape, float64."""
    u = normal(n, *shape).cumsum(-1)
    fitted = [
        FullCorrelation.fit(shape, moments(u), FLOOR),
        FullCorrelation.fit(shape, moments(u), FLOOR).shrunk(0.7),
        LowRankCorrelation.fit(shape, moments(u), FLOOR, 1),
        LowRankCorrelation.fit(shape, moments(u), FLOOR, 0),
    ]
    if len(shape) == 3:
        fitted.append(BandCorrelation.fit(shape, bands_of(u), FLOOR))
    return fitted


def matrix(correlation):
    """C, as what colouring does to the columns of I, times its transpose."""
    dimensions = math.prod(correlation.shape)
    identity = torch.eye(dimensions, dtype=torch.float64).view(dimensions, *correlation.shape)
    root = correlation.colour(identity).flatten(1).T
    return root @ root.T


def planted(dimensions, seed=0):
    """A covariance with two strong common directions."""
    loadings = normal(dimensions, 2, seed=seed)
    return loadings @ loadings.T + 0.3 * torch.eye(dimensions, dtype=torch.float64)


def draws(covariance, n, seed=1):
    return normal(n, len(covariance), seed=seed) @ torch.linalg.cholesky(covariance).T


@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_and_colouring_are_inverse_and_have_the_determinant(shape):
    x = normal(5, *shape, seed=1)
    for correlation in forms(shape):
        torch.testing.assert_close(correlation.whiten(correlation.colour(x)), x)
        torch.testing.assert_close(correlation.colour(correlation.whiten(x)), x)

        covariance = matrix(correlation)
        torch.testing.assert_close(torch.logdet(covariance), correlation.log_det)
        solved = torch.linalg.solve(covariance, x.flatten(1).T).T
        squared = correlation.whiten(x).flatten(1).square().sum(1)
        torch.testing.assert_close(squared, (x.flatten(1) * solved).sum(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_density_is_that_of_scipy(shape):
    """With all D eigenvectors, it is any multivariate normal density."""
    mean, log_var, x = normal(*shape), normal(*shape, seed=2), normal(3, *shape, seed=3)
    for correlation in forms(shape):
        density = CorrelatedGaussian(mean.expand_as(x), log_var, correlation)
        std = density.std[0].flatten()
        sigma = std[:, None] * matrix(correlation) * std
        oracle = stats.multivariate_normal.logpdf(x.flatten(1), mean.flatten(), sigma)
        np.testing.assert_allclose(density.log_prob(x), oracle, rtol=1e-9)


def test_each_example_has_its_own_std():
    mean, x, log_var = (normal(3, 1, 8, 8, seed=seed) for seed in range(3))
    for correlation in forms((1, 8, 8)):
        together = CorrelatedGaussian(mean, log_var, correlation).log_prob(x)
        for i in range(3):
            alone = CorrelatedGaussian(mean[i : i + 1], log_var[i], correlation)
            torch.testing.assert_close(alone.log_prob(x[i : i + 1]), together[i : i + 1])

        scalar = CorrelatedGaussian(mean, torch.tensor(-1.0).double(), correlation).log_prob(x)
        spread = CorrelatedGaussian(mean, torch.full_like(mean, -1.0), correlation).log_prob(x)
        torch.testing.assert_close(scalar, spread)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_correlation_it_is_the_independent_gaussian(shape):
    dimensions = math.prod(shape)
    identity = FullCorrelation(
        shape, torch.eye(dimensions).double(), torch.zeros(dimensions).double()
    )
    mean, x, log_var = (normal(4, *shape, seed=i) for i in range(3))
    white, independent = CorrelatedGaussian(mean, log_var, identity), Gaussian(mean, log_var)
    for each in ("log_prob", "squared_distance"):
        torch.testing.assert_close(getattr(white, each)(x), getattr(independent, each)(x))
    torch.testing.assert_close(white.std, independent.std)
    torch.testing.assert_close(white.var, independent.var)
    draw = [d.sample(torch.Generator().manual_seed(0)) for d in (white, independent)]
    torch.testing.assert_close(*draw)


def test_the_density_has_the_right_gradients():
    correlation = forms((4,))[1]
    mean, log_var, x = (normal(3, 4, seed=i).requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(
        lambda m, v, y: CorrelatedGaussian(m, v, correlation).log_prob(y), (mean, log_var, x)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_have_the_covariance(shape):
    n = 4_000
    zero, std = torch.zeros(n, *shape, dtype=torch.float64), 1 + normal(*shape, seed=6).square()
    for correlation in forms(shape):
        density = CorrelatedGaussian(zero, 2 * std.log(), correlation)
        u = (density.sample(torch.Generator().manual_seed(0)) / std).flatten(1)
        covariance, oracle = u.T @ u / n, matrix(correlation)
        var = oracle.diagonal()
        error = (covariance - oracle) / (var[:, None] * var).sqrt()
        assert error.abs().max() < 8 / math.sqrt(n)  # a diagonal one has sqrt(2 / n)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (16, 12), (5, 31)])
def test_the_cosine_transform_is_orthonormal_and_scipys(size):
    transform = CosineTransform((2, *size), torch.float64)
    x = normal(3, 2, *size)
    torch.testing.assert_close(transform.rows @ transform.rows.T, torch.eye(size[0]).double())
    torch.testing.assert_close(transform.inverse(transform(x)), x)
    oracle = fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(transform(x), oracle, atol=1e-12)

    assert transform.sizes.sum() == math.prod(size)
    assert (transform.sizes > 0).all()  # bands are numbered without gaps
    assert transform.bands[0, 0] == 0
    assert transform.sizes[0] == 1


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_bands_of_white_residuals_are_one(shape):
    u = normal(2000, *shape)
    bands = BandCorrelation.fit(shape, bands_of(u), torch.tensor(0.0))
    numbers = 2000 * bands.transform.sizes[:, None]
    error = (bands.log_var.exp() - 1) / (2 / numbers).sqrt()
    assert error.abs().max() < 5  # standard errors
    assert bands_of(u).var == pytest.approx(float(u.square().mean()))


def test_planted_bands_and_colours_are_recovered():
    shape = (3, 8, 12)
    transform = CosineTransform(shape, torch.float64)
    axes = torch.linalg.qr(normal(3, 3, seed=1)).Q
    var = torch.linspace(4, 0.1, len(transform.sizes)).double()[:, None] * torch.tensor([3.0, 2, 1])
    truth = BandCorrelation(shape, axes, var.log())

    fitted = BandCorrelation.fit(
        shape, bands_of(truth.colour(normal(3000, *shape))), torch.tensor(0)
    )
    error = matrix(fitted) - matrix(truth)
    assert error.norm() / matrix(truth).norm() < 0.03


@pytest.mark.parametrize(
    "fit",
    [
        lambda statistic: FullCorrelation.fit((8,), statistic, torch.tensor(0.0)),
        lambda statistic: LowRankCorrelation.fit((8,), statistic, torch.tensor(1e-6), 2),
    ],
)
def test_a_planted_covariance_is_recovered_with_an_error_of_one_over_root_n(fit):
    covariance = planted(8)
    errors = []
    for n in (250, 4000, 64_000):
        repeated = [matrix(fit(moments(draws(covariance, n, seed)))) for seed in range(5)]
        errors.append(sum((found - covariance).square().sum() for found in repeated).sqrt())
    for larger, smaller in itertools.pairwise(errors):
        assert 2.5 < larger / smaller < 6.4  # 4, within the error of five repetitions


def test_factors_are_those_of_scikit_learn():
    from sklearn.decomposition import FactorAnalysis

    u = draws(planted(10), 500)
    both_signs = torch.cat([u, -u]).numpy()  # of mean zero
    oracle = FactorAnalysis(2, tol=1e-8, max_iter=5000).fit(both_signs)
    fitted = LowRankCorrelation.fit((10,), moments(u), torch.tensor(1e-9), 2)
    density = CorrelatedGaussian(torch.zeros_like(u), torch.tensor(0.0).double(), fitted)
    assert float(density.log_prob(u).mean()) == pytest.approx(oracle.score(both_signs), abs=1e-3)


@pytest.mark.parametrize(("columns", "expected"), [(600, "full"), (1100, "")])
def test_auto_leaves_out_what_would_take_minutes(columns, expected):
    """Common factors of hundreds of columns, and any form of more than a thousand."""
    model, data = table_of_width(columns)
    fit = fit_correlation(model, data, "auto")
    assert {name.partition(",")[0] for name in fit.gains} == ({expected} - {""})
    assert ("no form of correlation is tried" in fit.message) == (not expected)


def table_of_width(columns):
    """Return an untrained model of a wide table, and the table."""
    data = equipoise.load_data(np.random.default_rng(0).normal(size=(40, columns)))
    return VAE.build((columns,), 2, architecture="mlp", width=2).eval(), data


def test_low_rank_is_its_dense_matrix():
    loadings, uniqueness = normal(6, 2), normal(6, seed=1).square() + 0.1
    correlation = LowRankCorrelation.of((6,), loadings, uniqueness)
    torch.testing.assert_close(matrix(correlation), loadings @ loadings.T + uniqueness.diag())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_shrinkage_keeps_the_total_variance(weight):
    u = draws(planted(6), 50)
    full = FullCorrelation.fit((6,), moments(u), torch.tensor(0.0))
    sample, shrunk = matrix(full), matrix(full.shrunk(weight))
    torch.testing.assert_close(sample, u.T @ u / len(u))
    white = sample.diagonal().mean() * torch.eye(6).double()
    torch.testing.assert_close(shrunk, weight * sample + (1 - weight) * white)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_direction_is_narrower_than_the_floor(shape):
    """Even with two examples, and dimensions that never vary."""
    u = normal(2, *shape)
    u[..., 0] = 0
    floor = 0.01 + normal(*shape, seed=1).square()
    lowest = floor.flatten().diag()
    for fitted in (
        FullCorrelation.fit(shape, moments(u), floor),
        LowRankCorrelation.fit(shape, moments(u), floor, 1),
    ):
        assert torch.linalg.eigvalsh(matrix(fitted) - lowest).min() > -1e-9
    if len(shape) == 3:
        bands = BandCorrelation.fit(shape, bands_of(u), floor)
        assert torch.linalg.eigvalsh(matrix(bands)).min() > float(floor.mean()) - 1e-9


def test_what_has_no_variance_needs_a_floor():
    with pytest.raises(ValueError, match="give more examples, or a floor"):
        FullCorrelation.fit((4,), moments(normal(2, 4)), torch.tensor(0.0))
    with pytest.raises(ValueError, match="give a floor"):
        BandCorrelation.fit((1, 4, 4), bands_of(torch.zeros(2, 1, 4, 4)), torch.tensor(0.0))


@pytest.mark.parametrize("make", [moments, bands_of])
def test_statistics_of_several_processes_are_sums(make):
    u = normal(30, 2, 4, 4)
    whole, parts = make(u), [make(part) for part in u.split([7, 23])]
    parts[0].all_reduce(
        lambda values: values + {1: parts[1].sum, 0: parts[1].count}[values.ndim > 0]
    )
    torch.testing.assert_close(parts[0].covariance, whole.covariance)


def correlated(shape, correlation, marginal=None):
    """A small model with the given correlation."""
    model = VAE.build(shape, 2, architecture="mlp", width=2, noise=marginal)
    model.noise = CorrelatedNoise(model.noise, correlation.float())
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_of_one_dimension_alone_stays_as_it_is(shape):
    model = VAE.build(shape, 2, architecture="mlp", width=2).eval()
    model.predict_variance(torch.tensor(0.1), torch.tensor(0.02))
    marginal, x = model.noise, torch.randn(5, *shape)
    before, interval = model.reconstruct(x), model.interval(x)

    model.noise = CorrelatedNoise(marginal, forms(shape)[0].float())
    after = model.reconstruct(x)
    assert type(before) is Gaussian
    assert type(after) is CorrelatedGaussian
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.std, after.std)
    assert torch.equal(interval.lower, model.interval(x).lower)
    for name in ("shared_log_var", "floor_var", "calibration_scale", "depends_on_code"):
        assert getattr(model.noise, name) == getattr(marginal, name)
    assert model.noise.floor_share(after.log_var) == marginal.floor_share(before.log_var)
    assert model.noise.networks() == marginal.networks()
    assert marginal_of(model.noise) is marginal_of(marginal) is marginal
    with pytest.raises(ValueError, match="correlated already"):
        CorrelatedNoise(model.noise, forms(shape)[0])


class FactorAnalysis(nn.Module):
    """The exact posterior of x = W z + e, e ~ N(0, Sigma), where W^T Sigma^-1 W is diagonal."""

    def __init__(self, weight, sigma):
        super().__init__()
        self.projection = torch.linalg.solve(sigma, weight)
        self.precision = 1 + (weight * self.projection).sum(0)
        self.dtype = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        mean = x @ self.projection / self.precision
        return Gaussian(mean, -self.precision.log().expand_as(mean))


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, z):
        return z @ self.weight.T


def test_a_linear_vae_with_correlated_noise_is_factor_analysis():
    correlation = LowRankCorrelation.of((6,), normal(6, 1), 0.5 + normal(6, seed=1).square())
    noise = CorrelatedNoise(GlobalNoise().double(), correlation)
    noise.marginal.set_var(torch.tensor(0.3))
    sigma = noise.marginal.log_var.exp() * matrix(correlation)

    values, vectors = torch.linalg.eigh(sigma)
    root = vectors * values.sqrt() @ vectors.T
    weight = root @ torch.linalg.qr(normal(6, 2, seed=2)).Q * torch.tensor([2.0, 0.7]).double()
    encoder, decoder = FactorAnalysis(weight, sigma), Linear(weight)
    model = VAE(encoder, decoder, noise, shape=(6,), latent_dim=2).eval()

    x = draws(weight @ weight.T + sigma, 20)
    oracle = stats.multivariate_normal.logpdf(x.numpy(), np.zeros(6), weight @ weight.T + sigma)
    bound = importance_weighted_bound(model, x, 3, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(bound, oracle)  # exact, with the exact posterior

    many = x[:1].expand(20_000, -1)
    elbo = Elbo(model)(many, torch.Generator().manual_seed(0)).elbo.mean()
    assert float(elbo) == pytest.approx(float(oracle[0]), abs=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_models_are_saved_and_loaded_bit_for_bit(shape, tmp_path):
    x, z = torch.randn(3, *shape), torch.randn(3, 2)
    for number, correlation in enumerate(forms(shape)):
        predicted = PredictedNoise(nn.Identity(), torch.tensor(0.1), torch.tensor(0.02))
        for marginal in (None, predicted):
            model = correlated(shape, correlation)
            if marginal is not None:
                model.noise = model.noise.marginal
                model.predict_variance(torch.tensor(0.1), torch.tensor(0.02))
                model.noise = CorrelatedNoise(model.noise, correlation.float())

            file = tmp_path / f"{number}.safetensors"
            save_model(file, model)
            loaded = load_model(file)
            assert torch.equal(loaded.decode(z).log_prob(x), model.decode(z).log_prob(x))
            assert type(loaded.noise.marginal) is type(model.noise.marginal)
            assert loaded.description() == model.description()


def change(description, **arguments):
    description["noise"]["arguments"]["correlation"]["arguments"] |= arguments
    return description


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes_shape": [10**6, 10**6]}, "larger than all that the file holds"),
        ({"axes_shape": [9, 9]}, "are not those"),
        ({"shape": [3], "axes_shape": [3, 3]}, "another shape than its examples"),
        ({"axes_shape": "none"}, "damaged or altered"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(arguments, message):
    model = correlated((4,), forms((4,))[0])
    description = change(model.description(), **arguments)
    with pytest.raises(StoreError, match=message):
        restore_model(description, model.state_dict())


def test_a_noise_model_without_its_parts_is_refused():
    model = correlated((4,), forms((4,))[0])
    for part in ("marginal", "correlation"):
        description = model.description()
        del description["noise"]["arguments"][part]
        with pytest.raises(StoreError, match=part):
            restore_model(description, model.state_dict())

    description = model.description()
    arguments = description["noise"]["arguments"]
    arguments["marginal"] = {"kind": "CorrelatedNoise", "arguments": dict(arguments)}
    with pytest.raises(StoreError, match="correlated already"):
        restore_model(description, model.state_dict())


def test_the_card_of_a_published_run_names_both_parts_of_the_noise(digits, tmp_path):
    run = equipoise.train(digits, replace(CONFIG, noise_correlation="full"), tmp_path / "run")
    description = read_tensors(run.model_file, "model", ModelDescription)[1]
    assert without_paths(description) == description  # it can be published
    card = model_card(run, "someone/digits")
    assert PredictedNoise.summary + ". " + CorrelatedNoise.summary in " ".join(card.split())


def test_descriptions_of_bands_are_checked():
    description = describe_correlation(forms((1, 8, 8))[-1])
    for arguments in ({"shape": [1, 8, 9000]}, {"var_shape": [3, 1]}, {"axes_shape": [2, 2]}):
        changed = {"form": "bands", "arguments": description["arguments"] | arguments}
        with pytest.raises(ValueError, match=r"pixels a side|are not those"):
            build_correlation(changed)
    with pytest.raises(ValueError, match="there is no form"):
        build_correlation({"form": "wavelets", "arguments": {}})


class Nothing(nn.Module):
    """Networks that know nothing of the data, so that the data are the residuals."""

    def __init__(self, shape, value):
        super().__init__()
        self.value = nn.Parameter(torch.full(shape, float(value)))

    def forward(self, inputs):
        return self.value.expand(len(inputs), *self.value.shape)


def ignorant(shape, mean=0.0, var=1.0, scaling=None):
    """A VAE whose residuals are x - mean, and whose std is the root of var."""
    noise = GlobalNoise()
    noise.set_var(torch.tensor(var))
    encoder, decoder = Nothing((2,), -20), Nothing(shape, mean)
    return VAE(encoder, decoder, noise, shape=shape, latent_dim=1, scaling=scaling).eval()


def table_of(u):
    return equipoise.load_data(u.numpy().astype(np.float32), test_fraction=0.01)


def images_of(u):
    """Images of 256 levels around 128, of which u are the residuals in units of 12 levels."""
    raw = (128 + 12 * u).round().clamp(0, 255).to(torch.uint8)
    scaling = Scaling(torch.tensor(0.0), torch.tensor(255.0), quantum=1 / 255)
    model = ignorant(tuple(u.shape[1:]), 128 / 255, (12 / 255) ** 2, scaling)
    return model, equipoise.load_data(raw.numpy(), validation_fraction=0.5, test_fraction=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_white_errors_stay_independent(seed):
    data = table_of(normal(1500, 5, seed=seed))
    model = ignorant((5,))
    fit = fit_correlation(model, data, "auto")
    assert fit.form == "none"
    assert type(model.noise) is GlobalNoise
    assert "independent" in fit.message
    assert set(fit.gains) < set(fit.scores)

    model, data = images_of(normal(600, 1, 8, 8, seed=seed))
    assert fit_correlation(model, data, "auto").form == "none"


def test_planted_correlation_is_found_and_gains_what_it_must():
    covariance = planted(5)
    covariance *= 5 / covariance.trace()
    data, model = table_of(draws(covariance, 8000)), ignorant((5,))
    fit = fit_correlation(model, data, "auto")
    assert fit.form in ("full", "low-rank")
    assert fit.n_training == 0
    found = matrix(fit.correlation.double())
    assert (found - covariance).norm() / covariance.norm() < 0.15

    # E log N(u; 0, C) - E log N(u; 0, I), where the trace of C is D.
    gain = fit.gains[fit.setting]
    assert gain.value == pytest.approx(
        -0.5 * float(torch.logdet(covariance)), abs=4 * gain.standard_error
    )
    assert isinstance(model.noise, CorrelatedNoise)


def test_bands_are_found_in_images():
    truth = forms((3, 16, 12))[-1]
    u = truth.colour(normal(400, 3, 16, 12, seed=3))
    u /= u.std()
    model, data = images_of(u)
    fit = fit_correlation(model, data, "auto")
    assert fit.form == "bands"
    assert fit.gains["bands"].value > 10 * fit.gains["bands"].standard_error
    # Whitened, the residuals of new data are white.
    x = model.scaling(torch.from_numpy(data.train[:]))
    z = torch.zeros(len(x), 1)
    white = fit.correlation.whiten((x - model.decode_mean(z)) / model.decode(z).std)
    bands = BandCorrelation.fit((3, 16, 12), bands_of(white), torch.tensor(0.0))
    assert bands.log_var.exp().sub(1).abs().max() < 0.25


def test_few_rows_are_helped_by_the_training_set():
    covariance = planted(12)
    u = draws(covariance, 1000)
    data = equipoise.load_data(u.numpy().astype(np.float32), validation_fraction=0.03)
    model = ignorant((12,), var=float(covariance.diagonal().mean()))
    fit = fit_correlation(model, data, "full")
    assert 0 < fit.n_held_out < 60
    assert fit.n_training > 200
    found = matrix(fit.correlation.double()) * model.noise.marginal.log_var.exp()
    assert (found - covariance).norm() / covariance.norm() < 0.5


def test_one_odd_row_cannot_decide_for_a_form():
    u = normal(400, 4)
    data = table_of(u)
    data = replace(data, validation=data.train.take(slice(40)))
    rows = data.validation[:].copy()
    rows[7] = 60
    odd = equipoise.load_data(rows, validation_fraction=0.5)
    fit = fit_correlation(ignorant((4,)), replace(odd, validation=odd.train), "auto")
    assert fit.form == "none"


def test_two_rows_cannot_decide_for_a_form():
    """Two rows often gain alike by chance, and then their standard error is small."""
    chosen = 0
    for seed in range(60):
        data = table_of(normal(60, 4, seed=seed))
        train, two = data.train.take(slice(20)), data.train.take(slice(20, 22))
        few = replace(data, train=train, validation=two)
        chosen += fit_correlation(ignorant((4,)), few, "auto").form != "none"
    assert chosen <= 1  # by two standard errors, 5


def test_the_message_says_in_which_direction_the_likelihood_goes():
    fit = fit_correlation(ignorant((4,)), table_of(normal(60, 4)), "full")
    gain = Estimate(-1.5, 0.2, 12)
    worse = fit._replace(
        scores={"white": Estimate(-4, 0.2, 12), fit.setting: Estimate(-5.5, 0.2, 12)},
        gains={fit.setting: gain},
    )
    assert "falls from -4.0 to -5.5 nats" in worse.message
    assert "take the form auto or none" in worse.message
    better = fit._replace(
        scores={"white": Estimate(-4, 0.2, 12), fit.setting: Estimate(-3, 0.2, 12)},
        gains={fit.setting: Estimate(1, 0.2, 12)},
    )
    assert "rises from -4.0 to -3.0 nats" in better.message
    assert "none" not in better.message


def test_a_form_that_is_asked_for_is_taken_and_judged():
    data = table_of(normal(1000, 4))
    for form in ("full", "low-rank"):
        model = ignorant((4,))
        fit = fit_correlation(model, data, form)
        assert fit.form == model.noise.correlation.form == form
        assert fit.gains[fit.setting].value < 1
        again = fit_correlation(model, data, "none")
        assert again.message == "Errors are independent of each other, as asked."
        assert type(model.noise) is GlobalNoise


def test_forms_that_do_not_suit_the_examples_are_refused(digits, table):
    assert problem_of_form("bands", (4,)).endswith("for tables use full or low-rank")
    assert "for images use bands" in problem_of_form("full", (3, 64, 64))
    assert "must be one of" in problem_of_form("wavelets", (4,))
    assert problem_of_form("auto", (3, 64, 64)) is problem_of_form("bands", (3, 64, 64)) is None
    with pytest.raises(ConfigError, match="needs images"):
        check_fit(equipoise.load_data(table), equipoise.TrainConfig(noise_correlation="bands"))
    with pytest.raises(ConfigError, match="needs images"):
        fit_correlation(ignorant((6,)), equipoise.load_data(table), "bands")
    own = CorrelatedNoise(GlobalNoise(), forms((1, 8, 8))[0].float())
    with pytest.raises(ConfigError, match="give the noise model that it is of"):
        check_own_noise(own, digits, equipoise.TrainConfig())


def test_processes_do_not_matter():
    covariance = planted(5)
    data, model = table_of(draws(covariance, 900)), ignorant((5,), var=2.0)
    alone = fit_correlation(model, data, "auto")

    def fit(part, processes):
        return fit_correlation(ignorant((5,), var=2.0), data, "auto", processes=processes)

    for shared in in_processes(fit, [None] * 3):
        assert shared.setting == alone.setting
        assert shared.n_held_out == alone.n_held_out
        for name, score in alone.scores.items():
            assert shared.scores[name].value == pytest.approx(score.value, rel=1e-9)
        found, oracle = (matrix(fit.correlation.double()) for fit in (shared, alone))
        torch.testing.assert_close(found, oracle, rtol=1e-5, atol=1e-5)


CONFIG = equipoise.TrainConfig(
    latent_dim=2, width=2, stage_1_epochs=2, stage_2_epochs=1, batch_size=128, n_components=2
)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    return equipoise.train(digits, CONFIG, tmp_path_factory.mktemp("runs") / "run")


def test_a_trained_run_gets_a_correlation_afterwards(run, digits):
    brief = {"sections": ["likelihood"], "brief": True}
    before = equipoise.evaluate(run, digits, **brief)["likelihood"]
    model, mixture, codes = run.model(), run.mixture(), read_codes_digest(run.model_file)

    fit = fit_noise(run, digits)
    assert fit.form == "full"
    correlated = run.model()
    assert correlated.noise.correlation.form == "full"
    x = model.scaling(torch.from_numpy(digits.test[:]))
    assert torch.equal(correlated.reconstruct(x).mean, model.reconstruct(x).mean)
    assert torch.equal(correlated.reconstruct(x).std, model.reconstruct(x).std)

    # The codes are the same, so the mixture stays; the evaluation is of another model.
    assert read_digest(run.model_file) != codes == read_codes_digest(run.model_file)
    assert torch.equal(run.mixture().means, mixture.means)
    with pytest.raises(StoreError, match="of another model"):
        run.evaluation()
    after = equipoise.evaluate(run, digits, **brief)["likelihood"]
    assert after["elbo"]["value"] > before["elbo"]["value"] + 10
    assert after["kl"]["value"] == pytest.approx(before["kl"]["value"])
    run.evaluation()

    # Held-out gain and the gain on the test set are the same, within their errors.
    gain = fit.scores[fit.setting].value - fit.scores["white"].value
    assert after["elbo"]["value"] - before["elbo"]["value"] == pytest.approx(gain, rel=0.5)

    assert fit_noise(run.folder, digits, "none").form == "none"
    assert torch.equal(run.model().reconstruct(x).std, model.reconstruct(x).std)
    assert not isinstance(run.model().noise, CorrelatedNoise)
    digest = read_digest(run.model_file)
    fit_noise(run, digits, "none")
    assert read_digest(run.model_file) == digest


def test_it_is_estimated_at_the_end_of_a_training(digits, tmp_path):
    config = replace(CONFIG, noise_correlation="auto")
    run = equipoise.train(digits, config, tmp_path / "run")
    description = read_tensors(run.model_file, "model", ModelDescription)[1]
    assert description["correlation_fit"]["form"] == run.model().noise.correlation.form == "full"
    assert "rises from" in description["correlation_fit"]["message"]
    run.mixture()


def test_training_leaves_it_out(digits):
    class Messages(list):
        def start(self, *_): ...
        def step(self, *_): ...
        def epoch(self, row): ...
        def close(self): ...

        message = list.append

    shape, messages = (1, 8, 8), Messages()
    model = VAE.build(shape, 2, architecture="mlp", width=2)
    model.noise = CorrelatedNoise(model.noise, forms(shape)[0].float())
    config = replace(CONFIG, stage_1_epochs=1, stage_2_epochs=0)
    Trainer(model, digits, config, sinks=[messages]).fit()
    assert type(model.noise) is GlobalNoise
    assert any("leaves out the model's correlation" in text for text in messages)


@pytest.mark.parametrize("form", ["full", "low-rank", "auto", "none"])
def test_the_estimator_has_it(form, table, tmp_path):
    estimator = equipoise.VAEEstimator(
        stage_1_epochs=20, stage_2_epochs=0, noise_correlation=form, random_state=0
    ).fit(table)
    has_it = isinstance(estimator.model_.noise, CorrelatedNoise)
    assert has_it or form in ("auto", "none")
    chosen = estimator.model_.noise.correlation.form if has_it else "none"
    assert estimator.noise_correlation_ == chosen

    scores = estimator.score_samples(table[:20], importance_samples=2)
    assert np.isfinite(scores).all()
    assert estimator.sample(3, noise=True).shape == (3, 6)
    estimator.save(tmp_path / "estimator.safetensors")
    loaded = equipoise.VAEEstimator.load(tmp_path / "estimator.safetensors")
    np.testing.assert_array_equal(loaded.score_samples(table[:20], 2), scores)
    assert loaded.noise_correlation_ == chosen

    estimator.partial_fit(table)
    assert isinstance(estimator.model_.noise, CorrelatedNoise) or form in ("auto", "none")


def test_noisy_samples_hang_together(tmp_path):
    """The errors of neighbours in one draw are those of C, and written by 'sample --noise'."""
    shape, n = (1, 8, 8), 400
    transform = CosineTransform(shape)
    log_var = torch.linspace(2, -4, len(transform.sizes))[:, None]
    smooth = BandCorrelation(shape, torch.eye(1), log_var)
    model = ignorant(shape, var=0.01)
    model.noise = CorrelatedNoise(model.noise, smooth)
    write_samples(
        model, torch.zeros(n, 1), "a", tmp_path, torch.Generator().manual_seed(0), noise=True
    )
    drawn = np.load(tmp_path / "a.npy").reshape(n, 64)
    found = torch.from_numpy(drawn.T @ drawn / n).double() / 0.01
    oracle = matrix(smooth.double())
    assert (found - oracle).norm() / oracle.norm() < 0.3  # of independent noise, 0.8


def test_outlier_scores_are_mahalanobis_distances():
    correlation = forms((4,))[0].float()
    model = ignorant((4,), var=0.5)
    model.noise = CorrelatedNoise(model.noise, correlation)
    mixture = equipoise.GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.eye(1)[None])
    x = normal(6, 4).float()
    scores = model_scores(model, mixture, [x], torch.Generator().manual_seed(0))
    oracle = (x @ torch.linalg.inv(0.5 * matrix(correlation.double())).float() * x).sum(1) / 4
    np.testing.assert_allclose(scores.standardised_residual, oracle, rtol=1e-4)


def test_an_exported_decoder_has_the_std_without_the_matrix(tmp_path):
    shape = (1, 8, 8)
    model = VAE.build(shape, 2, architecture="mlp", width=2).eval()
    mixture = equipoise.GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    export(model, mixture, "torch", tmp_path / "white")
    model.noise = CorrelatedNoise(model.noise, forms(shape)[0].float())
    export(model, mixture, "torch", tmp_path / "correlated")
    sizes = [(tmp_path / name / "decoder.pt2").stat().st_size for name in ("white", "correlated")]
    assert sizes[1] < sizes[0] + 4 * 64 * 64


def test_the_command_fits_it(run, capsys):
    main(["fit-noise", str(run.folder), "--form", "bands", "--quiet"])
    assert "Correlated noise (bands)" in capsys.readouterr().out
    assert run.model().noise.correlation.form == "bands"

    main(["export", str(run.folder), "--to", "torch"])
    assert "not its correlation" in capsys.readouterr().out


def test_resuming_a_finished_run_says_that_its_correlation_is_replaced(run, digits):
    """The end of a training is done anew, by the options of the run, which has none."""
    said = []

    class Ear:
        def start(self, *_): ...
        def step(self, *_): ...
        def epoch(self, row): ...
        def close(self): ...
        def message(self, text):
            said.append(text)

    fit_noise(run, digits, "full")
    equipoise.train(digits, CONFIG, run.folder, resume=True, sinks=[Ear()])
    assert any("the run had (full) is replaced" in text for text in said)
    assert not isinstance(run.model().noise, CorrelatedNoise)

    said.clear()
    equipoise.train(digits, CONFIG, run.folder, resume=True, sinks=[Ear()])
    assert not any("replaced" in text for text in said)
