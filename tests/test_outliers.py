"""Compares outlier scores with closed forms, and areas with scikit-learn and the normal law."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import mahalanobis
from scipy.stats import chi2, kstest, norm
from sklearn.metrics import average_precision_score, roc_auc_score

from equipoise.aggregate import GaussianMixture
from equipoise.metrics.outliers import (
    ModelScores,
    auroc,
    average_precision,
    model_scores,
    outlier_detection,
    outlier_scores,
)
from equipoise.noise import FixedNoise
from tests.oracles import Ppca, linear_gaussian_data, ppca_vae


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def standard_normal_mixture(d=3):
    return GaussianMixture(
        torch.ones(1).double(), torch.zeros(1, d).double(), torch.eye(d).double()[None]
    )


def random_scores(n, seed=0, shift=0.0):
    """Scores that depend on each other, as those of a model do."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=n)
    return ModelScores(*(shift + common + rng.gumbel(size=(4, n))))


@pytest.fixture
def linear():
    x = linear_gaussian_data(n=3000)
    ppca = Ppca.fit(x[:1000], 3)
    model = ppca_vae(ppca, FixedNoise(float(ppca.var))).eval()
    model.scaling.double()
    model.noise.double()
    return model, ppca, x[1000:2000], x[2000:]


class TestScores:
    def test_closed_forms_of_probabilistic_pca(self, linear):
        """The exact posterior's bound is log p(x).

        PPCA gives the residual and the density of the posterior mean.
        """
        model, ppca, _, x = linear
        scores = model_scores(model, standard_normal_mixture(), x.split(300), seeded())
        code = (x - ppca.bias) @ ppca.weight / ((ppca.weight.T @ ppca.weight).diagonal() + ppca.var)
        residual = (x - ppca.bias - code @ ppca.weight.T).square().mean(1) / ppca.var
        assert scores.standardised_residual == pytest.approx(residual.numpy(), rel=1e-5)
        density = 0.5 * (3 * math.log(2 * math.pi) + code.square().sum(1))
        assert scores.negative_mixture_log_prob == pytest.approx(density.numpy())
        assert scores.rate == pytest.approx(model.encode(x).kl().numpy())
        error = scores.negative_elbo + ppca.log_prob(x).numpy()
        assert abs(error.mean()) < 4 * error.std() / len(error) ** 0.5
        assert np.corrcoef(scores.negative_elbo, -ppca.log_prob(x).numpy())[0, 1] > 0.8

    def test_the_generator_decides(self, linear):
        model, _, _, x = linear
        drawn = [
            model_scores(model, standard_normal_mixture(), [x], seeded(s)).negative_elbo
            for s in (0, 0, 1)
        ]
        assert np.array_equal(drawn[0], drawn[1])
        assert not np.array_equal(drawn[0], drawn[2])

    def test_nothing_and_nan_are_refused(self, linear):
        model, _, _, x = linear
        with pytest.raises(ValueError, match="at least one batch"):
            model_scores(model, standard_normal_mixture(), [])
        broken = copy.deepcopy(model)
        broken.decoder.register_forward_hook(lambda module, codes, means: means * math.nan)
        with pytest.raises(ValueError, match="NaN for 4 of 4 examples, the first in row 0"):
            model_scores(broken, standard_normal_mixture(), [x[:4]])

    def test_far_examples_are_odd_and_stop_no_others(self, linear):
        model, _, _, x = linear
        rows = x[:40].clone()
        rows[1, 0], rows[2, 0] = 1e20, 3e38
        scores = model_scores(model, standard_normal_mixture(), [rows], seeded(0))
        scores.standardised_residual[2] = math.inf
        near = ModelScores(*(np.delete(values, [1, 2]) for values in scores))
        judged = outlier_scores(scores, near)

        assert not any(np.isnan(values).any() for values in judged)
        assert np.all(judged.combined[1:3] > 1e10)
        assert np.all(judged.tail_probability[1:3] == 1 / 39)
        assert np.isfinite(np.delete(judged.combined, [1, 2])).all()
        with pytest.raises(ValueError, match=r"1 examples of the reference .* in row 2"):
            outlier_scores(near, scores)


class TestCombination:
    def test_the_distance_is_mahalanobis_of_residual_rate_and_density(self):
        scores, reference = random_scores(40, 1), random_scores(300, 2)
        used = np.array([1, 2, 3])
        covariance = np.cov(np.array(reference)[used])
        oracle = [
            mahalanobis(row, np.mean(np.array(reference)[used], 1), np.linalg.inv(covariance)) ** 2
            for row in np.array(scores)[used].T
        ]
        assert outlier_scores(scores, reference).combined == pytest.approx(oracle, rel=1e-5)

    @pytest.mark.parametrize("n", [5, 20])
    def test_tail_probabilities_count_reference_examples_that_are_as_far_from_the_others(self, n):
        scores, reference = random_scores(50, 1), random_scores(n, 2)
        others = [ModelScores(*np.delete(np.array(reference), i, axis=1)) for i in range(n)]
        left_out = []
        for i, rest in enumerate(others):
            deviation = np.array(reference)[1:, i] - np.array(rest)[1:].mean(1)
            left_out.append(deviation @ np.linalg.solve(np.cov(np.array(rest)[1:]), deviation))
        found = outlier_scores(scores, reference)
        oracle = [(1 + sum(other >= own for other in left_out)) / (1 + n) for own in found.combined]
        assert found.tail_probability == pytest.approx(oracle)

    def test_tail_probabilities_of_data_like_the_reference_are_uniform(self):
        """Though the scores are not Gaussian: a chi-squared distribution would be wrong by far."""
        found = outlier_scores(random_scores(5000, 1), random_scores(5000, 2))
        assert kstest(found.tail_probability, "uniform").statistic < 0.04
        assert np.mean(found.tail_probability <= 0.01) == pytest.approx(0.01, abs=0.006)
        assert kstest(chi2.sf(found.combined, 3), "uniform").statistic > 0.04

    def test_a_small_reference_raises_no_more_alarms_than_it_promises(self):
        """Averaged over references of ten examples."""
        rates = [
            np.mean(
                outlier_scores(
                    random_scores(200, seed), random_scores(10, seed + 1000)
                ).tail_probability
                <= 2 / 11
            )
            for seed in range(300)
        ]
        assert 0.1 < np.mean(rates) < 2 / 11

    @given(arrays(float, (3, 3), elements=st.floats(-3, 3)), st.floats(-5, 5))
    def test_units_and_mixtures_of_the_scores_do_not_count(self, map_, shift):
        """Nats or bits, the ELBO's terms or their sum: the distance is the same."""
        map_ = map_ + 10 * np.eye(3)  # invertible
        scores, reference = random_scores(30, 1), random_scores(100, 2)
        before = outlier_scores(scores, reference)
        moved = (ModelScores(s[0], *(map_ @ np.array(s[1:]) + shift)) for s in (scores, reference))
        after = outlier_scores(*moved)
        assert after.combined == pytest.approx(before.combined, rel=1e-6)

    def test_scores_that_are_too_good_are_odd(self):
        """An input that is simpler than the data has a higher likelihood, but is not typical."""
        reference = random_scores(500)
        typical = ModelScores(*np.mean(reference, axis=1, keepdims=True))
        too_good = ModelScores(*(np.mean(reference, axis=1, keepdims=True) - 20))
        assert outlier_scores(typical, reference).tail_probability > 0.9
        assert outlier_scores(too_good, reference).tail_probability < 0.01

    def test_constant_scores_and_small_references(self):
        """Scores of a model with dead units only: an example is odd if it differs at all."""
        constant = ModelScores(*np.full((4, 6), 3.0))
        found = outlier_scores(constant, constant)
        assert found.combined.tolist() == [0.0] * 6
        assert found.tail_probability.tolist() == [1.0] * 6
        odd = outlier_scores(ModelScores(*np.full((4, 1), 3.1)), constant)
        assert odd.tail_probability == pytest.approx([1 / 7])
        with pytest.raises(ValueError, match="5 examples, got 4"):
            outlier_scores(constant, random_scores(4))


class TestDetection:
    @settings(max_examples=25)
    @given(
        arrays(float, st.integers(1, 20), elements=st.integers(0, 5).map(float)),
        arrays(float, st.integers(1, 20), elements=st.integers(0, 5).map(float)),
    )
    def test_areas_are_those_of_scikit_learn(self, inliers, outliers):
        """With many ties."""
        truth, scores = (
            np.repeat([0, 1], [len(inliers), len(outliers)]),
            np.concatenate([inliers, outliers]),
        )
        assert auroc(inliers, outliers).value == pytest.approx(roc_auc_score(truth, scores))
        assert average_precision(inliers, outliers).value == pytest.approx(
            average_precision_score(truth, scores)
        )
        assert auroc(inliers, outliers).n == average_precision(inliers, outliers).n == len(scores)

    @pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
    def test_two_normals(self, shift):
        """The area is Phi(shift / sqrt 2).

        About 95 % of 200 repetitions lie within two standard errors.
        """
        rng = np.random.default_rng(0)
        found = [auroc(rng.normal(size=150), shift + rng.normal(size=80)) for _ in range(200)]
        error = np.array([each.value for each in found]) - norm.cdf(shift / math.sqrt(2))
        standard_error = np.array([each.standard_error for each in found])
        assert 180 <= (abs(error) < 2 * standard_error).sum() <= 199
        assert standard_error.mean() == pytest.approx(error.std(), rel=0.15)

    def test_the_error_of_the_average_precision(self):
        rng = np.random.default_rng(0)
        found = [
            average_precision(rng.normal(size=200), 1 + rng.normal(size=100)) for _ in range(60)
        ]
        assert np.mean([each.standard_error for each in found]) == pytest.approx(
            np.std([each.value for each in found]), rel=0.3
        )

    def test_planted_outliers_are_found_and_equal_ones_are_not(self, linear):
        model, _, validation, x = linear
        mixture = standard_normal_mixture()
        reference = model_scores(model, mixture, [validation], seeded(0))
        inliers, shifted, equal = (
            outlier_scores(model_scores(model, mixture, [each], seeded(1)), reference)
            for each in (x[:500], x[:250] + 30, x[500:])
        )
        found = outlier_detection(inliers, shifted)
        assert found.outlier_share == pytest.approx(1 / 3)
        for detection in (found.negative_elbo, found.standardised_residual, found.combined):
            assert detection.auroc == (1.0, 0.0, 750)
            assert detection.aupr == (1.0, 0.0, 750)
        assert np.mean(shifted.tail_probability) < 0.01
        for detection in outlier_detection(inliers, equal)[:4]:
            assert detection.auroc.value == pytest.approx(
                0.5, abs=4 * detection.auroc.standard_error
            )
            assert detection.aupr.value == pytest.approx(0.5, abs=4 * detection.aupr.standard_error)

    def test_each_score_finds_its_own_outliers(self, linear):
        """Far along the plane of PPCA only the code is odd; across it only the residual is odd."""
        model, ppca, validation, x = linear
        mixture = standard_normal_mixture()
        along = 5 * ppca.weight[:, 0]
        across = torch.linalg.svd(ppca.weight).U[:, 3] * 5 * ppca.var.sqrt()
        reference = model_scores(model, mixture, [validation], seeded(0))
        inliers, unusual, unexplained = (
            outlier_scores(model_scores(model, mixture, [each], seeded(1)), reference)
            for each in (x, x + along, x + across)
        )
        by_code, by_residual = (
            outlier_detection(inliers, unusual),
            outlier_detection(inliers, unexplained),
        )
        assert by_code.negative_mixture_log_prob.auroc.value > 0.99
        assert by_code.standardised_residual.auroc.value == pytest.approx(0.5, abs=0.06)
        assert by_residual.standardised_residual.auroc.value > 0.99
        assert by_residual.negative_mixture_log_prob.auroc.value == pytest.approx(0.5, abs=0.06)
        assert min(by_code.combined.auroc.value, by_residual.combined.auroc.value) > 0.95

    def test_degenerate_cases(self):
        one, two, none = np.array([1.0]), np.array([0.0, 3.0]), np.zeros(0)
        assert auroc(one, one) == (0.5, None, 2)
        assert auroc(two, one) == (0.5, None, 3)
        assert average_precision(two, one) == (0.5, None, 3)
        assert average_precision(one, two).standard_error is None
        assert auroc(np.ones(3), np.ones(4)) == (0.5, 0.0, 7)
        for measure in (auroc, average_precision):
            with pytest.raises(ValueError, match="2 inliers and 0 outliers"):
                measure(two, none)
            with pytest.raises(ValueError, match="0 inliers and 1 outliers"):
                measure(none, one)
