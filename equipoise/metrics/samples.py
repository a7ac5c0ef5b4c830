"""How similar samples are to real data.

The measures are the Fréchet distance and the kernel distance of their features. The latter is
computed by torchmetrics.
"""

import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.estimate import Estimate

EPSILON = 1e-12
"""Variances below this share of the largest one are treated as rounding errors."""

SUBSETS = 100
"""Number of subsets of either set for the kernel distance."""
SUBSET_SIZE = 1000
"""Number of examples in each subset."""


class SampleQuality(NamedTuple):
    """Distances of one set of examples to the reference, in one kind of features.

    Args:
        frechet: Fréchet distance, squared unit of the features.
        kernel: kernel distance, a squared maximum mean discrepancy without unit.
    """

    frechet: Estimate
    kernel: Estimate


def sample_quality(
    features: Float[Tensor, "n d"], reference: Float[Tensor, "m _"], seed: int = 0
) -> SampleQuality:
    """Compute the Fréchet distance and the kernel distance.

    Args:
        features: features of the examples to judge, (N, d), at least 4.
        reference: features of real data, (M, d), at least 4.
        seed: seed for the subsets of the kernel distance.

    Returns:
        Both distances.
    """
    return SampleQuality(
        frechet_distance(features, reference), kernel_distance(features, reference, seed)
    )


def frechet_distance(features: Float[Tensor, "n d"], reference: Float[Tensor, "m _"]) -> Estimate:
    r"""Fréchet distance between Gaussians with the moments of two sets of features.

    .. math:: \|\mu - \mu_r\|^2 +
        \mathrm{tr}\bigl(\Sigma + \Sigma_r - 2 (\Sigma \Sigma_r)^{1/2}\bigr)

    Heusel, Ramsauer, Unterthiner, Nessler and Hochreiter (2017), *GANs trained by a two time-scale
    update rule converge to a local Nash equilibrium*. The distance is biased upwards by about 1/N,
    and by much more if N <= d. Only distances of the same N should be compared.

    Args:
        features: features of the examples to judge, (N, d), at least 2.
        reference: features of real data, (M, d), at least 2. They are taken as fixed.

    Returns:
        The distance, computed in float64. Its standard error is that of the infinitesimal jackknife
        over the examples (Jaeckel, 1972), the spread of their influences on the distance. It needs
        no recomputation.

    Raises:
        ValueError: if there are too few examples, or the dimensions differ.

    Example:
        >>> features = torch.tensor([[-1.0], [1.0]])
        >>> round(frechet_distance(3 + 2 * features, features).value, 4)  # 3^2 + 2 (2 - 1)^2
        11.0
    """
    _check(features, reference, minimum=2)
    features, reference = features.double(), reference.double()
    d = features.shape[1]

    shift = features.mean(0) - reference.mean(0)
    centred = features - features.mean(0)
    covariance = features.mT.cov().reshape(d, d)
    reference_covariance = reference.mT.cov().reshape(d, d)

    # With R R^T = Sigma_r the trace of the matrix root is the sum of the standard deviations of R^T
    # x along its principal axes. This takes two symmetric decompositions, which are several times
    # faster than the eigenvalues of the product.
    reference_vars, reference_axes = torch.linalg.eigh(reference_covariance)
    scores = centred @ (reference_axes * reference_vars.clamp(min=0).sqrt())
    score_vars, score_axes = torch.linalg.eigh(scores.mT.cov().reshape(d, d))
    trace_of_root = score_vars.clamp(min=0).sqrt().sum()

    distance = (
        shift.square().sum() + covariance.trace() + reference_covariance.trace() - 2 * trace_of_root
    )

    # The influence of an example is the derivative of the distance with respect to its weight, up
    # to a constant.
    inverse_stds = torch.where(score_vars > EPSILON * score_vars[-1], score_vars, torch.inf).rsqrt()
    influence = 2 * centred @ shift + centred.square().sum(1)
    influence -= (scores @ score_axes).square() @ inverse_stds
    standard_error = Estimate.of_mean(influence).standard_error

    return Estimate(float(distance), standard_error, len(features))


def kernel_distance(
    features: Float[Tensor, "n d"], reference: Float[Tensor, "m _"], seed: int = 0
) -> Estimate:
    r"""Kernel distance: squared maximum mean discrepancy of two sets of features, without bias.

    .. math:: E\,k(x, x') + E\,k(y, y') - 2\,E\,k(x, y), \qquad k(x, y) = (x^\top y / d + 1)^3

    The distance is the mean over 100 random subsets of n = 1000 examples of either set, as in
    Bińkowski, Sutherland, Arbel and Gretton (2018), *Demystifying MMD GANs*. If one set has fewer
    than 2000 examples, n is half its size.

    The spread over the subsets is the standard error of n examples. The delete-d jackknife of Shao
    and Wu (1989), *A general theory for jackknife variance estimation*, turns it into the standard
    error of N examples. The finite number of subsets adds a second term:

    .. math:: \mathrm{s.e.}^2 =
        \Bigl(\frac{n}{N - n} + \frac{1}{100}\Bigr) \mathrm{Var}_\mathrm{subsets}

    It accounts for the spread of both sets, and N is the size of the smaller one. Near a distance
    of zero it is too large rather than too small.

    Args:
        features: features of the examples to judge, (N, d), at least 4.
        reference: features of real data, (M, d), at least 4.
        seed: seed for the choice of the subsets.

    Returns:
        The distance, which may be negative by chance, and its standard error.

    Raises:
        ValueError: if there are too few examples, or the dimensions differ.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    _check(features, reference, minimum=4)
    n = min(len(features), len(reference))
    subset_size = min(SUBSET_SIZE, n // 2)

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Metric `Kernel Inception Distance` will save all", UserWarning
        )
        metric = KernelInceptionDistance(nn.Identity(), subsets=SUBSETS, subset_size=subset_size)

    metric.update(reference, real=True)
    metric.update(features, real=False)

    # The metric draws its subsets from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mean, std = metric.compute()

    error_factor = math.sqrt(subset_size / (n - subset_size) + 1 / SUBSETS)
    return Estimate(float(mean), float(std) * error_factor, len(features))


def _check(features: Tensor, reference: Tensor, minimum: int) -> None:
    if min(len(features), len(reference)) < minimum:
        raise ValueError(
            f"expected at least {minimum} examples on either side, "
            f"got {len(features)} and {len(reference)}"
        )

    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"expected features of one kind, got {features.shape[1]} and {reference.shape[1]} "
            "dimensions; take both with the same extractor"
        )
