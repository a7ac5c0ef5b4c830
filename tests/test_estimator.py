"""The scikit-learn estimator: scikit-learn's rules, the units of results, what scores mean."""

import inspect
import math
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

from equipoise.config import TrainConfig
from equipoise.correlated_noise import marginal_of
from equipoise.estimator import VAEEstimator
from equipoise.files import StoreError
from equipoise.gaussian import RowGenerators, standard_normal_like
from equipoise.noise import GlobalNoise, PredictedNoise
from equipoise.objectives import importance_weighted_bound
from equipoise.store import save_model

QUICK = {
    "latent_dim": 2,
    "width": 4,
    "stage_1_epochs": 3,
    "stage_2_epochs": 2,
    "n_components": 2,
    "random_state": 0,
}
# Models of a few steps ignore their codes, and say so.
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def parts():
    x, labels = load_digits(return_X_y=True)
    return train_test_split(x, labels, test_size=0.2, random_state=0)


@pytest.fixture(scope="module")
def vae(parts):
    """A fit of a few seconds."""
    return VAEEstimator(stage_1_epochs=60, stage_2_epochs=20, random_state=0).fit(parts[0])


EXPECTED_TO_FAIL = {
    "check_do_not_raise_errors_in_init_or_set_params": (
        "beartype, which only the tests have, checks the constructor"
    ),
    "check_outliers_train": (
        "with contamination, the threshold is by models that did not see the row, as new rows "
        "need it; fit_predict has exactly the share, and predict of rows trained on has not"
    ),
}


@parametrize_with_checks(
    [VAEEstimator(**QUICK | {"latent_dim": 1, "n_components": 1})],
    expected_failed_checks=lambda _: EXPECTED_TO_FAIL,
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_options_have_the_names_of_train_config_and_its_defaults():
    ours = {
        name: argument.default
        for name, argument in inspect.signature(VAEEstimator).parameters.items()
    }
    theirs = {field.name: field.default for field in fields(TrainConfig)}
    assert ours.pop("random_state") is None
    assert ours.pop("conditional") is False  # a matter of the data
    assert ours.pop("stage_1_epochs") == ours.pop("stage_2_epochs") == "auto"
    assert ours.pop("validation_fraction") == "auto"
    assert ours.pop("false_alarm_rate") is ours.pop("contamination") is None
    # Where 'auto' sets the epochs by steps, few steps in an epoch do no harm.
    assert ours.pop("batch_size") == 256
    assert ours == {name: theirs[name] for name in ours}


# What scores mean


def test_scores_bound_the_log_density_that_the_data_have(table):
    mean, std = table.mean(0), table.std(0)
    truth = multivariate_normal(cov=np.corrcoef(table.T))
    fresh = truth.rvs(400, random_state=1)
    log_density = (truth.logpdf(fresh) - np.log(std).sum()).mean()
    vae = VAEEstimator(noise="dimension", stage_1_epochs=100, stage_2_epochs=0, random_state=0).fit(
        table
    )
    assert log_density - 0.5 < vae.score(mean + std * fresh) < log_density + 0.05


def test_scores_are_densities_in_the_unit_of_the_data(table):
    model = VAEEstimator(**QUICK)
    one, four = (clone(model).fit(unit * table).score_samples(unit * table[:50]) for unit in (1, 4))
    np.testing.assert_allclose(four, one - 6 * math.log(4), rtol=1e-5)  # p(4 x) = p(x) / 4^6


def test_more_importance_samples_tighten_the_bound(vae, parts):
    x = parts[1]
    assert vae.score_samples(x, 1).mean() < vae.score(x) < vae.score_samples(x, 100).mean()


@pytest.mark.slow
def test_with_its_defaults_scores_tell_digits_from_permuted_pixels(parts):
    vae, x = VAEEstimator(random_state=0).fit(parts[0]), parts[1]
    permuted = np.random.default_rng(0).permuted(x, axis=1)
    is_odd = np.repeat([0, 1], len(x))
    assert roc_auc_score(is_odd, -vae.score_samples(np.concatenate([x, permuted]))) > 0.95


# What comes back


def test_reconstructions_are_close_and_know_how_close(vae, parts):
    x = parts[1]
    seen = vae.reconstruct(x)
    error = x - seen.mean
    assert np.square(error).sum() < 0.4 * np.square(x - parts[0].mean(0)).sum()
    varies = parts[0].std(0) > 0
    # Below one, because no std is below that of stage 1, the floor of images.
    assert 0.5 < (error / seen.std)[:, varies].std() < 1.25
    np.testing.assert_array_equal(vae.predict_std(x), seen.std)
    np.testing.assert_array_equal(vae.inverse_transform(vae.transform(x)), seen.mean)


def test_codes_keep_what_the_digits_are(vae, parts):
    train, test, train_labels, test_labels = parts
    classifier = LogisticRegression(max_iter=1000).fit(vae.transform(train), train_labels)
    assert classifier.score(vae.transform(test), test_labels) > 0.85


@pytest.mark.parametrize("source", ["mixture", "prior"])
def test_samples_with_noise_spread_as_the_data_do(vae, parts, source):
    samples = vae.sample(2000, source, noise=True)
    assert samples.shape == (2000, 64)
    spread = samples.std(0).mean() / parts[0].std(0).mean()
    assert vae.sample(2000, source).std(0).mean() < samples.std(0).mean()
    assert 0.8 < spread < 1.2
    np.testing.assert_array_equal(samples[:3], vae.sample(2000, source, noise=True)[:3])


def test_the_noise_variance_is_that_of_stage_1(vae, table):
    at_end_of_stage_1 = next(row for row in vae.history_ if "optimal_noise_var" in row)
    assert vae.noise_var_ == pytest.approx(at_end_of_stage_1["optimal_noise_var"], rel=1e-5)
    assert {row["stage"] for row in vae.history_} == {1, 2}
    assert not any(name.startswith("test_") for row in vae.history_ for name in row)
    per_column = VAEEstimator(**{**QUICK, "noise": "dimension"}).fit(table)
    assert per_column.noise_var_.shape == (6,)


# What goes in


def test_arrays_tensors_frames_and_lists_are_the_same(table):
    frame = pd.DataFrame(table, columns=list("abcdef"))
    codes = [
        clone(VAEEstimator(**QUICK)).fit(x).transform(x)
        for x in (table, torch.from_numpy(table).requires_grad_(), frame, table.tolist())
    ]
    for other in codes[1:]:
        np.testing.assert_allclose(codes[0], other, rtol=1e-6)


def test_the_columns_of_a_data_frame_are_known_again(table):
    frame = pd.DataFrame(table, columns=list("abcdef"))
    vae = VAEEstimator(**QUICK).fit(frame).set_output(transform="pandas")
    assert list(vae.feature_names_in_) == list("abcdef")
    assert list(vae.transform(frame).columns) == ["vaeestimator0", "vaeestimator1"]
    np.testing.assert_array_equal(
        vae.inverse_transform(vae.transform(frame)), vae.reconstruct(frame).mean
    )
    with pytest.raises(ValueError, match="feature names"):
        vae.transform(frame[list("fedcba")])


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8), (8, 8, 3)])
def test_images_come_back_as_they_went_in(shape):
    x = np.random.default_rng(0).integers(0, 256, (40, *shape)).astype(np.uint8)
    x[..., :4, :] //= 4  # so that axes that are mixed up show
    vae = VAEEstimator(**{**QUICK, "stage_1_epochs": 100}).fit(x)
    assert vae.n_features_in_ == math.prod(shape)
    seen = vae.reconstruct(x)
    assert seen.mean.shape == seen.std.shape == x.shape
    assert np.corrcoef(seen.mean.mean(0).ravel(), x.mean(0).ravel())[0, 1] > 0.9
    assert vae.sample(5).shape == (5, *shape)
    assert vae.sample(5).dtype == np.uint8
    with pytest.raises(ValueError, match=r"whole numbers within \[0, 255\]"):
        vae.transform(x / 255)
    with pytest.raises(ValueError, match=r"expected examples of shape .*got \(64,\)|is expecting"):
        vae.transform(np.zeros((3, 64), np.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"width": 0, "learning_rate": "fast"},
            "width must be at least 1|learning_rate must be a number",
        ),
        ({"noise": "fixed", "noise_var": 0.5, "stage_2_epochs": 2}, "set stage_2_epochs=0"),
        ({"architecture": "conv"}, "needs images"),
    ],
)
def test_options_that_cannot_be_are_refused_in_fit(table, options, message):
    vae = VAEEstimator().set_params(**QUICK | options)
    with pytest.raises(ValueError, match=message):
        vae.fit(table)
    with pytest.raises(NotFittedError):
        vae.transform(table)


def test_what_cannot_be_asked_for_is_refused(table):
    vae = VAEEstimator(**QUICK).fit(table)
    for source in ("mixture", "gaussian", "prior"):
        assert vae.sample(2, source).shape == (2, table.shape[1])
        with pytest.raises(ValueError, match="expected n >= 1"):
            vae.sample(0, source)
    with pytest.raises(ValueError, match="'mixture', 'mixture@T', got 'posterior'"):
        vae.sample(3, "posterior")
    with pytest.raises(ValueError, match=r"codes of shape \(n, 2\)"):
        vae.inverse_transform(np.zeros((4, 3)))


def test_masked_values_are_not_taken_as_they_are(table):
    masked = np.ma.masked_greater(table, table.mean())
    for x in (masked, masked[:, :, None]):
        with pytest.raises(ValueError, match="masked array"):
            VAEEstimator(**QUICK).fit(x)


def test_a_model_that_ignores_its_codes_is_warned_of(table):
    with pytest.warns(
        ConvergenceWarning, match="noise variance 50 is at or above the data's variance"
    ):
        VAEEstimator(**QUICK | {"noise": "fixed", "noise_var": 50.0, "stage_2_epochs": 0}).fit(
            table
        )


def test_auto_epochs_are_few_enough_for_small_tables(table):
    vae = VAEEstimator(width=1, n_components=1, random_state=0).fit(table[:40])
    assert [sum(row["stage"] == stage for row in vae.history_) for stage in (1, 2)] == [200, 100]


# Randomness


@pytest.mark.slow
def test_a_fit_depends_on_random_state_alone_and_leaves_torchs_numbers_alone(table):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    codes = [
        VAEEstimator(**QUICK | {"random_state": seed}).fit_transform(table) for seed in (0, 0, 1)
    ]
    torch.testing.assert_close(torch.rand(3), expected)
    np.testing.assert_array_equal(codes[0], codes[1])
    assert not np.allclose(codes[0], codes[2])


# Streams


@pytest.mark.slow
def test_chunks_of_a_stream_train_one_model_in_the_unit_of_the_first(table):
    options = {"batch_size": 16, "width": 16, "learning_rate": 5e-3, "noise_correlation": "none"}
    vae = VAEEstimator(**QUICK | options)
    scores = []
    for _ in range(4):
        for first in range(0, 500, 100):
            vae.partial_fit(table[first : first + 100])
        scores.append(vae.score(table[500:]))
    assert scores[-1] > scores[0] + 0.5
    assert len(vae.history_) == 20
    first = VAEEstimator(**QUICK).partial_fit(table[:100])
    torch.testing.assert_close(vae.model_.scaling.offset, first.model_.scaling.offset)
    with pytest.raises(ValueError, match="6 features"):
        vae.partial_fit(table[:100, :3])


def test_a_stream_after_stage_2_goes_back_to_stage_1(table):
    vae = VAEEstimator(**QUICK).fit(table)
    assert isinstance(marginal_of(vae.model_.noise), PredictedNoise)
    before = vae.transform(table)
    vae.partial_fit(table)
    assert isinstance(marginal_of(vae.model_.noise), GlobalNoise)
    assert len(vae.history_) == 6
    assert 0 < np.abs(vae.transform(table) - before).max() < 1  # it went on, from there


# What the loader noticed


def test_columns_that_float32_cannot_tell_apart_are_warned_of(table):
    """Seconds since 1970 have a resolution of 128 s. Other columns vary by rounding only."""
    rng = np.random.default_rng(0)
    for column in (1.7e9 + rng.uniform(0, 300, 600), 1.7e9 + rng.uniform(0, 1, 600)):
        with pytest.warns(UserWarning, match="Columns 0 vary by less than 1e-5 of their mean"):
            VAEEstimator(**QUICK).fit(np.column_stack([column, table[:, 1:]]))

    ulp = np.where(rng.random(600) < 0.5, 1.0, np.nextafter(np.float32(1), np.float32(2)))
    with pytest.warns(UserWarning, match="Columns 0 vary by less than 1e-5 of their mean"):
        vae = VAEEstimator(**QUICK).fit(np.column_stack([ulp, table[:, 1:]]))
    assert vae.model_.scaling.scale[0] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"stage_2_epochs": 0},
        {"stage_2_epochs": 5, "recalibrate": "scale"},
        {"stage_2_epochs": 0, "noise": "dimension"},
        {"stage_2_epochs": 5, "recalibrate": "dimension"},
    ],
)
def test_constant_columns_change_no_variance(options):
    """Of 4 columns beside 16 constant ones, .36 of the errors lay within a predicted std."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 4)) + 0.3 * rng.normal(size=(500, 4))
    wide = np.column_stack([x, np.full((500, 16), 3.0)])
    options = QUICK | {"stage_1_epochs": 60, "width": 16, "noise_correlation": "none"} | options
    coverages, noise_vars = [], []
    for table in (x, wide):
        vae = VAEEstimator(**options).fit(table)
        mean, std = vae.reconstruct(table)
        coverages.append((np.abs(mean - table) < std)[:, :4].mean())
        noise_vars.append(np.mean(vae.noise_var_))
    assert coverages[1] == pytest.approx(coverages[0], abs=0.08)
    assert noise_vars[1] == pytest.approx(noise_vars[0], rel=0.3)


def test_rows_stored_twice_are_noticed(table):
    with pytest.warns(UserWarning, match="of 120 validation examples .* are training"):
        VAEEstimator(**QUICK | {"validation_fraction": 0.1}).fit(np.concatenate([table, table]))


# Other units than those of the training


@pytest.fixture(scope="module")
def float_images():
    images = load_digits().images[:400].astype(np.float32) / 16
    return images, VAEEstimator(**QUICK).fit(images)


def test_images_in_another_range_are_warned_of_or_refused(float_images):
    images, vae = float_images
    vae.transform(images[:3])
    vae.transform(images[:3] * 0)
    with pytest.warns(
        UserWarning, match=r"trained on values within \[0, 1\]; these are from 0 to 4"
    ):
        vae.score_samples(4 * images[:20])
    with pytest.warns(UserWarning, match=r"these are from 0 to 0\.00392"):
        vae.reconstruct(images[:20] / 255)
    for method in (vae.transform, vae.score_samples, vae.reconstruct):
        with pytest.raises(ValueError, match=r"within \[0, 1\]; these are from 0 to 255\. Bring"):
            method(255 * images[:20])


def test_tables_in_another_unit_are_warned_of(table, both_stages):
    both_stages.transform(table[:30])
    odd = table[:30].copy()
    odd[:5] *= 1000  # a few odd rows are for the scores to tell
    both_stages.transform(odd)
    with pytest.warns(UserWarning, match=r"values of 1 columns are more than 10 std .* Column 3"):
        both_stages.transform(table[:30] + np.array([0, 0, 0, 1, 0, 0]))


def test_a_chunk_far_from_the_first_is_warned_of(table):
    """The unit of the first chunk, 1e4 away, left the columns of all others unresolved."""
    vae = VAEEstimator(**QUICK).partial_fit(table + 1e4 * table.std(0))
    with pytest.warns(UserWarning, match="columns of this chunk are far from the first chunk"):
        vae.partial_fit(table)


def test_a_chunk_in_another_unit_is_refused(float_images):
    images, _ = float_images
    vae = VAEEstimator(**QUICK).partial_fit(images[:200])
    with pytest.raises(ValueError, match=r"trained on values within \[0, 1\]"):
        vae.partial_fit(255 * images[200:])


# With scikit-learn


@pytest.mark.slow
def test_pipelines_and_grid_searches(table):
    pipeline = make_pipeline(
        FunctionTransformer(np.cbrt), VAEEstimator(**QUICK | {"stage_1_epochs": 30})
    )
    search = GridSearchCV(pipeline, {"vaeestimator__width": np.array([1, 32])}, cv=2).fit(table)
    assert search.best_params_ == {"vaeestimator__width": 32}
    assert search.transform(table).shape == (600, 2)


def test_a_saved_estimator_is_the_same(table, tmp_path):
    frame = pd.DataFrame(table, columns=list("abcdef"))
    vae = (
        VAEEstimator(**QUICK | {"recalibrate": "dimension"})
        .set_params(width=np.int64(4))
        .fit(frame)
    )
    path = tmp_path / "vae.safetensors"
    vae.save(path)
    loaded = VAEEstimator.load(path)
    assert loaded.get_params() == vae.get_params()
    assert loaded.history_ == vae.history_
    assert loaded.n_features_in_ == 6
    for method in ("transform", "predict_std", "score_samples"):
        np.testing.assert_array_equal(getattr(loaded, method)(frame), getattr(vae, method)(frame))
    np.testing.assert_array_equal(loaded.sample(5), vae.sample(5))
    np.testing.assert_array_equal(loaded.noise_var_, vae.noise_var_)
    with pytest.raises(ValueError, match="feature names"):
        loaded.transform(frame[list("fedcba")])
    for number in (np.int64(3), np.uint8(3)):
        vae.set_params(random_state=number).save(path)
        assert VAEEstimator.load(path).random_state == 3
    save_model(path, vae.model_)
    with pytest.raises(StoreError, match="holds a model, not a estimator"):
        VAEEstimator.load(path)


# What scores are made of


def test_a_row_has_its_own_draws(vae, parts):
    """The score of a row does not depend on its neighbours, and no draw is shared by all rows."""
    x = parts[1][:40]
    scores = vae.score_samples(x, 3)
    np.testing.assert_allclose(vae.score_samples(x[5:9], 3), scores[5:9], atol=1e-2)
    np.testing.assert_allclose(vae.score_samples(x[::-1], 3)[::-1], scores, atol=1e-2)
    assert np.abs(np.diff(np.concatenate([vae.score_samples(x[:1], k) for k in (1, 2)]))) > 0.1

    rows = torch.from_numpy(x).float()
    draws = standard_normal_like(rows.repeat_interleave(2, 0), RowGenerators.of(rows))
    assert draws.view(40, -1).mean(1).std() == pytest.approx(128**-0.5, rel=0.3)
    again = standard_normal_like(rows[3:5].repeat_interleave(2, 0), RowGenerators.of(rows[3:5]))
    assert torch.equal(again, draws[6:10])


def test_a_score_is_within_its_error_of_independent_draws(vae, parts):
    """One stream of draws for all rows shifted the mean of digits by .6, ten times its error."""
    x = parts[1]
    own = vae.score_samples(x, 2)
    model = vae.model_
    scaled = model.scaling(torch.from_numpy(x).float())
    log_prior = vae._log_priors()[vae.prior_]
    others = torch.stack(
        [
            importance_weighted_bound(
                model, scaled, 2, torch.Generator().manual_seed(seed), log_prior=log_prior
            )
            for seed in range(10)
        ]
    ).numpy() - float(model.scaling.scale.log().expand(model.shape).sum())
    error = math.sqrt(others.var(0, ddof=1).sum()) / len(x)
    assert abs(own.mean() - others.mean()) < 3 * error
    assert vae.score(x) == pytest.approx(vae.score_samples(x).mean())


def test_held_out_rows_choose_the_density_of_codes(tmp_path):
    rng = np.random.default_rng(0)
    centres = 4 * rng.choice([-1.0, 1.0], (400, 2))
    x = centres @ rng.normal(size=(2, 6)) + 0.3 * rng.normal(size=(400, 6))
    options = {"latent_dim": 2, "stage_1_epochs": 150, "stage_2_epochs": 0, "random_state": 0}
    clustered = VAEEstimator(**options, n_components=4, learning_rate=5e-3).fit(x[:300])
    assert clustered.prior_ == "mixture"
    with_mixture = clustered.score(x[300:])

    clustered.save(tmp_path / "vae.safetensors")
    loaded = VAEEstimator.load(tmp_path / "vae.safetensors")
    assert loaded.prior_ == "mixture"
    assert loaded.score(x[300:]) == with_mixture
    loaded.prior_ = "prior"
    assert loaded.score(x[300:]) < with_mixture


# Rows far from all of the training


@pytest.fixture(scope="module")
def both_stages(table):
    """Correlated noise around a predicted variance: all that may overflow."""
    return VAEEstimator(**QUICK | {"noise_correlation": "full"}).fit(table)


def test_far_rows_have_no_nan(both_stages, table):
    """Scores fall to minus infinity, and never become NaN; means and std stay finite."""
    rows = np.repeat(table[:1].astype(np.float32), 7, 0)
    for row, far in enumerate((1e3, 1e6, 1e10, 1e15, 1e20, 9.97e36)):
        rows[row + 1, 2] = far

    scores = both_stages.score_samples(rows)
    assert not np.isnan(scores).any()
    assert np.all(scores[1:] <= scores[:-1])
    assert np.isfinite(scores[:4]).all()
    for values in (*both_stages.reconstruct(rows), both_stages.transform(rows)):
        assert np.isfinite(values).all()


def test_a_row_without_density_is_named(table):
    options = {"stage_2_epochs": 0, "noise_correlation": "none"}
    vae = VAEEstimator(**QUICK | options).fit(table)
    rows = table[:20].astype(np.float32)
    rows[3, 0] = 3e38
    with pytest.warns(UserWarning, match="1 of 20 examples have no density .* in row 3"):
        assert vae.score(rows) == -math.inf
