"""Power transforms of skewed columns, against scipy and planted densities."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

import equipoise
from equipoise import VAEEstimator
from equipoise.imputer import VAEImputer
from equipoise.metrics.likelihood import iwae, likelihood
from equipoise.model import PowerScaling
from equipoise.powers import (
    choose_powers,
    yeo_johnson,
    yeo_johnson_inverse,
    yeo_johnson_log_slope,
)

LAMBDAS = [0.0, 0.3, 1.0, 1.55, 2.0]


@pytest.mark.parametrize("power", LAMBDAS)
def test_the_transform_is_scipys_and_comes_back(power):
    x = torch.cat([torch.linspace(-30, 30, 301), torch.tensor([1e6, -1e6])]).double()[:, None]
    powers = torch.tensor([power], dtype=torch.float64)
    t = yeo_johnson(x, powers)
    expected = scipy.stats.yeojohnson(x[:, 0].numpy(), power)
    np.testing.assert_allclose(t[:, 0].numpy(), expected, rtol=1e-9)
    torch.testing.assert_close(yeo_johnson_inverse(t, powers), x, rtol=1e-7, atol=1e-9)
    if power == 1:
        torch.testing.assert_close(t, x)


@pytest.mark.parametrize("power", LAMBDAS)
def test_the_slope_is_the_derivative(power):
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)[:, None].requires_grad_()
    powers = torch.tensor([power], dtype=torch.float64)
    (slope,) = torch.autograd.grad(yeo_johnson(x, powers).sum(), x)
    torch.testing.assert_close(yeo_johnson_log_slope(x, powers).exp(), slope)
    assert torch.autograd.gradcheck(lambda v: yeo_johnson(v, powers), x)
    assert torch.autograd.gradcheck(lambda v: yeo_johnson_inverse(v, powers), x)


def test_only_skewed_columns_are_changed_and_by_evidence():
    rng = np.random.default_rng(0)
    skewed = [rng.lognormal(size=400), -rng.gamma(1.0, size=400), rng.exponential(size=400) + 5e6]
    plain = [rng.normal(size=400), rng.uniform(size=400), np.ones(400), np.empty(0)]
    few = [rng.lognormal(size=20)]
    powers = choose_powers(skewed + plain + few)
    assert (powers[[0, 2]] < 0.5).all()
    assert powers[1] > 1.5
    assert (powers[3:] == 1).all()


def skewed_table(n=600):
    """Rows that are normal after a power transform: two columns that hang together, one alone."""
    rng = np.random.default_rng(1)
    normal = rng.multivariate_normal([0, 0, 0], [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 1]], size=n)
    return np.c_[np.exp(normal[:, :2]), 100 + normal[:, 2]]


def fitted(**options):
    options = {"stage_1_epochs": 80, "stage_2_epochs": 0, "random_state": 0} | options
    return VAEEstimator(latent_dim=2, learning_rate=5e-3, **options)


@pytest.fixture(scope="module")
def both():
    table = skewed_table()
    return tuple(fitted(power_transform=on).fit(table[:500]) for on in (False, True))


def test_densities_have_the_slope_and_are_higher(both):
    plain, transformed = both
    assert isinstance(transformed.model_.scaling, PowerScaling)
    powers = transformed.model_.scaling.powers
    assert (powers[:2] < 0.5).all()
    assert powers[2] == 1
    held_out = skewed_table(3000)[2000:]
    assert transformed.score_samples(held_out).mean() > plain.score_samples(held_out).mean() + 0.5

    # A density integrates to one: over a grid in one column, relative to the other two.
    grid = np.linspace(0.001, 60, 4000)
    rows = np.tile([1.0, 1.0, 100.0], (len(grid), 1))
    rows[:, 0] = grid
    slice_of = np.exp(transformed.score_samples(rows))
    partner = transformed.score_samples(np.array([[np.nan, 1.0, 100.0]]))
    mass = np.trapezoid(slice_of, grid) / math.exp(partner[0])
    assert mass == pytest.approx(1.0, abs=0.25)


def test_evaluations_with_and_without_are_in_one_unit(both):
    rows = skewed_table(2500)[2000:]
    rows[::5, 0] = np.nan
    raw = torch.from_numpy(rows).float()
    bounds, elbos = [], []
    for estimator in both:
        model = estimator.model_
        log_scale = np.where(np.isnan(rows), 0, model.scaling.scale.log().numpy()).sum(1).mean()
        expected = estimator.score_samples(rows, importance_samples=20).mean() + log_scale
        prior = [estimator.mixture_.log_prob]
        generator = torch.Generator().manual_seed(0)
        bounds.append(float(iwae(model, [raw], 20, prior, generator).mean()))
        assert bounds[-1] == pytest.approx(expected, abs=0.05)
        elbos.append(likelihood(model, [raw], generator).elbo.value)

    assert bounds[1] > bounds[0] + 0.3
    assert elbos[1] > elbos[0] + 0.2


def test_units_do_not_matter(both):
    table = skewed_table()
    moved = fitted(power_transform=True).fit(table[:500] * 1000 - 7)
    torch.testing.assert_close(
        moved.model_.scaling.powers, both[1].model_.scaling.powers, rtol=0, atol=0.06
    )


def test_reconstructions_and_their_std_are_in_raw_units(both):
    _, transformed = both
    rows = skewed_table()[500:]
    mean, std = transformed.reconstruct(rows)
    assert (mean[:, :2] > -0.2).all()
    # Where a lognormal value is large, so is its uncertainty.
    large = mean[:, 0] > np.quantile(mean[:, 0], 0.9)
    assert std[large, 0].mean() > 2 * std[~large, 0].mean()
    within = np.abs(rows[:, 0] - mean[:, 0]) < 2 * std[:, 0]
    assert within.mean() > 0.85


def test_it_is_saved_and_loaded(both, tmp_path):
    _, transformed = both
    transformed.save(tmp_path / "model.zip")
    again = VAEEstimator.load(tmp_path / "model.zip")
    rows = skewed_table()[:20]
    np.testing.assert_array_equal(again.score_samples(rows), transformed.score_samples(rows))


def test_gaps_are_filled_with_expectations_not_medians():
    table = skewed_table(800)
    gaps = table.copy()
    gaps[::2, 2] = np.nan
    gaps[1::2, 0] = np.nan
    imputer = VAEImputer(fitted(power_transform=True), random_state=0).fit(gaps)
    filled, std = imputer.transform(gaps, return_std=True)
    # E[exp(u)] with u | v normal of mean .8 v and variance .36
    expected = np.exp(0.8 * np.log(table[1::2, 1]) + 0.18)
    error = filled[1::2, 0] - expected
    assert abs(error.mean()) < 0.15
    assert np.corrcoef(filled[1::2, 0], expected)[0, 1] > 0.9
    assert (std[1::2, 0] > 0).all()


def test_the_command_takes_it_and_images_do_not(tmp_path):
    data = equipoise.load_data(skewed_table(200))
    config = equipoise.TrainConfig(
        power_transform=True, latent_dim=2, width=4, stage_1_epochs=2, stage_2_epochs=1
    )
    run = equipoise.train(data, config, tmp_path / "run")
    assert isinstance(run.model().scaling, PowerScaling)
    digits = equipoise.load_data("digits")
    model = equipoise.training.setup.make_model(digits, config)
    assert not isinstance(model.scaling, PowerScaling)


def test_epochs_show_the_bound_of_the_raw_data_as_evaluations_do(tmp_path):
    data = equipoise.load_data(skewed_table(400) * [1e3, 1, 1])
    config = equipoise.TrainConfig(
        power_transform=True,
        latent_dim=2,
        width=4,
        stage_1_epochs=3,
        stage_2_epochs=0,
        noise_correlation="none",
    )
    run = equipoise.train(data, config, tmp_path / "run")
    row = run.history()[-1]
    slope = run.model().scaling.log_transform_slope(torch.from_numpy(data.test[:])).mean()
    elbo = equipoise.evaluate(run, data, sections=["likelihood"])["likelihood"]["elbo"]

    assert abs(slope) > 0.5
    assert row["test_elbo"] == pytest.approx(elbo["value"], abs=3 * elbo["standard_error"])
    for split in ("train", "validation", "test"):
        difference = row[f"{split}_log_likelihood"] - row[f"{split}_kl"]
        assert row[f"{split}_elbo"] == pytest.approx(difference, abs=1e-4)
