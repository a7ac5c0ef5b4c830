r"""Scores of odd inputs, their combination, and how well they detect outliers.

No single score is sufficient. Simple images of another kind may have a higher likelihood than the
data (Nalisnick et al., 2019, *Do deep generative models know what they don't know?*). A well
reconstructed input may have an unusual code, and the code carries no information about what it
leaves out. The combination therefore asks whether an input is *typical*: whether its scores, taken
together, are similar to those of the data, neither too high nor too low.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from equipoise.aggregate import GaussianMixture
from equipoise.categories import numeric_part
from equipoise.data.dataset import Array
from equipoise.estimate import Estimate, jackknife
from equipoise.gaps import n_observed
from equipoise.model import VAE
from equipoise.objectives import Elbo

MIN_REFERENCE = 5
"""Smallest number of reference examples.

With one of them left out, the covariance of three scores still has full rank.
"""

SCORE_PRECISION = 1e-6
"""Smallest standard deviation of a score, relative to its mean or to one.

Float32 cannot resolve smaller ones.
"""


LARGEST_DEVIATION = 1e100
"""Deviation of a score from which its square counts as infinite."""


class ModelScores(NamedTuple):
    """Scores of each example by the parts of a model.

    Args:
        negative_elbo: -ELBO, eq. (4), (N,), nats. Higher is odder.
        standardised_residual: mean over the dimensions of (x - m)^2 / sigma^2 at the posterior
            mean, (N,). With correlated noise, the squared Mahalanobis distance of the residual over
            the number of dimensions. Higher is odder, and it is about one if the noise model is
            right. Missing values do not count; without any value it is one.
        rate: KL(q(z|x), p(z)), (N,), nats. It is odd if it is unusually low or high.
        negative_mixture_log_prob: minus the log-density of the posterior mean under the mixture,
            eq. (13), (N,), nats. Higher is odder.
    """

    negative_elbo: Float64[np.ndarray, " n"]
    standardised_residual: Float64[np.ndarray, " n"]
    rate: Float64[np.ndarray, " n"]
    negative_mixture_log_prob: Float64[np.ndarray, " n"]

    @property
    def _vectors(self) -> Float64[np.ndarray, "n 3"]:
        """The three scores that are combined. None of them depends on random draws.

        They measure what the code leaves out, what it costs and where it lies.
        """
        return np.stack(
            [self.standardised_residual, self.rate, self.negative_mixture_log_prob], axis=1
        )


class OutlierScores(NamedTuple):
    """Scores of each example against reference data.

    All scores except the tail probability are higher for odder examples.

    Args:
        negative_elbo: -ELBO, as in :class:`ModelScores`.
        standardised_residual: mean standardised residual, as in :class:`ModelScores`.
        negative_mixture_log_prob: minus the log-density of the code, as in :class:`ModelScores`.
        combined: squared Mahalanobis distance of the scores from those of the reference, (N,).
        tail_probability: probability that an example like the reference has at least this distance,
            (N,). At a value of 0.03 the example is odder than 97 % of the reference.
    """

    negative_elbo: Float64[np.ndarray, " n"]
    standardised_residual: Float64[np.ndarray, " n"]
    negative_mixture_log_prob: Float64[np.ndarray, " n"]
    combined: Float64[np.ndarray, " n"]
    tail_probability: Float64[np.ndarray, " n"]


@torch.no_grad()
def model_scores(
    model: VAE,
    mixture: GaussianMixture,
    batches: Iterable[Tensor],
    generator: torch.Generator | None = None,
) -> ModelScores:
    r"""Score each example by the parts of a model.

    Args:
        model: the model, in evaluation mode.
        mixture: mixture that was fitted to the aggregate posterior, on the model's device.
        batches: raw data, (B, \*) each, on the model's device.
        generator: source of randomness for the one sample of z per example in the ELBO.

    Returns:
        The scores, in the order of the examples. They are infinite for examples whose density is
        too small for a number.

    Raises:
        ValueError: if there are no batches, or a score is NaN.
    """
    objective = Elbo(model)
    rows = []
    for raw in batches:
        x = model.scaling(raw)
        terms = objective(x, generator)

        code = terms.posterior.mean
        likelihood, numbers = numeric_part(model.decode(code), x)
        n = n_observed(numbers)
        # A row without any value is neither near nor far.
        standardised = torch.where(n > 0, likelihood.squared_distance(numbers) / n, 1.0)
        density = mixture.log_prob(code).to(x.dtype)

        rows.append(torch.stack([-terms.elbo, standardised, terms.kl, -density]))

    if not rows:
        raise ValueError("expected at least one batch of examples to score, got none")

    scores = ModelScores(*torch.cat(rows, 1).double().cpu().numpy())
    for name, values in scores._asdict().items():
        bad = np.flatnonzero(np.isnan(values))
        if len(bad) > 0:
            raise ValueError(
                f"{name} is NaN for {len(bad)} of {len(values)} examples, the first in row "
                f"{bad[0]}; check that their values are finite"
            )
    return scores


def outlier_scores(scores: ModelScores, reference: ModelScores) -> OutlierScores:
    r"""Combine the scores of each example into its distance from the scores of reference data.

    .. math:: D^2(x) = (s(x) - \bar s)^T C^{-1} (s(x) - \bar s), \qquad
        p(x) = \frac{1 + \#\{n : D_{(n)}^2(x_n) \ge D^2(x)\}}{1 + N}

    Here s holds the standardised residual, the rate and the negative mixture log-density. Its mean
    and covariance are over the N examples of the reference. :math:`D_{(n)}` leaves out the n-th of
    them, so that the reference is treated like new data.

    D^2 assumes that s is Gaussian over the reference; p does not. Among new data like the
    reference, about a share p of the examples has a tail probability below p. The distance is that
    of Mahalanobis (1936), *On the generalised distance in statistics*. Morningstar et al. (2021),
    *Density of states estimation for out-of-distribution detection*, judge typicality by several
    statistics of a model in the same way.

    Args:
        scores: scores of the examples to judge.
        reference: scores of data that the model was not trained on, such as the validation set, of
            at least 5 examples.

    Returns:
        The scores, D^2 and its tail probability, which is no smaller than 1 / (1 + N). D^2 is
        infinite where a score is.

    Raises:
        ValueError: if the reference has fewer than 5 examples, or infinite scores.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> reference = ModelScores(*rng.normal(size=(4, 999)))
        >>> usual_and_odd = ModelScores(*np.array([[0.0, 5.0]] * 4))
        >>> outlier_scores(usual_and_odd, reference).tail_probability.round(2)
        array([1., 0.])
    """
    vectors = reference._vectors
    n = len(vectors)
    if n < MIN_REFERENCE:
        raise ValueError(
            f"a covariance of three scores needs a reference of {MIN_REFERENCE} examples, got {n}"
        )

    far = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(far) > 0:
        raise ValueError(
            f"{len(far)} examples of the reference have infinite scores, the first in row "
            f"{far[0]}; leave them out"
        )

    mean = vectors.mean(0)
    precision = SCORE_PRECISION * np.abs(mean).clip(1.0)
    covariance = np.cov(vectors.T) + np.diag(np.square(precision))

    def squared_distance(of: ModelScores) -> Array:
        deviation = of._vectors - mean
        squared: Array = np.full(len(deviation), np.inf)
        finite = np.abs(deviation).max(1) < LARGEST_DEVIATION
        near = deviation[finite]
        squared[finite] = (near * np.linalg.solve(covariance, near.T).T).sum(1)
        return squared

    combined = squared_distance(scores)
    within_reference = squared_distance(reference)
    left_out = n**2 * (n - 2) / (n - 1) * within_reference / ((n - 1) ** 2 - n * within_reference)

    n_as_odd = n - np.searchsorted(np.sort(left_out), combined, side="left")

    return OutlierScores(
        negative_elbo=scores.negative_elbo,
        standardised_residual=scores.standardised_residual,
        negative_mixture_log_prob=scores.negative_mixture_log_prob,
        combined=combined,
        tail_probability=(1 + n_as_odd) / (1 + n),
    )


class Detection(NamedTuple):
    """How well one score separates outliers from inliers.

    Args:
        auroc: area under the ROC curve, which is the probability that an outlier has a higher score
            than an inlier. A random score gives 0.5.
        aupr: area under the precision-recall curve. A random score gives the share of outliers.
    """

    auroc: Estimate
    aupr: Estimate


class OutlierDetection(NamedTuple):
    """Detection by each score.

    Args:
        negative_elbo: detection by -ELBO.
        standardised_residual: detection by the mean standardised residual.
        negative_mixture_log_prob: detection by minus the log-density of the code under the mixture.
        combined: detection by the distance of the scores from those of the reference.
        outlier_share: share of outliers among all examples. The areas under precision-recall curves
            depend on it.
    """

    negative_elbo: Detection
    standardised_residual: Detection
    negative_mixture_log_prob: Detection
    combined: Detection
    outlier_share: float


def outlier_detection(inliers: OutlierScores, outliers: OutlierScores) -> OutlierDetection:
    """Measure how well each score separates outliers from inliers.

    Args:
        inliers: scores of test data of the kind that the model was trained on.
        outliers: scores of other data, against the same reference.

    Returns:
        The areas for each score. Their n is the number of inliers and outliers together.

    Raises:
        ValueError: if either has no examples.
    """
    n_outliers = len(outliers.combined)
    n_inliers = len(inliers.combined)

    return OutlierDetection(
        negative_elbo=_detection(inliers.negative_elbo, outliers.negative_elbo),
        standardised_residual=_detection(
            inliers.standardised_residual, outliers.standardised_residual
        ),
        negative_mixture_log_prob=_detection(
            inliers.negative_mixture_log_prob, outliers.negative_mixture_log_prob
        ),
        combined=_detection(inliers.combined, outliers.combined),
        outlier_share=n_outliers / (n_inliers + n_outliers),
    )


def auroc(inliers: Float[np.ndarray, " n"], outliers: Float[np.ndarray, " m"]) -> Estimate:
    r"""Area under the ROC curve, with the standard error of its U-statistic.

    .. math:: A = \frac1{nm} \sum_{ij} \bigl([s_i < t_j] + \tfrac12 [s_i = t_j]\bigr), \qquad
        \mathrm{s.e.}^2 = \frac{\mathrm{Var}_j\,V_j}{m} + \frac{\mathrm{Var}_i\,U_i}{n}

    Here V_j is the share of inliers below outlier j, and U_i is the share of outliers above inlier
    i. DeLong, DeLong and Clarke-Pearson (1988), *Comparing the areas under two or more correlated
    receiver operating characteristic curves*.

    Args:
        inliers: scores of the inliers, (n,), at least one.
        outliers: scores of the outliers, (m,), at least one. A good score is higher for outliers.

    Returns:
        The area, its standard error and n + m. The standard error is None if there is only one
        inlier or only one outlier.

    Raises:
        ValueError: if either is empty.

    Example:
        >>> auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
        Estimate(value=0.875, standard_error=0.1767766952966369, n=4)
    """
    _check_both(inliers, outliers)
    n = len(inliers) + len(outliers)
    below = _share_below(outliers, inliers)
    above = 1 - _share_below(inliers, outliers)
    area = float(below.mean())

    if min(len(inliers), len(outliers)) == 1:
        return Estimate(area, None, n)

    variance = below.var(ddof=1) / len(below) + above.var(ddof=1) / len(above)
    return Estimate(area, math.sqrt(variance), n)


def average_precision(
    inliers: Float[np.ndarray, " n"], outliers: Float[np.ndarray, " m"]
) -> Estimate:
    r"""Area under the precision-recall curve, a step function, with the jackknife over examples.

    .. math:: \sum_k (R_k - R_{k-1}) P_k

    Here P_k and R_k are the precision and the recall at the k-th threshold. Boyd, Eng and Page
    (2013), *Area under the precision-recall curve: point estimates and confidence intervals*.

    Args:
        inliers: scores of the inliers, (n,), at least one.
        outliers: scores of the outliers, (m,), at least one.

    Returns:
        The area, its standard error and n + m. The standard error is None if there is only one
        inlier or only one outlier.

    Raises:
        ValueError: if either is empty.

    Example:
        >>> average_precision(np.array([0.0, 2.0]), np.array([1.0, 3.0])).value  # (1 + 2/3) / 2
        0.8333333333333333
    """
    from sklearn.metrics import average_precision_score

    _check_both(inliers, outliers)
    scores = np.concatenate([inliers, outliers])
    is_outlier = np.arange(len(scores)) >= len(inliers)

    def area(rows: NDArray[np.int64]) -> float:
        return float(average_precision_score(is_outlier[rows], scores[rows]))

    # The jackknife would leave out the only example of its kind.
    if min(len(inliers), len(outliers)) == 1:
        return Estimate(area(np.arange(len(scores))), None, len(scores))

    return jackknife(area, len(scores))


def _check_both(inliers: Array, outliers: Array) -> None:
    if len(inliers) == 0 or len(outliers) == 0:
        raise ValueError(
            "detection needs both kinds of examples, "
            f"got {len(inliers)} inliers and {len(outliers)} outliers"
        )


def _detection(inliers: Array, outliers: Array) -> Detection:
    return Detection(auroc(inliers, outliers), average_precision(inliers, outliers))


def _share_below(scores: Array, others: Array) -> Array:
    """Share of the others below each score, where a tie counts one half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, scores, "left")
    below_or_equal = np.searchsorted(ordered, scores, "right")

    share: Array = (below + below_or_equal) / (2 * len(others))
    return share
