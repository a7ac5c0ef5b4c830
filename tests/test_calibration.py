import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from equipoise.config import TrainConfig
from equipoise.data import load
from equipoise.data import varying as varying_module
from equipoise.digital import DigitalGaussian, Levels
from equipoise.estimate import Estimate
from equipoise.metrics import calibration as module
from equipoise.metrics.calibration import (
    NOMINAL_COVERAGE,
    PIT_BINS,
    RELIABILITY_BINS,
    REMOVED,
    calibration,
    noise_calibration,
    varying_dimensions,
)
from equipoise.noise import FixedNoise
from equipoise.training.setup import make_model
from equipoise.training.trainer import Trainer
from tests.oracles import Ppca, linear_gaussian_data, ppca_vae


def heteroscedastic(n=400, dimensions=50, seed=0):
    """Residuals that are as their std say."""
    rng = np.random.default_rng(seed)
    std = np.exp(rng.normal(-2, 0.7, (n, dimensions)))
    return torch.from_numpy(std * rng.normal(size=std.shape)), torch.from_numpy(std)


def coverage(found):
    return found.coverage_1, found.coverage_2, found.coverage_3


def figures(found):
    return {
        name: figure for name, figure in found._asdict().items() if isinstance(figure, Estimate)
    }


def values(found):
    return [figure.value for figure in figures(found).values()]


def sorted_curve(ranks, squared):
    """Sparsification with a sort, one value at a time."""
    ascending = squared.ravel()[np.argsort(ranks.ravel())]
    kept = [ascending[: round((1 - share) * len(ascending))] for share in REMOVED]
    return np.array([math.sqrt(part.mean() / ascending.mean()) for part in kept])


def test_coverage_includes_its_bounds():
    found = calibration(
        torch.tensor([[0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]]), torch.full((1, 7), 0.5)
    )
    assert [share.value for share in coverage(found)] == pytest.approx([2 / 7, 4 / 7, 6 / 7])


def test_intervals_are_covered_as_their_widths_say():
    residual = torch.tensor([[0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]])
    found = calibration(residual, torch.full((1, 7), 0.5), interval_factors=(0.5, 2.5, 3.5))
    covered = (found.interval_coverage_1, found.interval_coverage_2, found.interval_coverage_3)
    assert [share.value for share in covered] == pytest.approx([1 / 7, 5 / 7, 1])


def test_std_that_are_right():
    residual, std = heteroscedastic()
    found = calibration(residual, std)
    for share, nominal in zip(coverage(found), (0.6827, 0.9545, 0.9973), strict=True):
        assert share.value == pytest.approx(nominal, abs=4 * share.standard_error)
        # 20,000 independent values, in 400 examples.
        assert share.standard_error == pytest.approx(
            math.sqrt(nominal * (1 - nominal) / 20_000), rel=0.2
        )
    assert found.standardised_var.value == pytest.approx(
        1.0, abs=4 * found.standardised_var.standard_error
    )
    assert found.normalised_calibration_error.value < 0.03
    assert found.pit_histogram_error.value < 0.05
    np.testing.assert_allclose(
        found.reliability.observed_rmse, found.reliability.predicted_std, rtol=0.12
    )
    assert {figure.n for figure in figures(found).values()} == {400}


@pytest.mark.parametrize(("factor", "var", "error"), [(2.0, 0.25, 0.5), (0.5, 4.0, 1.0)])
def test_std_that_are_wrong_by_a_factor(factor, var, error):
    residual, std = heteroscedastic()
    right, wrong = calibration(residual, std), calibration(residual, factor * std)
    assert wrong.standardised_var.value == pytest.approx(var, rel=0.04)
    assert wrong.normalised_calibration_error.value == pytest.approx(error, rel=0.04)
    assert wrong.pit_histogram_error.value > 10 * right.pit_histogram_error.value
    # What lies within 1 std of twice the width lies within 2 of the right one.
    wider, narrower = (wrong, right) if factor > 1 else (right, wrong)
    assert wider.coverage_1 == narrower.coverage_2
    # The order is the same, and with it the sparsification.
    assert wrong.sparsification_error_area == pytest.approx(right.sparsification_error_area)


def test_a_constant_std_is_one_bin_and_a_random_order():
    """The curve of the oracle keeps the smallest part of a folded normal: its variance is known."""
    residual = torch.from_numpy(np.random.default_rng(1).normal(size=(400, 500)))
    found = calibration(residual, torch.full_like(residual, 1.25))
    rmse = float(residual.square().mean().sqrt())
    np.testing.assert_allclose(found.reliability.predicted_std, 1.25)
    np.testing.assert_allclose(found.reliability.observed_rmse, rmse)
    assert found.normalised_calibration_error.value == pytest.approx((1.25 - rmse) / 1.25)
    np.testing.assert_allclose(found.sparsification.model, 1.0)
    kept = 1 - REMOVED
    quantile = norm.ppf((1 + kept[1:]) / 2)
    oracle = np.sqrt(1 - 2 * quantile * norm.pdf(quantile) / kept[1:])
    np.testing.assert_allclose(found.sparsification.oracle, [1.0, *oracle], atol=0.005)
    area = float(np.trapezoid(1 - np.array([1.0, *oracle]), REMOVED))
    assert found.sparsification_error_area.value == pytest.approx(area, abs=0.002)
    assert found.sparsification_error_area == pytest.approx(found.random_sparsification_error_area)


def test_histograms_in_place_of_a_sort_change_little():
    """Heavy tails, and std that have little to do with them."""
    rng = np.random.default_rng(0)
    residual = rng.laplace(size=(300, 40))
    std = np.exp(rng.normal(0, 0.5, residual.shape)) * np.abs(residual) ** 0.2
    found = calibration(torch.from_numpy(residual), torch.from_numpy(std))
    order = np.argsort(std.ravel()).reshape(RELIABILITY_BINS, -1)
    predicted = np.sqrt(np.square(std.ravel()[order]).mean(1))
    observed = np.sqrt(np.square(residual.ravel()[order]).mean(1))
    np.testing.assert_allclose(found.reliability.predicted_std, predicted, rtol=1e-3)
    np.testing.assert_allclose(found.reliability.observed_rmse, observed, rtol=0.03)
    ence = float(np.mean(np.abs(predicted - observed) / predicted))
    assert found.normalised_calibration_error.value == pytest.approx(ence, rel=0.01)
    model, oracle = (sorted_curve(ranks, np.square(residual)) for ranks in (std, np.abs(residual)))
    np.testing.assert_allclose(found.sparsification.model, model, atol=5e-3)
    np.testing.assert_allclose(found.sparsification.oracle, oracle, atol=2e-3)
    area = float(np.trapezoid(model - oracle, REMOVED))
    assert found.sparsification_error_area.value == pytest.approx(area, abs=1e-3)


def test_the_pit_histogram_is_that_of_scipy():
    rng = np.random.default_rng(0)
    residual, std = 0.5 + rng.normal(size=(100, 30)), np.exp(rng.normal(size=(100, 30)))
    residual[0, :2] = -60.0, 60.0  # at either end a PIT of exactly 0 or 1
    counts, _ = np.histogram(norm.cdf(residual / std), PIT_BINS, (0, 1))
    found = calibration(torch.from_numpy(residual), torch.from_numpy(std))
    np.testing.assert_allclose(found.pit_histogram, counts / 3000)
    assert found.pit_histogram_error.value == pytest.approx(np.abs(counts / 3000 - 0.05).sum())


def test_the_order_of_the_errors_is_the_best_and_its_reverse_is_worse_than_none():
    residual, _ = heteroscedastic()
    best, worst = calibration(residual, residual.abs()), calibration(residual, 1 / residual.abs())
    assert best.sparsification_error_area.value == pytest.approx(0, abs=1e-12)
    assert best.normalised_calibration_error.value == pytest.approx(0, abs=1e-12)
    assert (
        worst.sparsification_error_area.value > 1.5 * worst.random_sparsification_error_area.value
    )


def test_ties_take_their_share_of_the_bins():
    """A quarter of the values has std 1, the rest has std 2: these are five and fifteen bins."""
    residual = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 10)))
    std = torch.full_like(residual, 2.0)
    std.view(-1)[torch.randperm(400)[:100]] = 1.0
    found = calibration(residual, std)
    np.testing.assert_allclose(found.reliability.predicted_std, [1.0] * 5 + [2.0] * 15)
    rmse = [float(residual[std == level].square().mean().sqrt()) for level in (1.0, 2.0)]
    np.testing.assert_allclose(found.reliability.observed_rmse, [rmse[0]] * 5 + [rmse[1]] * 15)


def test_dimensions_of_one_example_are_not_independent():
    """Sixteen copies of each dimension are no more evidence than one."""
    residual, std = heteroscedastic(60, 6)
    once = calibration(residual, std)
    often = calibration(residual.repeat(1, 16), std.repeat(1, 16))
    for single, copied in zip(figures(once).values(), figures(often).values(), strict=True):
        assert copied == pytest.approx(single)


def test_standard_errors_are_those_of_repetitions():
    """Of std that are wrong: where an error is near zero, its absolute value has a kink."""
    draws = [heteroscedastic(60, 8, seed) for seed in range(60)]
    found = [calibration(residual, 0.5 * std) for residual, std in draws]
    for name in figures(found[0]):
        estimates = [figures(one)[name] for one in found]
        spread = np.std([estimate.value for estimate in estimates])
        typical = np.mean([estimate.standard_error for estimate in estimates])
        assert spread / 1.4 < typical < 1.4 * spread, name


@settings(max_examples=10)
@given(st.integers(0, 1000), st.integers(-20, 20), st.integers(1, 20))
def test_units_and_order_do_not_matter(seed, octaves, n):
    residual, std = heteroscedastic(n, 12, seed)
    expected = values(calibration(residual, std))
    unit = 2.0**octaves  # any other unit moves values across the edges of cells
    assert values(calibration(unit * residual, unit * std)) == pytest.approx(expected)
    rows, columns = torch.randperm(n), torch.randperm(12)
    assert values(calibration(residual[rows][:, columns], std[rows][:, columns])) == pytest.approx(
        expected
    )
    assert values(calibration(-residual.view(n, 3, 4), std.view(n, 3, 4))) == pytest.approx(
        expected
    )


def test_blocks_do_not_matter(monkeypatch):
    residual, std = heteroscedastic(57, 8)
    whole = figures(calibration(residual, std))
    monkeypatch.setattr(module, "BLOCK", 30)
    for name, figure in figures(calibration(residual, std)).items():
        assert figure == pytest.approx(whole[name]), name


def test_one_example_has_figures_without_standard_errors():
    residual, std = heteroscedastic(1)
    for name, figure in figures(calibration(residual, std)).items():
        assert figure.standard_error is None, name
        assert figure.n == 1, name
        assert math.isfinite(figure.value), name


def test_no_error_at_all_is_covered_and_needs_no_order():
    found = calibration(torch.zeros(20, 5), torch.ones(20, 5))
    assert [share.value for share in coverage(found)] == [1.0, 1.0, 1.0]
    assert found.standardised_var.value == 0.0
    assert found.normalised_calibration_error.value == 1.0
    assert found.pit_histogram_error.value == pytest.approx(1.9)
    assert (
        found.sparsification_error_area.value == found.random_sparsification_error_area.value == 0.0
    )


@pytest.mark.parametrize(
    ("residual", "std", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 2), "positive, finite std"),
        (torch.zeros(3, 2), torch.full((3, 2), -1.0), "positive, finite std"),
        (torch.zeros(3, 2), torch.full((3, 2), math.inf), "positive, finite std"),
        (torch.full((3, 2), math.nan), torch.ones(3, 2), "finite residuals"),
        (torch.zeros(3, 2), torch.ones(3, 1), "same shape"),
        (torch.zeros(0, 2), torch.ones(0, 2), "same shape"),
        (torch.zeros(3), torch.ones(3), "same shape"),
    ],
)
def test_what_cannot_be_judged_is_refused(residual, std, message):
    with pytest.raises(ValueError, match=message):
        calibration(residual, std)


def test_the_nominal_coverage_is_the_gaussians():
    assert pytest.approx([norm.cdf(k) - norm.cdf(-k) for k in (1, 2, 3)]) == NOMINAL_COVERAGE


@pytest.fixture
def linear_model():
    x = linear_gaussian_data(n=600)
    ppca = Ppca.fit(x, 3)
    model = ppca_vae(ppca, FixedNoise(float(ppca.var))).eval()
    model.scaling.double()
    return model, x, ppca


def test_a_linear_model_has_known_residuals(linear_model, monkeypatch):
    """The residual of the posterior mean is var C^-1 (x - b).

    On the data of the fit its covariance is var^2 C^-1.
    """
    model, x, ppca = linear_model
    found = noise_calibration(model, torch.split(x, 250), torch.ones(8, dtype=torch.bool))
    covariance = ppca.weight @ ppca.weight.T + ppca.var * torch.eye(8, dtype=torch.float64)
    expected = float(ppca.var * torch.trace(torch.linalg.inv(covariance)) / 8)
    assert found.all_dimensions.standardised_var.value == pytest.approx(expected, rel=1e-5)
    assert found.all_dimensions.standardised_var.n == 600
    for name, figure in figures(found.all_dimensions).items():
        assert figure == figures(found.varying_dimensions)[name]
    monkeypatch.setattr(model.noise, "interval_factor", lambda n_std: n_std - 1)
    found = noise_calibration(model, [x], torch.ones(8, dtype=torch.bool)).varying_dimensions
    assert found.interval_coverage_1.value == 0
    assert (found.interval_coverage_2, found.interval_coverage_3) == (
        found.coverage_1,
        found.coverage_2,
    )


def test_batches_do_not_matter(linear_model):
    model, x, _ = linear_model
    varying = torch.ones(8, dtype=torch.bool)
    one, many = (
        figures(noise_calibration(model, torch.split(x, size), varying)[0]) for size in (600, 7)
    )
    for name, figure in one.items():
        assert many[name] == pytest.approx(figure), name


def test_only_dimensions_that_vary_are_judged(linear_model):
    model, x, _ = linear_model
    varying = torch.arange(8) % 3 == 0
    found = noise_calibration(model, [x], varying).varying_dimensions
    seen = model.reconstruct(x)
    expected = calibration((x - seen.mean)[:, varying], seen.std[:, varying])
    assert figures(found) == figures(expected)
    assert (
        noise_calibration(model, [x], torch.zeros(8, dtype=torch.bool)).varying_dimensions is None
    )
    with pytest.raises(ValueError, match="shape of one example"):
        noise_calibration(model, [x], varying[:7])
    with pytest.raises(ValueError, match="no examples"):
        noise_calibration(model, [], varying)


def test_only_values_among_those_asked_for_are_judged():
    """Values that differ in number between examples; what is left out does not matter."""
    residual, std = heteroscedastic(40, 12)
    among = torch.rand(residual.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    among[:15] = False  # examples, and with them groups, without a value
    found = calibration(residual, std, among=among)
    z = (residual / std)[among]
    assert found.coverage_1.value == pytest.approx(float((z.abs() <= 1).double().mean()))
    assert found.standardised_var.value == pytest.approx(float(z.square().mean()))
    assert found.pit_histogram.sum() == pytest.approx(1)

    other = torch.where(among, residual, 99.0), torch.where(among, std, 0.01)
    assert figures(calibration(*other, among=among)) == figures(found)
    columns = torch.zeros_like(among)
    columns[:, 3:9] = True
    chosen = figures(calibration(residual, std, among=columns))
    for name, figure in figures(calibration(residual[:, 3:9], std[:, 3:9])).items():
        assert chosen[name] == pytest.approx(figure), name

    with pytest.raises(ValueError, match="no values to judge"):
        calibration(residual, std, among=torch.zeros_like(among))
    with pytest.raises(ValueError, match="same shape"):
        calibration(residual, std, among=among[:, :3])


@pytest.mark.parametrize("std", [0.1, 0.4, 3.0])
def test_digital_data_are_judged_as_levels(std, generator):
    """Rounded and clamped draws, most of them on a bound, and a std that is right.

    The shares of the levels are nominal. Those of the residuals are not: on the bounds nearly all
    are within one std, and below a level rounding decides.
    """
    levels = Levels(1.0, 0.0, 15.0)
    mean = 20 * torch.rand(3000, 12, generator=generator, dtype=torch.float64) - 2.5
    mean = mean.clamp(0, 15)
    drawn = mean + std * torch.randn(3000, 12, generator=generator, dtype=torch.float64)
    x = drawn.round().clamp(0, 15)

    log_var = torch.full_like(mean, 2 * math.log(std))
    pit = DigitalGaussian(mean, log_var, levels).pit(x, generator)
    stds = torch.full_like(mean, std)
    found = calibration(x - mean, stds, pit=pit)
    shares = (found.digital_coverage_1, found.digital_coverage_2, found.digital_coverage_3)
    for share, nominal in zip(shares, NOMINAL_COVERAGE, strict=True):
        assert share.value == pytest.approx(nominal, abs=4 * share.standard_error)
    assert found.pit_histogram_error.value < 0.05

    raw = calibration(x - mean, stds)
    assert raw.digital_coverage_1 is None
    assert raw.pit_histogram_error.value > 4 * found.pit_histogram_error.value
    wrong_by = abs(raw.coverage_1.value - NOMINAL_COVERAGE[0])
    assert wrong_by > 8 * raw.coverage_1.standard_error
    assert raw.coverage_1 == found.coverage_1


def test_values_on_a_bound_of_the_scale_are_left_out_of_a_further_set(linear_model, monkeypatch):
    """Those whose datum and mean are both at the same end, to half a level."""
    model, x, _ = linear_model
    varying = torch.arange(8) < 5
    unbounded = noise_calibration(model, [x], varying)
    assert (unbounded.off_bounds, unbounded.off_bounds_share) == (None, None)

    model.scaling.quantum, model.mean_bounds = 0.25, (1.0, 3.0)
    x = x.div(0.25).round().mul(0.25).clamp(1, 3)
    found = noise_calibration(model, x.split(250), varying, torch.Generator().manual_seed(0))

    seen = model.reconstruct(x)
    black = (x == 1) & (seen.mean < 1.125)
    white = (x == 3) & (seen.mean > 2.875)
    off = ~(black | white)[:, varying]
    z = ((x - seen.mean) / seen.std)[:, varying]
    assert 0.2 < found.off_bounds_share < 0.8
    assert found.off_bounds_share == pytest.approx(float(off.double().mean()))
    assert found.off_bounds.coverage_1.value == pytest.approx(
        float((z[off].abs() <= 1).double().mean())
    )
    assert found.off_bounds.coverage_1.value < found.varying_dimensions.coverage_1.value
    assert found.off_bounds.coverage_1.n == 600

    # The random numbers are drawn example by example, so that batches do not matter.
    again = noise_calibration(model, x.split(7), varying, torch.Generator().manual_seed(0))
    for name, figure in figures(found.off_bounds).items():
        assert figures(again.off_bounds)[name] == pytest.approx(figure), name

    # A datum at one end and a mean at the other are an error like any other.
    monkeypatch.setattr(model, "decode_mean", lambda z: torch.full_like(x[: len(z)], 3.0))
    black, white = (torch.full_like(x, bound) for bound in model.mean_bounds)
    assert noise_calibration(model, [black], varying).off_bounds_share == 1
    nothing_left = noise_calibration(model, [white], varying)
    assert (nothing_left.off_bounds, nothing_left.off_bounds_share) == (None, 0)


def test_a_dimension_varies_beyond_a_grey_level_in_more_than_a_tail(monkeypatch):
    grey = torch.zeros(100, 2, 2, dtype=torch.uint8)
    grey[:5, 0, 0] = 255  # at the tail
    grey[:6, 0, 1] = 255  # beyond it
    grey[50:, 1, 0] = 1  # one level
    grey[94:, 1, 1] = 2
    expected = torch.tensor([[False, True], [False, True]])
    assert torch.equal(varying_dimensions(grey), expected)
    monkeypatch.setattr(varying_module, "BLOCK", 1)
    assert torch.equal(varying_dimensions(grey), expected)
    assert torch.equal(varying_dimensions(grey / 255), torch.tensor([[False, True], [True, True]]))
    assert not varying_dimensions(grey[:1]).any()
    with pytest.raises(ValueError, match="at least one"):
        varying_dimensions(grey[:0])


def test_a_planted_noise_map_is_recovered():
    """x = f(z) + std(z) * epsilon, with a std that differs between columns and between examples."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4000, 2))
    planted = rng.uniform(0.2, 0.5, 64) * np.exp(0.5 * np.tanh(z @ rng.normal(size=(2, 64))))
    noise = planted * rng.normal(size=planted.shape)
    data = load((z @ rng.normal(size=(2, 64)) + noise).astype(np.float32))
    config = TrainConfig(
        latent_dim=2,
        width=8,
        batch_size=128,
        learning_rate=5e-3,
        stage_2_learning_rate=5e-3,
        stage_1_epochs=12,
        stage_2_epochs=12,
        floor=0.01,
        accelerator="cpu",
    )
    model = make_model(data, config)
    Trainer(model, data, config).fit()
    model.eval()
    raw, planted, noise = (
        torch.from_numpy(data.test[:]),
        planted[data.test.indices],
        noise[data.test.indices],
    )
    with torch.no_grad():
        predicted = model.scaling.restore_std(model.reconstruct(model.scaling(raw)).std).numpy()
    ratio = np.log(predicted / planted)
    assert np.corrcoef(np.log(predicted).ravel(), np.log(planted).ravel())[0, 1] > 0.92
    within = [np.corrcoef(predicted[:, i], planted[:, i])[0, 1] for i in range(64)]
    assert np.mean(within) > 0.95
    # The uncertainty of z adds to the noise, and is part of what the model predicts.
    assert 0 < ratio.mean() < 0.12
    assert ratio.std() < 0.18

    found = noise_calibration(model, [raw], varying_dimensions(raw)).all_dimensions
    for share, nominal in zip(coverage(found), NOMINAL_COVERAGE, strict=True):
        assert share.value == pytest.approx(nominal, abs=0.04)
    assert found.standardised_var.value == pytest.approx(1.0, abs=0.15)
    assert found.normalised_calibration_error.value < 0.08
    assert found.pit_histogram_error.value < 0.09
    # The AUSE depends on the units of the columns, so it is taken in model units. The true std have
    # the best possible order.
    scale = model.scaling.scale.double()
    best = calibration(
        torch.from_numpy(noise) / scale, torch.from_numpy(planted) / scale
    ).sparsification_error_area
    assert found.sparsification_error_area.value == pytest.approx(best.value, abs=0.03)
    assert best.value < 0.5 * found.random_sparsification_error_area.value
