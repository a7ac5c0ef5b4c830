"""How much samples look like real data: Fréchet and kernel distance of their features, the latter by torchmetrics."""

import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from equipoise.estimate import Estimate

EPSILON = 1e-12
"""Variances below this share of the largest are rounding."""

SUBSETS = 100
SUBSET_SIZE = 1000
"""The protocol of the kernel distance: subsets of either set, and examples in each."""


class SampleQuality(NamedTuple):
    """Distances of one set of examples to the reference, in one kind of features.

    Args:
        frechet: squared unit of the features.
        kernel: squared maximum mean discrepancy, no unit.
    """

    frechet: Estimate
    kernel: Estimate


def sample_quality(
    features: Float[Tensor, "n d"], reference: Float[Tensor, "m _"], seed: int = 0
) -> SampleQuality:
    """Measure both distances.

    Args:
        features: of the examples to judge, (N, d), at least 4.
        reference: of real data, (M, d), at least 4.
        seed: of the subsets of the kernel distance.

    Returns:
        The distances.
    """
    return SampleQuality(
        frechet_distance(features, reference), kernel_distance(features, reference, seed)
    )


def frechet_distance(features: Float[Tensor, "n d"], reference: Float[Tensor, "m _"]) -> Estimate:
    r"""Fréchet distance between Gaussians with the moments of two sets of features.

    .. math:: \|\mu - \mu_r\|^2 + \mathrm{tr}\bigl(\Sigma + \Sigma_r - 2 (\Sigma \Sigma_r)^{1/2}\bigr)

    Heusel, Ramsauer, Unterthiner, Nessler and Hochreiter (2017), *GANs trained by a two time-scale update rule converge
    to a local Nash equilibrium*. It is biased upwards, by about 1/N, and badly where N <= d: compare figures of one N.

    Args:
        features: of the examples to judge, (N, d), at least 2.
        reference: of real data, (M, d), at least 2; taken as fixed.

    Returns:
        The distance, computed in float64, with the standard error of the infinitesimal jackknife over the examples
        (Jaeckel, 1972): the spread of their influences on the distance, which needs no recomputation.

    Raises:
        ValueError: if there are too few examples, or the dimensions differ.

    Example:
        >>> features = torch.tensor([[-1.0], [1.0]])
        >>> round(frechet_distance(3 + 2 * features, features).value, 4)  # 3^2 + 2 (2 - 1)^2
        11.0
    """
    _check(features, reference, least=2)
    features, reference = features.double(), reference.double()
    d, shift, centred = (
        features.shape[1],
        features.mean(0) - reference.mean(0),
        features - features.mean(0),
    )
    covariance, reference_covariance = (x.mT.cov().reshape(d, d) for x in (features, reference))
    # With R R^T = Sigma_r the trace of the root is the sum of the roots of the variances of R^T x along its principal
    # axes: two symmetric decompositions, several times faster than the eigenvalues of the product.
    reference_vars, axes = torch.linalg.eigh(reference_covariance)
    scores = centred @ (axes * reference_vars.clamp(min=0).sqrt())
    score_vars, axes = torch.linalg.eigh(scores.mT.cov().reshape(d, d))
    trace_of_root = score_vars.clamp(min=0).sqrt().sum()
    value = (
        shift.square().sum() + covariance.trace() + reference_covariance.trace() - 2 * trace_of_root
    )
    # Derivative of the distance by the weight of each example, up to a constant.
    inverse_stds = torch.where(score_vars > EPSILON * score_vars[-1], score_vars, torch.inf).rsqrt()
    influence = (
        2 * centred @ shift + centred.square().sum(1) - (scores @ axes).square() @ inverse_stds
    )
    return Estimate(float(value), Estimate.of_mean(influence).standard_error, len(features))


def kernel_distance(
    features: Float[Tensor, "n d"], reference: Float[Tensor, "m _"], seed: int = 0
) -> Estimate:
    r"""Kernel distance: squared maximum mean discrepancy of two sets of features, without bias.

    .. math:: E\,k(x, x') + E\,k(y, y') - 2\,E\,k(x, y), \qquad k(x, y) = (x^\top y / d + 1)^3

    Bińkowski, Sutherland, Arbel and Gretton (2018), *Demystifying MMD GANs*: the mean over subsets of n = 1000 of
    either set (half of them where there are fewer than 2000). The spread over subsets is that of n examples; the
    delete-d jackknife of Shao and Wu (1989), *A general theory for jackknife variance estimation*, turns it into the
    standard error of N examples, to which the finite number of subsets adds:

    .. math:: \mathrm{s.e.}^2 = \Bigl(\frac{n}{N - n} + \frac{1}{100}\Bigr) \mathrm{Var}_\mathrm{subsets}

    Both sets vary in it, N is the size of the smaller, and near a distance of zero it is too large rather than too
    small.

    Args:
        features: of the examples to judge, (N, d), at least 4.
        reference: of real data, (M, d), at least 4.
        seed: of the subsets.

    Returns:
        The distance, which may be negative by chance, and its standard error.

    Raises:
        ValueError: if there are too few examples, or the dimensions differ.
    """
    _check(features, reference, least=4)
    n = min(len(features), len(reference))
    subset_size = min(SUBSET_SIZE, n // 2)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Metric `Kernel Inception Distance` will save all", UserWarning
        )
        metric = KernelInceptionDistance(nn.Identity(), subsets=SUBSETS, subset_size=subset_size)
    metric.update(reference, real=True)
    metric.update(features, real=False)
    with torch.random.fork_rng(
        devices=[]
    ):  # the metric draws its subsets from the global generator
        torch.default_generator.manual_seed(seed)
        mean, std = metric.compute()
    return Estimate(
        float(mean),
        float(std) * math.sqrt(subset_size / (n - subset_size) + 1 / SUBSETS),
        len(features),
    )


def _check(features: Tensor, reference: Tensor, least: int) -> None:
    if min(len(features), len(reference)) < least:
        raise ValueError(
            f"expected at least {least} examples on either side, got {len(features)} and {len(reference)}"
        )
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"expected features of one kind, got {features.shape[1]} and {reference.shape[1]} dimensions; "
            "take both with the same extractor"
        )
