"""Thresholds that go with a model: their false alarms, and what they say of odd examples."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import equipoise
from equipoise import VAEEstimator, held_out
from equipoise.conformal import (
    check_rate,
    conformal_p_values,
    conformal_threshold,
    fewest_held_out,
)
from equipoise.contamination import near_rows
from equipoise.data import load
from equipoise.detector import pyod_detector
from equipoise.files import StoreError
from equipoise.gaussian import standard_normal_log_prob
from equipoise.held_out import Reference
from equipoise.metrics.explanation import explain
from equipoise.model import VAE

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

QUICK = {"latent_dim": 2, "width": 4, "stage_2_epochs": 0, "n_components": 2, "random_state": 0}


@pytest.fixture(scope="module")
def vae(table):
    return VAEEstimator(**QUICK, stage_1_epochs=60, validation_fraction=0.2).fit(table[:300])


# Conformal thresholds


@pytest.mark.parametrize("n", [19, 20, 50, 99, 250])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25, 0.9])
def test_a_threshold_flags_what_has_a_p_value_of_at_most_the_rate(n, rate):
    rng = np.random.default_rng(n)
    held_out = rng.integers(0, 30, n).astype(float)  # with ties
    scores = np.linspace(-1, 31, 321)
    flagged = scores < conformal_threshold(held_out, rate)
    np.testing.assert_array_equal(flagged, conformal_p_values(scores, held_out) <= rate + 1e-9)


def test_the_share_of_false_alarms_is_exact_in_the_mean():
    rng = np.random.default_rng(0)
    flagged = []
    for _ in range(2000):
        scores = rng.standard_cauchy(59)
        flagged.append((scores[:20] < conformal_threshold(scores[20:], 0.1)).mean())
    assert np.mean(flagged) == pytest.approx(0.1, abs=0.007)  # floor(0.1 * 40) / 40


@pytest.mark.parametrize("rate", [0.05, 0.01, 0.3, 1 / 3, 0.001])
def test_a_rate_takes_enough_held_out_scores(rate):
    m = fewest_held_out(rate)
    assert 1 / (1 + m) <= rate + 1e-12 < 1 / m
    check_rate(rate, m)
    with pytest.raises(ValueError, match=f"takes at least {m} held-out rows"):
        conformal_threshold(np.zeros(m - 1), rate)


def test_what_has_no_density_left_is_odd_whatever_the_held_out_rows_are():
    held_out = np.array([-np.inf] * 5 + [1.0] * 15)
    assert -np.inf < conformal_threshold(held_out, 0.1)


# The estimator


def test_decisions_are_those_of_the_scores(vae, table):
    x = table[300:].copy()
    x[0] *= 50.0
    decision = vae.decision_function(x)
    np.testing.assert_allclose(decision, vae.score_samples(x) - vae.offset_, rtol=1e-6)
    np.testing.assert_array_equal(vae.predict(x), np.where(decision < 0, -1, 1))
    np.testing.assert_array_equal(vae.predict(x) == -1, vae.p_values(x) <= 0.05)
    assert vae.predict(x)[0] == -1
    assert 0.005 < (vae.predict(x) == -1).mean() < 0.15


def test_a_higher_rate_flags_more(vae, table):
    cautious = VAEEstimator(
        **QUICK, stage_1_epochs=60, validation_fraction=0.2, false_alarm_rate=0.3
    ).fit(table[:300])
    assert cautious.offset_ > vae.offset_
    assert (cautious.predict(table[300:]) == -1).mean() > (vae.predict(table[300:]) == -1).mean()


def test_the_threshold_is_saved(vae, table, tmp_path):
    vae.save(tmp_path / "vae.safetensors")
    again = VAEEstimator.load(tmp_path / "vae.safetensors")
    assert (again.offset_, again.false_alarm_rate_) == (vae.offset_, vae.false_alarm_rate_)
    np.testing.assert_array_equal(again.p_values(table[300:]), vae.p_values(table[300:]))

    gaps = table[300:].copy()
    gaps[3, 1] = np.nan
    assert vae.predict(gaps).shape == (300,)
    # The rows themselves are not in the file.
    with pytest.raises(ValueError, match="1 rows have gaps, the first is row 3"):
        again.predict(gaps)


@pytest.mark.filterwarnings("ignore:Half of the values")
def test_rows_with_gaps_have_a_threshold_of_their_own(table, tmp_path):
    rng = np.random.default_rng(0)
    x = table.copy()
    x[rng.random(x.shape) < 0.1] = np.nan
    vae = VAEEstimator(**QUICK, stage_1_epochs=30, validation_fraction=0.2).fit(x[:400])
    fresh = np.where(np.arange(6) < 3, np.nan, table[400:])
    assert 0 < (vae.predict(fresh) == -1).mean() < 0.15
    assert (vae.predict(np.where(np.isnan(fresh), np.nan, 100 * fresh)) == -1).all()
    assert vae.predict(np.full((2, 6), np.nan)).tolist() == [1, 1]

    vae.save(tmp_path / "vae.safetensors")
    again = VAEEstimator.load(tmp_path / "vae.safetensors")
    np.testing.assert_array_equal(again.decision_function(fresh), vae.decision_function(fresh))


def test_rows_of_your_own_set_the_threshold(vae, table):
    before = vae.offset_
    try:
        vae.calibrate(table[300:500])
        assert len(vae.held_out_scores_) == 200
        flagged = (vae.predict(table[300:500]) == -1).sum()
        assert flagged == math.floor(0.05 * 201) - 1
        with pytest.raises(ValueError, match="smallest p-value is"):
            VAEEstimator(**QUICK, stage_1_epochs=2, false_alarm_rate=0.001).fit(table)
    finally:
        vae.calibrate(table[500:])
    assert vae.offset_ != before


def test_scores_are_cross_fitted_over_the_correlation_of_the_errors():
    # Of 64 columns, whose matrix the held-out rows are few for.
    x = load_digits().data
    order = np.random.default_rng(0).permutation(len(x))
    options = QUICK | {"latent_dim": 8, "width": 16}
    vae = VAEEstimator(**options, stage_1_epochs=10, noise_correlation="full").fit(x[order[:400]])
    in_sample = np.sort(vae.score_samples(vae._threshold.rows.numpy()))
    fresh = vae.score_samples(x[order[400:]])
    assert vae.held_out_scores_.mean() < in_sample.mean() - 1
    bias = [
        (fresh < np.median(scores)).mean() - 0.5 for scores in (in_sample, vae.held_out_scores_)
    ]
    assert bias[0] > 0.06
    assert bias[1] < 0.03  # models of four fifths of the rows are a little cautious


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"false_alarm_rate": 0.0}, "false_alarm_rate must be above 0 and below 1"),
        ({"contamination": 0.6}, "contamination must be above 0 and at most 0.5"),
        ({"contamination": 0.1, "false_alarm_rate": 0.1}, "give one of"),
    ],
)
def test_options_out_of_their_domain_are_refused(options, text, table):
    with pytest.raises(ValueError, match=text):
        VAEEstimator(**QUICK, **options).fit(table)


def test_a_share_is_a_number(table):
    # As of scikit-learn's detectors, set as a grid search sets it.
    with pytest.raises(ValueError, match="contamination must be a number or None, got 'auto'"):
        VAEEstimator(**QUICK).set_params(contamination="auto").fit(table)


def test_outliers_in_the_table_are_left_out_of_the_training(table):
    rng = np.random.default_rng(1)
    x = table[:200].copy()
    is_outlier = np.arange(200) < 10
    mean, std = x.mean(0), x.std(0)
    # Each value is usual, but not beside the others.
    x[is_outlier] = mean + std * 1.5 * rng.choice([-1, 1], (10, 6))
    robust = VAEEstimator(**QUICK, stage_1_epochs=20, contamination=0.05).fit(x)
    assert robust.usual_[~is_outlier].mean() > 0.95
    assert robust.usual_[is_outlier].mean() < 0.3
    assert roc_auc_score(is_outlier, -robust.table_scores_) > 0.95
    assert roc_auc_score(is_outlier, -robust.score_samples(x)) > 0.95
    assert robust.usual_.sum() == 190
    assert (robust.table_scores_[~robust.usual_] < robust.offset_).all()
    with pytest.raises(ValueError, match="contamination is for fit"):
        robust.partial_fit(x)


# Whatever is more extreme is odder


@pytest.mark.filterwarnings("ignore:Half of the values")
@pytest.mark.parametrize("power", [1, 2, 4, 8, 16, 20, 24, 30, 36])
def test_more_extreme_values_are_never_less_odd(vae, table, power):
    x = table[300:310]
    factor = np.float64(10.0) ** power
    far = np.clip(x * factor, -3e38, 3e38)
    scores = vae.score_samples(far)
    assert not np.isnan(scores).any()
    assert (scores <= vae.score_samples(np.clip(x * factor / 10, -3e38, 3e38)) + 1e-6).all()
    assert (vae.predict(far) == -1).all()
    assert not np.isnan(vae.decision_function(far)).any()


@pytest.mark.parametrize("fill", [1e20, 9.97e36])
def test_fill_values_in_the_training_are_named(table, fill):
    x = table[:200].copy()
    x[::7, 2] = fill
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vae = VAEEstimator(**QUICK, stage_1_epochs=3).fit(x)
    assert any(f"2 have the value {fill:g}" in str(each.message) for each in caught)
    assert not np.isnan(vae.score_samples(x)).any()


def test_fill_values_that_only_held_out_rows_have_are_named(table):
    parts = load(table[:200], test_fraction=0.1, validation_fraction=0.2)
    row = int(parts.validation.indices[0])
    x = table[:200].copy()
    x[row, 2] = 1e20
    with pytest.raises(ValueError, match=r"columns 2 .* 1e.20 in the validation rows"):
        load(x, test_fraction=0.1, validation_fraction=0.2)
    x[row, 2] = 1e9
    (caution,) = load(x, test_fraction=0.1, validation_fraction=0.2).cautions
    assert "columns 2 have the value 1e+09 in the validation rows" in caution


# Gaps of many patterns


def test_many_patterns_of_gaps_share_a_bounded_number_of_held_out_rows(monkeypatch):
    model = VAE.build((12,), latent_dim=2).eval()
    rng = torch.Generator().manual_seed(0)
    reference, raw = (torch.randn(1200, 12, generator=rng) for _ in range(2))
    raw[torch.rand(raw.shape, generator=rng) < 0.4] = torch.nan
    scored = []
    monkeypatch.setattr(held_out, "REFERENCE_SCORES", 4000)

    def count(model, x, *_):
        scored.append(len(x))
        return np.zeros(len(x))

    monkeypatch.setattr(held_out, "log_densities", count)
    parts = list(
        held_out.held_out_by_gaps(model, raw, reference, standard_normal_log_prob, fewest=10)
    )
    assert len(parts) > 500
    assert sum(which.sum() for which, _ in parts) == len(raw)
    assert set(scored) == {10}

    one = torch.randn(3, 12, generator=rng)
    scored.clear()
    list(held_out.held_out_by_gaps(model, one, reference, standard_normal_log_prob))
    assert scored == [1000]
    scored.clear()
    known = Reference(np.zeros(7))
    ((_, found),) = held_out.held_out_by_gaps(
        model, one, reference, standard_normal_log_prob, complete=known
    )
    assert found is known.plain
    assert not scored


# Explanations


@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)])
def test_explanations_are_the_density_that_values_cost(shape):
    model = VAE.build(shape, latent_dim=2).eval()
    raw = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    found = explain(model, raw)
    reconstruction = model.reconstruct(raw)
    at_mean = reconstruction.log_prob(reconstruction.mean)
    lost = (at_mean - reconstruction.log_prob(raw)).detach().numpy()
    np.testing.assert_allclose(found.nats.reshape(5, -1).sum(1), lost, rtol=1e-4)
    np.testing.assert_allclose(found.code, model.encode(raw).kl().detach().numpy(), rtol=1e-5)
    assert found.names == (("0", "1", "2") if len(shape) == 1 else ())


def test_an_explanation_has_the_shape_and_names_of_the_data(vae, table):
    x = table[300:302].copy()
    x[0, 4] += 100 * table[:, 4].std()
    x[1, 2] = np.nan
    found = vae.explain(x)
    assert found.nats.shape == (2, 6)
    assert found.nats[0].argmax() == 4
    assert found.nats[1, 2] == 0

    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    vae = VAEEstimator(**QUICK | {"n_components": 1}, stage_1_epochs=1).fit(images)
    assert vae.explain(images[:2]).nats.shape == (2, 8, 8, 3)
    assert vae.predict(images).shape == (40,)


def test_a_file_with_a_damaged_threshold_is_refused(vae, tmp_path, monkeypatch):
    known = Reference(vae.held_out_scores_.astype(np.float32))
    monkeypatch.setattr(vae, "_threshold", dataclasses.replace(vae._threshold, known=known))
    vae.save(tmp_path / "vae.safetensors")
    with pytest.raises(StoreError, match="no held-out scores"):
        VAEEstimator.load(tmp_path / "vae.safetensors")


def test_the_estimator_is_a_detector_of_pyod(table):
    pytest.importorskip("pyod")
    x = table[:100]
    detector = pyod_detector(VAEEstimator(**QUICK, stage_1_epochs=3), contamination=0.1).fit(x)
    assert detector.labels_.sum() == 10
    far = table[100:103] + 20 * table.std(0)
    assert detector.predict(far).tolist() == [1, 1, 1]
    assert detector.get_params()["contamination"] == 0.1
    np.testing.assert_array_equal(
        detector.decision_function(far), -detector.estimator_.score_samples(far)
    )


def test_half_of_the_rows_at_least_are_near(table):
    for share in (0.5, 0.9, 1.0):
        assert near_rows(table[:100], share).sum() == 50


def test_as_many_outliers_as_may_be_supposed_leave_enough_to_train_on(table):
    vae = VAEEstimator(**QUICK, contamination=0.5, stage_1_epochs=2).fit(table[:60])
    assert vae.usual_.sum() == 30


# Runs


def test_a_run_keeps_scores_that_the_correlation_did_not_see(tmp_path):
    x = load_digits().data
    order = np.random.default_rng(0).permutation(len(x))
    np.save(tmp_path / "x.npy", x[order[:450]] + np.random.default_rng(1).uniform(0, 1, (450, 64)))
    config = equipoise.make_config(
        {"latent_dim": 8, "width": 16, "stage_1_epochs": 10, "stage_2_epochs": 0}
        | {"noise_correlation": "full", "batch_size": 64}
    )
    data = load(tmp_path / "x.npy", test_fraction=0.2, validation_fraction=0.2)
    run = equipoise.train(data, config, tmp_path / "run")
    found = held_out.read_held_out(run, run.model())
    assert found.n_validation == len(data.validation)
    assert len(found.scores) == len(data.validation) + len(data.test)

    in_sample, fresh = (
        held_out.log_densities(run.model(), torch.from_numpy(part[:]), run.mixture().log_prob)
        for part in (data.validation, data.test)
    )
    assert found.scores[: found.n_validation].mean() < in_sample.mean() - 1
    np.testing.assert_allclose(found.scores[found.n_validation :], fresh, rtol=1e-5)

    assert len(held_out.log_densities(run.model(), torch.zeros(0, 64), run.mixture().log_prob)) == 0

    before = run.held_out_file.read_bytes()
    equipoise.fit_noise(run, data, "low-rank")
    assert run.held_out_file.read_bytes() != before
    assert held_out.read_held_out(run, run.model()).n_validation == found.n_validation
    run.held_out_file.write_bytes(before)
    assert held_out.read_held_out(run, run.model()) is None  # of another model
    run.held_out_file.write_bytes(before[:-8])
    with pytest.raises(StoreError):
        held_out.read_held_out(run, run.model())


def planes(n, rng):
    """Rows of six columns near a plane, which predict each other."""
    weights = np.array([[1, 1, 0, 1, -1, 0.5], [0, 1, 1, -1, 1, 0.5]])
    return rng.normal(size=(n, 2)) @ weights + 0.3 * rng.normal(size=(n, 6))


def test_complete_rows_are_compared_with_complete_rows_of_a_table_with_gaps(tmp_path):
    rng = np.random.default_rng(0)
    x, fresh, others = planes(1200, rng), planes(2000, rng), planes(800, rng)
    for table in (x, others):
        table[rng.random(table.shape) < 0.15] = np.nan
    options = QUICK | {"latent_dim": 2, "stage_1_epochs": 20, "validation_fraction": 0.3}
    vae = VAEEstimator(**options, false_alarm_rate=0.1).fit(x)
    n_complete = int((~np.isnan(vae._threshold.rows.numpy()).any(1)).sum())
    assert len(vae.held_out_scores_) == n_complete > 50

    def shares():
        p_values = vae.p_values(fresh)
        return (p_values <= 0.1).mean(), (p_values <= 0.5).mean()

    # Five standard errors of the share that so many held-out rows decide on.
    assert np.abs(np.subtract(shares(), [0.1, 0.5])).max() < 5 * 0.5 / math.sqrt(n_complete) / 2
    vae.calibrate(others)
    assert np.abs(np.subtract(shares(), [0.1, 0.5])).max() < 5 * 0.5 / math.sqrt(n_complete) / 2
    assert (vae.predict(fresh) == -1).mean() == pytest.approx(shares()[0])

    np.save(tmp_path / "x.npy", x)
    config = equipoise.make_config({"latent_dim": 2, "stage_1_epochs": 20, "stage_2_epochs": 0})
    run = equipoise.train(load(tmp_path / "x.npy", validation_fraction=0.3), config, tmp_path / "r")
    found = held_out.read_held_out(run, run.model())
    assert len(found.known().plain) == found.is_complete.sum() < len(found.scores)
    scores = held_out.log_densities(
        run.model(), torch.from_numpy(fresh.astype(np.float32)), run.mixture().log_prob
    )
    share = (conformal_p_values(scores, found.known().plain) <= 0.5).mean()
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(found.is_complete.sum()) / 2
